#!/bin/sh
# Linux under QEMU, without hardware virtualization, uses disks of
# examples/serve through vhost-user-blk-pci and, on a microvm,
# through virtio-mmio. One line per check; the status is 0 if all are ok, or if
# something is not installed and INTEROP_REQUIRED is not 1. vhost/common.sh has
# the variables.
test=qemu
packages="busybox-static e2fsprogs"
. "$(dirname "$0")/../vhost/common.sh"

need_tools busybox mkfs.ext4 e2fsck debugfs resize2fs blkdiscard fallocate
need_qemu
build "$tmp/serve"
[ -z "$SANITIZE" ] || build "$tmp/serve-sanitized" $SANITIZE


# ---- The guest --------------------------------------------------------------

head -c 1048576 /dev/urandom >"$tmp/root/piece"
head -c 512 /dev/urandom >"$tmp/root/sector"

# What it does depends on the first word of the last sector of vda.
job <<'JOB'
stage=$(dd if=/dev/vda bs=512 skip=81920 count=1 iflag=direct 2>/dev/null |
    tr -d '\0')
say() { echo "guest ${stage:-first} $*"; }

describe() {
    say $1-size $(cat /sys/block/$1/size)
    say $1-cache $(cat /sys/block/$1/queue/write_cache)
    say $1-serial $(cat /sys/block/$1/serial)
    say $1-ro $(cat /sys/block/$1/ro)
    say $1-queues $(ls /sys/block/$1/mq | wc -l)
}

# 36 MiB and on is raw.
write_all() {
    dd if=/piece of=$1 bs=64k seek=576 oflag=direct 2>/dev/null
    say raw-write $?
    dd if=$1 bs=4k skip=9216 count=256 iflag=direct 2>/dev/null | cmp - /piece
    say raw-read $?
    mount -t ext4 $1 /mnt
    say mount $?
    say file $(sha256sum </mnt/file)
    i=0
    while [ $i -lt 20 ]; do
        { echo "file $i"; head -c $((i * 50021)) /mnt/file; } >/mnt/new.$i &
        i=$((i + 1))
    done
    wait
    rm /mnt/new.3
    dd if=/mnt/file of=/mnt/direct bs=64k oflag=direct conv=fsync 2>/dev/null
    (cd /mnt && sha256sum file direct new.*) >/mnt/sums
    sync
    umount /mnt
    say umount $?
}

verify_all() {
    dd if=$1 bs=4k skip=9216 count=256 iflag=direct 2>/dev/null | cmp - /piece
    say raw-read $?
    mount -t ext4 $1 /mnt
    say files $(cd /mnt && sha256sum -c sums | grep -c OK$)
    umount /mnt
}

now() { cut -d ' ' -f 1 /proc/uptime; }

case $stage in
"")
    for disk in vda vdb vdc vdd; do
        [ -b /dev/$disk ] && describe $disk
    done
    write_all /dev/vda
    if [ -b /dev/vdd ]; then
        # Both at once, on all queues.
        for disk in vda vda vdd vdd; do
            dd if=/dev/$disk of=/dev/null bs=64k count=300 iflag=direct \
                2>/dev/null &
        done
        wait
        dd if=/piece of=/dev/vdb bs=4k count=1 oflag=direct 2>/dev/null
        say read-only-write $?
        mount -t ext4 -o ro /dev/vdb /mnt
        say read-only-file $(sha256sum </mnt/file)
        umount /mnt
        sleep 1.2
        start=$(now)
        dd if=/dev/vdc of=/dev/null bs=4k count=600 iflag=direct 2>/dev/null
        say seconds $(now) - $start
        dd if=/piece of=/dev/vdd bs=64k conv=fsync 2>/dev/null
        say unsafe-write $?
    fi
    say done
    echo second | dd of=/dev/vda bs=512 seek=81920 conv=sync 2>/dev/null
    sync
    reboot -f
    ;;
second)
    verify_all /dev/vda
    dd if=/sector of=/dev/vda bs=512 seek=81920 oflag=direct 2>/dev/null
    ;;
esac
JOB

run_qemu() { # name, options of QEMU...
    name=$1
    shift
    start_qemu "$tmp/$name.console" "$@"
    wait_guest
}

