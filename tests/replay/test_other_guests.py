"""Recorded guests of other kinds than the shipped boot: exits follow from rows by rule, or the recording is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.replay.monitor import CR0_GUEST, CR4_GUEST, PASSED_THROUGH, READ_THROUGH
from tests.replay.recordings import MIB, Row, row, trace
from vtsim.base.errors import ConfigError
from vtsim.config import load_scenario
from vtsim.guest.traces.kinds import NAME
from vtsim.guest.traces.paging import RESET_CR0
from vtsim.platform.machine import Machine
from vtsim.vmcs.reasons import BY_NUMBER

MEMORY = 32 * MIB
SCENARIO = """
machine:
  profile: skx-4114
  memory: 256 MiB
vmm:
  personality: kvm
  ept:
    page_size: 2 MiB
vms:
  - memory: 32 MiB
    devices: [i440fx]
    guest:
      kernel:
        tick: off
      processes:
        - name: recorded
          phases:
            - primitive: replay
              trace: guest.npz
"""
ROOT, OTHER, PDPT, PD, TABLE = 0x1000, 0x10000, 0x2000, 0x3000, 0x4000
PAGING = 0x8001_0001
PAE, PGE, LA57, PCIDE, SMEP = 1 << 5, 1 << 7, 1 << 12, 1 << 17, 1 << 20
EFER, LONG, NO_EXECUTE = 0xC000_0080, 1 << 8, 1 << 11
NO_FLUSH = 1 << 63
KERNEL = -0x7780_0000_0000  # Linux's map of all memory
FREE_PORT = 0x80 | 1 << 16


def exits(rows: list[Row], folder: Path, *settings: str) -> Counter[str]:
    """Replay a guest under the kvm personality: exits by reason."""
    trace(rows, MEMORY).save(folder / "guest.npz")
    (folder / "guest.yaml").write_text(SCENARIO)
    outcome = Machine(load_scenario(folder / "guest.yaml", list(settings))).run()
    assert [vm.stopped for vm in outcome.vms] == [None]
    assert outcome.replayed is not None
    counts: Counter[str] = Counter()
    for (reason, _, _), phases in outcome.replayed.counts.items():
        counts[BY_NUMBER[reason].name] += sum(phases)
    return counts


def long_mode(cr4: int = PAE) -> list[Row]:
    """A guest turns 4- or 5-level paging on."""
    return [
        row("MOV_TO_CR", 10, a0=4, a1=cr4), row("MOV_TO_CR", 12, a0=3, a1=ROOT), row("WRMSR", 14, a0=EFER, a1=LONG),
        row("MOV_TO_CR", 16, a0=0, a1=PAGING, a2=RESET_CR0), row("ROOT", 16, a0=ROOT, a1=1),
    ]  # fmt: skip


# --- a reference that knows rows and rules, and no machine ---------------------------------------------------------
SINGLE = {"CPUID": "CPUID", "WBINVD": "WBINVD", "INVD": "INVD", "XSETBV": "XSETBV", "RDPMC": "RDPMC",
          "IN": "IO_INSTRUCTION", "OUT": "IO_INSTRUCTION"}  # fmt: skip
ON_SHADOW = {"INVLPG": "INVLPG", "INVPCID": "INVPCID"}


def by_rule(rows: list[Row], *, shadow: bool, huge: bool) -> Counter[str]:
    """What kvm_intel's controls make of the rows; page faults on shadow tables are left out."""
    counts: Counter[str] = Counter()
    held = {0: RESET_CR0, 4: 0}
    owned = {0: CR0_GUEST, 4: CR4_GUEST & ~PGE if shadow else CR4_GUEST}
    mapped: set[tuple[int, int]] = set()  # page size, number
    split: set[int] = set()
    for one in rows:
        name = NAME[one["kind"]]
        if name in SINGLE:
            counts[SINGLE[name]] += 1
        elif name in ON_SHADOW and shadow:
            counts[ON_SHADOW[name]] += 1
        elif name == "RDMSR":
            counts["MSR_READ"] += one["a0"] not in (*PASSED_THROUGH, READ_THROUGH)
        elif name == "WRMSR":
            counts["MSR_WRITE"] += one["a0"] not in PASSED_THROUGH
        elif name == "MOV_TO_CR" and one["a0"] == 3:
            counts["CR_ACCESS"] += shadow
        elif name == "MOV_TO_CR":
            counts["CR_ACCESS"] += (held[one["a0"]] ^ one["a1"]) & ~owned[one["a0"]] != 0
            held[one["a0"]] = one["a1"]
        elif name.startswith("TOUCH") and not shadow:
            page, region = one["a0"] >> 12, one["a0"] >> 21
            small = not huge or region == 0 or region in split  # the first 2 MiB hold firmware, too
            if (0, page) in mapped or ((1, region) in mapped and name != "TOUCH_F"):
                continue
            counts["EPT_VIOLATION"] += 1
            if name == "TOUCH_F" and not small:  # large pages are not executable: this one is taken apart
                split.add(region)
                mapped.discard((1, region))
                small = True
            mapped.add((0, page) if small else (1, region))
    return +counts


