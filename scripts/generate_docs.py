"""Write the documents that are generated from the code."""

from __future__ import annotations

from pathlib import Path

from vtsim.config import reference, study_schema_text
from vtsim.cpu.visible import page as equivalence
from vtsim.iommu.coverage import page as vtd_coverage
from vtsim.study.not_modelled import PACKAGE, docstrings, limits
from vtsim.study.result import reference as result_reference
from vtsim.study.verdict import page as verdict
from vtsim.study.vmx.exceptions_page import page as oracle_exceptions
from vtsim.vmcs.coverage import page as coverage

# Every generated document and what writes it; a test compares them.
DOCS = Path(__file__).resolve().parents[1] / "docs"

__all__ = ["DOCS", "GENERATED", "PACKAGE", "docstrings"]


def not_modelled() -> str:
    """What the model leaves out, collected from the docstrings of the code that would model it."""
    lines = [
        "# What is not modelled",
        "",
        "Generated from the docstrings; each line stands beside the code that it limits.",
        "",
    ]
    lines += [f"- `{limit.where}`: {limit.what}" for limit in limits()]
    return "\n".join(lines) + "\n"


GENERATED = {
    "scenario.md": reference,
    "study.schema.json": study_schema_text,
    "result.md": result_reference,
    "not-modelled.md": not_modelled,
    "vmx-coverage.md": coverage,
    "vtd-coverage.md": vtd_coverage,
    "oracle-exceptions.md": oracle_exceptions,
    "equivalence.md": equivalence,
    "verdict.md": verdict,
}


def main() -> None:
    """Write every generated document."""
    for name, text in GENERATED.items():
        (DOCS / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
