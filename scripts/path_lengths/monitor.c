// The first process of a small Linux: loads KVM and runs the loops of guest.S as guests, each between two marks that
// the instrumentation of Bochs sees. A second argument on the kernel's command line chooses tests by their names.
//
// Port 0x8900 takes marks, port 0x8901 what is to be written to the file `guest.out`.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

enum {
	MARK_PORT = 0x8900, TEXT_PORT, END = -1,
	MEMORY = 64 << 20, CODE = 0x1000, STACK = 0x9000, GDT = 0xA000, IDT = 0xB000, ROOT = 0x10000, OTHER_ROOT = 0x50000,
	RANGE = 0x2000000,		// pages that tests touch
	QEMU = 100, HOST = 200, DEVICE = 0xD0000000, EVENT = 0xD0100000, FAST_EVENT = 0xD0100008,
	COALESCED = 0xD0100010, PRIVATE = 16,
};
enum {
	X2APIC = 1, UNTOUCHED = 2, TWO = 4, LOG = 8, SHARED_TABLES = 16, SETS = 32, DROPS = 64, EVENTS = 128, AGAIN = 256,
	EMULATED = 512, AWAITED = 1024,
};

extern const char guest_start[], guest_end[], handler_interrupt[], handler_ud[], handler_fault[];

static void say(const char *format, ...)
{
	char line[512];
	va_list list;
	va_start(list, format);
	int n = vsnprintf(line, sizeof line, format, list);
	va_end(list);
	outsb(TEXT_PORT, line, n);
}

static void check(long result, const char *what)
{
	if (result >= 0)
		return;
	say("failed: %s: %m\n", what);
	sync();
	outl(END, MARK_PORT);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void copy_out(const char *path, const char *only)
{
	char line[512];
	FILE *file = fopen(path, "r");
	while (file && fgets(line, sizeof line, file))
		if (!only || strstr(line, only))
			outsb(TEXT_PORT, line, strlen(line));
	if (file)
		fclose(file);
}

static void load(const char *name, const char *parameters)
{
	char path[64];
	snprintf(path, sizeof path, "/%s.ko", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	check(fd, path);
	check(syscall(SYS_finit_module, fd, parameters, 0), name);
	close(fd);
}

struct machine {
	int vm, cpu[2], size, event, fast_event;
	struct kvm_run *run[2];
	char *memory;
	struct kvm_cpuid2 *cpuid;
};
static int kvm;

static uint64_t *entry(char *memory, uint64_t table, unsigned n)
{
	return (uint64_t *) (memory + table) + n;
}

// Tables at `root`: the memory and the devices at their own addresses; leaf tables of 4 KiB pages.
static void make_tables(char *memory, uint64_t root)
{
	uint64_t upper = root + 0x1000, low = root + 0x2000, high = root + 0x3000, leaf = root + 0x4000;
	*entry(memory, root, 0) = upper | 7;
	*entry(memory, upper, 0) = low | 7;
	*entry(memory, upper, 3) = high | 7;
	for (unsigned n = 0; n < MEMORY >> 21; n++)
		*entry(memory, low, n) = (leaf + n * 0x1000) | 7;
	for (unsigned n = 0; n < MEMORY >> 12; n++)
		*entry(memory, leaf, n) = (uint64_t) n << 12 | 0x67;
	for (uint64_t n = 0; n < 512; n++)
		*entry(memory, high, n) = (0xC0000000 + (n << 21)) | 0xE7;
}

static void gate(char *memory, unsigned vector, const char *handler)
{
	uint64_t address = CODE + (handler - guest_start);
	*entry(memory, IDT, 2 * vector) = (address & 0xFFFF) | 8 << 16 | 0x8E00ULL << 32 | (address >> 16) << 48;
	*entry(memory, IDT, 2 * vector + 1) = address >> 32;
}

static void set_slot(struct machine *m, unsigned slot, uint64_t address, uint64_t size, char *memory, unsigned flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = address, .memory_size = size,
		.userspace_addr = (uint64_t) memory,
	};
	check(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region), "memory region");
}

