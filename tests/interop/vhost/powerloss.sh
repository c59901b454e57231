#!/bin/sh
# Nothing that a guest was told is on the disk may be missing from it, whatever
# happens to the daemon or the disk. Linux writes numbered records and reports
# each one that is durable; then the power goes, or the daemon, or the disk.
# One line per check; the status is 0 if all are ok, or if something is not
# installed and INTEROP_REQUIRED is not 1.
#
#     ROUNDS    power failures of each kind; default 2
#     SEED      of the random numbers; default from the clock
#     GUEST     uml or qemu; default uml, where it runs
#
# The other variables are in common.sh.
test=powerloss
packages="busybox-static e2fsprogs"
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/../../vhost/slowdisk.sh"

ROUNDS=${ROUNDS:-2}
SEED=${SEED:-$(date +%s)}

need_tools busybox mkfs.ext4 e2fsck debugfs
need_guest
build "$tmp/serve"
here=$(cd "$(dirname "$0")" && pwd)
build "$tmp/serve-volatile" "-DVBLK_SERVE_BACKEND=\"$here/volatile.h\""

# ext4 in the first 32 MiB, raw records of 4 KiB from 36 MiB on. With blocks
# smaller than a page, ext4 may allocate the second half of a page before the
# size of the file says so, and e2fsck complains if the power goes in between.
truncate -s 48M "$tmp/made.img"
mkfs.ext4 -q -F -b 4096 "$tmp/made.img" 32m || exit 1
echo "seed $SEED guest $GUEST"


# ---- The records ------------------------------------------------------------

# A record is a file, a line in a file that grows, and a raw block, while
# something else dirties the file system and syncs nothing.
job_write() {
    cat <<'JOB'
if [ -e /cache_off ]; then
    was=$(dd if=/dev/vda bs=4k skip=12287 count=1 2>/dev/null | head -c 8)
    [ "$was" = rebooted ] || echo "write through" >/sys/block/vda/cache_type
    if [ -e /reboots ] && [ "$was" != rebooted ]; then
        echo rebooted | dd of=/dev/vda bs=4k seek=12287 conv=sync,fsync \
            2>/dev/null
        reboot -f
    fi
fi
mount -t ext4 /dev/vda /mnt
say cache $(cat /sys/block/vda/queue/write_cache)
(i=0; while :; do i=$(((i + 1) % 5)); cp /bin/busybox /mnt/junk.$i; done) &
n=1
say writing
while [ $n -le 2000 ]; do
    yes "record $n" | head -c $((n * 7 % 9000 + 1)) |
        dd of=/mnt/record.$n bs=16k conv=fsync 2>/dev/null && say file $n
    echo "line $n" | dd of=/mnt/lines oflag=append conv=notrunc,fsync \
        2>/dev/null && say line $n
    yes "raw $n" | dd of=/dev/vda bs=4k count=1 iflag=fullblock \
        seek=$((9216 + n)) oflag=direct conv=fsync 2>/dev/null && say raw $n
    n=$((n + 1))
done
JOB
}

# What of the reported records is not in the image, after the journal has been
# replayed. A report that shares its line with the kernel does not count.
missing_records() { # console, image
    sed -n 's/^guest \(file\|line\|raw\) \([0-9][0-9]*\)\r*$/\1 \2/p' "$1" \
        >"$tmp/reported"
    rm -rf "$tmp/dump"
    mkdir "$tmp/dump"
    debugfs -R "rdump / $tmp/dump" "$2" >/dev/null 2>&1
    while read -r kind n; do
        case $kind in
        file)
            yes "record $n" | head -c $((n * 7 % 9000 + 1)) |
                cmp -s - "$tmp/dump/record.$n" || echo "$kind-$n"
            ;;
        line) grep -qsx "line $n" "$tmp/dump/lines" || echo "$kind-$n" ;;
        raw)
            yes "raw $n" | head -c 4096 >"$tmp/expected"
            dd if="$2" bs=4k skip=$((9216 + n)) count=1 status=none |
                cmp -s - "$tmp/expected" || echo "$kind-$n"
            ;;
        esac
    done <"$tmp/reported" | tr '\n' ' '
    rm -rf "$tmp/dump"
}

kinds_reported() { # after missing_records
    cut -d ' ' -f 1 "$tmp/reported" | sort -u | tr '\n' ' '
}

# Complaints beyond the replay of a journal, and what a replay leaves for
# e2fsck to do: files deleted while open or being truncated, and the totals.
damage() { # image
    e2fsck -fy "$1" 2>&1 | grep -v -e '^e2fsck ' -e 'recovering journal' \
        -e '^\(Clearing\|Truncating\) orphaned inode' -e '^Pass [1-5]' -e '^$' \
        -e '^Free \(blocks\|inodes\) count wrong (' -e '^Fix? yes' \
        -e 'FILE SYSTEM WAS MODIFIED' -e ' files (.* blocks$' | head -n 5
}

