#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
enum { PAGE = 4096, HUGE = 2 << 20 };
static volatile int caught;
static char *arena;
static char *pages(long count)
{
  return mmap(0, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
static void fault(int signal, siginfo_t *of, void *context)
{
  caught++;
  mprotect((void *) ((long) of->si_addr & -PAGE), 2 * PAGE, PROT_READ | PROT_WRITE);
}
static void alarmed(int signal)
{
  caught++;
}
static void *worker(void *of)  // an allocator that gives memory back
{
  long id = (long) of;
  for (int round = 0; round < 25; round++) {
    char *own = arena + id * 40 * PAGE;
    for (int i = 0; i < 40; i += 1 + round % 2)
      own[i * PAGE] = round;
    if (round % 3 == 0)
      madvise(own + 4 * PAGE, 30 * PAGE, MADV_DONTNEED);
    else if (round % 3 == 1)
      madvise(own, 10 * PAGE, MADV_FREE);
    sched_yield();
  }
  return 0;
}
static void spawned(int count)
{
  extern char **environ;
  char *words[] = {"true", 0};
  pid_t child;
  for (int i = 0; i < count; i++)
    if (!posix_spawn(&child, "/usr/bin/true", 0, 0, words, environ))
      waitpid(child, 0, 0);
}
int main(int n, char **v)
{
  unsigned long sum = 0;
  struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &action, 0);
  char *heap = pages(120);
  for (int round = 0; round < 4; round++) {
    mprotect(heap, 120 * PAGE, round & 1 ? PROT_NONE : PROT_READ);
    for (int i = 2 * round; i < 120; i += 6)
      heap[i * PAGE]++;
    mprotect(heap, 120 * PAGE, PROT_READ | PROT_WRITE);
  }
  write(1, "segv\n", 5);
  signal(SIGUSR1, alarmed);
  for (int i = 0; i < 30; i++)
    kill(getpid(), SIGUSR1);
  int file = open("/mnt/mapped", O_RDWR | O_CREAT, 0600);  // written back: entries lose what says that they were written
  ftruncate(file, 96 * PAGE);
  char *mapped = mmap(0, 96 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  for (int round = 0; round < 6; round++) {
    for (int i = round; i < 96; i += 2)
      mapped[i * PAGE] += i;
    msync(mapped, 96 * PAGE, MS_SYNC);
  }
  madvise(mapped, 96 * PAGE, MADV_DONTNEED);
  for (int i = 0; i < 96; i += 5)
    sum += mapped[i * PAGE];
  munmap(mapped, 96 * PAGE);
  ftruncate(file, 0);
  close(file);
  write(1, "file\n", 5);
  char *grown = pages(16);
  for (int i = 16; i < 400; i += 16) {  // a realloc that moves
    memset(grown + (i - 16) * PAGE, i, 6 * PAGE);
    grown = mremap(grown, i * PAGE, (i + 16) * PAGE, MREMAP_MAYMOVE);
    if (i % 64 == 0)
      pages(1)[0] = 1;
  }
  munmap(grown, 400 * PAGE);
  write(1, "move\n", 5);
  arena = pages(200);
  pthread_t threads[4];
  for (long i = 0; i < 4; i++)
    pthread_create(&threads[i], 0, worker, (void *) i);
  for (int i = 0; i < 4; i++)
    pthread_join(threads[i], 0);
  write(1, "threads\n", 8);
  spawned(10);
  char *raw = pages(4 * 512), *large = (char *) (((long) raw + HUGE - 1) & -(long) HUGE);
  madvise(large, 3 * HUGE, MADV_HUGEPAGE);
  for (int i = 0; i < 3 * 512; i += 16)
    large[i * (long) PAGE] = i;
  madvise(large + HUGE, 9 * PAGE, MADV_DONTNEED);
  mprotect(large + 2 * HUGE + 17 * PAGE, 40 * PAGE, PROT_READ);
  for (int i = 0; i < 3 * 512; i += 16)
    sum += large[i * (long) PAGE];
  if (!fork()) {
    for (int i = 0; i < 512; i += 9)
      large[i * (long) PAGE] = 2;
    _exit(0);
  }
  wait(0);
  munmap(raw, 4 * 512 * PAGE);
  write(1, "large\n", 6);
  for (long i = 0; i < 60000000; i++)  // long between exits
    sum = sum * 3 + i;
  printf("churn %d %lu\n", caught, sum & 1);
  return 0;
}
