static long call(long n, long a, long b, long c, long d, long e)
{
  long r;
  __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
  return r;
}
enum { PAGE = 4096 };
static char *map(long pages, long flags)
{
  long args[6] = {0, pages * PAGE, 3, flags, -1, 0};
  return (char *) call(90, (long) args, 0, 0, 0, 0);
}
static void done(void) { call(1, 0, 0, 0, 0, 0); }
static void wait_one(void) { long s; call(7, -1, (long) &s, 0, 0, 0); }
static void ring(int processes, int rounds)
{
  int ends[8][2];
  for (int i = 0; i < processes; i++)
    call(42, (long) ends[i], 0, 0, 0, 0);
  for (int i = 0; i < processes; i++)
    if (!call(2, 0, 0, 0, 0, 0)) {
      char token;
      for (int round = 0; round < rounds; round++) {
        call(3, ends[i][0], (long) &token, 1, 0, 0);
        call(4, ends[(i + 1) % processes][1], (long) &token, 1, 0, 0);
      }
      done();
    }
  call(4, ends[0][1], (long) "x", 1, 0, 0);
  for (int i = 0; i < processes; i++)
    wait_one();
}
void _start(void)
{
  ring(5, 100);
  volatile char *area = map(128, 0x22);
  for (int i = 0; i < 128; i++)
    area[i * PAGE] = i;
  for (int child = 0; child < 6; child++)
    if (!call(2, 0, 0, 0, 0, 0)) {
      for (int i = child; i < 128; i += 3)
        area[i * PAGE + 8] = child;
      done();
    } else {
      for (int i = 0; i < 128; i += 9)
        area[i * PAGE + 16] = child;
      wait_one();
    }
  for (int round = 0; round < 12; round++) {
    volatile char *more = map(64, 0x22);
    for (int i = 0; i < 64; i += 1 + round % 3)
      more[i * PAGE]++;
    call(125, (long) more, 32 * PAGE, 1, 0, 0);
    (void) more[0];
    call(125, (long) more, 32 * PAGE, 3, 0, 0);
    more[3 * PAGE] = 1;
    more = (char *) call(163, (long) more, 64 * PAGE, 2000 * PAGE, 1, 0);
    more[1999 * PAGE] = 1;
    call(219, (long) more, 20 * PAGE, 4, 0, 0);
    (void) more[2 * PAGE];
    call(91, (long) more, 2000 * PAGE, 0, 0, 0);
  }
  call(4, 1, (long) "work32\n", 7, 0, 0);
  done();
}
