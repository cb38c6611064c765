"""Count the indirect branches of the lengths of lengths.toml: what are retpolines in a kernel with mitigations.

Usage: python -m scripts.path_lengths.indirect FOLDER VMLINUX MODULE..., with runs in FOLDER/ept and shadow as README.md
says, the ELF file that is packed in vmlinuz, and the modules. A kernel without mitigations executes `call *%reg` where
one with them calls a thunk; objtool lists the places, in section .retpoline_sites of each file.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scripts.path_lengths.count import Run, in_trace, read_lengths
from scripts.path_lengths.trace import ADDRESS

SECTION = ".retpoline_sites"


def _readelf(file: Path, option: str) -> list[str]:
    return subprocess.run(["readelf", "-W", option, file], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def _sections(file: Path) -> Iterator[tuple[int, str, int, int, int]]:
    """Number, name, address, offset in the file and size of each section."""
    for line in _readelf(file, "-S"):
        if match := re.match(r"\s*\[\s*(\d+)\] (\S+)\s+\S+\s+([0-9a-f]{16}) ([0-9a-f]+) ([0-9a-f]+)", line):
            number, name, address, offset, size = match.groups()
            yield int(number), name, int(address, 16), int(offset, 16), int(size, 16)


def of_kernel(file: Path) -> list[int]:
    """The places in a linked kernel: each entry is relative to itself."""
    _, _, address, offset, size = next(one for one in _sections(file) if one[1] == SECTION)
    entries = np.frombuffer(file.read_bytes()[offset : offset + size], np.int32)
    return [address + 4 * n + int(entry) for n, entry in enumerate(entries)]


def of_module(file: Path, symbols: dict[str, int]) -> list[int]:
    """The places in a module, by where the functions of its sections were in the running kernel."""
    names = {number: name for number, name, *_ in _sections(file)}
    loaded: dict[str, int] = {}
    for line in _readelf(file, "-s"):
        words = line.split()
        if len(words) == 8 and words[3] == "FUNC" and words[6].isdigit() and words[7] in symbols:
            loaded.setdefault(names[int(words[6])], symbols[words[7]] - int(words[1], 16))
    places, inside = [], False
    for line in _readelf(file, "-r"):
        inside = SECTION in line if line.startswith("Relocation section") else inside
        if inside and (match := re.search(r"R_X86_64_PC32\s+\S+ (\S+) \+ ([0-9a-f]+)", line)):
            section, offset = match.groups()
            if section in loaded:
                places.append(loaded[section] + int(offset, 16))
    return places


def symbols_of_modules(listing: Path) -> dict[str, dict[str, int]]:
    """Addresses of functions by module, from the guest's /proc/kallsyms."""
    found: dict[str, dict[str, int]] = {}
    for line in listing.read_text(errors="replace").splitlines():
        words = line.split()
        if len(words) == 4 and words[1] in "tT":
            found.setdefault(words[3][1:-1], {}).setdefault(words[2], int(words[0], 16))
    return found


def main() -> None:
    """Print how many there are in each length."""
    folder, kernel, *modules = map(Path, sys.argv[1:])
    lengths = read_lengths("count") | read_lengths("length")
    runs = {}
    for name in {one.run for one in lengths.values()}:
        if not (folder / name / "trace.bin").exists():
            continue
        symbols = symbols_of_modules(folder / name / "guest.out")
        places = of_kernel(kernel)
        for module in modules:
            places += of_module(module, symbols[module.stem.replace("-", "_")])
        known: NDArray[np.uint64] = np.array([place & ADDRESS for place in places], np.uint64)
        runs[name] = Run(folder / name, known)
    for name in lengths:
        instructions = in_trace(name, lengths, runs)
        found = in_trace(name, lengths, runs, indirect=True)
        if not math.isnan(found):
            print(f"{name:24} {instructions:6.0f} {lengths[name].instructions:6} {found:6.1f}")


if __name__ == "__main__":
    main()
