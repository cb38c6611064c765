#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <sys/socket.h>
#include <unistd.h>
enum { PAGE = 4096, HUGE = 2 << 20 };
static char *huge(long bytes)
{
  char *at = mmap(0, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  at = (char *) (((long) at + HUGE - 1) & -(long) HUGE);
  madvise(at, bytes, MADV_HUGEPAGE);
  return at;
}
static void ring(int processes, int rounds)  // a token goes round through pipes: many address spaces in turn
{
  int ends[8][2];
  for (int i = 0; i < processes; i++)
    pipe(ends[i]);
  for (int i = 0; i < processes; i++)
    if (!fork()) {
      char token, own[6 * PAGE];
      for (int round = 0; round < rounds; round++) {
        read(ends[i][0], &token, 1);
        own[(round % 6) * PAGE] = token;
        write(ends[(i + 1) % processes][1], &token, 1);
      }
      _exit(0);
    }
  write(ends[0][1], "x", 1);
  for (int i = 0; i < processes; i++)
    wait(0);
}
int main(int n, char **v)
{
  unsigned long sum = 0;
  if (n > 1)
    return 0;
  ring(6, 150);
  write(1, "ring\n", 5);
  char *at = huge(4 * HUGE);
  for (int i = 0; i < 4 * 512; i += 5)
    at[i * (long) PAGE] = i;
  for (int child = 0; child < 3; child++)  // a large page is copied, or split, on write
    if (!fork()) {
      for (int i = child; i < 4 * 512; i += 97)
        at[i * (long) PAGE + 8] = i;
      _exit(0);
    } else {
      at[child * (long) HUGE + 16] = 1;
      wait(0);
    }
  mprotect(at + HUGE, 3 * PAGE, PROT_READ);
  sum += at[HUGE];
  mprotect(at + HUGE, 3 * PAGE, PROT_READ | PROT_WRITE);
  at[HUGE + PAGE] = 3;
  madvise(at + 2 * (long) HUGE, 7 * PAGE, MADV_DONTNEED);
  sum += at[2 * (long) HUGE + PAGE];
  at = mremap(at + 3 * (long) HUGE, HUGE, 2 * HUGE, MREMAP_MAYMOVE);
  at[HUGE + 5] = 1;
  munmap(at, HUGE / 2);
  for (int i = 0; i < 10; i++)
    if (!vfork()) {
      execl("/proc/self/exe", "work2", "x", (char *) 0);
      _exit(1);
    } else
      wait(0);
  write(1, "exec\n", 5);
  int pair[2];
  socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
  char *shared = mmap(0, 300 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (!fork()) {
    for (int i = 0; i < 300; i++)
      shared[i * PAGE] = 1;
    write(pair[1], "y", 1);
    _exit(0);
  }
  char token;
  read(pair[0], &token, 1);
  for (int i = 0; i < 300; i++)
    sum += shared[i * PAGE];
  wait(0);
  for (int round = 0; round < 40; round++) {  // few pages and many are flushed
    char *some = mmap(0, 80 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int pages = 1 + 2 * round;
    for (int i = 0; i < pages; i++)
      some[i * PAGE] = i;
    mprotect(some, pages * PAGE, PROT_READ);
    sum += some[0];
    munmap(some, 80 * PAGE);
  }
  printf("work2 %lu\n", sum);
  return 0;
}