static void set_up_cpu(struct machine *m, int n, const char *code, uint64_t count, uint64_t argument, unsigned flags)
{
	struct kvm_sregs s;
	m->cpu[n] = ioctl(m->vm, KVM_CREATE_VCPU, n);
	check(m->cpu[n], "vCPU");
	m->run[n] = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, m->cpu[n], 0);
	check(ioctl(m->cpu[n], KVM_SET_CPUID2, m->cpuid), "CPUID");
	check(ioctl(m->cpu[n], KVM_GET_SREGS, &s), "sregs");
	struct kvm_segment code_segment = {
		.limit = 0xFFFFFFFF, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1,
	};
	struct kvm_segment data = code_segment;
	data.type = 3;
	data.selector = 16;
	data.l = 0;
	data.db = 1;
	s.cs = code_segment;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.gdt.base = GDT;
	s.gdt.limit = 23;
	s.idt.base = IDT;
	s.idt.limit = 4095;
	s.cr0 = 0x80010033;
	s.cr3 = ROOT;
	s.cr4 = 0x40620;		// PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
	s.efer = 0x500;
	if (flags & X2APIC)
		s.apic_base |= 0xC00;
	check(ioctl(m->cpu[n], KVM_SET_SREGS, &s), "sregs");
	struct kvm_regs r = {
		.rip = CODE + (code - guest_start), .rsp = STACK - 0x400 * n, .rflags = 2, .rdi = count, .rsi = argument,
		.r10 = ROOT + 0x4000 + (argument >> 9 & 0x7FFFF8),
	};
	if (flags & SHARED_TABLES)
		r.r10 = ROOT + 0x2000 + 8 * 20;
	check(ioctl(m->cpu[n], KVM_SET_REGS, &r), "regs");
	struct kvm_mp_state running = {.mp_state = KVM_MP_STATE_RUNNABLE};
	check(ioctl(m->cpu[n], KVM_SET_MP_STATE, &running), "runnable");
}

static void add_event(struct machine *m, uint64_t address, unsigned size, unsigned flags, int fd)
{
	struct kvm_ioeventfd event = {.addr = address, .len = size, .fd = fd, .flags = flags};
	check(ioctl(m->vm, KVM_IOEVENTFD, &event), "ioeventfd");
}

static void make_machine(struct machine *m, unsigned flags)
{
	m->vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(m->vm, "VM");
	check(ioctl(m->vm, KVM_SET_TSS_ADDR, 0xFFFBD000), "TSS");
	check(ioctl(m->vm, KVM_CREATE_IRQCHIP, 0), "irqchip");
	struct kvm_pit_config pit = {0};
	check(ioctl(m->vm, KVM_CREATE_PIT2, &pit), "PIT");
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(m->memory, MEMORY, MADV_NOHUGEPAGE);
	for (uint64_t at = 0; at < (flags & UNTOUCHED ? RANGE : MEMORY); at += 4096)
		m->memory[at] = 0;
	memcpy(m->memory + CODE, guest_start, guest_end - guest_start);
	make_tables(m->memory, ROOT);
	make_tables(m->memory, OTHER_ROOT);
	*entry(m->memory, GDT, 1) = 0xAF9B000000FFFFULL;
	*entry(m->memory, GDT, 2) = 0xCF93000000FFFFULL;
	gate(m->memory, 6, handler_ud);
	gate(m->memory, 14, handler_fault);
	for (unsigned vector = 0x40; vector < 0x43; vector++)
		gate(m->memory, vector, handler_interrupt);
	set_slot(m, 0, 0, MEMORY, m->memory, flags & LOG ? KVM_MEM_LOG_DIRTY_PAGES : 0);
	if (flags & EVENTS) {
		add_event(m, EVENT, 4, 0, m->event = eventfd(0, EFD_NONBLOCK));
		add_event(m, FAST_EVENT, 0, 0, m->fast_event = eventfd(0, EFD_NONBLOCK));
		struct kvm_coalesced_mmio_zone zone = {.addr = 0x70, .size = 1, .pio = 1};
		check(ioctl(m->vm, KVM_REGISTER_COALESCED_MMIO, &zone), "coalesced");
		zone = (struct kvm_coalesced_mmio_zone) {.addr = COALESCED, .size = 4};	// Linux 4.19 has none of ports
		check(ioctl(m->vm, KVM_REGISTER_COALESCED_MMIO, &zone), "coalesced");
		add_event(m, 0x600, 1, KVM_IOEVENTFD_FLAG_PIO, eventfd(0, EFD_NONBLOCK));
	}
}

