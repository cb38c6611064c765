"""Every control bit of the VMCS, 0 and 1, through the engine: what it changes; or the one place that excuses it.

SDM: "Pin-Based VM-Execution Controls"; "Processor-Based VM-Execution Controls"; "VM-Exit Controls"; "VM-Entry Controls".
"""

from __future__ import annotations

import pytest

from tests.vmcs.control_cases import CASES
from vtsim.vmcs.controls import CONTROLS
from vtsim.vmcs.coverage import WITHOUT_EFFECT


def test_every_control_has_a_case_or_an_excuse_and_none_has_both() -> None:
    named = {control.name for control in CONTROLS}

    assert named - CASES.keys() == WITHOUT_EFFECT.keys() & named
    assert CASES.keys() <= named


@pytest.mark.parametrize("name", CASES)
def test_a_control_does_what_the_manual_says_and_nothing_where_it_is_0(name: str) -> None:
    guest, without, with_it = CASES[name]

    assert guest.run(f"-{name}").differs(without) == {}
    assert guest.run(name).differs(with_it) == {}
