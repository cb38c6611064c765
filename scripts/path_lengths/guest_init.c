/* The first program of the measured guest: loops of system calls and page faults between marks.
 *
 * Each loop runs WARM rounds unmarked and ROUNDS marked; the plugin records which blocks of the kernel they run.
 * A mark is a NOP of eight bytes whose displacement is 0x56, the kind, and 16 bits: which loop, or nothing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WARM = 60, ROUNDS = 60, PAGE = 4096 }; /* folios join the LRU lists by fifteens: a round has its share */

#define MARK(kind, id) __asm__ volatile(".byte 0x0f, 0x1f, 0x84, 0x00\n.long 0x56000000 | %c0 << 16 | %c1" : : "i"(kind), "i"(id) : "memory")
#define BEGIN(id) MARK(0xA1, id)
#define END(id) MARK(0xA2, id)
#define ROUND() MARK(0xA3, 0)
#define LOOP_OF(warm, rounds, id, name, ...) \
    do { \
        printf("loop %d %s\n", id, name); \
        fflush(stdout); \
        for (int round = 0; round < (warm); round++) { __VA_ARGS__; } \
        BEGIN(id); \
        for (int round = 0; round < (rounds); round++) { ROUND(); __VA_ARGS__; } \
        END(id); \
    } while (0)
#define LOOP(id, name, ...) LOOP_OF(WARM, ROUNDS, id, name, __VA_ARGS__)

static char *area;
static volatile int shots;

static char *map(size_t pages, int flags)
{
    char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (at == MAP_FAILED)
        perror("mmap");
    return at;
}

static void touch(char *at, size_t pages)
{
    for (size_t page = 0; page < pages; page++)
        *(volatile char *)(at + page * PAGE) = 1;
}

static void handler(int number)
{
    shots++;
}

static void fault_handler(int number, siginfo_t *information, void *context)
{
    mprotect(area, PAGE, PROT_READ | PROT_WRITE);
}

static void load_modules(void)
{
    char name[128];
    FILE *list = fopen("/modules/list", "r");
    while (list && fscanf(list, "%127s", name) == 1) {
        int file = open(name, O_RDONLY);
        if (syscall(SYS_finit_module, file, "", 0))
            perror(name);
        close(file);
    }
}

/* The functions of the kernel and their addresses, to the second serial port. */
static void print_symbols(void)
{
    char line[256];
    FILE *in = fopen("/proc/kallsyms", "r"), *out = fopen("/dev/ttyS1", "w");
    while (fgets(line, sizeof line, in))
        if (line[17] == 't' || line[17] == 'T' || line[17] == 'w' || line[17] == 'W')
            fputs(line, out);
    fclose(out);
    fclose(in);
}

static void bring_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int descriptor = socket(AF_INET, SOCK_DGRAM, 0);
    ioctl(descriptor, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    if (ioctl(descriptor, SIOCSIFFLAGS, &request))
        perror("lo");
    close(descriptor);
}

static void calls(void)
{
    char byte = 0;
    struct stat what;
    int zero = open("/dev/zero", O_RDONLY), null = open("/dev/null", O_WRONLY);
    LOOP(1, "getppid", syscall(SYS_getppid));
    LOOP(2, "read", read(zero, &byte, 1));
    LOOP(3, "write", write(null, &byte, 1));
    mkdir("/disk/aaaaaa", 0755);
    mkdir("/disk/aaaaaa/bbbbbb", 0755);
    mkdir("/disk/aaaaaa/bbbbbb/cccccc", 0755);
    close(open("/disk/aaaaaa/dddddd", O_CREAT | O_RDWR, 0644));
    close(open("/disk/aaaaaa/bbbbbb/cccccc/dddddd", O_CREAT | O_RDWR, 0644));
    sync();
    LOOP(4, "stat of 3 components", syscall(SYS_stat, "/disk/aaaaaa/dddddd", &what));
    LOOP(5, "stat of 5 components", syscall(SYS_stat, "/disk/aaaaaa/bbbbbb/cccccc/dddddd", &what));
    LOOP(6, "open and close of 3 components", syscall(SYS_close, syscall(SYS_open, "/disk/aaaaaa/dddddd", O_RDONLY)));
    LOOP(7, "open and close of 5 components",
         syscall(SYS_close, syscall(SYS_open, "/disk/aaaaaa/bbbbbb/cccccc/dddddd", O_RDONLY)));
    struct sigaction action = {.sa_handler = handler};
    sigaction(SIGUSR1, &action, NULL);
    LOOP(8, "sigaction", sigaction(SIGUSR1, &action, NULL));
    pid_t self = getpid();
    LOOP(9, "kill with signal 0", syscall(SYS_kill, self, 0));
    LOOP(10, "signal caught", syscall(SYS_kill, self, SIGUSR1));
    LOOP(11, "yield alone", sched_yield());
    struct timespec moment = {0, 50000};
    LOOP(12, "nanosleep", nanosleep(&moment, NULL));
    LOOP(13, "time passes", for (volatile long n = 0; n < 1000000; n++));
}

