from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vtsim.base import jit

WRAP = 2**63 - 1


@jit.kernel
def add(values, amount):  # type: ignore[no-untyped-def]
    return values[0] + amount


@jit.kernel
def lowest(value: int) -> int:
    return jit.lowest_bit(value)  # type: ignore[no-any-return]


@jit.kernel
def four(values: jit.Arena, first: int, value: int) -> int:
    return jit.which_of_4(values, first, value)  # type: ignore[no-any-return]


@jit.kernel
def eight(values: jit.Tags, first: int, value: int) -> int:
    return jit.which_of_8(values, first, value)  # type: ignore[no-any-return]


@jit.kernel
def sixteen(values: jit.Tags, first: int, value: int) -> int:
    return jit.which_of_16(values, first, value)  # type: ignore[no-any-return]


@jit.kernel
def copied(words: int, to: jit.Arena, first: int, source: jit.Record, start: int) -> None:
    if words == 8:
        jit.copy_8(to, first, source, start)
    elif words == 16:
        jit.copy_16(to, first, source, start)
    elif words == 18:
        jit.copy_18(to, first, source, start)
    else:
        jit.copy_20(to, first, source, start)


def python(code: str, **environment: str) -> str:
    """Run code in a process of its own and return what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "VTSIM", "XDG"))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_engine_integers_wrap() -> None:
    assert int(add(np.array([WRAP]), np.int64(1))) == -WRAP - 1


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_the_lowest_bit_is_found(bit: int) -> None:
    assert {int(lowest(np.int64(-1 << bit))), int(lowest(np.int64(1 << bit if bit < 63 else -1 << 63)))} == {bit}


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("value", [0, 5, -1, (1 << 31) - 1, -1 << 31])
def test_each_of_the_elements_that_are_equal_has_its_bit(lanes: int, value: int) -> None:
    which, dtype = {4: (four, np.int64), 8: (eight, np.int32), 16: (sixteen, np.int32)}[lanes]
    for chosen in range(1 << lanes) if lanes < 16 else (0, 1, 1 << 15, 0xFFFF, 0x8421, 0x1234, 0xFEDC):
        values = np.full(3 + lanes + 3, value, dtype)  # neighbours that are equal are not asked
        values[3 : 3 + lanes] = [value if chosen >> n & 1 else value ^ (1 << n) for n in range(lanes)]
        assert int(which(values, np.int64(3), np.int64(value))) == chosen


@pytest.mark.parametrize("words", [8, 16, 18, 20])
def test_so_many_words_are_copied_and_no_neighbour(words: int) -> None:
    to, source = np.arange(100, 130), np.arange(-40, 0)
    copied(words, to, 3, source, 7)

    assert to.tolist() == [*range(100, 103), *range(-33, -33 + words), *range(103 + words, 130)]


@pytest.mark.parametrize("high", [8, 1 << 32, 1 << 62, -1 << 63])
def test_elements_of_64_bits_are_compared_whole(high: int) -> None:
    values = np.array([7, 7 | high, 7, 6], np.int64)
    assert int(four(values, np.int64(0), np.int64(7))) == 0b0101


@pytest.mark.compiled_only
def test_a_kernel_that_ran_is_cached() -> None:
    add(np.array([1]), np.int64(1))

    assert jit.kernels_are_cached(add)
    assert jit.kernels_are_cached()


def test_interpreted_kernels_are_the_functions_themselves_and_numba_is_not_imported() -> None:
    code = "import sys; from vtsim.base.jit import *; print(kernel(len) is len, 'numba' in sys.modules, kernels_are_cached())"

    assert python(code, NUMBA_DISABLE_JIT="1") == "True False True"


@pytest.mark.parametrize("option", ["NUMBA_BOUNDSCHECK", "NUMBA_OPT"])
def test_options_that_change_machine_code_change_the_key(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = jit.source_key()
    monkeypatch.setenv(option, "1" if os.environ.get(option) != "1" else "2")

    assert jit.source_key() != before


def test_an_edited_source_changes_the_key_and_an_edited_report_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpu", "study"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(jit, "SOURCES", tmp_path)
    before = jit.source_key()

    (tmp_path / "study" / "a.py").write_text("x = 2\n")
    assert jit.source_key() == before
    (tmp_path / "cpu" / "a.py").write_text("x = 2\n")
    assert jit.source_key() != before


def test_no_kernel_is_defined_in_the_packages_that_the_key_leaves_out() -> None:
    for package in jit.WITHOUT_KERNELS:
        for path in [jit.SOURCES / f"{package}.py", *(jit.SOURCES / package).rglob("*.py")]:
            assert not path.exists() or "@kernel" not in path.read_text(), path


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTSIM_CACHE", str(tmp_path / "mine"))
    assert jit.cache_root() == (tmp_path / "mine").resolve()

    monkeypatch.delenv("VTSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_root() == (tmp_path / "xdg" / "vtsim").resolve()


def test_an_unwritable_home_falls_back_to_a_private_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file is no directory")
    monkeypatch.setenv("VTSIM_CACHE", str(blocked / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert jit.cache_root() == (tmp_path / f"vtsim-{os.getuid()}").resolve()
    assert (tmp_path / f"vtsim-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_write_is_not_trusted_with_machine_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("VTSIM_CACHE", str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert jit.cache_root() == (tmp_path / "vtsim").resolve()


def test_old_caches_are_pruned_and_those_in_use_are_kept(tmp_path: Path) -> None:
    now = time.time()
    for age in range(2 * jit.KEPT_KEYS):
        directory = tmp_path / f"kernels-{age:02}"
        directory.mkdir()
        os.utime(directory, (now, now - age * jit.KEPT_SECONDS - 60))
    used = tmp_path / f"kernels-{2 * jit.KEPT_KEYS - 1:02}"

    jit.prune(tmp_path, used)

    assert len(list(tmp_path.iterdir())) == jit.KEPT_KEYS
    assert used.exists()


@pytest.mark.compiled_only
def test_numba_finds_the_cache_when_it_was_imported_before(tmp_path: Path) -> None:
    code = (
        "import numba; from vtsim.base import jit;"
        "print(numba.config.CACHE_DIR == str(jit.CACHE), jit.CACHE.is_relative_to(jit.Path(jit.os.environ['VTSIM_CACHE'])))"
    )

    assert python(code, VTSIM_CACHE=str(tmp_path)) == "True True"


@pytest.mark.compiled_only
def test_the_boundscheck_option_checks_bounds(tmp_path: Path) -> None:
    code = (
        "import numpy as np\nfrom tests.base.test_jit import add\n"
        "try:\n    add(np.zeros(0, np.int64), np.int64(1))\nexcept IndexError:\n    print('checked')"
    )

    assert python(code, VTSIM_CACHE=str(tmp_path), NUMBA_BOUNDSCHECK="1") == "checked"


@pytest.mark.compiled_only
def test_kernels_of_others_are_compiled_as_numba_does_it(tmp_path: Path) -> None:
    """A function of a user's that is named as a part of ours, and an index that counts from the end."""
    code = (
        "import numpy as np, numba\nfrom vtsim.cpu.kernels import run\nfrom vtsim.base import parts\n"
        "@numba.njit\ndef probe(x):\n    return x[-1]\n"
        "print(parts.available, 'probe' in parts._names, probe(np.arange(5)))"
    )

    assert python(code, VTSIM_CACHE=str(tmp_path)) == "True True 4"
