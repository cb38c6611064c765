"""The table of a study as a file of another program."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vtsim.base.errors import ConfigError
from vtsim.base.whole_file import replacing
from vtsim.study.extras import needed
from vtsim.study.sweep.study import Study, cells, column_names

PURPOSE: Final = "this format"


def _csv(study: Study, path: Path) -> None:
    table = study.table()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column_names(table))
        writer.writerows(cells(table, row) for row in table.rows)


def _parquet(study: Study, path: Path) -> None:
    needed("pyarrow", "tables", PURPOSE)
    study.to_pandas().to_parquet(path)


def _netcdf(study: Study, path: Path) -> None:
    for package in ("h5py", "h5netcdf"):
        needed(package, "tables", PURPOSE)
    found = study.to_xarray()
    names = {name: str(name).replace("/", "_") for name in found.variables}  # a slash would make a group
    found.rename(names).to_netcdf(path, engine="h5netcdf")


FORMATS: Final[dict[str, tuple[str, Callable[[Study, Path], None]]]] = {
    "csv": (".csv", _csv),
    "parquet": (".parquet", _parquet),
    "netcdf": (".nc", _netcdf),
}


def export(study: Study, form: str, path: Path | None = None) -> Path:
    """Write a table and return where; beside the store if no path is given. Only a whole file replaces an older one."""
    if form not in FORMATS:
        raise ConfigError.unknown("format", form, FORMATS, field="--to")
    suffix, write = FORMATS[form]
    path = path or study.path.with_suffix(suffix)
    study.check_output(path)
    try:
        with replacing(path) as place:
            write(study, place)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}", field="--output") from None
    return path