static void run(struct machine *m, int n)
{
	struct kvm_run *state = m->run[n];
	for (;;) {
		int result = ioctl(m->cpu[n], KVM_RUN, 0);
		if (result < 0)
			check(result, "KVM_RUN");
		if (state->exit_reason == KVM_EXIT_IO && state->io.port == 0x10)
			return;
		if (state->exit_reason != KVM_EXIT_IO && state->exit_reason != KVM_EXIT_MMIO) {
			struct kvm_regs r;
			ioctl(m->cpu[n], KVM_GET_REGS, &r);
			say("unexpected exit %u (%llx) at %llx\n", state->exit_reason, state->hw.hardware_exit_reason, r.rip);
			return;
		}
	}
}

static struct machine machine;

static void *second(void *unused)
{
	(void) unused;
	run(&machine, 1);
	return NULL;
}

static void *server(void *unused)
{
	uint64_t times;
	struct sched_param first = {.sched_priority = 1};	// it has run when the next event comes
	(void) unused;
	check(sched_setscheduler(0, SCHED_FIFO, &first), "SCHED_FIFO");
	for (;;)
		check(read(machine.event, &times, sizeof times), "event");
	return NULL;
}

#define TEST(name) extern const char test_##name[];
TEST(vmcall) TEST(cpuid) TEST(rdmsr) TEST(wrmsr) TEST(cr0) TEST(cr4) TEST(dr) TEST(xsetbv) TEST(wbinvd) TEST(pause)
TEST(ud) TEST(out) TEST(in) TEST(in_emulated) TEST(outs) TEST(store) TEST(load) TEST(touch) TEST(touch8) TEST(read) TEST(device_pages)
TEST(cr3) TEST(cr3_two) TEST(invlpg) TEST(write_leaf) TEST(write_leaf_of_64) TEST(write_leaves) TEST(write_directory)
TEST(true_fault) TEST(halt) TEST(self_ipi) TEST(apic_msr) TEST(apic_memory) TEST(send) TEST(answer) TEST(spin)

