// Records what a guest in VMX non-root operation does, and which VM exits it takes.
//
// `exits.bin`: one record of struct Exit per VM exit. `rows.bin`: one record of struct Row per event, in the kinds of
// docs/traces.md; only with RECORD_GUEST=MEBIBYTES in the environment, and only where the hypervisor uses EPT, since
// there the guest's own paging is in the processor's registers.
//
// An event is written when its instruction completes: that is when it retires, or, if it exits to be emulated, at that
// exit. A row's icount is the number of instructions, and iterations of string instructions, that completed before.
//
// A byte to port 0x8900 ends the simulation.
#define NEED_CPU_REG_SHORTCUTS 1
#include "bochs.h"
#include "cpu/cpu.h"
#include "cpu/decoder/ia_opcodes.h"
#include "memory/memory-bochs.h"
#include "pc_system.h"
#include <algorithm>
#include <array>
#include <stdio.h>
#include <stdlib.h>
#include <unordered_map>
#include <vector>

#if BX_INSTRUMENTATION

enum { END_PORT = 0x8900 };

enum Kind {
  NONE = 0, CPUID = 1, RDMSR, WRMSR, IN, OUT, MMIO_R, MMIO_W, MOV_TO_CR, MOV_FROM_CR, CLTS, LMSW, INVLPG, INVPCID, HLT, PAUSE,
  RDTSC, RDTSCP, SYSCALL, SYSRET, EXC, IRQ, IRET, WBINVD, INVD, XSETBV, MOV_TO_DR, MOV_FROM_DR, LGDT, LIDT, LTR, LLDT,
  MONITOR, MWAIT, VMCALL, RDPMC, RDRAND, RDSEED, SYSENTER, INTN, SMSW,
  TOUCH_R = 48, RETOUCH_R = 51, REARM = 54, PTW, ROOT, LEAF_R
};
enum { READ, WRITE, FETCH };
enum { STRING = 1 << 20, REP = 1 << 21 };  // of a0 of IN and OUT
enum { PRESENT = 1, USER = 4, LARGE = 0x80, ACCESSED_DIRTY = 0x60 };
// Of `leaf_uses`: a bit per READ, WRITE, FETCH, these again for ways to the entry that are not executable, and
enum { EMPTY = 0, BY_OTHER_WAY = 3, UPPER_USED = 0x40, HAS_PIECES = 0x80 };
static const Bit64u ADDRESS = BX_CONST64(0xFFFFFFFFFF000), NO_EXECUTE = BX_CONST64(0x8000000000000000);

struct Row {
  Bit64u icount, cr3, rip, a0, a1, a2;
  Bit32u n;
  Bit8u kind, cpl, implicit, unused;  // implicit: an access that the processor makes to deliver an event
};
struct Exit {
  Bit64u ticks, icount, rip, info, gpa, rax, rcx, rdx;
  Bit32u reason, interruption, error, kind;  // kind: MMIO_R or MMIO_W if the instruction reads or writes memory so
};
struct Shape { unsigned levels, bits, size; };
struct Page { Bit64u gpa, leaf; unsigned level; bool user, no_execute; Bit64u upper[4]; unsigned uppers; };
struct Cached { Bit64u page, generation; Page at; Bit8u *host; unsigned seen; };
struct Store { Bit64u at, size, gpa, before; Bit8u *host; };  // of `size` bytes at `at`; the eight bytes at `gpa` among them
struct Table { unsigned level, references; };
struct Root { Bit64u at; bool used; };

static FILE *exits_file;
static std::vector<Row> rows;
static bool recording, started;
static Bit64u memory_end, icount, generation = 1, host_generation = 1;

// the instruction that runs
static bxInstruction_c *running;
static Row current;
static int pending_input = -1;           // row whose value is in RAX at the next instruction
static long string_row = -1;             // row of a string instruction that exits, and RCX before it
static Bit64u string_count;
static bool raised;                      // an exception is on its way to its handler
static unsigned raised_error;
static int delivering = -1;
static int delivered_again = -1;         // vector whose delivery exited: the hypervisor injects it again
static Bit64u known_cr3 = ~(Bit64u) 0, known_mode = ~(Bit64u) 0;

static std::vector<Bit8u> touched, armed, fetched_region;
static Bit8u *leaf_uses;
static Bit64u *software;                 // what the guest last stored in each eight bytes
static std::vector<Table> tables;
static std::vector<unsigned> tables_in_region;
static std::vector<Root> roots;
static std::vector<Bit8u> pdpts;         // how many roots of PAE paging, which have 32 bytes, stand in each page
static std::vector<Store> stores;
static std::vector<Bit64u> host_of, host_of_generation;
static std::unordered_map<Bit64u, std::array<Bit8u, 512>> pieces;
static std::unordered_map<Bit64u, Bit8u> rom_touched, rom_armed;
static Bit64u live_tables, config_address;
static Cached cache[4096];

// Memory of the board i440fx of QEMU: with 3.5 GiB and more, what is beyond 3 GiB stands above 4 GiB.
static const Bit64u HOLE = 3ULL << 30, HOLE_END = 4ULL << 30, MOST_BELOW = 7ULL << 29;
static bool in_memory(Bit64u gpa)
{
  return gpa < memory_end && (memory_end <= HOLE_END || gpa < HOLE || gpa >= HOLE_END);
}

