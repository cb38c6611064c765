from __future__ import annotations

from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError, ModelError
from vtsim.base.registry import Registry, import_all


def nic() -> None:
    """Receives frames.

    And more.
    """


def test_a_registry_keeps_names_in_the_order_of_registration() -> None:
    devices: Registry[str, object] = Registry("device")
    devices.register("nic")(nic)
    devices.register("disk")(len)

    assert (list(devices), devices["nic"], len(devices)) == (["nic", "disk"], nic, 2)


def test_the_description_is_the_first_line_of_the_docstring() -> None:
    devices: Registry[str, object] = Registry("device")
    devices.register("nic")(nic)

    assert devices.describe("nic") == "Receives frames."


def test_a_name_cannot_be_registered_twice() -> None:
    devices: Registry[str, object] = Registry("device")
    devices.register("nic")(nic)

    with pytest.raises(ModelError) as error:
        devices.register("nic")(nic)
    assert str(error.value) == "device 'nic' is registered twice"


def test_an_unknown_name_is_the_users_mistake() -> None:
    devices: Registry[str, object] = Registry("device")
    devices.register("nic")(nic)

    with pytest.raises(ConfigError) as error:
        devices["nik"]
    assert str(error.value) == "unknown device 'nik'\n help: did you mean 'nic'?"
    assert "nik" not in devices


def test_a_package_is_imported_in_name_order_and_a_broken_module_breaks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "doors_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("seen = []")
    for name in ("b", "a"):
        (package / f"{name}.py").write_text(f"import doors_of_a_test as p; p.seen.append({name!r})")
    monkeypatch.syspath_prepend(tmp_path)
    import doors_of_a_test  # type: ignore[import-not-found]

    import_all(doors_of_a_test)
    assert doors_of_a_test.seen == ["a", "b"]

    (package / "c.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError):
        import_all(doors_of_a_test)