says_at() { # name, stage, key
    tr -d '\r' <"$tmp/$1.console" | sed -n "s/^guest $2 $3\( \|$\)//p"
}


# ---- The disks --------------------------------------------------------------

SECTORS=81921 # ext4 in the first 32 MiB

mkdir "$tmp/seed" || exit 1
head -c 3000001 /dev/urandom >"$tmp/seed/file"
truncate -s $((SECTORS * 512)) "$tmp/made.img"
mkfs.ext4 -q -F -d "$tmp/seed" "$tmp/made.img" 32m || exit 1

check_writes() { # name
    check "$1-boots" "$(grep -c '^guest .* done' "$tmp/$1.console")" 2
    check "$1-raw-write" "$(says_at "$1" first raw-write)" 0
    check "$1-raw-read" "$(says_at "$1" first raw-read)" 0
    check "$1-mount" "$(says_at "$1" first mount)" 0
    check "$1-umount" "$(says_at "$1" first umount)" 0
    check "$1-guest-reads-file" \
        "$(says_at "$1" first file | cut -d ' ' -f 1)" \
        "$(sum_of "$tmp/seed/file")"
    check "$1-raw-read-after-reboot" "$(says_at "$1" second raw-read)" 0
    check "$1-files-after-reboot" "$(says_at "$1" second files)" 21

    check "$1-host-sees-raw-write" "$(dd if="$tmp/disk.img" bs=64k skip=576 \
        count=16 status=none | sha256sum)" "$(sha256sum <"$tmp/root/piece")"
    check "$1-host-sees-last-sector" "$(tail -c 512 "$tmp/disk.img" |
        sha256sum)" "$(sha256sum <"$tmp/root/sector")"
    check "$1-image-bytes" "$(wc -c <"$tmp/disk.img")" $((SECTORS * 512))
    check "$1-e2fsck" "$(status_of e2fsck -fn "$tmp/disk.img")" 0
    mkdir -p "$tmp/dump"
    debugfs -R "rdump / $tmp/dump" "$tmp/disk.img" >/dev/null 2>&1
    check "$1-host-agrees-on-21-files" "$(cd "$tmp/dump" &&
        sha256sum -c sums 2>&1 | grep -c 'OK$')" 21
    rm -rf "$tmp/dump"
}

check_daemon() { # name, its pid, errors expected
    daemon=$2
    end TERM
    check "$1-daemon-ends" "status $status" "status 0"
    check "$1-errors" "$(counter "$1" io_errors) $(counter "$1" broken_rings)" \
        "0 0"
    check "$1-silent" "$(cat "$tmp/$1.err")" ""
}


# ---- PCI: four disks --------------------------------------------------------

cp "$tmp/made.img" "$tmp/disk.img"
cp "$tmp/made.img" "$tmp/other.img"
truncate -s 20M "$tmp/raw.img"
start a "$tmp/serve" --image "$tmp/disk.img" --id "disk A" --queues 2 \
    --threads
a=$daemon
start b "$tmp/serve" --image "$tmp/other.img" --id "disk B" --read-only
b=$daemon
start c "$tmp/serve" --image "$tmp/made.img" --id "disk C" --iops 200
c=$daemon
direct=
if dd if="$tmp/raw.img" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null
then
    direct=--direct
fi
start d "$tmp/serve" --image "$tmp/raw.img" --id "disk D" --cache unsafe \
    $direct
d=$daemon
set -- -M q35,accel=tcg,memory-backend=m -smp 2
for disk in a b c d; do
    queues=1
    [ $disk = a ] && queues=2
    set -- "$@" -chardev "socket,id=$disk,path=$tmp/$disk.sock" \
        -device "vhost-user-blk-pci,chardev=$disk,num-queues=$queues"
done
run_qemu pci "$@"

check pci-size "$(says_at pci first vda-size)" $SECTORS
check pci-cache "$(says_at pci first vda-cache)" "write back"
check pci-serials "$(for disk in vda vdb vdc vdd; do
    says_at pci first $disk-serial; done | tr '\n' ,)" \
    "disk A,disk B,disk C,disk D,"
check pci-queues "$(says_at pci first vda-queues)" 2
check_writes pci
check pci-read-only "$(says_at pci first vda-ro) $(says_at pci first vdb-ro)" \
    "0 1"
