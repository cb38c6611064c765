#!/bin/sh
mark() { printf "\\$1" | dd of=/dev/port bs=1 seek=244 count=1 conv=notrunc 2>/dev/null; }
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mark 001
i=0
while [ $i -lt 8 ]; do
  echo "line $i $(uname -r) $(expr $i \* 7)" >> /tmp/lines
  i=$((i + 1))
done
awk '{ s += $4; print s, $0 }' /tmp/lines | sed 's/line/row/' | tail -n 2
tar -cf /tmp/a.tar -C / bin/busybox init && gzip -1 /tmp/a.tar && gunzip -c /tmp/a.tar.gz | md5sum
(for f in 1 2 3 4; do cat /proc/self/maps > /tmp/m$f & done; wait)
grep -c r-xp /tmp/m1
mark 002
/ring_686
dd if=/dev/zero of=/tmp/z bs=64k count=40 2>/dev/null
find /sys/class | wc -l
mark 003
ls -l /tmp | wc -l
cat /proc/vmstat | head -n 3
poweroff -f