wait_for() { # console, text, how often
    for try in $(seq $((LIMIT * 10))); do
        [ "$(cat "$1" 2>/dev/null | grep -c "$2")" -ge "$3" ] && return
        guest_runs || break
        sleep 0.1
    done
    echo "no '$2' from the guest" >&2
    return 1
}

random=$SEED
next_random() { # bound; leaves it in $random_value
    random=$(((random * 1103515245 + 12345) % 2147483648))
    random_value=$((random / 65536 % $1))
}


# ---- Loss of power ----------------------------------------------------------

total_unflushed=0

# Leaves $missing, $damage and $reported.
lose_power() { # name, then the environment of the daemon
    name=$1
    shift
    cp "$tmp/made.img" "$tmp/disk.img"
    next_random 1000000
    start "$name" env "$@" VOLATILE_SEED=$random_value "$tmp/serve-volatile" \
        --image "$tmp/disk.img"
    job_write | job
    start_guest "$tmp/$name.console" "$tmp/$name.sock"
    if wait_for "$tmp/$name.console" "^guest raw" 3; then
        next_random 30
        sleep $((random_value / 10)).$((random_value % 10))
        end USR1
    else
        end KILL # without requests it would go on
    fi
    check "$name-power-lost" "status $status" "status 3"
    sleep 0.2
    kill_guest
    unflushed=$(counter "$name" unflushed)
    judge_loss
}

judge_loss() {
    total_unflushed=$((total_unflushed + ${unflushed:-0}))
    damage=$(damage "$tmp/disk.img")
    missing=$(missing_records "$tmp/$name.console" "$tmp/disk.img")
    reported=$(kinds_reported)
}

survive() { # name, cache mode that the guest sees, environment
    name=$1
    cache=$2
    shift 2
    lose_power "$name" "$@"
    check "$name-cache" "$(says "$name" cache)" "$cache"
    check "$name-reported" "$reported" "file line raw "
    check "$name-missing" "$missing" ""
    check "$name-damage" "$damage" ""
    check "$name-e2fsck" "$(status_of e2fsck -fn "$tmp/disk.img")" 0
}

for round in $(seq "$ROUNDS"); do
    survive "writeback-$round" "write back" VOLATILE_OFFER=flush
    survive "writethrough-$round" "write through" VOLATILE_OFFER=none
done
# The driver turns the cache off: it flushes no more. QEMU keeps to that over a
# reboot, through a firmware that knows of no cache.
touch "$tmp/root/cache_off"
[ "$GUEST" = uml ] || touch "$tmp/root/reboots"
for round in $(seq "$ROUNDS"); do
    survive "cache-off-$round" "write through" VOLATILE_OFFER=flush
done
rm -f "$tmp/root/cache_off" "$tmp/root/reboots"
check something-was-unflushed "$(between $total_unflushed 1 1000000)" yes

# The test itself: a disk that lies about flushing must be found out.
lose_power liar VOLATILE_FLUSH=none
check liar-is-found-out "$([ -n "$missing$damage" ] && echo yes)" yes


# ---- The host's disk loses its power -----------------------------------------

# Under io_uring and O_DIRECT. False: there is no such disk.
disk_loses_power() { # name, liar
    name=$1
    shift
    cp "$tmp/made.img" "$tmp/disk.img"
    next_random 1000000
    begin_slow_disk "$tmp/disk.img" 1 "$random_value" "$@" || return
    start "$name" "$tmp/serve" --image "$slow_disk" --direct --aio uring
    job_write | job
    start_guest "$tmp/$name.console" "$tmp/$name.sock"
    wait_for "$tmp/$name.console" "^guest raw" 3 || kill -KILL "$slow"
    next_random 30
    sleep $((random_value / 10)).$((random_value % 10))
    kill -PWR "$slow"
    wait "$slow"
    check "$name-power-lost" "status $?" "status 3"
    sleep 0.2
    kill_guest
    end KILL
    forget "$slow"
    end_slow_disk
    unflushed=$(sed -n 's/^unflushed //p' "$tmp/slow.log")
    judge_loss
}

total_unflushed=0
for round in $(seq "$ROUNDS"); do
    if disk_loses_power "uring-$round"; then
        check "uring-$round-reported" "$reported" "file line raw "
        check "uring-$round-missing" "$missing" ""
        check "uring-$round-damage" "$damage" ""
        last=$round
    fi
done
if [ -n "${last:-}" ]; then
    check something-was-unflushed-by-uring \
        "$(between $total_unflushed 1 1000000)" yes
    disk_loses_power uring-liar liar
    check uring-liar-is-found-out "$([ -n "$missing$damage" ] && echo yes)" yes
else
    echo "SKIP: a disk that loses its power needs FUSE, a loop device and the" \
        "right to both (apt install libfuse3-dev pkg-config)"
fi


# ---- The daemon is killed ---------------------------------------------------