static BX_CPU_C *cpu() { return BX_CPU(0); }
static Bit64u reg(unsigned n) { return cpu()->gen_reg[n].rrx; }
static bool long_mode() { return cpu()->efer.get_LMA(); }

static Bit64u guest_cr(unsigned n)
{
  VMCS_CACHE *vm = &cpu()->vmcs;
  switch (n) {
    case 0: return (cpu()->cr0.get32() & ~vm->vm_cr0_mask) | (vm->vm_cr0_read_shadow & vm->vm_cr0_mask);
    case 2: return cpu()->cr2;
    case 3: return cpu()->cr3;
    case 4: return (cpu()->cr4.get() & ~vm->vm_cr4_mask) | (vm->vm_cr4_read_shadow & vm->vm_cr4_mask);
    default: return 0;
  }
}

static void start()
{
  started = true;
  const char *mebibytes = getenv("RECORD_GUEST");
  recording = mebibytes && *mebibytes;
  exits_file = fopen("exits.bin", "wb");
  if (!recording)
    return;
  memory_end = strtoull(mebibytes, 0, 0) << 20;
  if (memory_end >= MOST_BELOW)
    memory_end += HOLE_END - HOLE;
  touched.resize(memory_end >> 12);
  armed.resize(memory_end >> 12);
  tables.resize(memory_end >> 12);
  pdpts.resize(memory_end >> 12);
  tables_in_region.resize((memory_end >> 21) + 1);
  fetched_region.resize((memory_end >> 21) + 1);
  leaf_uses = (Bit8u *) calloc(memory_end >> 2, sizeof *leaf_uses);
  software = (Bit64u *) calloc(memory_end >> 3, sizeof *software);
  host_of.resize(memory_end >> 12);
  host_of_generation.resize(memory_end >> 12);
}

static void finish()
{
  if (exits_file)
    fclose(exits_file);
  if (recording) {
    FILE *out = fopen("rows.bin", "wb");
    fwrite(rows.data(), sizeof(Row), rows.size(), out);
    fclose(out);
  }
  fprintf(stderr, "recorded %lu rows, %lu instructions\n", (unsigned long) rows.size(), (unsigned long) icount);
}

// ---- rows

static bool merges(const Row &row)
{
  switch (row.kind) {
    case PAUSE: case RDTSC: case RDTSCP: case IRET: return true;
    case IN: return (row.a0 & 0xFFFF) == 0x42 || (row.a0 & 0xFFFF) == 0x608;
    case MMIO_R: case MMIO_W: return row.a0 == 0xFED000F0 || row.a0 == 0xFED00148;
    default: return false;
  }
}

static bool same(const Row &one, const Row &other)
{
  return one.kind == other.kind && one.rip == other.rip && one.cpl == other.cpl && one.cr3 == other.cr3 &&
    (one.kind != IN && one.kind != MMIO_R && one.kind != MMIO_W || one.a0 == other.a0);
}

static size_t spin;  // rows from here on merge

static void push(const Row &row)
{
  if (merges(row)) {
    for (size_t at = spin; at < rows.size(); at++)
      if (same(rows[at], row)) {
        rows[at].n++;
        return;
      }
    rows.push_back(row);
  } else {
    rows.push_back(row);
    spin = rows.size();
  }
}

static void event(unsigned kind, Bit64u a0, Bit64u a1 = 0, Bit64u a2 = 0)
{
  Row row = current;
  row.icount = icount;
  row.kind = kind;
  row.a0 = a0, row.a1 = a1, row.a2 = a2;
  row.n = 1;
  push(row);
}

// ---- guest memory

static Bit8u *host_pointer(Bit64u gpa)
{
  if (!in_memory(gpa))
    return 0;
  Bit64u page = gpa >> 12;
  if (host_of_generation[page] != host_generation) {
    bx_phy_address physical;
    if (!cpu()->dbg_translate_guest_physical_ept(gpa & ~(Bit64u) 0xFFF, &physical))
      return 0;
    Bit8u *host = BX_MEM(0)->getHostMemAddr(0, physical & ~(Bit64u) 0xFFF, BX_READ);
    if (!host)
      return 0;
    host_of[page] = (Bit64u) host;
    host_of_generation[page] = host_generation;
  }
  return (Bit8u *) host_of[page] + (gpa & 0xFFF);
}

static Bit64u load(Bit64u gpa, unsigned size)
{
  Bit8u *host = host_pointer(gpa);
  return !host ? 0 : size == 8 ? *(Bit64u *) host : *(Bit32u *) host;
}

// An entry as the guest last stored it: without the flags that the processor has set since.
static Bit64u as_stored(Bit64u gpa, Bit64u value, unsigned size)
{
  Bit64u stored = software[gpa >> 3];
  if (size == 4)
    stored = (Bit32u) (gpa & 4 ? stored >> 32 : stored);
  return (stored & ~(Bit64u) ACCESSED_DIRTY) == (value & ~(Bit64u) ACCESSED_DIRTY) ? stored : value;
}

// ---- the guest's paging