def any_guest(random: Random, length: int) -> list[Row]:
    """A 64-bit guest that does a bit of everything, with and without PCIDs."""
    rows = [*long_mode(), row("MOV_TO_CR", 17, cr3=ROOT, a0=4, a1=PAE | PCIDE)]
    page = lambda: random.randrange(0x200, MEMORY >> 12) << 12  # noqa: E731
    makers = (
        lambda: {"kind": "CPUID", "a0": random.choice((0, 1, 0x8000_0001))},
        lambda: {"kind": "MOV_TO_CR", "a0": 3, "a1": random.choice((ROOT, OTHER | 1, OTHER | 2, ROOT - NO_FLUSH))},
        lambda: {"kind": "MOV_TO_CR", "a0": 0, "a1": PAGING ^ random.choice((0, 1 << 16, 1 << 3, 1 << 18))},
        lambda: {"kind": "MOV_TO_CR", "a0": 4, "a1": PAE | PCIDE | random.choice((0, PGE, SMEP, 1 << 2, 1 << 9, 3 << 20))},
        lambda: {"kind": "WRMSR", "a0": EFER, "a1": LONG | random.choice((1, NO_EXECUTE, NO_EXECUTE | 1))},
        lambda: {"kind": "WRMSR", "a0": random.choice((0x174, 0xC000_0102)), "a1": 0},
        lambda: {"kind": "RDMSR", "a0": random.choice((0x10, 0x1B, 0x174, 0x277))},
        lambda: {"kind": random.choice(("IN", "OUT")), "a0": FREE_PORT},
        lambda: {"kind": "INVLPG", "a0": page()},
        lambda: {"kind": "INVPCID", "a0": random.randrange(4), "a1": 1},
        lambda: {"kind": random.choice(("WBINVD", "RDTSC", "CLTS", "SMSW"))},
        lambda: {"kind": random.choice(("TOUCH_R", "TOUCH_W")), "a0": (at := page()), "a1": at},
        lambda: {"kind": "TOUCH_F", "a0": (at := random.randrange(0x400, 0x800) << 12), "a1": at},
    )  # fmt: skip
    for n in range(length):
        made = random.choice(makers)()
        rows.append(row(made.pop("kind"), 20 + 7 * n, cr3=ROOT, **made))
    return rows


@pytest.mark.parametrize("seed", range(2))
def test_exits_of_any_guest_follow_from_its_rows_by_rule(tmp_path, seed):
    rows = any_guest(Random(seed), 160)
    for settings, shadow, huge in (
        ((), False, True),
        (("vmm.huge_pages=never",), False, False),
        (("vmm.paging=shadow",), True, True),
    ):
        assert exits(rows, tmp_path, *settings) == by_rule(rows, shadow=shadow, huge=huge), settings