check pci-read-only-write-fails "$(says_at pci first read-only-write)" 1
check pci-read-only-file \
    "$(says_at pci first read-only-file | cut -d ' ' -f 1)" \
    "$(sum_of "$tmp/seed/file")"
check pci-read-only-image-untouched \
    "$(status_of cmp "$tmp/made.img" "$tmp/other.img")" 0
check pci-limit-takes-2-seconds \
    "$(between "$(says_at pci first seconds | awk '{print $1 - $3}')" 1.8 5)" \
    yes
check pci-unsafe-cache "$(says_at pci first vdd-cache)" "write through"
check pci-unsafe-write "$(says_at pci first unsafe-write)" 0
check pci-unsafe-data "$(head -c 1048576 "$tmp/raw.img" | sha256sum)" \
    "$(sha256sum <"$tmp/root/piece")"
check_daemon a $a
check_daemon b $b
check_daemon c $c
check_daemon d $d
check pci-limit-stalls "$(between "$(counter c stalls)" 1 100000)" yes


# ---- MMIO, with the sanitized build -----------------------------------------

# Without PCI and ACPI a microvm cannot be reset in place, so QEMU is run once
# for each boot.
# On a busy host its kernel fails to measure the TSC and hangs, so it is told.
kernel_options="tsc_early_khz=2000000 lpj=4000000"
cp "$tmp/made.img" "$tmp/disk.img"
program=$tmp/serve
[ -z "$SANITIZE" ] || program=$tmp/serve-sanitized
start m "$program" --image "$tmp/disk.img" --id "disk M"
for boot in first second; do
    run_qemu mmio-$boot -M microvm,accel=tcg,memory-backend=m -smp 1 \
        -no-reboot -global virtio-mmio.force-legacy=false \
        -chardev "socket,id=m,path=$tmp/m.sock" \
        -device vhost-user-blk,chardev=m,num-queues=1
done
cat "$tmp/mmio-first.console" "$tmp/mmio-second.console" >"$tmp/mmio.console"
check mmio-size "$(says_at mmio first vda-size)" $SECTORS
check mmio-serial "$(says_at mmio first vda-serial)" "disk M"
check mmio-cache "$(says_at mmio first vda-cache)" "write back"
check_writes mmio
check_daemon m "$daemon"


truncate -s 64M "$tmp/raw.img"


# ---- An image that QEMU has open, and one that it may not open ---------------

if command -v qemu-io >/dev/null; then
    start locked "$tmp/serve" --image "$tmp/raw.img"
    check locked-for-qemu "$(qemu-io -f raw -c 'read 0 512' "$tmp/raw.img" \
        2>&1 | grep -c 'Failed to get')" 1
    end TERM
    start shared "$tmp/serve" --image "$tmp/raw.img" --read-only
    check shared-with-a-reader "$(qemu-io -r -f raw -c 'read 0 512' \
        "$tmp/raw.img" 2>&1 | grep -c 'read 512/512')" 1
    check not-shared-with-a-writer "$(qemu-io -f raw -c 'read 0 512' \
        "$tmp/raw.img" 2>&1 | grep -c 'Failed to get')" 1
    end TERM
    qemu-io -f raw -c 'read 0 512' -c 'sleep 20000' "$tmp/raw.img" \
        >"$tmp/qemu-io.out" 2>&1 &
    io=$!
    running="$running $io"
    for try in $(seq 100); do
        grep -q 'read 512/512' "$tmp/qemu-io.out" && break
        sleep 0.05
    done
    timeout 10 "$tmp/serve" --socket "$tmp/never.sock" --image "$tmp/raw.img" \
        >"$tmp/never.out" 2>&1
    check open-in-qemu "status $?" "status 1"
    check open-in-qemu-says-so "$(grep -c 'in use by another' \
        "$tmp/never.out")" 1
    start unlocked "$tmp/serve" --image "$tmp/raw.img" --no-lock
    end TERM
    check no-lock-goes-on "status $status" "status 0"
    kill -KILL $io
    wait $io 2>/dev/null
    forget $io
else
    echo "SKIP: locks beside QEMU need qemu-io (apt install qemu-utils)"
fi


# ---- The daemon is killed and comes back ------------------------------------