static Shape shape()
{
  if (!cpu()->cr0.get_PG())
    return {0, 0, 0};
  if (long_mode())
    return {cpu()->cr4.get_LA57() ? 5u : 4u, 9, 8};
  if (cpu()->cr4.get_PAE())
    return {3, 9, 8};
  return {2, 10, 4};
}

static bool is_page(const Shape &of, Bit64u entry, unsigned level)
{
  return level == 1 || (entry & LARGE && (level == 2 || (level == 3 && of.levels > 3)));
}

static Bit64u root_of(const Shape &of, Bit64u cr3)
{
  return of.levels == 3 ? cr3 & 0xFFFFFFE0 : cr3 & ADDRESS;
}

static bool walk(Bit64u laddr, Page &to)
{
  Shape of = shape();
  to.leaf = 0, to.level = 0, to.user = true, to.no_execute = false, to.uppers = 0;
  if (!of.levels) {
    to.gpa = laddr & 0xFFFFF000;
    return true;
  }
  Bit64u table = root_of(of, cpu()->cr3);
  for (unsigned level = of.levels; level; level--) {
    Bit64u at = table + of.size * ((laddr >> (12 + of.bits * (level - 1))) & ((1 << of.bits) - 1));
    Bit64u entry = load(at, of.size);
    if (!(entry & PRESENT))
      return false;
    if (!(of.levels == 3 && level == 3))
      to.user = to.user && entry & USER;
    if (is_page(of, entry, level)) {
      Bit64u within = ((Bit64u) 1 << (12 + of.bits * (level - 1))) - 1;
      to.gpa = ((entry & ADDRESS & ~within) | (laddr & within)) & ~(Bit64u) 0xFFF;
      to.leaf = at, to.level = level;
      return true;
    }
    to.upper[to.uppers++] = at;
    to.no_execute = to.no_execute || entry & NO_EXECUTE;
    table = entry & ADDRESS;
  }
  return false;
}

static void rearm_pieces(Bit64u leaf)
{
  auto found = pieces.find(leaf);
  if (found != pieces.end()) {
    found->second.fill(0);
    generation++;
  }
}

static void becomes_table(Bit64u at, unsigned level, const Shape &of);

static void refers(const Shape &of, Bit64u entry, unsigned level)
{
  if (entry & PRESENT && !is_page(of, entry, level))
    becomes_table(entry & ADDRESS, level - 1, of);
}

static void becomes_table(Bit64u at, unsigned level, const Shape &of)
{
  if (!in_memory(at))
    return;
  Table &table = tables[at >> 12];
  if (table.references++)
    return;
  table.level = level;
  live_tables++;
  generation++;
  if (!tables_in_region[at >> 21]++)
    for (auto &piece : pieces)
      if ((load(piece.first, of.size) & ADDRESS) >> 21 == at >> 21)
        rearm_pieces(piece.first);
  if (level > 1)
    for (unsigned n = 0; n < 1u << of.bits; n++)
      refers(of, load(at + n * of.size, of.size), level);
}

static void loses_reference(Bit64u at, const Shape &of)
{
  if (!in_memory(at) || !tables[at >> 12].references)
    return;
  Table &table = tables[at >> 12];
  if (--table.references)
    return;
  unsigned level = table.level;
  table.level = 0;
  live_tables--;
  generation++;
  tables_in_region[at >> 21]--;
  if (level > 1)
    for (unsigned n = 0; n < 1u << of.bits; n++) {
      Bit64u entry = load(at + n * of.size, of.size);
      if (entry & PRESENT && !is_page(of, entry, level))
        loses_reference(entry & ADDRESS, of);
    }
}

// User entries of a root stand in its lower half, or with PAE and 32-bit paging in its lower three quarters.
static unsigned user_entries(const Shape &of)
{
  return of.levels > 3 ? 256 : of.levels == 3 ? 3 : 768;
}

static bool any_present(const Shape &of, Bit64u table, unsigned entries)
{
  for (unsigned n = 0; n < entries; n++)
    if (load(table + n * of.size, of.size) & PRESENT)
      return true;
  return false;
}

// With PAE paging kernels leave PDPTEs as they are when a process ends, but not what its page directories hold.
static bool user_part_empty(const Shape &of, Bit64u root)
{
  if (of.levels != 3)
    return !any_present(of, root, user_entries(of));
  for (unsigned n = 0; n < user_entries(of); n++) {
    Bit64u entry = load(root + 8 * n, 8);
    if (entry & PRESENT && any_present(of, entry & ADDRESS, 512))
      return false;
  }
  return true;
}

static void becomes_root(Bit64u at, const Shape &of)
{
  roots.push_back({at, false});
  if (of.levels != 3) {
    becomes_table(at, of.levels, of);
    return;
  }
  pdpts[at >> 12]++;
  for (unsigned n = 0; n < 4; n++)
    refers(of, load(at + 8 * n, 8), 3);
}

static void is_no_root(Bit64u at, const Shape &of)
{
  if (of.levels != 3) {
    loses_reference(at, of);
    return;
  }
  pdpts[at >> 12]--;
  for (unsigned n = 0; n < 4; n++) {
    Bit64u entry = load(at + 8 * n, 8);
    if (entry & PRESENT)
      loses_reference(entry & ADDRESS, of);
  }
}

