/* TCG plugin: which translation blocks of the kernel run between two marks that the guest's init sets.
 *
 * A mark is a NOP of eight bytes whose displacement says what it is (see guest_init.c). The trace is a file of 32-bit
 * words: the number of a block, or a mark with the top bit set; one is for user programs running. A second file describes each block: its address, the
 * length of each instruction, and the bytes of the last. A repeated string instruction is one instruction: the blocks
 * of its own that its second element and those behind it run are left out.
 *
 * The few declarations of qemu-plugin.h that are needed are repeated here, for Debian does not ship that header.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info_t qemu_info_t;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*exec_cb)(unsigned int, void *);
typedef void (*udata_cb)(qemu_plugin_id_t, void *);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, exec_cb, enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, exec_cb, enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, udata_cb, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { BEGIN = 0xA1, END = 0xA2, USER = 0xA4 };
static FILE *trace, *blocks;
static uint32_t count;
static volatile bool recording;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool in_user[8];

static void put(uint32_t word)
{
    fwrite(&word, sizeof word, 1, trace);
}

static void run(unsigned int cpu, void *number)
{
    if (recording)
        put((uint32_t)(uintptr_t)number | cpu << 28);
    in_user[cpu & 7] = false;
}

/* User programs leave one mark, however many blocks they run. */
static void run_user(unsigned int cpu, void *unused)
{
    if (recording && !in_user[cpu & 7])
        put(1u << 31 | (USER & 15) << 24 | cpu);
    in_user[cpu & 7] = true;
}

static void mark(unsigned int cpu, void *what)
{
    uint32_t word = (uint32_t)(uintptr_t)what;
    if (word >> 16 == BEGIN)
        recording = true;
    if (recording)
        put(1u << 31 | (word >> 16 & 15) << 24 | (word & 0xFFFF));
    if (word >> 16 == END)
        recording = false;
}

static bool repeated(const uint8_t *bytes, size_t size)
{
    size_t at = 0;
    bool prefix = false;
    for (; at < size && (bytes[at] == 0xF2 || bytes[at] == 0xF3 || (bytes[at] & 0xF0) == 0x40 || bytes[at] == 0x66); at++)
        prefix |= bytes[at] == 0xF2 || bytes[at] == 0xF3;
    if (!prefix || at >= size)
        return false;
    uint8_t op = bytes[at];
    return (op >= 0xA4 && op <= 0xA7) || (op >= 0xAA && op <= 0xAF) || (op >= 0x6C && op <= 0x6F);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    static const uint8_t nop[4] = {0x0F, 0x1F, 0x84, 0x00};
    size_t n = qemu_plugin_tb_n_insns(tb);
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        const uint8_t *bytes = qemu_plugin_insn_data(insn);
        uint32_t word;
        if (qemu_plugin_insn_size(insn) != 8 || memcmp(bytes, nop, 4))
            continue;
        memcpy(&word, bytes + 4, 4);
        if (word >> 24 == 0x56)
            qemu_plugin_register_vcpu_insn_exec_cb(insn, mark, QEMU_PLUGIN_CB_NO_REGS,
                                                   (void *)(uintptr_t)(word & 0xFFFFFF));
    }
    uint64_t address = qemu_plugin_tb_vaddr(tb);
    if (!(address >> 63)) {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, run_user, QEMU_PLUGIN_CB_NO_REGS, NULL);
        return;
    }
    struct qemu_plugin_insn *first = qemu_plugin_tb_get_insn(tb, 0), *last = qemu_plugin_tb_get_insn(tb, n - 1);
    if (repeated(qemu_plugin_insn_data(first), qemu_plugin_insn_size(first)))
        return;
    pthread_mutex_lock(&lock);
    uint32_t number = count++;
    fprintf(blocks, "%" PRIx64 " ", address);
    for (size_t i = 0; i < n; i++)
        fprintf(blocks, "%zx", qemu_plugin_insn_size(qemu_plugin_tb_get_insn(tb, i)));
    fputc(' ', blocks);
    const uint8_t *bytes = qemu_plugin_insn_data(last);
    for (size_t i = 0; i < qemu_plugin_insn_size(last); i++)
        fprintf(blocks, "%02x", bytes[i]);
    fputc('\n', blocks);
    pthread_mutex_unlock(&lock);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, run, QEMU_PLUGIN_CB_NO_REGS, (void *)(uintptr_t)number);
}

static void finished(qemu_plugin_id_t id, void *data)
{
    fclose(trace);
    fclose(blocks);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    char name[1024];
    const char *out = argc && !strncmp(argv[0], "out=", 4) ? argv[0] + 4 : "guest";
    snprintf(name, sizeof name, "%s.trace", out);
    trace = fopen(name, "wb");
    snprintf(name, sizeof name, "%s.blocks", out);
    blocks = fopen(name, "w");
    if (!trace || !blocks)
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
