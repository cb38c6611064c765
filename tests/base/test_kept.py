"""What a process keeps: bounded, by use, and not at all where it is told so."""

from vtsim.base.kept import Kept, nothing_kept


def test_a_value_is_built_once_and_the_one_not_used_for_longest_goes_first() -> None:
    kept, built = Kept[str](2), []

    def get(key: str) -> str:
        return kept.get(key, lambda: built.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert [get(key) for key in "aabacab"] == list("AABACAB")
    assert built == ["a", "b", "c", "b"]  # b was not used for longest when c came
    assert len(kept) == 2


def test_nothing_is_kept_where_that_is_asked_for() -> None:
    kept, built = Kept[int](2), []
    kept.get("a", lambda: built.append("before") or 1)  # type: ignore[func-returns-value]
    with nothing_kept():
        for _ in range(2):
            kept.get("a", lambda: built.append("within") or 1)  # type: ignore[func-returns-value]
        assert len(kept) == 0
    kept.get("a", lambda: built.append("after") or 1)  # type: ignore[func-returns-value]
    assert built == ["before", "within", "within", "after"]