cp "$tmp/made.img" "$tmp/disk.img"
start killed "$tmp/serve" --image "$tmp/disk.img"
job_write | job
start_guest "$tmp/killed.console" "$tmp/killed.sock"
wait_for "$tmp/killed.console" "^guest raw" 20
end KILL
kill_guest
check killed "status $status" "status 137"
start killed "$tmp/serve" --image "$tmp/disk.img"
job <<'JOB'
mount -t ext4 /dev/vda /mnt
say mount $?
say lines $(wc -l </mnt/lines)
umount /mnt
JOB
run_guest recovered killed
end TERM
check recovered-mount "$(says recovered mount)" 0
check recovered-missing \
    "$(missing_records "$tmp/killed.console" "$tmp/disk.img")" ""
check recovered-reported "$(kinds_reported)" "file line raw "
check recovered-e2fsck "$(status_of e2fsck -fn "$tmp/disk.img")" 0


# ---- The disk fails ---------------------------------------------------------

start eio "$tmp/serve-volatile" --image "$tmp/disk.img"
job <<'JOB'
yes before | dd of=/dev/vda bs=4k count=1 iflag=fullblock seek=9216 \
    oflag=direct conv=fsync 2>/dev/null
say before $?
read go
yes after | dd of=/dev/vda bs=4k count=1 iflag=fullblock seek=9216 \
    oflag=direct 2>/dev/null
say write $?
dd if=/dev/vda of=/dev/null bs=4k count=1 skip=9216 iflag=direct 2>/dev/null
say read $?
JOB
start_guest "$tmp/eio.console" "$tmp/eio.sock"
wait_for "$tmp/eio.console" "^guest before" 1
kill -USR2 $daemon
tell_guest go
wait_guest
check eio-before "$(says eio before)" 0
check eio-write-fails "$(says eio write)" 1
check eio-read-fails "$(says eio read)" 1
check eio-told "$(between "$(grep -c "backend failed" "$tmp/eio.err")" \
    1 30)" yes
check eio-flushed-data "$(dd if="$tmp/disk.img" bs=4k skip=9216 count=1 \
    status=none | tr '\n' ' ' | head -c 14)" "before before "
job <<'JOB'
say size $(cat /sys/block/vda/size)
JOB
run_guest eio-next eio
check eio-daemon-serves-on "$(says eio-next size)" 98304
end TERM
check eio-daemon-ends "status $status" "status 0"


# ---- The image is cut under way ---------------------------------------------

# What was behind the end of the file is lost: an error, for a flush too, and no
# zeroes. What is before it stays.
head -c 48M /dev/urandom >"$tmp/cut.img"
front=$(head -c 10M "$tmp/cut.img" | sha256sum | cut -d ' ' -f 1)
start cut "$tmp/serve" --image "$tmp/cut.img"
job <<'JOB'
say ready
read go
say front $(dd if=/dev/vda bs=64k count=160 iflag=direct 2>/dev/null |
    sha256sum)
dd if=/dev/vda bs=64k skip=160 count=1 iflag=direct >/dev/null 2>&1
say behind $?
dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct conv=fsync 2>/dev/null
say flush $?
JOB
start_guest "$tmp/cut.console" "$tmp/cut.sock"
wait_for "$tmp/cut.console" "^guest ready" 1
truncate -s 10M "$tmp/cut.img"
tell_guest go
wait_guest
end TERM
check cut-front "$(says cut front | cut -d ' ' -f 1)" "$front"
check cut-behind-is-lost "$(says cut behind)" 1
check cut-flush-fails "$(says cut flush)" 1
check cut-told "$(between "$(grep -c "backend failed to read" \
    "$tmp/cut.err")" 1 30)" yes
check cut-daemon-ends "status $status" "status 0"
rm -f "$tmp/cut.img"


# ---- The host's disk is full ------------------------------------------------

mkdir "$tmp/small" || exit 1
if ! mount -t tmpfs -o size=8m tmpfs "$tmp/small" 2>/dev/null; then
    echo "SKIP: full needs the right to mount a tmpfs"
else
    truncate -s 48M "$tmp/small/disk.img"
    start full "$tmp/serve" --image "$tmp/small/disk.img"
    job <<'JOB'
i=0
while yes "block $i" | dd of=/dev/vda bs=256k count=1 iflag=fullblock seek=$i \
    oflag=direct conv=fsync 2>/dev/null; do
    i=$((i + 1))
done
say written $i
yes "block 3" | head -c 262144 >/block
dd if=/dev/vda bs=256k skip=3 count=1 iflag=direct 2>/dev/null | cmp - /block
say read $?
JOB
    run_guest full full
    end TERM
    check full-written "$(between "$(says full written)" 16 32)" yes
    check full-read "$(says full read)" 0
    check full-flushed-data "$(dd if="$tmp/small/disk.img" bs=256k skip=15 \
        count=1 status=none | sha256sum)" \
        "$(yes 'block 15' | head -c 262144 | sha256sum)"
    check full-errors "$(between "$(counter full io_errors)" 1 100)" yes
    check full-daemon-ends "status $status" "status 0"
    umount "$tmp/small"
fi

explain
[ $failures -eq 0 ]