# Four writers, each of which reads back what it wrote, until they are told to
# stop: each waits for the daemon, and none sees an error.
kernel_options=
job <<'JOB'
writer() { # number
    i=0
    while [ ! -e /stop ]; do
        at=$(($1 * 256 + i % 256))
        yes "writer $1 block $i" | head -c 65536 >/out.$1
        dd if=/out.$1 of=/dev/vda bs=64k seek=$at oflag=direct 2>/dev/null ||
            say error write $1 $i
        dd if=/dev/vda bs=64k skip=$at count=1 iflag=direct 2>/dev/null |
            cmp - /out.$1 || say error read $1 $i
        i=$((i + 1))
    done
    echo $i >/rounds.$1
}
for number in 0 1 2 3; do writer $number & done
say queues $(ls /sys/block/vda/mq | wc -l)
say ready
read go
touch /stop
wait
say rounds $(cat /rounds.*)
JOB
kill_and_come_back() { # name, options of the daemon
    name=$1
    shift
    start $name "$tmp/serve" --image "$tmp/raw.img" "$@"
    start_qemu "$tmp/$name.console" -M q35,accel=tcg,memory-backend=m -smp 2 \
        -chardev "socket,id=c,path=$tmp/$name.sock,reconnect=1" \
        -device vhost-user-blk-pci,chardev=c
    for try in $(seq $((LIMIT * 10))); do
        grep -q "^guest ready" "$tmp/$name.console" && break
        sleep 0.1
    done
    for round in 1 2 3 4 5; do
        sleep 1.5
        end KILL
        check $name-$round "status $status" "status 137"
        start $name "$tmp/serve" --image "$tmp/raw.img" "$@"
    done
    sleep 1.5
    tell_guest go
    wait_guest
    check $name-finished "$(grep -c "^guest done" "$tmp/$name.console")" 1
    check $name-no-errors "$(grep -c "^guest error" "$tmp/$name.console")" 0
    check $name-queues "$(says $name queues)" 2
    check $name-writers "$(says $name rounds | wc -w)" 4
    end TERM
    check $name-last-daemon-served "$(between "$(counter $name writes)" \
        1 100000000)" yes
    check $name-errors \
        "$(counter $name io_errors) $(counter $name broken_rings)" "0 0"
}

kill_and_come_back killed --aio sync
# shellcheck disable=SC2086
kill_and_come_back killed-threads --aio auto --threads $direct



# ---- The image grows under a mounted file system ------------------------------

bring() { # programs, with what they load
    mkdir -p "$tmp/root/tools" || exit 1
    for tool in "$@"; do
        tool=$(command -v "$tool") || exit 1
        for file in "$tool" $(ldd "$tool" |
            sed -n 's/.*[ 	]\(\/[^ ]*\) (.*/\1/p'); do
            cp "$file" "$tmp/root/tools/" || exit 1
        done
    done
}

bring resize2fs
truncate -s 16M "$tmp/grown.img"
mkfs.ext4 -q -F "$tmp/grown.img" || exit 1
job <<'JOB'
mount -t ext4 /dev/vda /mnt
echo mine >/mnt/file
say before $(cat /sys/block/vda/size)
read go
i=0
while [ $(cat /sys/block/vda/size) = 32768 ] && [ $i -lt 100 ]; do
    sleep 0.1
    i=$((i + 1))
done
say after $(cat /sys/block/vda/size)
/tools/ld-linux-x86-64.so.2 --library-path /tools /tools/resize2fs /dev/vda \
    >/log 2>&1