struct test {
	const char *name, *code;
	uint64_t count, argument;
	unsigned flags;
};
static const struct test TESTS[] = {
	{"vmcall", test_vmcall, 64, 0, 0},
	{"cpuid", test_cpuid, 64, 0, 0},
	{"rdmsr", test_rdmsr, 64, 0x1A0, 0},
	{"wrmsr", test_wrmsr, 64, 0x1A0, 0},
	{"rdmsr_pat", test_rdmsr, 64, 0x277, 0},
	{"wrmsr_pat", test_wrmsr, 64, 0x277, 0},
	{"cr0", test_cr0, 64, 0, 0},
	{"cr4", test_cr4, 64, 0, 0},
	{"dr", test_dr, 64, 0, 0},
	{"xsetbv", test_xsetbv, 64, 0, 0},
	{"wbinvd", test_wbinvd, 64, 0, 0},
	{"ud", test_ud, 64, 0, 0},
	{"out_kernel", test_out, 64, 0x21, 0},
	{"in_kernel", test_in, 64, 0x21, 0},
	{"out_event", test_out, 64, 0x600, EVENTS},
	{"out_coalesced", test_out, 64, 0x70, EVENTS},
	{"out_user", test_out, 64, 0x80, 0},
	{"in_user", test_in, 64, 0x80, 0},
	{"outs_user", test_outs, 64, 0x80, 0},
	{"in_emulated", test_in_emulated, 64, 0x21, EMULATED},
	{"in_emulated_user", test_in_emulated, 64, 0x80, EMULATED},
	{"store_user", test_store, 64, DEVICE, 0},
	{"load_user", test_load, 64, DEVICE, 0},
	{"store_event", test_store, 64, EVENT, EVENTS},
	{"store_event_awaited", test_store, 64, EVENT, EVENTS | AWAITED},
	{"store_fast_event", test_store, 64, FAST_EVENT, EVENTS},
	{"device_pages", test_device_pages, 64, DEVICE, 0},
	{"touch", test_touch, 256, RANGE, AGAIN},
	{"read", test_read, 256, RANGE, AGAIN},
	{"touch_untouched", test_touch, 256, RANGE, UNTOUCHED},
	{"touch_logged", test_touch, 256, RANGE, LOG},
	{"sets", test_touch, 256, RANGE, SETS | AGAIN},
	{"drops", test_touch, 256, RANGE, DROPS},
	{"cr3", test_cr3, 64, 0, 0},
	{"true_fault", test_true_fault, 64, 0x5000000, 0},
	{"cr3_two", test_cr3_two, 32, OTHER_ROOT, 0},
	{"touch8", test_touch8, 256, RANGE, AGAIN},
	{"invlpg", test_invlpg, 64, RANGE, 0},
	{"write_leaf", test_write_leaf, 64, RANGE, 0},
	{"write_leaf_of_64", test_write_leaf_of_64, 64, RANGE, 0},
	{"write_leaves", test_write_leaves, 32, RANGE, 0},
	{"write_directory", test_write_directory, 64, RANGE, SHARED_TABLES},
	{"apic_msr", test_apic_msr, 64, 0, X2APIC},
	{"apic_memory", test_apic_memory, 64, 0, 0},
	{"self_ipi", test_self_ipi, 64, 0, X2APIC},
	{"halt", test_halt, 32, 300000, X2APIC},
	{"send", test_send, 32, 0, X2APIC | TWO},
	{"spin", test_spin, 100000000, 0, 0},
	{"pause", test_pause, 200000, 0, 0},
	{"store_coalesced", test_store, 64, COALESCED, EVENTS},
};

static void set(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	check(fd, path);
	check(write(fd, value, strlen(value)), path);
	close(fd);
}

// Whether an instruction behind UD2 and "kvm" is executed by the emulator. Linux 4.19 is told when KVM is loaded.
#define PREFIX "force_emulation_prefix"
static const char *only_emulated;	// `prefix=1` on the command line: it is told to, and tests of that are run

static bool can_emulate(void)
{
	struct stat s;
	return only_emulated || (!stat("/sys/module/kvm/parameters/" PREFIX, &s) && s.st_mode & 0200);
}

static void set_emulation(const char *flag)
{
	if (!only_emulated)
		set("/sys/module/kvm/parameters/" PREFIX, flag);
}

static void dirty_log(struct machine *m, unsigned slot)
{
	static uint64_t bits[MEMORY / 4096 / 64];
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bits};
	check(ioctl(m->vm, KVM_GET_DIRTY_LOG, &log), "dirty log");
}