# --- tables ----------------------------------------------------------------------------------------------------------
def use(kind: str, icount: int, address: int, at: int, level: int, value: int, cpl: int = 0, cr3: int = ROOT) -> Row:
    return row(kind, icount, cr3=cr3, a0=address, a1=at | level, a2=value, cpl=cpl)


def faults(rows: list[Row], folder: Path) -> int:
    """Page faults that a guest has in common with its shadow tables."""
    return exits([*long_mode(), *rows], folder, "vmm.paging=shadow")["EXCEPTION_NMI"]


def test_pages_of_every_size_and_global_ones_fault_once_each_on_shadow_tables(tmp_path):
    rows = [
        use("LEAF_R", 20, KERNEL + 0x600000, PDPT, 3, 0xE3 | 1 << 8),
        use("LEAF_W", 22, KERNEL + (1 << 30) + 0x400000, PD + 16, 2, 0x4000E3),
        use("LEAF_R", 24, KERNEL + (2 << 30), TABLE, 1, 0x800163),
    ]
    assert faults(rows, tmp_path) == len(rows)


def test_a_table_that_two_processes_share_is_shadowed_once_and_its_page_faults_once(tmp_path):
    tables = [
        row("PTW", 17, cr3=ROOT, a0=ROOT | 4, a1=PDPT | 7), row("PTW", 17, cr3=ROOT, a0=PDPT | 3, a1=PD | 7),
        row("PTW", 17, cr3=ROOT, a0=PD | 8 | 2, a1=TABLE | 7), row("PTW", 18, cr3=ROOT, a0=TABLE | 1, a1=0x400067),
    ]  # fmt: skip
    first = use("LEAF_W", 20, 0x200000, TABLE, 1, 0x400067, cpl=3)
    second = [
        row("MOV_TO_CR", 30, cr3=ROOT, a0=3, a1=OTHER), row("ROOT", 31, cr3=ROOT, a0=OTHER),
        row("PTW", 32, cr3=OTHER, a0=OTHER | 4, a1=PDPT | 7),
    ]  # fmt: skip
    again = use("LEAF_R", 35, 0x200000, TABLE, 1, 0x400067, cpl=3, cr3=OTHER)
    assert faults([*tables, first], tmp_path) == 1
    assert faults([*tables, first, *second, again], tmp_path) == 2  # the new root's own entry; the rest is found again


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((0x67, 0x67, 0x67, 0x67), 1),
        ((0x67, 0x67, 0, 0x67), 2),  # entries are filled in order, up to the first that is not present
        ((0x67, 0, 0x67, 0x67), 3),
        ((0x67, 0x47, 0x67, 0x67), 3),  # or not accessed, as the second stays
    ],
)
def test_entries_beside_a_missing_one_are_filled_up_to_the_first_that_cannot_be(
    tmp_path: Path, flags: tuple[int, ...], expected: int
) -> None:
    """Linux 6.1, pte_prefetch in arch/x86/kvm/mmu/paging_tmpl.h: the loop ends there."""
    entries = [(TABLE + 8 * n, 0x400000 + 0x1000 * n | of) for n, of in enumerate(flags) if of]
    tables = [
        row("PTW", 17, cr3=ROOT, a0=ROOT | 4, a1=PDPT | 7), row("PTW", 17, cr3=ROOT, a0=PDPT | 3, a1=PD | 7),
        row("PTW", 17, cr3=ROOT, a0=PD | 8 | 2, a1=TABLE | 7),
        *(row("PTW", 18, cr3=ROOT, a0=at | 1, a1=entry) for at, entry in entries),
    ]  # fmt: skip
    uses = [
        use("LEAF_R", 20 + at, 0x200000 + (at - TABLE) * 512, at, 1, entry, cpl=3)
        for at, entry in entries
        if at != TABLE + 8
    ]
    assert faults([*tables, *uses], tmp_path) == expected


