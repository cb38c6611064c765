#!/bin/dash
# the programs of Debian: dynamically linked, many and short
export PATH=/usr/bin:/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
insmod /lib/brd.ko rd_nr=1 rd_size=6144
mke2fs -q -F /dev/ram0 && mount -t ext4 /dev/ram0 /mnt
echo madvise > /sys/kernel/mm/transparent_hugepage/enabled
/mark 1
i=0
while [ $i -lt 8 ]; do
  echo "row $i $(expr $i \* 17) $(basename /a/b$i)" >> /tmp/rows
  i=$((i + 1))
done
sort -r /tmp/rows | uniq | cut -d' ' -f2,3 | tr ' ' ',' | head -n 3
seq 1 3000 | wc -l
cp /usr/bin/sort /tmp/sort; cksum /tmp/sort | cut -c1-4; rm /tmp/sort
ls -l /usr/bin | wc -l
perl -e 'my %h; for my $i (1..4000) { $h{"k$i"} = [$i, "v" x 40]; } my $s = 0; $s += $h{$_}[0] for sort keys %h; print "perl $s\n"; my $p = fork(); if (!$p) { $h{"k$_"} = 1 for 1..400; exit } waitpid $p, 0; print `echo from perl`;'
/mark 2
/churn
/mark 3
grep -E 'thp_(fault|split_pmd)' /proc/vmstat
umount /mnt
/poweroff -f
