#include <stdlib.h>
#include <sys/io.h>
int main(int n, char **v)  // where /dev/port is not
{
  ioperm(0xf4, 1, 1);
  outb(n > 1 ? atoi(v[1]) : 0, 0xf4);
  return 0;
}