static void retire_roots(const Shape &of)
{
  for (size_t n = 0; n < roots.size(); n++) {
    Root &root = roots[n];
    bool empty = user_part_empty(of, root.at);
    root.used = root.used || !empty;
    if (root.used && empty && root.at != root_of(of, cpu()->cr3)) {
      Bit64u at = root.at;
      roots.erase(roots.begin() + n--);
      is_no_root(at, of);
    }
  }
}

static void look_at_root()
{
  Bit64u mode = cpu()->cr0.get_PG() | cpu()->cr4.get_PAE() << 1 | long_mode() << 2;
  if (cpu()->cr3 == known_cr3 && mode == known_mode)
    return;
  Shape of = shape();
  generation++;
  if (of.levels) {
    if (mode != known_mode) {  // tables of another form are none now
      roots.clear();
      std::fill(pdpts.begin(), pdpts.end(), 0);
      for (auto &table : tables)
        table = {0, 0};
      for (auto &count : tables_in_region)
        count = 0;
      live_tables = 0;
    }
    Bit64u at = root_of(of, cpu()->cr3);
    bool known = !in_memory(at);
    for (auto &root : roots)
      known = known || root.at == at;
    if (!known) {
      becomes_root(at, of);
      event(ROOT, at, live_tables);
    }
    retire_roots(of);
  }
  known_cr3 = cpu()->cr3;
  known_mode = mode;
}

// ---- accesses

static void touch(Bit64u gpa, Bit64u laddr, unsigned how)
{
  bool memory = in_memory(gpa);
  if (!memory && gpa < 0xFFFC0000)
    return;
  Bit8u &touches = memory ? touched[gpa >> 12] : rom_touched[gpa >> 12];
  Bit8u &arms = memory ? armed[gpa >> 12] : rom_armed[gpa >> 12];
  Bit8u bit = 1 << how;
  if (!(touches & bit))
    event(TOUCH_R + how, gpa, laddr);
  else if (!(arms & bit))
    event(RETOUCH_R + how, gpa, laddr);
  touches |= bit;
  arms |= bit;
  if (memory && how == FETCH && !fetched_region[gpa >> 21]) {
    fetched_region[gpa >> 21] = 1;
    Bit64u first = gpa >> 21 << 9;
    for (Bit64u page = first; page < first + 512 && page < armed.size(); page++)
      if (page != gpa >> 12)
        armed[page] = 0;
    generation++;
  }
}

static void use_leaf(const Page &page, Bit64u laddr, unsigned how)
{
  if (!page.level || !in_memory(page.leaf))
    return;
  bool first = false;
  for (unsigned n = 0; n < page.uppers; n++) {
    Bit8u &upper = leaf_uses[page.upper[n] >> 2];
    first = first || !(upper & UPPER_USED);
    upper |= UPPER_USED;
  }
  Bit8u bit = 1 << (page.no_execute ? how + BY_OTHER_WAY : how);
  Bit8u *uses = &leaf_uses[page.leaf >> 2];
  if (page.level > 1) {
    *uses |= HAS_PIECES;
    uses = &pieces[page.leaf][(page.gpa >> 12) & 511];
  }
  if (first || !(*uses & bit)) {
    unsigned size = shape().size;
    event(LEAF_R + how, laddr, page.leaf | page.level | (first ? 4 : 0),
      as_stored(page.leaf, load(page.leaf, size), size));
  }
  bool fetched = page.level == 1;
  if (page.level > 1)
    for (auto use : pieces[page.leaf])
      fetched = fetched || use & 1 << FETCH;
  if (how == FETCH && !fetched)
    rearm_pieces(page.leaf);
  *uses |= bit;
}

static Cached *look_up(Bit64u laddr)
{
  Cached *found = &cache[(laddr >> 12) & 4095];
  if (found->page != laddr >> 12 || found->generation != generation) {
    if (!walk(laddr, found->at)) {
      found->page = ~(Bit64u) 0;
      return 0;
    }
    found->page = laddr >> 12;
    found->generation = generation;
    found->seen = 0;
  }
  return found;
}

static Cached *access(Bit64u laddr, unsigned how)
{
  Cached *found = look_up(laddr);
  if (!found || found->seen & 1 << how)
    return found;
  Row saved = current;
  if (!found->at.user && cpu()->user_pl) {
    current.cpl = 0;
    current.implicit = 1;
  } else if (cpu()->in_event)
    current.implicit = 1;
  Page page = found->at;
  use_leaf(page, laddr, how);
  touch(page.gpa | (laddr & 0xFFF), laddr, how);
  current = saved;
  found = look_up(laddr);
  if (found)
    found->seen |= 1 << how;
  return found;
}

void guest_accesses(Bit64u laddr, Bit64u paddr, unsigned size, unsigned rw)
{
  if (!recording)
    return;
  bool write = rw == BX_WRITE || rw == BX_RW;
  if (rw == BX_READ || rw == BX_RW)
    access(laddr, READ);
  if (!write)
    return;
  Cached *to = access(laddr, WRITE);
  if (!to)
    return;
  Bit64u gpa = to->at.gpa | (laddr & 0xFFF);
  if (!in_memory(gpa))
    return;
  Bit8u *host = BX_MEM(0)->getHostMemAddr(0, paddr & ~(Bit64u) 0xFFF, BX_READ);
  if (!host)
    return;
  for (Bit64u at = gpa & ~(Bit64u) 7; at < gpa + size; at += 8) {
    Bit8u *word = host + (at & 0xFFF);
    stores.push_back({gpa, size, at, *(Bit64u *) word, word});
  }
}