say resized $?
dd if=/dev/zero of=/mnt/large bs=1M count=24 conv=fsync 2>/dev/null
say large $?
say file $(cat /mnt/file)
umount /mnt
JOB
grow() { # name, options of the daemon
    name=$1
    cp "$tmp/grown.img" "$tmp/$name.img"
    shift
    start $name "$tmp/serve" --image "$tmp/$name.img" "$@"
    start_guest "$tmp/$name.console" "$tmp/$name.sock"
    for try in $(seq $((LIMIT * 10))); do
        grep -q "^guest before" "$tmp/$name.console" && break
        sleep 0.1
    done
    kill -HUP $daemon # it has not grown
    for try in $(seq 100); do
        grep -q "still 32768" "$tmp/$name.err" && break
        sleep 0.1
    done
    truncate -s 48M "$tmp/$name.img"
    sleep 0.2
    kill -HUP $daemon
    tell_guest go
    wait_guest
    end TERM
    check $name-finished "$(grep -c "^guest done" "$tmp/$name.console")" 1
    check $name-seen "$(says $name before) $(says $name after)" "32768 98304"
    check $name-file-system "$(says $name resized) $(says $name large)" "0 0"
    check $name-file "$(says $name file)" mine
    check $name-e2fsck "$(status_of e2fsck -fn "$tmp/$name.img")" 0
    check $name-says-so "$(sed -n 's/^vblk-serve: the image has //p' \
        "$tmp/$name.err" | cut -d ';' -f 1 | tr '\n' ',')" \
"still 32768 sectors,grown to 98304 sectors,"
}
grow grown-sync --aio sync
# shellcheck disable=SC2086
grow grown-threads --aio auto --threads $direct


# ---- What the guest does not need goes back to the host ----------------------

# Of 64 MiB, all allocated, ext4 has the first half. After each step the guest
# waits until the host has looked at the images. What is zeroed begins and ends
# at a logical block; if they are small, within one of the image's.
bring blkdiscard fallocate
job <<'JOB'
tool() { # name, arguments...
    tool=$1
    shift
    /tools/ld-linux-x86-64.so.2 --library-path /tools /tools/$tool "$@"
}

each() { # function
    for disk in vda vdb vdc; do
        block=$(cat /sys/block/$disk/queue/logical_block_size)
        $1
    done
}

step() { # name
    sync
    say step $1
    read go
}

describe() {
    cd /sys/block/$disk/queue
    say $disk-blocks $block $(cat physical_block_size discard_granularity)
    say $disk-most-discard $(cat discard_max_bytes)
    say $disk-most-zeroes $(cat write_zeroes_max_bytes)
    cd /
}

discard() {
    tool blkdiscard -f -o 40M -l 8M /dev/$disk
    say $disk-discard $?
}

zero() { # blkdiscard asks for zeroes that stay allocated, fallocate does not
    tool blkdiscard -f -z -o $((52 * 1048576 + block)) -l 4M /dev/$disk
    say $disk-zero $?
}

punch() {
    tool fallocate -p -o $((58 * 1048576 + block)) -l 4M /dev/$disk
    say $disk-punch $?
    say $disk-raw $(dd if=/dev/$disk bs=1M skip=32 iflag=direct 2>/dev/null |
        sha256sum)
}

trim() {
    mkdir -p /mnt/$disk
    mount -t ext4 /dev/$disk /mnt/$disk
    say $disk-mount $?
    cp /piece /mnt/$disk/kept
    fstrim /mnt/$disk
    say $disk-trim $?
}

fill() {
    dd if=/dev/zero of=/mnt/$disk/large bs=1M count=16 conv=fsync 2>/dev/null
    say $disk-fill $?
}

trim_again() {
    rm /mnt/$disk/large
    sync
    fstrim /mnt/$disk
}

trim_by_itself() {
    umount /mnt/$disk
    mount -t ext4 -o discard /dev/$disk /mnt/$disk
    dd if=/dev/zero of=/mnt/$disk/large bs=1M count=8 conv=fsync 2>/dev/null
    rm /mnt/$disk/large
}

leave() {
    umount /mnt/$disk
    say $disk-umount $?
}

each describe
disk=vdd
block=512
describe
discard 2>/dev/null
zero
each discard
step discarded
each zero
step zeroed
each punch
step punched
each trim
step trimmed
each fill
step filled
each trim_again
step trimmed-again
each trim_by_itself
sync
sleep 1 # ext4 gives up what is left to discard as it is unmounted
each leave
JOB

look() { # step, as the guest calls it
    for try in $(seq $((LIMIT * 10))); do
        grep -q "^guest step $1" "$tmp/back.console" && break
        guest_runs || break
        sleep 0.1
    done
    for image in "$tmp"/back-*.img; do
        stat -c %b "$image" >"${image%.img}.$1"
    done
    tell_guest go
}

frees() { # disk, step, next step, KiB, and how many it may be beside them
    kib=$((($(cat "$tmp/$1.$2") - $(cat "$tmp/$1.$3")) / 2))
    check "$1-frees-$3" "$(between $kib $(($4 - $5)) $(($4 + $5)))" yes
}