/* Descriptors of sockets that are connected, of pipes or of files, as lmbench's lat_select has them. */
static void selects(void)
{
    static int sockets[256];
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof name;
    int server = socket(AF_INET, SOCK_STREAM, 0);
    bind(server, (struct sockaddr *)&name, sizeof name);
    listen(server, 200);
    getsockname(server, (struct sockaddr *)&name, &size);
    int one = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(one, (struct sockaddr *)&name, sizeof name))
        perror("connect");
    int other = accept(server, NULL, NULL);
    int highest = 0;
    for (int n = 0; n < 100; n++)
        if ((sockets[n] = dup(one)) > highest)
            highest = sockets[n];
    struct timeval none = {0, 0};
    fd_set reading, again;
#define SELECT(id, name, n) \
    FD_ZERO(&reading); \
    for (int i = 0; i < n; i++) FD_SET(sockets[i], &reading); \
    LOOP(id, name, again = reading; none.tv_sec = none.tv_usec = 0; select(sockets[n - 1] + 1, &again, NULL, NULL, &none))
    SELECT(20, "select of 10 sockets", 10);
    SELECT(21, "select of 100 sockets", 100);
    char byte = 0;
    LOOP(22, "a byte through TCP", write(one, &byte, 1); read(other, &byte, 1));
    int on = 1, off = 0;
    LOOP(25, "a timer added and deleted", setsockopt(one, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
         setsockopt(one, SOL_SOCKET, SO_KEEPALIVE, &off, sizeof off));
    for (int n = 0; n < 100; n++)
        close(sockets[n]);
    int file = open("/disk/aaaaaa/dddddd", O_RDONLY);
    for (int n = 0; n < 100; n++)
        sockets[n] = dup(file);
    SELECT(23, "select of 10 files", 10);
    SELECT(24, "select of 100 files", 100);
    for (int n = 0; n < 100; n++)
        close(sockets[n]);
    close(file);
    close(one);
    close(other);
    close(server);
}

static void memory(void)
{
    char *pages = map(2 * (WARM + ROUNDS), 0);
    touch(pages, 1);
    char *next = pages;
    LOOP(30, "first write to a page", next += PAGE; *(volatile char *)next = 1);
    pages = map(WARM + ROUNDS + 1, MAP_POPULATE);
    int hold[2];
    pipe(hold);
    pid_t child = fork();
    if (!child) {
        char byte;
        read(hold[0], &byte, 1);
        _exit(0);
    }
    next = pages;
    LOOP(31, "write to a shared page", *(volatile char *)next = 1; next += PAGE);
    write(hold[1], "", 1);
    waitpid(child, NULL, 0);
    pages = map(WARM + ROUNDS + 1, MAP_POPULATE);
    if (!(child = fork()))
        _exit(0);
    waitpid(child, NULL, 0);
    next = pages;
    LOOP(32, "write to a page that was shared", *(volatile char *)next = 1; next += PAGE);
    char *much = map(64, MAP_POPULATE);
    LOOP(33, "protect 1 page", mprotect(much + 8 * PAGE, PAGE, PROT_READ);
         mprotect(much + 8 * PAGE, PAGE, PROT_READ | PROT_WRITE));
    LOOP(34, "protect 32 pages", mprotect(much + 8 * PAGE, 32 * PAGE, PROT_READ);
         mprotect(much + 8 * PAGE, 32 * PAGE, PROT_READ | PROT_WRITE));
    touch(much, 64);
    LOOP(35, "map and unmap 1 page", much = map(1, 0); touch(much, 1); munmap(much, PAGE));
    LOOP(36, "map and unmap 32 pages", much = map(32, 0); touch(much, 32); munmap(much, 32 * PAGE));
    LOOP_OF(1, 2, 37, "map and unmap 8192 pages", much = map(8192, 0); touch(much, 8192); munmap(much, 8192 * PAGE));
    area = map(1, MAP_POPULATE);
    struct sigaction action = {.sa_sigaction = fault_handler, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    LOOP(38, "signal of a protection fault", mprotect(area, PAGE, PROT_READ); *(volatile char *)area = 1);
    signal(SIGSEGV, SIG_DFL);
}

static void files(void)
{
    int file = open("/disk/file", O_RDWR | O_CREAT, 0644), one = open("/disk/page", O_RDWR | O_CREAT, 0644);
    char block[PAGE] = {1};
    for (int page = 0; page < 256; page++)
        write(file, block, PAGE);
    write(one, block, PAGE);
    sync();
    char *at;
    volatile char sink;
    LOOP(40, "map, msync and unmap a file", at = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
         syscall(SYS_msync, at, 16 * PAGE, MS_INVALIDATE); munmap(at, 16 * PAGE));
    char *table = mmap(NULL, 512 * PAGE, PROT_READ, MAP_SHARED, file, 0);
    sink = *table;
    LOOP(41, "read of a page of a file of 1 page", at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, one, 0);
         sink = *(volatile char *)at; munmap(at, PAGE));
    LOOP(42, "read of a page of a file, 16 around it", at = mmap(NULL, 16 * PAGE, PROT_READ, MAP_SHARED, file, 0);
         sink = *(volatile char *)at; munmap(at, 16 * PAGE));
    LOOP(43, "write to a page of a file", at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
         *(volatile char *)at = 1; munmap(at, PAGE));
    LOOP(44, "write to a page that was read", at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
         sink = *(volatile char *)at; *(volatile char *)at = 1; munmap(at, PAGE));
    int direct = open("/dev/vda", O_RDONLY | O_DIRECT);
    char *aligned = map(1, MAP_POPULATE);
    LOOP(45, "read of a sector", pread(direct, aligned, 512, 0));
    (void)sink;
}