static void store_entry(const Shape &of, Bit64u at, unsigned level, Bit64u before, Bit64u after)
{
  event(PTW, at | level, after, as_stored(at, before, of.size));
  if (level <= 1 || before == after)
    return;
  refers(of, after, level);
  if (before & PRESENT && !is_page(of, before, level))
    loses_reference(before & ADDRESS, of);
}

static Bit64u part(const Shape &of, Bit64u word, Bit64u at)
{
  return of.size == 8 ? word : (Bit32u) (at & 4 ? word >> 32 : word);
}

// What the instruction stored is in memory now.
static void settle()
{
  if (stores.empty())
    return;
  Shape of = shape();
  for (size_t n = 0; n < stores.size(); n++) {
    Store store = stores[n];
    Bit64u after = *(Bit64u *) store.host;
    Bit64u page = store.gpa >> 12;
    unsigned level = of.levels ? tables[page].level : 0;
    if (of.levels == 3 && pdpts[page])
      for (auto &root : roots)
        if (store.gpa >= root.at && store.gpa < root.at + 32)
          level = 3;
    if (level) {
      for (Bit64u at = store.gpa; at < store.gpa + 8; at += of.size)
        if (at < store.at + store.size && store.at < at + of.size)
          store_entry(of, at, level, part(of, store.before, at), part(of, after, at));
      if (level == of.levels)
        retire_roots(of);
    }
    if (store.before != after || software[store.gpa >> 3] != after)
      for (unsigned at = 0; at < 8; at += 4) {
        Bit8u &uses = leaf_uses[(store.gpa + at) >> 2];
        if (uses) {
          if (uses & HAS_PIECES)
            pieces.erase(store.gpa + at);
          uses = 0;
          generation++;
        }
      }
    software[store.gpa >> 3] = after;
  }
  stores.clear();
}

// ---- instructions

struct Form { Kind kind; unsigned detail; };  // detail: the register's number, or bytes and form of a port access, or bytes