static void test(const struct test *t, unsigned number)
{
	struct machine *m = &machine;
	pthread_t thread;
	say("test %u %s %lu\n", number, t->name, (unsigned long) t->count);
	make_machine(m, t->flags);
	set_up_cpu(m, 0, t->code, t->count, t->argument, t->flags);
	if (t->flags & TWO) {
		set_up_cpu(m, 1, test_answer, t->count, 0, t->flags);
		pthread_create(&thread, NULL, second, NULL);
		usleep(50000);
	}
	if (t->flags & AWAITED) {
		fcntl(m->event, F_SETFL, 0);
		pthread_create(&thread, NULL, server, NULL);
		usleep(10000);
	}
	if (t->flags & (LOG | DROPS | AGAIN)) {		// everything was mapped once
		run(m, 0);
		struct kvm_regs r;
		ioctl(m->cpu[0], KVM_GET_REGS, &r);
		r.rip = CODE + (t->code - guest_start);
		r.rdi = t->count;
		r.rsi = t->argument;
		ioctl(m->cpu[0], KVM_SET_REGS, &r);
	}
	if (t->flags & AGAIN && !(t->flags & SETS)) {	// and is no more, but the host has used its pages
		set_slot(m, 0, 0, 0, m->memory, 0);
		set_slot(m, 0, 0, MEMORY, m->memory, 0);
	}
	if (t->flags & EMULATED)
		set_emulation("1");
	outl(number, MARK_PORT);
	if (t->flags & LOG)
		dirty_log(m, 0);
	if (t->flags & SETS) {
		set_slot(m, 0, 0, MEMORY, m->memory, KVM_MEM_LOG_DIRTY_PAGES);
		set_slot(m, 0, 0, MEMORY, m->memory, 0);
		set_slot(m, 1, (uint64_t) PRIVATE << 28, 0x40000, m->memory, KVM_MEM_LOG_DIRTY_PAGES);
		dirty_log(m, 1);		// one word of bits
		set_slot(m, 1, (uint64_t) PRIVATE << 28, 0, m->memory, 0);
	}
	if (t->flags & DROPS)
		for (unsigned n = 0; n < t->count; n++)
			madvise(m->memory + t->argument + 4096 * n, 4096, MADV_DONTNEED);
	run(m, 0);
	if (t->flags & LOG)
		dirty_log(m, 0);
	outl(END, MARK_PORT);
	if (t->flags & EMULATED)
		set_emulation("0");
	if (t->flags & AWAITED)
		pthread_cancel(thread);
	if (t->flags & (TWO | AWAITED))
		pthread_join(thread, NULL);
	for (int n = 0; n < (t->flags & TWO ? 2 : 1); n++) {
		munmap(m->run[n], m->size);
		close(m->cpu[n]);
	}
	munmap(m->memory, MEMORY);
	close(m->vm);
}

// QEMU with a ROM that does nothing but the instruction of a test; marks from QEMU + n on.
static const struct { const char *name; unsigned char code[16]; } ROMS[] = {
	{"qemu_absent", {0xBA, 0x34, 0x12, 0x66, 0xED, 0xEB, 0xFC}},	// mov $0x1234, %dx; 1: in %dx, %eax; jmp 1b
	{"qemu_cmos", {0xBA, 0x71, 0x00, 0xEC, 0xEB, 0xFD}},		// mov $0x71, %dx; 1: in %dx, %al; jmp 1b
	{"qemu_out", {0xBA, 0x80, 0x00, 0xEE, 0xEB, 0xFD}},		// mov $0x80, %dx; 1: out %al, %dx; jmp 1b
};

