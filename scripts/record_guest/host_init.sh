#!/bin/sh
# /init of the host: KVM runs the guest in QEMU. ept, thp, guest (MiB of the guest), kpti and cpu are words of the command line.
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
word() { for w in $(cat /proc/cmdline); do case $w in $1=*) echo ${w#*=};; esac; done; }
echo $(word thp) > /sys/kernel/mm/transparent_hugepage/enabled
insmod /lib/irqbypass.ko; insmod /lib/kvm.ko; insmod /lib/kvm-intel.ko ept=$(word ept) enable_apicv=0 preemption_timer=0
grep -H . /sys/module/kvm_intel/parameters/* /sys/module/kvm/parameters/nx_huge_pages
qemu-system-x86_64 -accel kvm -machine pc-i440fx-7.2,usb=off -m $(word guest) -nodefaults -display none -serial stdio -no-reboot \
  -cpu $(word cpu) -kernel /vmlinuz -initrd /initrd </dev/null \
  -append "console=ttyS0 panic=-1 quiet nokaslr $(word kpti) no_timer_check tsc=reliable tsc_early_khz=3499912"
printf '\001' | dd of=/dev/port bs=1 seek=35072 count=1 conv=notrunc  # port 0x8900: the simulation ends
