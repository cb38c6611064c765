"""`python -m vtsim` is the command `vtsim`."""

import sys

from vtsim.cli import main

sys.exit(main())