clear_range() { # image, offset, MiB
    dd if=/dev/zero of="$1" bs=1M count="$3" seek="$2" oflag=seek_bytes \
        conv=notrunc status=none
}

head -c 67108864 /dev/urandom >"$tmp/full.img"
best=$(stat -c %o "$tmp/full.img")
[ "$best" -ge 4096 ] && [ "$best" -le 65536 ] || best=4096
set -- -M q35,accel=tcg,memory-backend=m -smp 2
for name in back-sync back-blocks back-threads back-off; do
    cp "$tmp/full.img" "$tmp/$name.img"
    block=1024
    case $name in
    *-sync) options="--aio sync" ;;
    *-blocks) options="--block-size 4096" block=4096 ;;
    *-threads) options="--aio auto --threads $direct" ;;
    *-off) options="--discard off" ;;
    esac
    mkfs.ext4 -q -F -b $block \
        -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 \
        "$tmp/$name.img" 32m || exit 1
    stat -c %b "$tmp/$name.img" >"$tmp/$name.made"
    # shellcheck disable=SC2086
    start $name "$program" --image "$tmp/$name.img" $options
    echo $daemon >"$tmp/$name.pid"
    set -- "$@" -chardev "socket,id=$name,path=$tmp/$name.sock" \
        -device "vhost-user-blk-pci,chardev=$name"
done
start_qemu "$tmp/back.console" "$@"
for step in discarded zeroed punched trimmed filled trimmed-again; do
    look $step
done
wait_guest
check back-finished "$(grep -c "^guest done" "$tmp/back.console")" 1

back() { # disk of the guest, name, its logical block
    check "$2-blocks" "$(says back "$1-blocks")" "$3 $best $best"
    check "$2-offers-discard" \
        "$(between "$(says back "$1-most-discard")" 4096 1e12)" yes
    check "$2-offers-zeroes" \
        "$(between "$(says back "$1-most-zeroes")" 4096 1e12)" yes
    check "$2-steps" "$(for step in discard zero punch mount trim fill umount
        do says back "$1-$step"; done | tr '\n' ' ')" "0 0 0 0 0 0 0 "
    stat -c %b "$tmp/$2.img" >"$tmp/$2.unmounted"
    frees "$2" made discarded 8192 64
    frees "$2" discarded zeroed 0 64
    frees "$2" zeroed punched 4096 64
    frees "$2" punched trimmed 26000 4000
    frees "$2" trimmed filled -16384 256
    frees "$2" filled trimmed-again 16384 256
    frees "$2" trimmed-again unmounted 0 256
    cp "$tmp/full.img" "$tmp/expected.img"
    clear_range "$tmp/expected.img" $((40 * 1048576)) 8
    clear_range "$tmp/expected.img" $((52 * 1048576 + $3)) 4
    clear_range "$tmp/expected.img" $((58 * 1048576 + $3)) 4
    check "$2-guest-sees-only-ranges-cleared" \
        "$(says back "$1-raw" | cut -d ' ' -f 1)" \
        "$(tail -c 33554432 "$tmp/expected.img" | sha256sum | cut -d ' ' -f 1)"
    check "$2-so-does-host" "$(status_of cmp -i 33554432 "$tmp/$2.img" \
        "$tmp/expected.img")" 0
    check "$2-e2fsck" "$(status_of e2fsck -fn "$tmp/$2.img")" 0
    check "$2-kept" "$(debugfs -R "cat /kept" "$tmp/$2.img" 2>/dev/null |
        sha256sum)" "$(sha256sum <"$tmp/root/piece")"
    check_daemon "$2" "$(cat "$tmp/$2.pid")"
    for kind in discards write_zeroes; do
        check "$2-$kind" "$(between "$(counter "$2" $kind)" 1 1e9)" yes
    done
}

back vda back-sync 512
back vdb back-blocks 4096
back vdc back-threads 512
check back-off-offers "$(says back vdd-most-discard) $(says back \
    vdd-most-zeroes)" "0 0"
check back-off-discard-zero "$(says back vdd-discard) $(says back vdd-zero)" \
    "1 0"
