"""Generated documents are what the code would write today; `make docs` writes them."""

from __future__ import annotations

import pytest

from scripts.generate_docs import DOCS, GENERATED


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_the_document_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATED[name](), f"run `make docs` to rewrite docs/{name}"