def test_a_table_that_becomes_a_page_and_a_table_again_maps_what_it_holds_then(tmp_path):
    kernels = [use("LEAF_R", 17, KERNEL + at, 0x5000 + 8 * (at >> 12), 1, at | 0x63) for at in (ROOT, PDPT, PD, TABLE)]
    rows = [
        *kernels,
        row("PTW", 17, cr3=ROOT, a0=ROOT | 4, a1=PDPT | 7), row("PTW", 17, cr3=ROOT, a0=PDPT | 3, a1=PD | 7),
        row("PTW", 17, cr3=ROOT, a0=PD | 8 | 2, a1=TABLE | 7), row("PTW", 18, cr3=ROOT, a0=TABLE | 1, a1=0x400067),
        use("LEAF_W", 20, 0x200000, TABLE, 1, 0x400067, cpl=3),
        row("PTW", 22, cr3=ROOT, a0=PD | 8 | 2), row("INVLPG", 23, cr3=ROOT, a0=0x200000),
        use("LEAF_W", 24, KERNEL + TABLE, 0x5000 + 8 * 4, 1, TABLE | 0x63),  # it is data now
        row("PTW", 26, cr3=ROOT, a0=PD | 8 | 2, a1=TABLE | 7), row("PTW", 27, cr3=ROOT, a0=TABLE | 1, a1=0x402067),
    ]  # fmt: skip
    again = use("LEAF_R", 29, 0x200000, TABLE, 1, 0x402067, cpl=3)
    assert faults([*rows, again], tmp_path) == faults(rows, tmp_path) + 1


def test_a_store_by_the_map_of_all_memory_is_seen_though_nothing_tells_of_its_entry(tmp_path):
    """The map's large page was split: of the table only the entry is known that was used since."""
    rows = [
        use("LEAF_R", 17, KERNEL + ROOT, 0x5000 + 8 * (ROOT >> 12), 1, ROOT | 0x63),
        row("PTW", 17, cr3=ROOT, a0=ROOT | 4, a1=PDPT | 7), row("PTW", 17, cr3=ROOT, a0=PDPT | 3, a1=PD | 7),
        row("PTW", 17, cr3=ROOT, a0=PD | 8 | 2, a1=TABLE | 7), row("PTW", 18, cr3=ROOT, a0=TABLE | 1, a1=0x400067),
        use("LEAF_W", 20, 0x200000, TABLE, 1, 0x400067, cpl=3),
    ]  # fmt: skip
    store = row("PTW", 22, cr3=ROOT, a0=TABLE + 8 | 1, a1=0x401067, rip=KERNEL)
    assert faults([*rows, store], tmp_path) == faults(rows, tmp_path) + 1