frees back-off made trimmed-again 0 64
cp "$tmp/full.img" "$tmp/expected.img"
clear_range "$tmp/expected.img" $((52 * 1048576 + 512)) 4
check back-off-zeroes-are-written "$(status_of cmp -i 33554432 \
    "$tmp/back-off.img" "$tmp/expected.img")" 0
check_daemon back-off "$(cat "$tmp/back-off.pid")"
check back-off-counts "$(counter back-off discards) $(counter back-off \
    write_zeroes)" "0 0"
rm "$tmp"/back-*.img


# ---- btrfs discards under load -----------------------------------------------

# Its checksums show what was discarded in the wrong place. Those that wait
# (async) do so for minutes, so fstrim asks for some.
job <<'JOB'
for module in libcrc32c xor raid6_pq zstd_compress btrfs; do
    insmod /btrfs/$module.ko
done
btrfs() {
    /tools/ld-linux-x86-64.so.2 --library-path /tools /tools/btrfs "$@"
}
now() { cut -d . -f 1 /proc/uptime; }

writer() { # number, until, mode
    i=0
    while [ $(now) -lt $2 ]; do
        { echo "writer $1 file $i"; cat /piece; } >/mnt/$1.$((i % 16)) ||
            say error $1 $i
        sync /mnt/$1.$((i % 16))
        rm -f /mnt/$1.$(((i + 5) % 16)) /mnt/$1.$(((i + 9) % 16))
        i=$((i + 1))
    done
    say $3-files $i
}

mkdir -p /var/lib/btrfs
for mode in async sync; do
    mount -t btrfs -o discard=$mode /dev/vda /mnt
    say $mode-mount $?
    until=$(($(now) + 4))
    for number in 0 1; do writer $number $until $mode & done
    while [ $(now) -lt $until ]; do
        fstrim /mnt || say error fstrim
        sleep 0.5
    done
    wait
    sync
    btrfs scrub start -B /mnt >/log 2>&1
    say $mode-scrub $? $(grep -c 'no errors found' /log)
    umount /mnt
    say $mode-umount $?
done
JOB
modules=/usr/lib/modules/${kernel#/boot/vmlinuz-}/kernel
if ! command -v mkfs.btrfs >/dev/null || ! command -v btrfs >/dev/null; then
    echo "SKIP: btrfs needs btrfs-progs (apt install btrfs-progs)"
elif [ ! -f "$modules/fs/btrfs/btrfs.ko" ]; then
    echo "SKIP: btrfs needs its module, which this kernel has not"
else
    bring btrfs
    # Loaded when a thread is cancelled, so ldd does not tell of it.
    cp "$($CC -print-file-name=libgcc_s.so.1)" "$tmp/root/tools/" || exit 1
    mkdir "$tmp/root/btrfs" || exit 1
    cp "$modules/lib/libcrc32c.ko" "$modules/crypto/xor.ko" \
        "$modules/lib/raid6/raid6_pq.ko" \
        "$modules/lib/zstd/zstd_compress.ko" "$modules/fs/btrfs/btrfs.ko" \
        "$tmp/root/btrfs/" || exit 1
    truncate -s 256M "$tmp/btrfs.img"
    check btrfs-made "$(status_of mkfs.btrfs "$tmp/btrfs.img")" 0
    start btrfs "$tmp/serve" --image "$tmp/btrfs.img" --threads
    run_guest btrfs btrfs
    for mode in async sync; do
        check btrfs-$mode "$(for step in mount scrub umount; do
            says btrfs $mode-$step; done | tr '\n' ' ')" "0 0 1 0 "
        check btrfs-$mode-load "$(between "$(says btrfs $mode-files |
            awk '{ n += $1 } END { print n }')" 4 1e6)" yes
    done
    check btrfs-no-errors "$(grep -c '^guest error' "$tmp/btrfs.console")" 0
    check btrfs-quiet "$(grep -ci 'btrfs.*\(error\|critical\)' \
        "$tmp/btrfs.console")" 0
    check_daemon btrfs "$daemon"
    check btrfs-discards "$(between "$(counter btrfs discards)" 1 1e9)" yes
    check btrfs-check "$(status_of btrfs check --readonly \
        --check-data-csum "$tmp/btrfs.img")" 0
fi

explain
[ $failures -eq 0 ]
