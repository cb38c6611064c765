"""What a long run shows on the terminal, and how Ctrl-C or a request to terminate ends it."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from vtsim.cli.output import note

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STOPPING: Final = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S: Final = 1.0  # shorter runs show no bar


class Watch:
    """Called by the run from time to time; draws a bar on a terminal and passes on a wish to stop.

    The first Ctrl-C or SIGTERM asks for a partial result, the second ends the program.
    """

    def __init__(self, *, bar: bool) -> None:
        self.bar = bar and sys.stderr.isatty()
        self.interrupted = False
        self.told: set[str] = set()
        self.began = time.monotonic()
        self.stage = ""
        self.stage_began = self.began
        self.task: TaskID | None = None
        self.progress: Progress | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Watch:
        self.previous = {number: signal.signal(number, self._interrupt) for number in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, stage: str, done: float, instructions: int) -> bool:
        """Show how far the run is; False once the user wants it to stop."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.stage_began = stage, now
            if self.progress is not None:
                self.task = self._add(self.progress)
        if self.bar and now - self.began > PATIENCE_S:
            self._draw(done, instructions / max(now - self.stage_began, 1e-3))
        return not self.interrupted

    def remark(self, sentence: str) -> None:
        """Say at once what a run finds out, above the bar if there is one; its baseline may find the same."""
        if sentence in self.told:
            return
        self.told.add(sentence)
        if self.progress is None:
            note(f"note: {sentence}")
        else:
            self.progress.console.print(f"note: {sentence}", markup=False, highlight=False)

    def _draw(self, done: float, rate: float) -> None:
        from vtsim.study.report import count

        if self.progress is None:
            self.progress = _bar()
            self.progress.start()
        if self.task is None:
            self.task = self._add(self.progress)
        self.progress.update(self.task, completed=min(done, 1.0), rate=f"{count(rate)} instructions/s")

    def _add(self, progress: Progress) -> TaskID:
        return progress.add_task(self.stage, total=1.0, rate="")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        note("\nstopping; the result will be partial (Ctrl-C again ends at once)")


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
