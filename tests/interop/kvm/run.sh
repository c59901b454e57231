#!/bin/sh
# Debian's Linux on examples/kvm.c, which runs under Debian's Linux, which QEMU
# runs: it emulates a processor with SVM, so this needs no hardware that
# virtualizes. And the guest of tests/kvm. One line per check; the status is 0
# if all are ok, or if something is not installed and INTEROP_REQUIRED is not 1.
# vhost/common.sh has the variables.
test=kvm
packages="busybox-static e2fsprogs"
. "$(dirname "$0")/../vhost/common.sh"

need_tools busybox mkfs.ext4 e2fsck debugfs
need_qemu
[ "$(uname -m)" = x86_64 ] || skip ": the VMM is one for x86-64"
modules=${drivers%/drivers}
for module in virt/lib/irqbypass arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
    [ -f "$modules/$module.ko" ] || missing "$module.ko"
    cp "$modules/$module.ko" "$tmp/root/" || exit 1
done
# shellcheck disable=SC2086
$CC $WARN $CFLAGS -static -fsanitize=undefined -fsanitize-undefined-trap-on-error \
    -o "$tmp/root/kvm" "$root/examples/kvm.c" -lpthread || {
    echo "FAIL build"
    exit 1
}
sh "$root/tests/kvm/guest.sh" "$tmp/root/guest" || exit 1
mkdir -p "$tmp/root/project/tests/kvm" "$tmp/root/project/examples" || exit 1
cp "$root/tests/kvm/run.sh" "$tmp/root/project/tests/kvm/" || exit 1
cp "$root/examples/kvm.c" "$tmp/root/project/examples/" || exit 1
cp "$kernel" "$tmp/root/vmlinuz" || exit 1


# ---- The inner guest --------------------------------------------------------

# Its kernel has the virtio drivers as modules. The kernel gives its init what
# it does not know itself on the command line: the stage.
mkdir "$tmp/inner" "$tmp/inner/proc" "$tmp/inner/sys" "$tmp/inner/dev" \
    "$tmp/inner/mnt" "$tmp/root/tmp" || exit 1
cp -a "$tmp/root/bin" "$tmp/inner/" || exit 1
for module in virtio/virtio_ring virtio/virtio virtio/virtio_mmio \
    block/virtio_blk; do
    cp "$drivers/$module.ko" "$tmp/inner/" || exit 1
done
head -c 1048576 /dev/urandom >"$tmp/inner/piece"
cat >"$tmp/inner/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
say() { echo "guest $stage $*"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_mmio virtio_blk; do
    insmod /$module.ko
done
say size $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size 2>/dev/null)
say cache $(cat /sys/block/vda/queue/write_cache)
say kind $(sed -n 's/.*IO-APIC *[0-9]*-\([a-z]*\) *virtio0$/\1/p' \
    /proc/interrupts)
case $stage in
first)
    read line
    say input $line
    say raw $(dd if=/dev/vda bs=64k skip=640 count=256 iflag=direct \
        2>/dev/null | sha256sum)
    dd if=/piece of=/dev/vdb bs=64k seek=16 oflag=direct 2>/dev/null
    say second-write $?
    dd if=/dev/vdb bs=4k skip=256 count=256 iflag=direct 2>/dev/null |
        cmp - /piece
    say second-read $?
    mount -t ext4 /dev/vda /mnt
    say mount $?
    say file $(sha256sum </mnt/file)
    i=0
    while [ $i -lt 10 ]; do
        { echo "file $i"; head -c $((i * 50021)) /mnt/file; } >/mnt/new.$i &
        i=$((i + 1))
    done
    wait
    dd if=/mnt/file of=/mnt/direct bs=64k oflag=direct conv=fsync 2>/dev/null
    (cd /mnt && sha256sum file direct new.*) >/mnt/sums
    sync
    umount /mnt
    mount -t ext4 /dev/vda /mnt
    say files $(cd /mnt && sha256sum -c sums | grep -c OK$)
    dd if=/dev/zero of=/mnt/large bs=1M count=12 conv=fsync 2>/dev/null
    rm /mnt/large
    sync
    fstrim /mnt
    say trim $?
    umount /mnt
    say umount $?
    poweroff -f
    ;;
second)
    now() { cut -d ' ' -f 1 /proc/uptime; }
    mount -t ext4 /dev/vda /mnt
    say files $(cd /mnt && sha256sum -c sums | grep -c OK$)
    umount /mnt
    sleep 1.2
    start=$(now)
    dd if=/dev/vda of=/dev/null bs=4k count=350 iflag=direct 2>/dev/null
    say seconds $(now) - $start
    say memory $(grep -c '1[0-9a-f]*-1[0-9a-f]* : System RAM' /proc/iomem)
    reboot -f
    ;;
esac
INIT
chmod +x "$tmp/inner/init"
(cd "$tmp/inner" && find . | cpio -o -H newc --quiet) >"$tmp/root/initrd" ||
    exit 1


# ---- The outer guest --------------------------------------------------------

