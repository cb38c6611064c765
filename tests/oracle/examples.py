"""How many random worlds the oracles look at: the gate's number, times VTSIM_EXAMPLES (`make thorough`)."""

from __future__ import annotations

import os

MORE_EXAMPLES = int(os.environ.get("VTSIM_EXAMPLES", "1"))
