"""Programs whose memory accesses follow data structures: what each is made of, and how large that is.

Sizes are those of the named program's own types on x86-64; every value can be set.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from vtsim.base.spec import Boolean, counts, setting, sizes
from vtsim.guest.spec import SLAB, Phase, primitives

LINE = 64


def accesses() -> int:
    """Declare how many loads and stores a program makes."""
    value: int = setting(counts(ge=1), "Loads and stores", default=1_000_000)
    return value


def elements(default: int, meaning: str, least: int = 1) -> int:
    """Declare how many of something a data structure has: times a random fraction of 31 bits it fits 64."""
    value: int = setting(counts(ge=least, le=2**32 - 1), meaning, default=default)
    return value


@primitives.register("updates")
@frozen(kw_only=True)
class UpdatesSpec(Phase):
    """Updates of random words of a table, in pairs whose places come from one random number and one division."""

    table: int = setting(sizes(ge=64), "Bytes of the table", default=64 << 20)
    division: int = setting(
        counts(le=1000), "Cycles from where a division can begin until the places of its updates are known", default=42
    )
    accesses: int = setting(counts(ge=1), "Updates, each a load and a store of one word", default=1_000_000)

    @property
    def region_bytes(self) -> int:
        return self.table


@primitives.register("btree")
@frozen(kw_only=True)
class BTreeSpec(Phase):
    """Look-ups of random keys in a B+ tree in memory, from its root to a record."""

    STRUCTURE: ClassVar[int] = 48  # bytes of a node in a slab
    ARRAYS: ClassVar[int] = 320  # of its keys and pointers in the heap: 120 and 128 bytes, aligned to lines
    RECORD: ClassVar[int] = 16  # and as much of what it points to

    records: int = elements(3_000_000, "Records at its leaves")
    children: int = setting(counts(ge=2, le=64), "Children of a node", default=3)
    node_lines: int = setting(counts(ge=1, le=16), "Cache lines of a node, all read in turn", default=3)
    record_lines: int = setting(counts(ge=1, le=16), "Cache lines of a record", default=2)
    slabs: bool = setting(
        Boolean(),
        "Nodes' structures and records in slabs of 256 KiB with a page table each, arrays of all levels in one heap, "
        "as in vMitosis",
        default=False,
    )
    accesses: int = accesses()

    @property
    def levels(self) -> tuple[int, ...]:
        """How many nodes each level has, from the root on."""
        sizes = [-(-self.records // self.children)]
        while sizes[0] > 1:
            sizes.insert(0, -(-sizes[0] // self.children))
        return tuple(sizes)

    def apart(self, part: int, alignment: int) -> int:
        """Bytes from a leaf's part to the next one's, of those that the first pass made; inner nodes lie among them."""
        leaves = self.levels[-1]
        first, nodes = leaves - leaves // 2, sum(self.levels) - leaves // 2
        return -(-part * nodes // (first * alignment)) * alignment

    def second_pass(self, part: int, alignment: int) -> int:
        """Where one part of the leaves that the second pass made begins, in bytes from that of the first leaf."""
        leaves = self.levels[-1]
        return -(-(leaves - leaves // 2) * self.apart(part, alignment) // alignment) * alignment

    @property
    def arrays_bytes(self) -> int:
        """Bytes of the heap that the nodes' arrays take."""
        return self.second_pass(self.ARRAYS, LINE) + self.levels[-1] // 2 * self.ARRAYS

    @property
    def structures_bytes(self) -> int:
        """Bytes of whole slabs that the nodes' structures take; the second pass begins a slab."""
        first = -(-self.second_pass(self.STRUCTURE, 2) // SLAB) * SLAB
        return -(-(first + self.levels[-1] // 2 * self.STRUCTURE) // SLAB) * SLAB

    @property
    def slab_bytes(self) -> int:
        return self.structures_bytes + self.records * self.RECORD if self.slabs else 0

    @property
    def region_bytes(self) -> int:
        if self.slabs:
            return self.arrays_bytes + self.records * self.RECORD + self.slab_bytes
        return LINE * (sum(self.levels) * self.node_lines + self.records * self.record_lines)


@primitives.register("netlist_swaps")
@frozen(kw_only=True)
class NetlistSwapsSpec(Phase):
    """Simulated annealing of a netlist: the routing cost of two random elements, through their neighbours."""

    ELEMENT: ClassVar[int] = 88  # bytes of two vectors, a pointer and a string
    PLACE: ClassVar[int] = 8
    NAME: ClassVar[int] = 80  # of an entry of the map of names

    elements: int = elements(3_000_000, "Elements of the netlist")
    neighbours: int = setting(counts(ge=1, le=32), "Inputs of an element, and as many outputs", default=5)
    grown_heap: bool = setting(
        Boolean(),
        "All but the elements in a heap that grew piece by piece: in pages of 4 KiB whatever kernel.page_size is, as "
        "with transparent huge pages",
        default=False,
    )
    accesses: int = accesses()

    @property
    def array_bytes(self) -> int:
        """A vector of pointers that has grown by doubling, and what the heap adds."""
        return 8 * (1 << (self.neighbours - 1).bit_length()) + 16

    @property
    def heap_bytes(self) -> int:
        """What the heap has for an element."""
        return 2 * self.array_bytes + self.NAME

    @property
    def grown_bytes(self) -> int:
        return self.elements * (self.PLACE + self.heap_bytes) if self.grown_heap else 0

    @property
    def region_bytes(self) -> int:
        return self.elements * (self.ELEMENT + self.PLACE + self.heap_bytes)


@primitives.register("cross_sections")
@frozen(kw_only=True)
class CrossSectionsSpec(Phase):
    """Macroscopic cross sections: binary search of an energy, then two points of each nuclide of a material."""

    nuclides: int = setting(counts(ge=68, le=4096), "Nuclides", default=355)
    points: int = elements(1_500, "Energies of a nuclide", least=2)
    accesses: int = accesses()

    @property
    def energies(self) -> int:
        """Entries of the unionized grid."""
        return self.nuclides * self.points

    @property
    def region_bytes(self) -> int:
        return self.energies * (16 + 4 * self.nuclides + 48)


@primitives.register("graph_gather")
@frozen(kw_only=True)
class GraphGatherSpec(Phase):
    """An iteration of PageRank over a uniform random graph in compressed sparse rows."""

    vertices: int = elements(12_000_000, "Vertices")
    degree: int = setting(counts(ge=1, le=256), "Neighbours of a vertex", default=16)
    accesses: int = accesses()

    @property
    def region_bytes(self) -> int:
        return self.vertices * (8 + 4 * self.degree + 4 + 4)


@primitives.register("key_values")
@frozen(kw_only=True)
class KeyValuesSpec(Phase):
    """Requests for random keys to a store with a hash table: bucket, entry, key, object with its value."""

    keys: int = elements(4_000_000, "Keys")
    value_lines: int = setting(counts(ge=1, le=64), "Cache lines of a value", default=2)
    work: int = setting(counts(le=2**15 - 1), "Ordinary instructions of a request beside the look-up", default=5000)
    accesses: int = accesses()

    @property
    def region_bytes(self) -> int:
        return self.keys * (8 + 32 + 32 + LINE * self.value_lines)
