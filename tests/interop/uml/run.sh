#!/bin/sh
# Linux, as a process of the host, uses a disk of examples/serve.
# One line per check; the status is 0 if all are ok, or if something is not
# installed and INTEROP_REQUIRED is not 1. vhost/common.sh has the variables.
test=uml
packages="busybox-static e2fsprogs"
. "$(dirname "$0")/../vhost/common.sh"

need_tools busybox mkfs.ext4 e2fsck debugfs
need_uml
build "$tmp/serve"
[ -z "$SANITIZE" ] || build "$tmp/serve-sanitized" $SANITIZE


# ---- The disk ---------------------------------------------------------------

# A file system of 32 MiB, and an odd number of sectors, so that no rounding
# of the capacity goes unseen. What is behind the file system is used raw.
SECTORS=81921

mkdir "$tmp/seed" || exit 1
head -c 3000001 /dev/urandom >"$tmp/seed/file"
head -c 1048576 /dev/urandom >"$tmp/root/shared/piece"
head -c 512 /dev/urandom >"$tmp/root/shared/sector"

make_disk() { # image
    truncate -s $((SECTORS * 512)) "$1"
    mkfs.ext4 -q -F -d "$tmp/seed" "$1" 32m || exit 1
}

make_disk "$tmp/made.img"


# ---- Reading and writing ----------------------------------------------------

job_use() {
    cat <<'JOB'
say size $(cat /sys/block/vda/size)
say cache $(cat /sys/block/vda/queue/write_cache)
say serial "$(cat /sys/block/vda/serial)"
say ro $(cat /sys/block/vda/ro)

# Raw: 36 MiB and on, and the last sector.
dd if=/shared/piece of=/dev/vda bs=64k seek=576 oflag=direct 2>/dev/null
say raw-write $?
dd if=/shared/sector of=/dev/vda bs=512 seek=81920 oflag=direct 2>/dev/null
say last-sector $?
dd if=/dev/vda bs=4k skip=9216 count=256 iflag=direct 2>/dev/null |
    cmp - /shared/piece
say raw-read $?

mount -t ext4 /dev/vda /mnt
say mount $?
say file $(sha256sum </mnt/file)
i=0
while [ $i -lt 20 ]; do
    { echo "file $i"; head -c $((i * 50021)) /mnt/file; } >/mnt/new.$i
    i=$((i + 1))
done
rm /mnt/new.3
dd if=/mnt/file of=/mnt/direct bs=64k conv=fsync 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt && sha256sum file direct new.*) >/shared/sums
umount /mnt
say umount $?

# The driver goes and comes back on the same connection.
rmmod virtio_blk && insmod /virtio_blk.ko
say reload $?
say reload-size $(cat /sys/block/vda/size)
dd if=/dev/vda bs=512 skip=81920 count=1 iflag=direct 2>/dev/null |
    cmp - /shared/sector
say reload-read $?
mount -t ext4 /dev/vda /mnt
say reload-files $(cd /mnt && sha256sum -c /shared/sums | grep -c OK$)
umount /mnt
JOB
}

