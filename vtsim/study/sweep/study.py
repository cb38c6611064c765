"""A study and its results, as notebooks and reports see it."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from vtsim.base.errors import ConfigError
from vtsim.config.load import nearby, path_of
from vtsim.config.study import StudyFile, load_study
from vtsim.study.extras import needed
from vtsim.study.sweep.metrics import column, figure
from vtsim.study.sweep.store import Run, Store, is_store, no_file
from vtsim.study.sweep.table import Column, Row, StudyTable, Value

SUFFIX: Final = ".sqlite"
SETTINGS: Final = (".yaml", ".yml")  # endings of files that output does not replace
SHOWN_ROWS: Final = 20  # of a table in a notebook
NO_RESULTS: Final = "run it with: vtsim sweep"
EITHER: Final = "give a study, which is YAML, or the SQLite file that vtsim sweep made of one"


def store_of(study: Path) -> Path:
    """Return where the results of a study file are kept if nobody says otherwise."""
    if not study.name:
        raise ConfigError("this is a folder, and no study", file=str(study), help=EITHER)
    return study if study.suffix == SUFFIX or is_store(study) else study.with_suffix(SUFFIX)


def _without_results(file: Path) -> ConfigError:
    """Say what a file is that no results belong to: only of a study it helps to run it."""
    if not file.exists():
        return ConfigError("cannot be read: No such file or directory", file=str(file), help=nearby(file))
    if not file.is_file():
        return ConfigError(f"this is {no_file(file)}, and no study", file=str(file), help=EITHER)
    try:
        load_study(file)
    except ConfigError as error:
        if file.suffix in SETTINGS:
            return error
        return ConfigError("this is neither a study nor the store of one", file=str(file), help=EITHER)
    return ConfigError("there are no results of this study", file=str(file), help=f"{NO_RESULTS} {file}")


@frozen(kw_only=True)
class Status:
    """How far a study is, in runs of its points."""

    name: str
    question: str
    version: str
    points: int
    planned: int
    done: int
    failed: int
    errors: tuple[tuple[str, str], ...]  # (place on the axes, error) of the first that failed

    @property
    def missing(self) -> int:
        """Runs that are still to be done."""
        return max(0, self.planned - self.done - self.failed)


class Study:
    """The results of a study so far. `path` is that of the study file, or of its store."""

    def __init__(self, path: str | Path) -> None:
        self.file = path_of(path, "a study")
        self.path = store_of(self.file)
        if not self.path.is_file():
            raise _without_results(self.file)
        found = None
        if self.path.stat().st_size:  # an empty file stays as it is
            with self._reading() as store:
                found = store.about()
        if found is None:
            raise ConfigError("no study was swept into it", file=str(self.path), help=EITHER)
        self.about: Mapping[str, Any] = found

    def _reading(self) -> Store:
        return Store(self.path, reading=True)

    def check_output(self, output: Path) -> None:
        """Raise `ConfigError` where no file can be, or over the results, which are hours of work, or a study."""
        if output.is_dir():
            raise ConfigError(f"{output} is a folder", field="--output", help="name a file in it")
        if not output.parent.is_dir():
            raise ConfigError(f"there is no folder {output.parent}", field="--output", help="make it, or name another")
        beside = {self.path.with_name(f"{self.path.name}{end}").resolve() for end in ("", "-wal", "-shm", "-lock")}
        what = "has the results of the study" if output.resolve() in beside else ""
        if output.exists() and (output.suffix in SETTINGS or output.samefile(self.file)):
            what = what or "is a study or a scenario"
        if what:
            raise ConfigError(f"{output} {what}", field="--output", help="name another file, or none")

    def table(self, metrics: Sequence[str] = ()) -> StudyTable:
        """Return all finished runs as one plain table; `metrics` are shown instead of those that the study names."""
        about = self.about
        columns = tuple(column(each) for each in metrics) or tuple(Column(**each) for each in about["metrics"])
        rows: list[Row] = []
        planned = failed = 0
        with self._reading() as store:
            for runs in _by_point(store.runs()):
                planned += 1
                failed += runs[0].error is not None
                if runs[0].result is not None:
                    rows.append(_row(runs, columns, about["baselines"]))
        if not metrics and not about["chosen"]:
            columns = tuple(each for each in columns if any(row.metrics[each.path] is not None for row in rows))
            kept = {each.path for each in columns}
            rows = [_with_metrics(row, kept) for row in rows]
        return StudyTable(
            name=about["name"],
            question=about["question"],
            axes=tuple(Column(**each) for each in about["axes"]),
            metrics=columns,
            rows=tuple(rows),
            failed=failed,
            missing=max(planned, about["points"] * about["replicates"]) - len(rows) - failed,
        )

    def status(self) -> Status:
        """Return how far it is."""
        with self._reading() as store:
            planned, done, failed = store.counts()
            errors = tuple(store.errors(20))
        return Status(
            name=self.about["name"],
            question=self.about["question"],
            version=self.about["version"],
            points=self.about["points"],
            planned=max(planned, self.about["points"] * self.about["replicates"]),
            done=done,
            failed=failed,
            errors=errors,
        )

    def is_of(self, file: StudyFile) -> bool:
        """Were these results swept from what is in the study file and its scenario now?"""
        return bool(self.about["source"] == file.digest)

    def results(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield identity and result (the JSON object of docs/result.md) of each run, those of baselines included."""
        with self._reading() as store:
            for run in store.runs():
                if run.result is not None:
                    yield run.identity, json.loads(run.result)

    def digest(self) -> str:
        """Return a hash of all results and errors but for how fast they came, which alone may differ between sweeps."""
        found = hashlib.sha256()
        with self._reading() as store:
            for run in store.runs():
                result = {key: value for key, value in json.loads(run.result or "{}").items() if key != "rate"}
                place = [run.number, run.replicate, run.baseline, run.identity, run.axes, run.error, result]
                found.update(json.dumps(place, sort_keys=True).encode())
        return found.hexdigest()

    def to_pandas(self) -> Any:
        """Return the table as a pandas DataFrame, a column for each axis, the replicate, and each metric."""
        pandas = needed("pandas", "tables", "a data frame")
        table = self.table()
        names = column_names(table)
        return pandas.DataFrame([cells(table, row) for row in table.rows], columns=names)

    def to_xarray(self) -> Any:
        """Return the table as an xarray Dataset: over the axes and replicates if all axes are grids, else over runs."""
        xarray = needed("xarray", "tables", "a dataset")
        frame = self.to_pandas()
        table = self.table()
        axes = [each.path for each in table.axes]
        index = [*axes, "replicate"]
        if self.about["grid"] and len(frame):
            order = {name: list(dict.fromkeys(frame[name])) for name in index}  # of the design, and not of the alphabet
            found = frame.drop(columns="identity").set_index(index).to_xarray().reindex(order)
        else:
            frame.index.name = "run"
            found = xarray.Dataset.from_dataframe(frame).set_coords([*index, "identity"])
        for each in (*table.axes, *table.metrics):
            found[each.path].attrs.update({"long_name": each.label, "units": each.unit, "description": each.meaning})
        found.attrs.update({"title": table.name, "question": table.question, "vtsim": self.about["version"]})
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: the question, and the first rows."""
        table = self.table()
        labels = [*(each.label for each in table.axes), "replicate", *(each.label for each in table.metrics)]
        head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell_text(value))}</td>" for value in cells(table, row)[:-1]) + "</tr>"
            for row in table.rows[:SHOWN_ROWS]
        )
        more = len(table.rows) - SHOWN_ROWS
        rest = [f"{more} more rows"] if more > 0 else []
        rest += [
            f"{count} runs {what}" for what, count in (("failed", table.failed), ("missing", table.missing)) if count
        ]
        return (
            f"<p><b>{html.escape(table.question)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            + (f"<p>{'; '.join(rest)}</p>" if rest else "")
        )

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r})"


def column_names(table: StudyTable) -> list[str]:
    """Return the names of the columns that `cells` fills."""
    return [*(each.path for each in table.axes), "replicate", *(each.path for each in table.metrics), "identity"]


def cells(table: StudyTable, row: Row) -> list[Value]:
    """Return one row: axes, replicate, metrics, identity."""
    axes = [row.axes[each.path] for each in table.axes]
    return [*axes, row.replicate, *(row.metrics[each.path] for each in table.metrics), row.identity]


def cell_text(value: Value) -> str:
    """Return a value as a reader sees it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _by_point(runs: Iterator[Run]) -> Iterator[list[Run]]:
    """Gather a run of a point and those of its baselines, which follow it."""
    group: list[Run] = []
    for run in runs:
        if not run.baseline and group:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _row(runs: list[Run], columns: tuple[Column, ...], baselines: Mapping[str, Sequence[str]]) -> Row:
    own = json.loads(runs[0].result or "null")
    metrics: dict[str, Value] = {}
    ratios = {f"{path} against {name}": (path, name) for name, paths in baselines.items() for path in paths}
    others = {run.baseline: json.loads(run.result) for run in runs[1:] if run.result}
    for each in columns:
        if each.path in ratios:
            path, name = ratios[each.path]
            metrics[each.path] = _ratio(figure(own, path), figure(others.get(name), path))
        else:
            metrics[each.path] = figure(own, each.path)
    return Row(identity=runs[0].identity, axes=json.loads(runs[0].axes), replicate=runs[0].replicate, metrics=metrics)


def _ratio(value: Value, base: Value) -> float | None:
    numbers = isinstance(value, int | float) and isinstance(base, int | float)
    return value / base if numbers and base else None  # type: ignore[operator]


def _with_metrics(row: Row, kept: set[str]) -> Row:
    metrics = {path: value for path, value in row.metrics.items() if path in kept}
    return Row(identity=row.identity, axes=row.axes, replicate=row.replicate, metrics=metrics)
