#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };

static void *thread(void *of)
{
  char stack[5 * PAGE];
  memset(stack, (long) of, sizeof stack);
  return (void *) (long) stack[PAGE];
}

int main(void)
{
  char *area = mmap(0, 128 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  unsigned long sum = 0;
  for (int i = 0; i < 128; i++)
    area[i * PAGE] = i;
  for (int child = 0; child < 8; child++)  // copies on write in the child, then in the parent
    if (!fork()) {
      for (int i = child; i < 128; i += 3)
        area[i * PAGE + 8] = child;
      _exit(0);
    } else {
      for (int i = 0; i < 128; i += 9)
        area[i * PAGE + 16] = child;
      wait(0);
    }
  for (int round = 0; round < 12; round++) {  // tables come and go
    char *more = mmap(0, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 64; i += 1 + round % 3)
      sum += more[i * PAGE]++;
    mprotect(more, 32 * PAGE, PROT_READ);
    for (int i = 0; i < 32; i++)
      sum += more[i * PAGE];
    mprotect(more, 32 * PAGE, PROT_READ | PROT_WRITE);
    more[3 * PAGE] = 1;
    more = mremap(more, 64 * PAGE, 600 * PAGE, MREMAP_MAYMOVE);
    more[599 * PAGE] = 1;
    madvise(more, 20 * PAGE, MADV_DONTNEED);
    sum += more[2 * PAGE];
    munmap(more, 600 * PAGE);
  }
  char *huge = mmap(0, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(huge, 8 << 20, MADV_HUGEPAGE);
  huge = (char *) (((long) huge + (2 << 20) - 1) & -(2L << 20));
  memset(huge, 1, 3 << 20);
  munmap(huge + (1 << 20), 64 * PAGE);
  int file = open("/tmp/mapped", O_RDWR | O_CREAT, 0600);
  ftruncate(file, 200 * PAGE);
  char *shared = mmap(0, 200 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  for (int i = 0; i < 200; i += 2)
    shared[i * PAGE] = i;
  for (int i = 0; i < 200; i++)
    sum += shared[i * PAGE];
  pthread_t threads[4];
  for (long i = 0; i < 4; i++)
    pthread_create(&threads[i], 0, thread, (void *) i);
  for (int i = 0; i < 4; i++)
    pthread_join(threads[i], 0);
  printf("work %lu\n", sum);
  return 0;
}