use() { # prefix, program
    rm -f "$tmp/root/shared/sums"
    cp "$tmp/made.img" "$tmp/disk.img"
    start "$1" "$2" --image "$tmp/disk.img" --id "disk of tests"
    job_use | job
    run_guest "$1" "$1"
    end TERM
    check "$1-daemon-ends" "status $status" "status 0"

    check "$1-size" "$(says "$1" size)" $SECTORS
    check "$1-cache" "$(says "$1" cache)" "write back"
    check "$1-serial" "$(says "$1" serial)" "disk of tests"
    check "$1-not-read-only" "$(says "$1" ro)" 0
    check "$1-raw-write" "$(says "$1" raw-write)" 0
    check "$1-raw-read" "$(says "$1" raw-read)" 0
    check "$1-last-sector" "$(says "$1" last-sector)" 0
    check "$1-mount" "$(says "$1" mount)" 0
    check "$1-umount" "$(says "$1" umount)" 0
    check "$1-driver-reloaded" "$(says "$1" reload) $(says "$1" reload-size)" \
        "0 $SECTORS"
    check "$1-read-after-reload" "$(says "$1" reload-read)" 0
    check "$1-files-after-reload" "$(says "$1" reload-files)" 21

    check "$1-host-sees-raw-write" "$(dd if="$tmp/disk.img" bs=64k skip=576 \
        count=16 status=none | sha256sum)" \
        "$(sha256sum <"$tmp/root/shared/piece")"
    check "$1-host-sees-last-sector" "$(tail -c 512 "$tmp/disk.img" |
        sha256sum)" "$(sha256sum <"$tmp/root/shared/sector")"
    check "$1-image-bytes" "$(wc -c <"$tmp/disk.img")" $((SECTORS * 512))
    check "$1-e2fsck" "$(status_of e2fsck -fn "$tmp/disk.img")" 0
    check "$1-guest-reads-file" "$(says "$1" file | cut -d ' ' -f 1)" \
        "$(sum_of "$tmp/seed/file")"
    mkdir -p "$tmp/dump"
    debugfs -R "rdump / $tmp/dump" "$tmp/disk.img" >/dev/null 2>&1
    check "$1-host-agrees-on-21-files" "$(cd "$tmp/dump" &&
        sha256sum -c "$tmp/root/shared/sums" 2>&1 | grep -c 'OK$')" 21
    rm -rf "$tmp/dump"

    check "$1-errors" "$(counter "$1" io_errors) $(counter "$1" broken_rings)" \
        "0 0"
    check "$1-flushes" "$(between "$(counter "$1" flushes)" 3 1000)" yes
    check "$1-silent" "$(cat "$tmp/$1.err")" ""
}

use plain "$tmp/serve"
[ -z "$SANITIZE" ] || use sanitized "$tmp/serve-sanitized"


# ---- A read-only disk -------------------------------------------------------

cp "$tmp/made.img" "$tmp/disk.img"
start read-only "$tmp/serve" --image "$tmp/disk.img" --read-only
job <<'JOB'
say ro $(cat /sys/block/vda/ro)
dd if=/shared/piece of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null
say write $?
mount -t ext4 -o ro /dev/vda /mnt
say file $(sha256sum </mnt/file)
umount /mnt
JOB
run_guest read-only read-only
end TERM
check read-only-in-guest "$(says read-only ro)" 1
check read-only-write-fails "$(says read-only write)" 1
check read-only-file "$(says read-only file | cut -d ' ' -f 1)" \
    "$(sum_of "$tmp/seed/file")"
check read-only-image-untouched \
    "$(status_of cmp "$tmp/made.img" "$tmp/disk.img")" 0
check read-only-silent "$(cat "$tmp/read-only.err")" ""


# ---- No flush ---------------------------------------------------------------

start unsafe "$tmp/serve" --image "$tmp/disk.img" --cache unsafe
job <<'JOB'
say cache $(cat /sys/block/vda/queue/write_cache)
dd if=/shared/piece of=/dev/vda bs=64k seek=576 conv=fsync 2>/dev/null
say write $?
JOB
run_guest unsafe unsafe
end TERM
check unsafe-cache "$(says unsafe cache)" "write through"
check unsafe-write "$(says unsafe write)" 0
check unsafe-flushes "$(counter unsafe flushes)" 0


# ---- Limits -----------------------------------------------------------------

# A second's worth is there at first; the rest comes at the rate.
timed_reads() { # block size, count
    cat <<JOB
now() { cut -d ' ' -f 1 /proc/uptime; }
sleep 1.2
start=\$(now)
dd if=/dev/vda of=/dev/null bs=$1 count=$2 iflag=direct 2>/dev/null
say read \$?
say seconds \$(now) - \$start
JOB
}

limited() { # name, options of the daemon, block size, count
    start "$1" "$tmp/serve" --image "$tmp/disk.img" $2
    timed_reads "$3" "$4" | job
    run_guest "$1" "$1"
    end TERM
    check "$1-read" "$(says "$1" read)" 0
    check "$1-takes-2-seconds" \
        "$(between "$(says "$1" seconds | awk '{print $1 - $3}')" 1.8 3)" yes
    check "$1-stalls" "$(between "$(counter "$1" stalls)" 1 100000)" yes
}

limited iops "--iops 200" 4k 600
limited bps "--bps 8M" 1M 24

explain
[ $failures -eq 0 ]
