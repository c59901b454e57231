#!/bin/sh
# examples/serve is killed again and again, with 48 requests of fio under way
# that end in any order, and comes back: Linux under QEMU sees no error, and fio
# finds what it wrote. The disk is slow where that can be had (FUSE and a loop
# device), so that requests are really under way. Variables are those of
# common.sh, and
#
#     KILLS  how often (5)
test=crash
packages="fio busybox-static e2fsprogs"
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/../../vhost/slowdisk.sh"
KILLS=${KILLS:-5}

need_tools fio busybox mkfs.ext4
need_qemu
build "$tmp/serve"

# fio and what it is linked to, on a disk of QEMU's own.
mkdir "$tmp/tools" || exit 1
for file in "$(command -v fio)" $(ldd "$(command -v fio)" |
    sed -n 's/.*[ 	]\(\/[^ ]*\) (.*/\1/p'); do
    cp "$file" "$tmp/tools/" || exit 1
done
mkfs.ext4 -q -F -d "$tmp/tools" "$tmp/tools.img" 160m || exit 1

job <<'JOB'
mount -t ext4 -o ro /dev/vdb /mnt
say ready
/mnt/ld-linux-x86-64.so.2 --library-path /mnt /mnt/fio --thread --name=crash \
    --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=48 \
    --rw=randwrite --bs=4k --size=4m --verify=crc32c --verify_fatal=1 \
    --verify_backlog=512 --time_based --runtime=40 >/log 2>&1
say fio $?
grep -o 'err= *[0-9]*' /log | while read line; do say $line; done
grep -o '[a-z]*: IOPS=[^,]*' /log | while read line; do say moved $line; done
dmesg | grep -i -e 'virtio' -e 'I/O error' |
    while read line; do say kernel "$line"; done
JOB

begun_again() { # name
    sed -n 's/.* \([0-9]*\) requests of the daemon before.*/\1/p' "$1"
}

# A supervisor starts it until it stays.
come_back() { # name, options...
    for attempt in 1 2 3 4 5 6 7 8; do
        quietly=1 start "$@" && return
    done
    check "$1-comes-back" "$(cat "$tmp/$1.err")" "a socket"
}

crash() { # name, options of the daemon...
    name=$1
    shift
    start "$name" "$tmp/serve" "$@" || return
    start_qemu "$tmp/$name.console" -M q35,accel=tcg,memory-backend=m -smp 2 \
        -chardev "socket,id=c,path=$tmp/$name.sock,reconnect=1" \
        -device vhost-user-blk-pci,chardev=c \
        -drive "file=$tmp/tools.img,if=none,id=t,format=raw,readonly=on" \
        -device virtio-blk-pci,drive=t
    for try in $(seq $((LIMIT * 10))); do
        grep -q "^guest ready" "$tmp/$name.console" && break
        sleep 0.1
    done
    killed=0
    again=0
    for round in $(seq $((KILLS * 4))); do
        sleep 1
        [ $killed -lt "$KILLS" ] && guest_runs || break
        end KILL
        come_back "$name" "$tmp/serve" "$@"
        sleep 1.5 # QEMU looks every second
        n=$(begun_again "$tmp/$name.err" | awk '{ n += $1 } END { print n + 0 }')
        echo "$name: $n requests begun again" # fio may still be starting
        [ "$n" -lt "$least" ] || killed=$((killed + 1))
    done
    check "$name-kills" "$killed" "$KILLS"
    wait_guest
    check "$name-fio" "$(says "$name" fio)" 0
    check "$name-errors" "$(says "$name" 'err=' | tr -d ' ')" 0
    check "$name-kernel-is-content" "$(says "$name" kernel |
        grep -c -e 'I/O error' -e 'is not a head')" 0
    echo "$name: $(says "$name" moved | tr '\n' ',')"
    end TERM
    check "$name-last-daemon-served" "$(between "$(counter "$name" writes)" \
        1 100000000)" yes
    check "$name-counts" \
        "$(counter "$name" io_errors) $(counter "$name" broken_rings)" "0 0"
}

truncate -s 4M "$tmp/disk.img"
if begin_slow_disk "$tmp/disk.img" 4000; then
    least=40
    crash uring --image "$slow_disk" --direct --aio uring
    crash threads --image "$slow_disk" --direct --aio uring --threads
    end_slow_disk
else
    echo "SKIP: a slow disk needs FUSE, a loop device and the right to both" \
        "(apt install libfuse3-dev pkg-config); requests end at once without"
    least=0
    crash uring --image "$tmp/disk.img" --aio auto
fi
least=0
crash sync --image "$tmp/disk.img" --aio sync

explain
[ $failures -eq 0 ]