# --- what cannot be predicted is refused ----------------------------------------------------------------------------
LEAF = use("LEAF_R", 20, KERNEL + 0x400000, TABLE, 1, 0x400063)
NARROW = [row("MOV_TO_CR", 12, a0=3, a1=ROOT), row("MOV_TO_CR", 16, a0=0, a1=PAGING)]
REFUSED = {
    "a page of 1 GiB with 32-bit paging": ([*NARROW, LEAF | {"a1": TABLE | 3}], "row 2 (LEAF_R): an entry of that level"),
    "a fifth of four levels": ([*long_mode(), row("PTW", 20, cr3=ROOT, a0=TABLE | 5)], "row 5 (PTW): the guest's tables"),
    "no entry": ([*long_mode(), LEAF | {"a2": 0}], "row 5 (LEAF_R): the entry that was used is not present"),
    "a far page": ([*long_mode(), LEAF | {"a2": 0x40_0000_0063}], "row 5 (LEAF_R): the page is in neither"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_on_shadow_tables_a_guest_is_refused_whose_tables_are_not_followed(tmp_path, name):
    rows, text = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        exits(rows, tmp_path, "vmm.paging=shadow")
    assert str(caught.value).startswith(f"{tmp_path / 'guest.npz'}: {text}")


@pytest.mark.parametrize("name", REFUSED)
def test_with_ept_such_a_guest_takes_the_exits_of_its_rows(tmp_path, name):
    rows, _ = REFUSED[name]
    expected = by_rule(rows, shadow=False, huge=True)
    expected["EPT_VIOLATION"] += 1  # the walk reads the entry, or the store finds no page
    assert exits(rows, tmp_path) == expected


def test_a_row_may_end_a_recording_that_is_nothing_to_execute(tmp_path):
    assert exits(long_mode(), tmp_path, "vmm.paging=shadow") == {"CR_ACCESS": 3, "MSR_WRITE": 1}


@pytest.mark.parametrize("vector", [13, 14])
def test_a_recorded_exception_of_real_address_mode_has_no_error_code(vector: int, tmp_path: Path) -> None:
    """VM entry refuses to inject one where CR0.PE is 0, after its delivery found the vector table not mapped by EPT."""
    rows = [row("EXC", 10, a0=vector, a1=2, a2=0x1234), row("IRET", 20)]

    assert exits(rows, tmp_path) == {"EPT_VIOLATION": 1}


@pytest.mark.parametrize("kind", ["WRMSR", "RDMSR"])
def test_a_fault_that_is_injected_in_real_address_mode_has_no_error_code(kind: str, tmp_path: Path) -> None:
    """An MSR that nobody knows, as firmware looks for one: the exit, and the delivery that finds no vector table."""
    found = exits([row(kind, 10, a0=0x12345, a1=0)], tmp_path)

    assert found == {f"MSR_{'WRITE' if kind == 'WRMSR' else 'READ'}": 1, "EPT_VIOLATION": 1}


# --- what the monitor sees of an access ------------------------------------------------------------------------------
IDT = -0x200_0000_0000
SMAP = 1 << 21


def user_page(icount: int, kind: str = "LEAF_R", cpl: int = 0) -> Row:
    return use(kind, icount, 0x200000, TABLE, 1, 0x400067, cpl=cpl)


def test_an_access_of_the_kernel_to_a_page_of_a_program_is_no_fault_of_the_guest(tmp_path):
    """STAC is not recorded; with SMAP, and without its flag in RFLAGS, a monitor would take it for one, and inject it."""
    rows = [*long_mode(PAE | SMAP), user_page(20), row("INVLPG", 30, cr3=ROOT, a0=0x300000), user_page(40)]
    assert exits(rows, tmp_path, "vmm.paging=shadow")["EXCEPTION_NMI"] == 1


@pytest.mark.parametrize("kind", ["EXC", "IRQ", "HLT"])
def test_the_delivery_of_an_event_reads_the_idt_through_shadow_tables(tmp_path, kind):
    """Its page is one more that is met first, by whatever event, and whether or not its table was recorded."""
    event = {
        "EXC": [row("EXC", 30, cr3=ROOT, a0=14, a1=4, a2=0x500000)],
        "IRQ": [row("IRQ", 30, cr3=ROOT, a0=0x30)],
        "HLT": [row("HLT", 30, cr3=ROOT), row("IRQ", 31, cr3=ROOT, a0=0x30)],
    }[kind]
    again = [{**one, "icount": one["icount"] + 10} for one in event]
    lidt = row("LIDT", 25, cr3=ROOT, a0=IDT, a1=0xFFF)
    mapped = [
        row("PTW", 21, cr3=ROOT, a0=ROOT + 8 * 508 | 4, a1=PDPT | 3), row("PTW", 22, cr3=ROOT, a0=PDPT | 3, a1=PD | 3),
        row("PTW", 23, cr3=ROOT, a0=PD | 2, a1=TABLE | 3), row("PTW", 24, cr3=ROOT, a0=TABLE | 1, a1=0x40_0063),
    ]  # fmt: skip
    base = faults([*event, *again], tmp_path)
    assert faults([lidt, *event, *again], tmp_path) == base + 1
    assert faults([*mapped, lidt, *event, *again], tmp_path) == base + 1