/* A process writes its pages and forks; the child writes so many of them, each a copy, and ends. */
static void family(char *pages, size_t written, size_t copied)
{
    touch(pages, written);
    pid_t child = fork();
    if (!child) {
        touch(pages, copied);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void processes(void)
{
    char *words[] = {"/hello", NULL}, *none[] = {NULL};
    pid_t child;
    LOOP(50, "fork and exit", if (!(child = fork())) _exit(0); waitpid(child, NULL, 0));
    LOOP(51, "fork, exec and exit", if (!(child = fork())) { execve("/hello", words, none); _exit(1); } waitpid(child, NULL, 0));
    struct rlimit nothing = {0, 0};
    setrlimit(RLIMIT_CORE, &nothing);
    LOOP(52, "fork and a fatal fault", if (!(child = fork())) { *(volatile char *)0 = 1; } waitpid(child, NULL, 0));
    if (!(child = fork())) {
        for (;;)
            sched_yield();
    }
    LOOP(53, "yield to another process", sched_yield());
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    int to[2], from[2];
    char byte = 0;
    pipe(to);
    pipe(from);
    if (!(child = fork())) {
        while (read(to[0], &byte, 1) == 1)
            write(from[1], &byte, 1);
    }
    LOOP(54, "a byte through pipes and back", write(to[1], &byte, 1); read(from[0], &byte, 1));
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    char *much = map(32, 0);
    LOOP(55, "fork with 32 pages", family(much, 32, 0));
    munmap(much, 32 * PAGE);
    much = map(160, 0);
    LOOP(56, "fork with 160 pages", family(much, 160, 0));
    LOOP(57, "fork with 160 pages, all copied", family(much, 160, 160));
    LOOP(58, "fork with 160 pages that are read-only", family(much, 0, 0));
}

static volatile int ending;

static void *spin(void *unused)
{
    while (!ending)
        ;
    return NULL;
}

/* With two CPUs: translations are dropped on the other one, too. */
static void shootdowns(void)
{
    pthread_t other;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    sched_setaffinity(0, sizeof set, &set);
    pthread_create(&other, NULL, spin, NULL);
    CPU_ZERO(&set);
    CPU_SET(1, &set);
    pthread_setaffinity_np(other, sizeof set, &set);
    char *page = map(1, MAP_POPULATE);
    LOOP(60, "protect 1 page of two CPUs", mprotect(page, PAGE, PROT_READ);
         mprotect(page, PAGE, PROT_READ | PROT_WRITE); *(volatile char *)page = 1);
    ending = 1;
    pthread_join(other, NULL);
}

/* Behind an IOMMU: a sector read maps its buffer and takes the mapping back, at once or in batches. */
static void strict_dma(void)
{
    int direct = open("/dev/vda", O_RDONLY | O_DIRECT);
    char *aligned = map(1, MAP_POPULATE);
    LOOP(70, "read of a sector behind an IOMMU", pread(direct, aligned, 512, 0));
}

static void deferred_dma(void)
{
    int direct = open("/dev/vda", O_RDONLY | O_DIRECT);
    char *aligned = map(1, MAP_POPULATE);
    LOOP(71, "the same, invalidated in batches", pread(direct, aligned, 512, 0));
}

/* The first process is none like others: a child of it does the work, with few areas of its own. */
static void apart(void (*work)(void))
{
    pid_t child = fork();
    if (!child) {
        work();
        fflush(stdout);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

int main(int count, char **words)
{
    mount("none", "/proc", "proc", 0, NULL);
    mount("none", "/sys", "sysfs", 0, NULL);
    mount("none", "/dev", "devtmpfs", 0, NULL);
    load_modules();
    bring_up_loopback();
    if (mount("/dev/vda", "/disk", "ext4", 0, NULL))
        perror("/disk");
    print_symbols();
    int quiet = open("/proc/sys/debug/exception-trace", O_WRONLY);
    write(quiet, "0", 1);
    close(quiet);
    const char *loops = getenv("loops");
    if (loops && !strcmp(loops, "dma")) {
        apart(strict_dma);
    } else if (loops) {
        apart(deferred_dma);
    } else if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
        apart(shootdowns);
    } else {
        apart(calls);
        apart(selects);
        apart(memory);
        apart(files);
        apart(processes);
    }
    puts("end of loops");
    fflush(stdout);
    reboot(RB_POWER_OFF);
}