static Form form_of(bxInstruction_c *i)
{
  unsigned rep = STRING | (i->repUsedL() ? REP : 0);
  switch (i->getIaOpcode()) {
    case BX_IA_CPUID: return {CPUID, 0};
    case BX_IA_RDMSR: return {RDMSR, 0};
    case BX_IA_WRMSR: return {WRMSR, 0};
    case BX_IA_IN_ALDX: case BX_IA_IN_ALIb: return {IN, 1 << 16};
    case BX_IA_IN_AXDX: case BX_IA_IN_AXIb: return {IN, 2 << 16};
    case BX_IA_IN_EAXDX: case BX_IA_IN_EAXIb: return {IN, 4 << 16};
    case BX_IA_OUT_DXAL: case BX_IA_OUT_IbAL: return {OUT, 1 << 16};
    case BX_IA_OUT_DXAX: case BX_IA_OUT_IbAX: return {OUT, 2 << 16};
    case BX_IA_OUT_DXEAX: case BX_IA_OUT_IbEAX: return {OUT, 4 << 16};
    case BX_IA_REP_INSB_YbDX: return {IN, 1 << 16 | rep};
    case BX_IA_REP_INSW_YwDX: return {IN, 2 << 16 | rep};
    case BX_IA_REP_INSD_YdDX: return {IN, 4 << 16 | rep};
    case BX_IA_REP_OUTSB_DXXb: return {OUT, 1 << 16 | rep};
    case BX_IA_REP_OUTSW_DXXw: return {OUT, 2 << 16 | rep};
    case BX_IA_REP_OUTSD_DXXd: return {OUT, 4 << 16 | rep};
    case BX_IA_MOV_CR0Rd: case BX_IA_MOV_CR0Rq: return {MOV_TO_CR, 0};
    case BX_IA_MOV_CR2Rd: case BX_IA_MOV_CR2Rq: return {MOV_TO_CR, 2};
    case BX_IA_MOV_CR3Rd: case BX_IA_MOV_CR3Rq: return {MOV_TO_CR, 3};
    case BX_IA_MOV_CR4Rd: case BX_IA_MOV_CR4Rq: return {MOV_TO_CR, 4};
    case BX_IA_MOV_RdCR0: case BX_IA_MOV_RqCR0: return {MOV_FROM_CR, 0};
    case BX_IA_MOV_RdCR2: case BX_IA_MOV_RqCR2: return {MOV_FROM_CR, 2};
    case BX_IA_MOV_RdCR3: case BX_IA_MOV_RqCR3: return {MOV_FROM_CR, 3};
    case BX_IA_MOV_RdCR4: case BX_IA_MOV_RqCR4: return {MOV_FROM_CR, 4};
    case BX_IA_MOV_DdRd: case BX_IA_MOV_DqRq: return {MOV_TO_DR, 0};
    case BX_IA_MOV_RdDd: case BX_IA_MOV_RqDq: return {MOV_FROM_DR, 0};
    case BX_IA_CLTS: return {CLTS, 0};
    case BX_IA_LMSW_Ew: return {LMSW, 0};
    case BX_IA_SMSW_Ew: return {SMSW, 0};
    case BX_IA_INVLPG: return {INVLPG, 0};
    case BX_IA_INVPCID: return {INVPCID, 0};
    case BX_IA_HLT: return {HLT, 0};
    case BX_IA_PAUSE: return {PAUSE, 0};
    case BX_IA_RDTSC: return {RDTSC, 0};
    case BX_IA_RDTSCP: return {RDTSCP, 0};
    case BX_IA_SYSCALL: case BX_IA_SYSCALL_LEGACY: return {SYSCALL, 0};
    case BX_IA_SYSRET: case BX_IA_SYSRET_LEGACY: return {SYSRET, 0};
    case BX_IA_SYSENTER: return {SYSENTER, 0};
    case BX_IA_IRET_Op16: case BX_IA_IRET_Op32: case BX_IA_IRET_Op64: return {IRET, 0};
    case BX_IA_WBINVD: return {WBINVD, 0};
    case BX_IA_INVD: return {INVD, 0};
    case BX_IA_XSETBV: return {XSETBV, 0};
    case BX_IA_LGDT_Ms: case BX_IA_LGDT_Op64_Ms: return {LGDT, 0};
    case BX_IA_LIDT_Ms: case BX_IA_LIDT_Op64_Ms: return {LIDT, 0};
    case BX_IA_LTR_Ew: return {LTR, 0};
    case BX_IA_LLDT_Ew: return {LLDT, 0};
    case BX_IA_MONITOR: return {MONITOR, 0};
    case BX_IA_MWAIT: return {MWAIT, 0};
    case BX_IA_VMCALL: return {VMCALL, 0};
    case BX_IA_RDPMC: return {RDPMC, 0};
    case BX_IA_RDRAND_Ew: case BX_IA_RDRAND_Ed: case BX_IA_RDRAND_Eq: return {RDRAND, 0};
    case BX_IA_RDSEED_Ew: case BX_IA_RDSEED_Ed: case BX_IA_RDSEED_Eq: return {RDSEED, 0};
    case BX_IA_INT_Ib: case BX_IA_INT3: return {INTN, 0};
    // memory, as far as devices are accessed so
    case BX_IA_MOV_EbGb: case BX_IA_MOV_EbIb: return {MMIO_W, 1};
    case BX_IA_MOV_EwGw: case BX_IA_MOV_EwIw: return {MMIO_W, 2};
    case BX_IA_MOV_Op32_EdGd: case BX_IA_MOV_Op64_EdGd: case BX_IA_MOV_EdId: case BX_IA_MOV_OdEAX: return {MMIO_W, 4};
    case BX_IA_MOV_EqGq: case BX_IA_MOV_EqId: return {MMIO_W, 8};
    case BX_IA_MOV_GbEb: return {MMIO_R, 1};
    case BX_IA_MOV_GwEw: return {MMIO_R, 2};
    case BX_IA_MOV_GqEq: return {MMIO_R, 8};
    default: return {NONE, 4};
  }
}

static Bit64u stored_value(bxInstruction_c *i)
{
  switch (i->getIaOpcode()) {
    case BX_IA_MOV_EbIb: return i->Ib();
    case BX_IA_MOV_EwIw: return i->Iw();
    case BX_IA_MOV_EdId: case BX_IA_MOV_EqId: return i->Id();
    case BX_IA_MOV_OdEAX: return (Bit32u) reg(0);
    case BX_IA_MOV_EqGq: return reg(i->src());
    default: return (Bit32u) reg(i->src());
  }
}

static Bit64u linear_operand(bxInstruction_c *i)
{
  BX_CPU_C *here = cpu();
  return i->as64L() ? here->get_laddr64(i->seg(), here->BxResolve64(i)) : here->get_laddr32(i->seg(), here->BxResolve32(i));
}

static Bit64u memory_at(Bit64u laddr)
{
  Page page;
  return walk(laddr, page) ? load(page.gpa | (laddr & 0xFFF), 8) : 0;
}

