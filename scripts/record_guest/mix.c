#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
enum { PAGE = 4096, HUGE = 2 << 20 };
static char *area;
static volatile int caught;
static char *pages(long bytes, int flags)
{
  return mmap(0, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
}
static void barrier(int signal, siginfo_t *of, void *context)  // a collector's write barrier
{
  caught++;
  mprotect((void *) ((long) of->si_addr & -PAGE), PAGE, PROT_READ | PROT_WRITE);
}
static void *drop(void *of)
{
  for (int i = 0; i < 60; i++) {
    char *own = area + (128 + (long) of * 32) * PAGE;
    memset(own, i, 20 * PAGE);
    madvise(own, 20 * PAGE, MADV_DONTNEED);
    sched_yield();
  }
  return 0;
}
int main(void)
{
  unsigned long sum = 0;
  struct timespec now;
  for (int i = 0; i < 400; i++) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    sum += now.tv_nsec & 1;
  }
  for (int i = 0; i < 20; i++)
    sum += ((long (*)(long *)) 0xffffffffff600400)(0) != 0;
  write(1, "time\n", 5);
  char *both = pages(64 * PAGE, MAP_SHARED);  // two processes, one mapping
  if (!fork()) {
    for (int round = 0; round < 40; round++) {
      for (int i = 0; i < 64; i += 3)
        both[i * PAGE]++;
      mprotect(both + 8 * PAGE, 16 * PAGE, PROT_READ);
      sched_yield();
      mprotect(both + 8 * PAGE, 16 * PAGE, PROT_READ | PROT_WRITE);
    }
    _exit(0);
  }
  for (int round = 0; round < 40; round++) {
    for (int i = 0; i < 64; i += 2)
      sum += both[i * PAGE]++;
    madvise(both + 30 * PAGE, 10 * PAGE, MADV_DONTNEED);
    sched_yield();
  }
  wait(0);
  munmap(both, 64 * PAGE);
  write(1, "both\n", 5);
  for (int round = 0; round < 6; round++) {  // large pages come, are copied or split, and go
    char *raw = pages(5 * HUGE, MAP_PRIVATE), *at = (char *) (((long) raw + HUGE - 1) & -(long) HUGE);
    for (int i = 0; i < 4; i++)
      at[i * (long) HUGE + round] = i;
    if (!fork()) {
      for (int i = 0; i < 4 * 512; i += 61)
        at[i * (long) PAGE] = i;
      _exit(0);
    }
    at[HUGE + 1] = 2;
    wait(0);
    mprotect(at + round * PAGE, PAGE, PROT_READ);
    sum += at[round * PAGE];
    munmap(raw, 5 * HUGE);
  }
  write(1, "huge\n", 5);
  area = pages(256 * PAGE, MAP_PRIVATE);
  memset(area, 1, 100 * PAGE);
  struct sigaction action = {.sa_sigaction = barrier, .sa_flags = SA_SIGINFO};
  sigaction(SIGSEGV, &action, 0);
  for (int round = 0; round < 5; round++) {
    mprotect(area, 100 * PAGE, PROT_READ);
    for (int i = round; i < 100; i += 4)
      area[i * PAGE]++;
  }
  write(1, "gc\n", 3);
  pthread_t threads[3];
  for (long i = 0; i < 3; i++)
    pthread_create(&threads[i], 0, drop, (void *) i);
  for (int i = 0; i < 3; i++)
    pthread_join(threads[i], 0);
  for (int i = 0; i < 6; i++)
    if (!vfork()) {
      execl("/bin/busybox", "true", (char *) 0);
      _exit(1);
    } else
      wait(0);
  printf("mix %d %lu\n", caught, sum & 0);
  return 0;
}