static void qemu(unsigned n)
{
	static char rom[65536];
	say("test %u %s\n", QEMU + n, ROMS[n].name);
	memcpy(rom + 0xFFF0, ROMS[n].code, 16);
	int fd = open("/rom", O_WRONLY | O_CREAT | O_TRUNC, 0644);
	check(write(fd, rom, sizeof rom), "rom");
	close(fd);
	int child = fork();
	if (!child) {
		fd = open("/dev/ttyS0", O_WRONLY);
		dup2(fd, 1);
		dup2(fd, 2);
		execl("/usr/bin/qemu-system-x86_64", "qemu", "-accel", "kvm", "-cpu", "host", "-M", "pc", "-m", "16", "-nodefaults",
		      "-display", "none", "-monitor", "none", "-bios", "/rom", NULL);
		_exit(1);
	}
	sleep(1);			// some 3,000 million instructions: Linux takes the TSC to be faster than it is
	outl(QEMU + n, MARK_PORT);
	usleep(1500);
	outl(END, MARK_PORT);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

// What the host does to pages of a process, without a guest; marks from HOST + n on.
static char *pages(unsigned long count, int advice)
{
	char *all = mmap(NULL, (count << 12) + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	all = (char *) (((unsigned long) all + (2 << 20) - 1) & -(2UL << 20));
	check(madvise(all, count << 12, advice), "madvise");
	return all;
}

static void fill(char *all, unsigned long count, unsigned long stride, unsigned long alike)
{
	for (unsigned long n = 0; n < count; n += stride)
		memset(all + (n << 12), (int) (n / alike + 1), 4096);
}

static unsigned long number(const char *path)
{
	char text[32] = {0};
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	check(read(fd, text, sizeof text - 1), path);
	close(fd);
	return strtoul(text, NULL, 10);
}

static void measure(unsigned n, const char *path, const char *value, const char *counter, unsigned long goal)
{
	goal += number(counter);
	outl(HOST + n, MARK_PORT);
	set(path, value);
	for (unsigned tries = 0; number(counter) < goal && tries < 200; tries++)
		usleep(1000);
	outl(END, MARK_PORT);
	say("%s %lu\n", counter, number(counter));
}

#define KSM "/sys/kernel/mm/ksm/"
#define HUGE "/sys/kernel/mm/transparent_hugepage/"

static void merge(unsigned n, unsigned long count)	// pairs of pages that hold the same
{
	char *all = pages(count, MADV_NOHUGEPAGE);
	fill(all, count, 1, 2);
	check(madvise(all, count << 12, MADV_MERGEABLE), "mergeable");
	set(KSM "pages_to_scan", "10000");
	set(KSM "sleep_millisecs", "1");
	measure(n, KSM "run", "1", KSM "pages_sharing", count / 2);
	set(KSM "run", "2");
	munmap(all, count << 12);
}

static void look_for_same(unsigned n, unsigned long count)	// pages that all differ, for the first time
{
	char *all = pages(count, MADV_NOHUGEPAGE);
	for (unsigned long k = 0; k < count; k++)
		((unsigned long *) all)[k << 9] = k + 1;
	check(madvise(all, count << 12, MADV_MERGEABLE), "mergeable");
	set(KSM "pages_to_scan", "10000");
	set(KSM "sleep_millisecs", "1000");
	measure(n, KSM "run", "1", KSM "full_scans", 1);
	set(KSM "run", "2");
	munmap(all, count << 12);
}

static void collapse(unsigned n, unsigned long stride)	// eight regions of 2 MiB with a page in each `stride`
{
	char *all = pages(8 * 512, MADV_NOHUGEPAGE);
	fill(all, 8 * 512, stride, 1);
	set(HUGE "enabled", "always");
	set(HUGE "khugepaged/pages_to_scan", "100000");
	set(HUGE "khugepaged/scan_sleep_millisecs", "1");
	set(HUGE "khugepaged/alloc_sleep_millisecs", "1");
	check(madvise(all, 8 << 21, MADV_HUGEPAGE), "huge");
	munmap(pages(1, MADV_NOHUGEPAGE), 4096);	// the kernel's lists have all pages then
	measure(n, HUGE "khugepaged/scan_sleep_millisecs", "1", HUGE "khugepaged/pages_collapsed", 8);
	munmap(all, 8 << 21);
}

static void reclaim(unsigned n, unsigned long count)	// of a control group, to a disk in memory
{
	static char header[4096];
	uint32_t version_and_last[2] = {1, 16383};
	char amount[16];
	memcpy(header + 1024, version_and_last, sizeof version_and_last);
	memcpy(header + 4086, "SWAPSPACE2", 10);
	int fd = open("/dev/ram0", O_WRONLY);
	check(fd, "/dev/ram0");
	check(write(fd, header, sizeof header), "swap space");
	close(fd);
	check(swapon("/dev/ram0", 0), "swapon");
	mkdir("/groups", 0755);
	check(mount("none", "/groups", "cgroup2", 0, NULL), "cgroup2");
	set("/groups/cgroup.subtree_control", "+memory");
	mkdir("/groups/one", 0755);
	set("/groups/one/cgroup.procs", "0");
	char *all = pages(8 * count, MADV_NOHUGEPAGE);
	fill(all, 8 * count, 1, 1);
	snprintf(amount, sizeof amount, "%lu", count << 12);
	outl(HOST + n, MARK_PORT);
	fd = open("/groups/one/memory.reclaim", O_WRONLY);
	if (fd < 0) {			// Linux before 5.19: what the group may keep
		snprintf(amount, sizeof amount, "%lu", number("/groups/one/memory.current") - (count << 12));
		fd = open("/groups/one/memory.high", O_WRONLY);
	}
	check(fd, "reclaim");
	if (write(fd, amount, strlen(amount)) < 0)
		say("reclaim: %m\n");
	outl(END, MARK_PORT);
	copy_out("/groups/one/memory.stat", "pgs");
	copy_out("/proc/swaps", NULL);
}

static const struct {
	const char *name;
	void (*run)(unsigned, unsigned long);
	unsigned long count;
} HOSTS[] = {
	{"look_for_same", look_for_same, 512},
	{"merge", merge, 512},
	{"collapse_full", collapse, 1},
	{"collapse_half", collapse, 2},
	{"collapse_few", collapse, 64},
	{"reclaim", reclaim, 1024},
};

int main(void)
{
	static char line[1024], ept[64];
	check(iopl(3), "iopl");
	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	int fd = open("/proc/cmdline", O_RDONLY);
	check(read(fd, line, sizeof line - 1), "cmdline");
	close(fd);
	const char *only = strstr(line, "tests="), *paging = strstr(line, "vtx=");
	snprintf(ept, sizeof ept, "preemption_timer=0 enable_apicv=0 pml=0 %s", paging && paging[4] == '0' ? "ept=0" : "");
	load("irqbypass", "");
	only_emulated = strstr(line, "prefix=1");
	load("kvm", only_emulated ? "halt_poll_ns=0 " PREFIX "=1" : "halt_poll_ns=0");
	load("kvm-intel", ept);
	if (strstr(line, "hosts=1"))
		load("brd", "rd_nr=1 rd_size=65536");
	copy_out("/proc/kallsyms", NULL);
	say("parameters %s\n", ept);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	check(kvm, "/dev/kvm");
	machine.size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	machine.cpuid = calloc(1, sizeof *machine.cpuid + 128 * sizeof(struct kvm_cpuid_entry2));
	machine.cpuid->nent = 128;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, machine.cpuid), "supported CPUID");
	for (unsigned n = 0; n < sizeof ROMS / sizeof *ROMS && strstr(line, "qemu=1"); n++)
		qemu(n);
	for (unsigned n = 0; n < sizeof TESTS / sizeof *TESTS; n++) {
		char name[64];
		bool emulated = TESTS[n].flags & EMULATED;
		snprintf(name, sizeof name, ",%s,", TESTS[n].name);
		if ((!only || strstr(only, name)) && (emulated ? can_emulate() : !only_emulated))
			test(TESTS + n, n);
	}
	for (unsigned n = 0; n < sizeof HOSTS / sizeof *HOSTS && strstr(line, "hosts=1"); n++) {
		say("test %u %s\n", HOST + n, HOSTS[n].name);
		HOSTS[n].run(n, HOSTS[n].count);
	}
	say("done\n");
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}