# Its disk is the inner one's first, a file in its memory the second.
job <<'JOB'
for module in irqbypass kvm kvm-amd; do insmod /$module.ko; done
truncate -s 8M /second.img
run() { # name, arguments...
    name=$1
    shift
    /kvm "$@" 2>/err
    say "$name-status" $?
    sed "s/^/guest $name-said /" /err
}
echo typed >/typed
run first /vmlinuz --initrd /initrd --disk /dev/vda --disk /second.img \
    --append "quiet panic=-1 nohz=off stage=first" </typed
run second /vmlinuz --initrd /initrd --disk /dev/vda --level --iops 100 \
    --memory 3328 --append "quiet panic=-1 nohz=off stage=second \
console=uart8250,io,0x3f8" </dev/null
say second-disk $(dd if=/second.img bs=64k skip=16 2>/dev/null |
    head -c 1048576 | sha256sum)
run no-room /vmlinuz --memory 32
BUILT=/ sh /project/tests/kvm/run.sh 2>&1 | sed 's/^/guest small /'
JOB

SECTORS=114688 # ext4 in 40 MiB, then 16 MiB as they are
mkdir "$tmp/seed" || exit 1
head -c 3000001 /dev/urandom >"$tmp/seed/file"
truncate -s 40M "$tmp/disk.img"
mkfs.ext4 -q -F -d "$tmp/seed" "$tmp/disk.img" 40m || exit 1
head -c 16777216 /dev/urandom >"$tmp/raw"
cat "$tmp/raw" >>"$tmp/disk.img"
allocated=$(stat -c %b "$tmp/disk.img")
start_qemu "$tmp/nested.console" -M q35,accel=tcg -m 1024 \
    -drive "file=$tmp/disk.img,format=raw,if=none,id=d,discard=unmap" \
    -device virtio-blk-pci,drive=d
wait_guest
check finished "$(says nested done | wc -l)" 1

counted() { # run, number of the disk, counter
    says nested "$1-said" | sed -n "$2s/.*[:,] \([0-9]*\) $3.*/\1/p"
}

check first-status "$(says nested first-status)" 0
check first-size "$(says nested "first size")" "$SECTORS 16384"
check first-cache "$(says nested "first cache")" "write back"
check first-edge "$(says nested "first kind")" edge
check first-input "$(says nested "first input")" typed
check first-raw "$(says nested "first raw" | cut -d ' ' -f 1)" \
    "$(sum_of "$tmp/raw")"
check first-second-disk "$(says nested "first second-write") \
$(says nested "first second-read")" "0 0"
check first-mount "$(says nested "first mount")" 0
check first-file "$(says nested "first file" | cut -d ' ' -f 1)" \
    "$(sum_of "$tmp/seed/file")"
check first-files "$(says nested "first files")" 12
check first-trim "$(says nested "first trim") $(says nested "first umount")" \
    "0 0"
check first-counted-reads "$(between "$(counted first 1 reads)" 256 9999)" yes
check first-counted-writes "$(between "$(counted first 1 writes)" 20 9999)" \
    yes
check first-counted-flushes "$(between "$(counted first 1 flushes)" 2 999)" \
    yes
check first-counted-discards "$(between "$(counted first 1 discards)" 1 999)" \
    yes
for disk in 1 2; do
    check first-failed-$disk "$(counted first $disk failed)" 0
    check first-notify-$disk "$(counted first $disk 'exits to notify')" 0
done
check second-status "$(says nested second-status)" 0
check second-level "$(says nested "second kind")" fasteoi
check second-files "$(says nested "second files")" 12
check second-memory-above "$(says nested "second memory")" 1
check second-limit "$(between "$(says nested "second seconds" |
    awk '{print $1 - $3}')" 2 20)" yes
check second-waited "$(between "$(counted second 1 waited)" 1 9999)" yes
check second-failed "$(counted second 1 failed)" 0
check second-notify "$(counted second 1 'exits to notify')" 0
check second-disk "$(says nested second-disk | cut -d ' ' -f 1)" \
    "$(sum_of "$tmp/inner/piece")"
check no-room-status "$(says nested no-room-status)" 1
check no-room "$(says nested no-room-said)" "kvm: /vmlinuz: needs more --memory"
check small-guest "$(says nested small)" "25 passed, 0 failed"


# ---- What the host finds ----------------------------------------------------

check host-e2fsck "$(head -c 41943040 "$tmp/disk.img" >"$tmp/fs.img"
    status_of e2fsck -fn "$tmp/fs.img")" 0
mkdir "$tmp/dump" || exit 1
debugfs -R "rdump / $tmp/dump" "$tmp/fs.img" >/dev/null 2>&1
check host-agrees-on-12-files "$(cd "$tmp/dump" &&
    sha256sum -c sums 2>&1 | grep -c 'OK$')" 12
check host-raw-untouched "$(tail -c 16777216 "$tmp/disk.img" | sha256sum)" \
    "$(sha256sum <"$tmp/raw")"
check host-has-what-was-trimmed "$(between \
    $(($(stat -c %b "$tmp/disk.img") - allocated)) 1 20000)" yes # not 34000

explain
[ $failures = 0 ]