// What is known of an instruction before it runs.
static void operands(bxInstruction_c *i)
{
  Form form = form_of(i);
  Bit64u low = (Bit32u) reg(0), value = low | reg(2) << 32;
  current.kind = form.kind;
  current.a0 = current.a1 = current.a2 = 0;
  switch (form.kind) {
    case CPUID: current.a0 = low, current.a1 = (Bit32u) reg(1); break;
    case RDMSR: case RDPMC: current.a0 = (Bit32u) reg(1); break;
    case WRMSR: case XSETBV: current.a0 = (Bit32u) reg(1), current.a1 = value; break;
    case SYSCALL: current.a0 = reg(0); break;
    case IN: case OUT: {
      bool immediate = i->getIaOpcode() == BX_IA_IN_ALIb || i->getIaOpcode() == BX_IA_IN_AXIb ||
        i->getIaOpcode() == BX_IA_IN_EAXIb || i->getIaOpcode() == BX_IA_OUT_IbAL ||
        i->getIaOpcode() == BX_IA_OUT_IbAX || i->getIaOpcode() == BX_IA_OUT_IbEAX;
      unsigned port = immediate ? i->Ib() : reg(2) & 0xFFFF, bytes = form.detail >> 16 & 7;
      current.a0 = port | form.detail;
      if (form.kind == OUT && !(form.detail & STRING))
        current.a1 = bytes == 4 ? low : low & ((1 << 8 * bytes) - 1);
      break;
    }
    case MOV_TO_CR:
      current.a0 = form.detail, current.a1 = reg(i->src()), current.a2 = guest_cr(form.detail);
      if (!long_mode())
        current.a1 = (Bit32u) current.a1;
      break;
    case MOV_FROM_CR: current.a0 = form.detail, current.a1 = guest_cr(form.detail); break;
    case MOV_TO_DR: current.a0 = i->dst(), current.a1 = reg(i->src()); break;
    case MOV_FROM_DR: current.a0 = i->src(); break;
    case INVLPG: current.a0 = linear_operand(i); break;
    case INVPCID: {
      Bit64u descriptor = linear_operand(i);
      current.a0 = reg(i->dst()), current.a1 = memory_at(descriptor), current.a2 = memory_at(descriptor + 8);
      break;
    }
    case INTN: current.a0 = i->getIaOpcode() == BX_IA_INT3 ? 3 : i->Ib(); break;
    default: break;
  }
}

void guest_begins(bxInstruction_c *i)
{
  if (!started)
    start();
  Row before = current;
  running = i;
  current.rip = cpu()->get_laddr(BX_SEG_REG_CS, cpu()->prev_rip);
  if (!recording)
    return;
  settle();
  if (pending_input >= 0) {
    unsigned bytes = rows[pending_input].a0 >> 16 & 7;
    rows[pending_input].a1 = bytes == 4 ? (Bit32u) reg(0) : reg(0) & ((1 << 8 * bytes) - 1);
    pending_input = -1;
  }
  if (string_row >= 0) {
    Bit64u done = (Bit32u) (string_count - reg(1));
    rows[string_row].n = rows[string_row].a0 & REP ? done : 1;
    icount += rows[string_row].n;
    string_row = -1;
  }
  raised = false;
  Bit64u rip = current.rip;
  current.rip = before.rip, current.cpl = before.cpl, current.cr3 = before.cr3, current.implicit = 0;
  look_at_root();
  current.rip = rip;
  current.cpl = cpu()->sregs[BX_SEG_REG_CS].selector.rpl;
  if (!cpu()->cr0.get_PE())
    current.cpl = 0;
  current.cr3 = cpu()->cr3;
  current.implicit = 0;
  operands(i);
  Row saved = current;
  access(current.rip, FETCH);
  Bit64u last = current.rip + i->ilen() - 1;
  if ((last ^ current.rip) >> 12)
    access(last & ~(Bit64u) 0xFFF, FETCH);
  current = saved;
}

static void complete()
{
  if (current.kind == LGDT)
    current.a0 = cpu()->gdtr.base, current.a1 = cpu()->gdtr.limit;
  if (current.kind == LIDT)
    current.a0 = cpu()->idtr.base, current.a1 = cpu()->idtr.limit;
  if (current.kind != NONE && current.kind != MMIO_R && current.kind != MMIO_W)
    event(current.kind, current.a0, current.a1, current.a2);
  icount++;
  running = 0;
}

void guest_ends()
{
  if (!recording || !running)
    return;
  settle();
  complete();
}

void guest_repeats()
{
  if (!recording || !running)
    return;
  settle();
  icount++;
}

void guest_tables_change()
{
  generation++;
}

// ---- events

void guest_raises(unsigned vector, unsigned error)
{
  raised = true;
  raised_error = error;
}

void guest_is_interrupted(unsigned vector)
{
  if (!recording)
    return;
  settle();
  if (running && !raised)  // INT n, which retires
    return;
  Bit32u injected = cpu()->vmcs.vmentry_interr_info;
  bool again = (int) vector == delivered_again && !running && !raised;
  delivered_again = -1;
  current.cpl = cpu()->sregs[BX_SEG_REG_CS].selector.rpl;
  current.implicit = 0;
  current.cr3 = cpu()->cr3;
  if (!raised)
    current.rip = cpu()->get_laddr(BX_SEG_REG_CS, cpu()->gen_reg[BX_64BIT_REG_RIP].rrx);
  if (again || !cpu()->cr0.get_PE())
    ;
  else if (raised)
    event(EXC, vector, raised_error, vector == BX_PF_EXCEPTION ? cpu()->cr2 : 0);
  else if (injected >> 31) {
    unsigned type = injected >> 8 & 7;
    if (type == 0)
      event(IRQ, vector);
    else if (type == 3)
      event(EXC, vector, cpu()->vmcs.vmentry_excep_err_code, vector == BX_PF_EXCEPTION ? cpu()->cr2 : 0);
  }
  raised = false;
  running = 0;
  delivering = vector;
}

static bool memory_exit(unsigned reason)
{
  return reason == VMX_VMEXIT_EPT_VIOLATION || reason == VMX_VMEXIT_EPT_MISCONFIGURATION;
}

