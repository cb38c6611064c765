#!/bin/bash
# Run the loops of guest_init.c in a Linux kernel under QEMU's translator, with and without a second CPU.
#
#   guest_run.sh KERNEL OUT     KERNEL: an unpacked linux-image-6.1.0-*-amd64, or another directory with boot/vmlinuz-* and
#                               such modules as are not built in; OUT: a directory for traces
#
# Needs qemu-system-x86, gcc, cpio, e2fsprogs. guest_count.py reads what this writes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kernel=$1 out=$2
mkdir -p "$out"
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

gcc -O2 -shared -fPIC -o "$out/trace.so" "$here/guest_trace.c"
mkdir -p "$root"/{dev,proc,sys,disk,modules}
gcc -O2 -static -pthread -o "$root/init" "$here/guest_init.c"
echo 'int main(void) { return 0; }' | gcc -O2 -static -o "$root/hello" -x c -
for name in virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk crc16 crc32c_generic \
    libcrc32c mbcache jbd2 ext4; do
    module=$(find "$kernel" -name $name.ko)
    [ -n "$module" ] || continue # it is built in
    cp "$module" "$root/modules/"
    echo "/modules/$name.ko" >> "$root/modules/list"
done
(cd "$root" && find . | cpio --quiet -o -H newc) > "$out/initramfs"

# What the model has no part for is off: mitigations, security modules, audit, debug-like hardening of the allocators.
words="console=ttyS0 quiet panic=-1 nokaslr nopti mitigations=off audit=0 lsm= init_on_alloc=0 randomize_kstack_offset=off"
words="$words transparent_hugepage=never tsc=reliable"
run() {
    name=$1
    shift
    rm -f "$out/disk"
    mke2fs -q -t ext4 "$out/disk" 64M
    timeout 3000 qemu-system-x86_64 -machine q35 -cpu Skylake-Server,-hypervisor -m 1G -nographic -no-reboot -nodefaults \
        -kernel "$(ls "$kernel"/boot/vmlinuz-*)" -initrd "$out/initramfs" -append "$words" \
        -drive file="$out/disk",if=none,id=disk,format=raw -serial "file:$out/$name.console" -serial "file:$out/$name.symbols" \
        -plugin "$out/trace.so,out=$out/$name" "$@"
    grep -q "end of loops" "$out/$name.console"
}
disk=virtio-blk-pci,drive=disk
run one -smp 1 -accel tcg,thread=single -icount shift=0,sleep=off -device $disk
run two -smp 2 -accel tcg,thread=single -device $disk
words="$words loops=dma intel_iommu=on,strict iommu.strict=1" # by its old name, too
run dma -smp 1 -accel tcg,thread=single -icount shift=0,sleep=off -device intel-iommu \
    -device $disk,disable-legacy=on,iommu_platform=on
words="${words/,strict iommu.strict=1/ iommu.strict=0}"
words="${words/loops=dma/loops=deferred}"
run dma_deferred -smp 1 -accel tcg,thread=single -icount shift=0,sleep=off -device intel-iommu \
    -device $disk,disable-legacy=on,iommu_platform=on
