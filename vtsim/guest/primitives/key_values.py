"""GET of random keys, as Redis serves them: bucket, entry, key, object and value, each known only from the one before.

Key and object are both known from the entry: that the key is the one asked for is predicted, and the object is read
meanwhile.

A bucket is where the key hashes to; entry, key and value lie where the allocator put them when the key was set, each in
the slabs of its size. Source: redis/redis, src/dict.c (dictFind), src/object.c (strings in one allocation with their
object), src/db.c (lookupKey). The instructions of a request (event loop, parsing, reply) are an estimate.
Not modelled: buckets with several entries; system calls and sockets; buffers of clients, which stay in the caches.
"""

from __future__ import annotations

from vtsim.cpu.assembler import Assembler
from vtsim.guest.primitives import Stage, lowering
from vtsim.guest.primitives.lookups import Step, lines, look_up, step_words
from vtsim.guest.structures import LINE, KeyValuesSpec

BUCKET, ENTRY, KEY = 8, 32, 32
WORK = 15  # follow a pointer, check a type, compare


def key_value_steps(phase: KeyValuesSpec) -> list[Step]:
    """One request."""
    count = phase.keys
    entries = count * BUCKET
    keys = entries + count * ENTRY
    values = keys + count * KEY
    value = Step(values, count, LINE * phase.value_lines, follows=2)
    return [
        Step(0, count, BUCKET, draws=True, work=WORK),
        Step(entries, count, ENTRY, draws=True, needs=True, work=WORK),
        Step(keys, count, KEY, needs=True, work=WORK),
        *list(lines(value, phase.value_lines))[:-1],
        Step(values + LINE * (phase.value_lines - 1), count, LINE * phase.value_lines,
             follows=2 if phase.value_lines == 1 else 0, work=phase.work),
    ]  # fmt: skip


@lowering(KeyValuesSpec, table_words=lambda phase: step_words(key_value_steps(phase)))
def key_values(a: Assembler, phase: KeyValuesSpec, at: Stage) -> None:
    """Random keys, one request after the other."""
    look_up(a, phase, at, key_value_steps(phase))
