"""What a worker of a sweep does: it runs scenarios, one at a time, and never outlives who asked for them."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from typing import Final

from attrs import frozen

from vtsim.base import jit
from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.kept import Kept
from vtsim.cpu.kernels.run import run_all
from vtsim.platform.spec import Scenario
from vtsim.study.result import Result
from vtsim.study.run import run, simulate
from vtsim.study.sweep.identity import identity, model_version, resolved_text
from vtsim.study.sweep.store import packed

PR_SET_PDEATHSIG: Final = 1
LOOK_S: Final = 1.0  # between two looks whether the parent lives, where the system does not tell
NATIVE: Final[Kept[Result]] = Kept(64)  # baselines: what points differ in is often below the guest
DIED: Final = "the worker process ended before the run did: it was killed, or this computer has too little memory"
SHOWN_LINES: Final = 12  # of the traceback of a mistake of ours


@frozen(kw_only=True)
class Task:
    """One run to be done, by a worker of one version."""

    identity: str
    version: str
    scenario: Scenario


@frozen(kw_only=True)
class Outcome:
    """What came of it: a packed result or an error, the resolved scenario, seconds, the largest size of the worker."""

    identity: str
    version: str
    scenario: str = ""
    result: bytes | None = None
    error: str | None = None
    wall_s: float = 0.0
    peak_mib: float = 0.0


def work(task: Task) -> Outcome:
    """Run one scenario; a worker of another version does not, and says which it is."""
    version = model_version()
    if version != task.version:
        return Outcome(identity=task.identity, version=version)
    if not jit.DISABLED:
        run_all.compile(())  # type: ignore[attr-defined]  # once, and no part of the time of a run
    began = time.perf_counter()
    result, error = None, None
    try:
        with jit.quiet():
            found = run(task.scenario, native=_native)
        result = packed(json.dumps(found.to_dict(), separators=(",", ":"), ensure_ascii=False, allow_nan=False))
    except ConfigError as mistake:
        error = str(mistake)
    except ModelError as mistake:
        error = f"model error: {mistake}"
    except Exception as mistake:
        error = "".join(traceback.format_exception(mistake)[-SHOWN_LINES:]).rstrip()
    return Outcome(
        identity=task.identity,
        version=version,
        scenario=resolved_text(task.scenario),
        result=result,
        error=error,
        wall_s=time.perf_counter() - began,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _native(scenario: Scenario) -> Result:
    """The result of a native baseline, simulated once for all points that have the same."""
    return NATIVE.get(identity(scenario), lambda: simulate(scenario))


def start(parent: int) -> None:
    """Prepare a local worker: it ends with its parent, and has its kernels loaded."""
    end_with(parent)
    if not jit.DISABLED and jit.kernels_are_cached(run_all):
        run_all.compile(())  # type: ignore[attr-defined]  # loads it from the disk cache


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends."""
    told = False
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        told = libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
    if not told:
        threading.Thread(target=_look_after, args=(parent,), daemon=True).start()


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
