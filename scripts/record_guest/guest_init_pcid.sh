#!/bin/sh
mark() { printf "\\$1" | dd of=/dev/port bs=1 seek=244 count=1 conv=notrunc 2>/dev/null; }
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
echo always > /sys/kernel/mm/transparent_hugepage/enabled
mark 001
cat /sys/devices/system/cpu/vulnerabilities/meltdown
i=0
while [ $i -lt 8 ]; do
  echo "line $i $(uname -r) $(expr $i \* 7)" >> /tmp/lines
  i=$((i + 1))
done
tar -cf /tmp/a.tar -C / bin/busybox init && gzip -1 /tmp/a.tar && gunzip -c /tmp/a.tar.gz | wc -c
mark 002
/ring
mark 003
cat /proc/vmstat | grep thp
ls -l /tmp | wc -l
poweroff -f