// Where the hypervisor's shadow tables lead: entries for devices hold the guest-physical address in their low half.
static Bit64u shadow_target(Bit64u laddr)
{
  Bit64u table = cpu()->cr3 & ADDRESS;
  int levels = long_mode() ? 4 : 3;
  for (int level = levels; level; level--) {
    Bit64u entry = 0;
    BX_MEM(0)->readPhysicalPage(cpu(), table + 8 * ((laddr >> (3 + 9 * level)) & 511), 8, &entry);
    if (level == 1)
      return (entry & 0xFFFFF000) | (laddr & 0xFFF);
    if (!(entry & PRESENT) || entry & LARGE)
      return 0;
    table = entry & ADDRESS;
  }
  return 0;
}

// After a PAM or SMRAM register of the host bridge was written, the hypervisor maps memory anew.
static void rearm_on_output()
{
  unsigned port = current.a0 & 0xFFFF, bytes = current.a0 >> 16 & 7;
  if (port == 0xCF8 && bytes == 4)
    config_address = current.a1;
  if (port < 0xCFC || port > 0xCFF || (config_address & 0xFFFFFF00) != 0x80000000)
    return;
  unsigned at = (config_address & 0xFC) + (port & 3);
  for (unsigned n = 0; n < bytes; n++)
    if ((at + n >= 0x59 && at + n <= 0x5F) || at + n == 0x72) {
      event(REARM, at, current.a1);
      std::fill(armed.begin(), armed.end(), 0);
      std::fill(fetched_region.begin(), fetched_region.end(), 0);
      rom_armed.clear();
      generation++;
      return;
    }
}

static bool writes(unsigned reason, Bit64u qualification, const Form &form)
{
  if (reason == VMX_VMEXIT_EPT_VIOLATION)
    return qualification & 2;
  return form.kind == MMIO_W;
}

void guest_exits(unsigned reason, Bit64u qualification)
{
  if (!started)
    start();
  Exit exit = {};
  exit.ticks = bx_pc_system.time_ticks();
  exit.icount = icount;
  exit.rip = cpu()->get_laddr(BX_SEG_REG_CS, cpu()->gen_reg[BX_64BIT_REG_RIP].rrx);
  if (running)
    exit.rip = current.rip;
  exit.info = qualification;
  exit.reason = reason;
  exit.rax = reg(0), exit.rcx = reg(1), exit.rdx = reg(2);
  Form form = running ? form_of(running) : Form {NONE, 0};
  exit.kind = form.kind;
  if (memory_exit(reason))
    exit.gpa = cpu()->VMread64(VMCS_64BIT_GUEST_PHYSICAL_ADDR);
  if (reason == VMX_VMEXIT_EXCEPTION_NMI) {
    exit.interruption = cpu()->VMread32(VMCS_32BIT_VMEXIT_INTERRUPTION_INFO);
    exit.error = cpu()->VMread32(VMCS_32BIT_VMEXIT_INTERRUPTION_ERR_CODE);
    if ((exit.interruption & 0xFF) == BX_PF_EXCEPTION && exit.error & 8)
      exit.gpa = shadow_target(qualification);
  }
  if (reason == VMX_VMEXIT_CR_ACCESS)
    exit.rax = reg(qualification >> 8 & 15);
  fwrite(&exit, sizeof exit, 1, exits_file);
  if (!recording)
    return;
  settle();
  host_generation++;
  if (cpu()->in_event)  // the hypervisor will inject it again
    delivered_again = delivering;
  raised = false;
  if (!running)
    return;
  switch (reason) {
    case VMX_VMEXIT_CPUID: case VMX_VMEXIT_HLT: case VMX_VMEXIT_INVD: case VMX_VMEXIT_INVLPG: case VMX_VMEXIT_RDPMC:
    case VMX_VMEXIT_RDTSC: case VMX_VMEXIT_VMCALL: case VMX_VMEXIT_CR_ACCESS: case VMX_VMEXIT_RDMSR:
    case VMX_VMEXIT_WRMSR: case VMX_VMEXIT_MWAIT: case VMX_VMEXIT_MONITOR: case VMX_VMEXIT_PAUSE: case VMX_VMEXIT_RDTSCP:
    case VMX_VMEXIT_WBINVD: case VMX_VMEXIT_XSETBV: case VMX_VMEXIT_INVPCID:
      complete();
      break;
    case VMX_VMEXIT_IO_INSTRUCTION:
      if (current.a0 & STRING) {
        spin = rows.size();
        event(current.kind, current.a0);
        string_row = rows.size() - 1;
        string_count = reg(1);
        break;
      }
      complete();
      if (current.kind == OUT)
        rearm_on_output();
      else if (rows.back().kind == IN && rows.back().n == 1)
        pending_input = rows.size() - 1;
      break;
    default:
      if (memory_exit(reason) && exit.gpa >= 0xA0000 && (exit.gpa < 0xC0000 || !in_memory(exit.gpa)) &&
          exit.gpa < 0xFFFC0000) {
        bool write = writes(reason, qualification, form);
        event(write ? MMIO_W : MMIO_R, exit.gpa, write ? stored_value(running) : 0, form.detail);
        icount++;
      }
  }
  running = 0;
}

void host_port(unsigned port, unsigned value)
{
  if (port != END_PORT)
    return;
  finish();
  exit(0);
}

#endif
