"""Structures in simulated memory as tables of 64-bit words: (name, words, meaning), one after the other."""

from __future__ import annotations

WordTable = tuple[tuple[str, int, str], ...]


def byte_offsets(words: WordTable) -> dict[str, int]:
    """Where each member begins, in bytes."""
    offsets, at = {}, 0
    for name, count, _ in words:
        offsets[name] = 8 * at
        at += count
    return offsets
