#!/bin/sh
# U-Boot for RISC-V, as Debian ships it, runs on machine.c and finds, reads and
# writes a disk through its own virtio drivers. One line per check; the status
# is 0 if all are ok, or if something is not installed and INTEROP_REQUIRED is
# not 1.
#
#     BUILD     where temporary files go, and are removed from; default /tmp
#     CC CFLAGS as usual
#     SANITIZE  flags of the second build; empty: no second build
#     UBOOT     the firmware, the M-mode build of qemu-riscv64
set -u
LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL PATH

here=$(dirname "$0")
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2 -g}
SANITIZE=${SANITIZE--fsanitize=address,undefined -fno-sanitize-recover=all}
UBOOT=${UBOOT:-/usr/lib/u-boot/qemu-riscv64/u-boot.bin}
WARN="-std=c99 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes"
LIMIT=60 # seconds for a boot that takes less than two

mkdir -p "${BUILD:-/tmp}" || exit 1
tmp=$(mktemp -d "${BUILD:-/tmp}/uboot.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM


# ---- What is needed ---------------------------------------------------------

missing() {
    echo "SKIP: interop-uboot needs $1 (apt install u-boot-qemu" \
        "libunicorn-dev device-tree-compiler e2fsprogs)"
    [ "${INTEROP_REQUIRED:-0}" = 1 ] && exit 1
    exit 0
}

[ -f "$UBOOT" ] || missing "$UBOOT"
for tool in dtc mkfs.ext4 e2fsck; do
    command -v $tool >/dev/null || missing $tool
done
printf '#include <unicorn/unicorn.h>\nint main(void) { return 0; }\n' \
    >"$tmp/have.c"
printf 'int main(void) { return 0; }\n' >"$tmp/cc.c"
$CC "$tmp/cc.c" -o "$tmp/have" || exit 1
$CC "$tmp/have.c" -o "$tmp/have" -lunicorn 2>/dev/null || missing libunicorn


# ---- The disk ---------------------------------------------------------------

# A file system of 32 MiB, and an odd number of sectors, so that no rounding
# of the capacity goes unseen.
SECTORS=81921
FILE_BYTES=3000001 # 0x2dc6c1

mkdir "$tmp/root"
head -c $FILE_BYTES /dev/urandom >"$tmp/root/file"
truncate -s $((SECTORS * 512)) "$tmp/made.img"
mkfs.ext4 -q -F -d "$tmp/root" "$tmp/made.img" 32m || exit 1
head -c 512 /dev/zero | tr '\000' '\245' >"$tmp/sector"
head -c 65536 "$tmp/root/file" >"$tmp/piece"

# What the commands below leave of it: 69632 is 0x11000, 73728 is 0x12000.
cp "$tmp/made.img" "$tmp/expected.img"
dd if="$tmp/sector" of="$tmp/expected.img" bs=512 seek=69632 conv=notrunc \
    status=none
dd if="$tmp/piece" of="$tmp/expected.img" bs=512 seek=73728 conv=notrunc \
    status=none

cat >"$tmp/first.commands" <<'COMMANDS'
virtio scan
virtio info
ext4load virtio 0 82000000 /file
crc32 82000000 2dc6c1
virtio read 84000000 0 8000
crc32 84000000 1000000
mw.b 86000000 a5 200
virtio write 86000000 11000 1
virtio write 82000000 12000 80
virtio read 86000000 14000 1
virtio read 86000000 14001 1
virtio read 86000000 14000 2
COMMANDS
cat >"$tmp/second.commands" <<'COMMANDS'
virtio scan
virtio read 86000000 11000 1
crc32 86000000 200
virtio read 84000000 12000 80
crc32 84000000 10000
COMMANDS

# The last eight bytes of a gzip file are the CRC-32 and the size, both
# little-endian.
crc32_of() {
    gzip -1 -c | tail -c 8 | od -A n -t x1 -N 4 | awk '{print $4 $3 $2 $1}'
}

file_crc32=$(crc32_of <"$tmp/root/file")
start_crc32=$(head -c 16777216 "$tmp/made.img" | crc32_of)
sector_crc32=$(crc32_of <"$tmp/sector")
piece_crc32=$(crc32_of <"$tmp/piece")


# ---- Judging ----------------------------------------------------------------

failures=0

check() { # name, seen, expected
    if [ "$2" = "$3" ]; then
        echo "ok $build/$1"
    else
        echo "FAIL $build/$1: saw '$2', expected '$3'"
        failures=$((failures + 1))
    fi
}

# What came after the echo of a command, down to the line of the device.
answer() { # boot, command
    awk -v command="$2" '
        on { print }
        /^device / { on = 0 }
        $0 == command { on = 1 }
    ' "$tmp/$1.console"
}

uboot_says() { # boot, command; the last line of the answer
    answer "$1" "$2" | sed '/^device /d; /^=> /d; /^$/d' | tail -n 1
}

outcome() { # boot, virtio read or write command
    uboot_says "$1" "$2" | sed 's/.*\.\.\. //'
}

crc32_says() { # boot, crc32 command
    uboot_says "$1" "$2" | sed 's/.* //'
}

device_says() { # boot, command
    answer "$1" "$2" | sed -n 's/^device //p'
}

counts() { # reads bytes writes bytes errors used-bytes; U-Boot never flushes
    echo "reads=$1 bytes_read=$2 writes=$3 bytes_written=$4 flushes=0" \
        "io_errors=$5 backend_flushes=$3 used_bytes=$6"
}

total() { # boot, counter
    awk -v name="$2" '
        /^device / {
            for (i = 2; i <= NF; i++) {
                split($i, field, "=")
                if (field[1] == name) {
                    sum += field[2]
                }
            }
        }
        END { print sum + 0 }
    ' "$tmp/$1.console"
}

boot() { # name
    timeout -k 5 $LIMIT "$tmp/machine" "$UBOOT" "$tmp/machine.dtb" \
        "$tmp/disk.img" <"$tmp/$1.commands" >"$tmp/$1.console" \
        2>"$tmp/$1.events"
    status=$?
    check "$1-boot-finished" "status $status" "status 0"
    return $status
}

explain() {
    for boot in first second; do
        for log in console events; do
            if [ -f "$tmp/$boot.$log" ]; then
                echo "---- $build: $log of the $boot boot"
                cat "$tmp/$boot.$log"
            fi
        done
    done >&2
}


# ---- The session ------------------------------------------------------------

judge() {
    boot first || return
    cmp "$tmp/disk.img" "$tmp/expected.img" >"$tmp/cmp" 2>&1
    boot second || return

    check capacity "$(uboot_says first 'virtio info' |
        sed 's/.*(\(.*\) x 512)/\1/')" $SECTORS

    check ext4load "$(uboot_says first 'ext4load virtio 0 82000000 /file' |
        sed 's/ in .*//')" "$FILE_BYTES bytes read"
    check ext4load-crc32 \
        "$(crc32_says first 'crc32 82000000 2dc6c1')" "$file_crc32"

    check read-16MiB "$(outcome first 'virtio read 84000000 0 8000')" \
        "32768 blocks read: OK"
    check read-16MiB-is-one-request \
        "$(device_says first 'virtio read 84000000 0 8000')" \
        "$(counts 1 16777216 0 0 0 16777217)"
    check read-16MiB-crc32 \
        "$(crc32_says first 'crc32 84000000 1000000')" "$start_crc32"

    check write-sector "$(outcome first 'virtio write 86000000 11000 1')" \
        "1 blocks written: OK"
    check write-sector-seen-by-device \
        "$(device_says first 'virtio write 86000000 11000 1')" \
        "$(counts 0 0 1 512 0 1)"
    check write-64KiB "$(outcome first 'virtio write 82000000 12000 80')" \
        "128 blocks written: OK"
    check write-64KiB-seen-by-device \
        "$(device_says first 'virtio write 82000000 12000 80')" \
        "$(counts 0 0 1 65536 0 1)"
    check image-is-what-was-written "$(cat "$tmp/cmp")" ""
    check second-boot-reads-sector \
        "$(crc32_says second 'crc32 86000000 200')" "$sector_crc32"
    check second-boot-reads-64KiB \
        "$(crc32_says second 'crc32 84000000 10000')" "$piece_crc32"

    # U-Boot does not compare a range with the capacity: the device must.
    check last-sector "$(outcome first 'virtio read 86000000 14000 1')" \
        "1 blocks read: OK"
    check read-past-end "$(outcome first 'virtio read 86000000 14001 1')" \
        "-5 blocks read: ERROR"
    check read-past-end-seen-by-device \
        "$(device_says first 'virtio read 86000000 14001 1')" \
        "$(counts 0 0 0 0 1 0)"
    check read-across-end "$(outcome first 'virtio read 86000000 14000 2')" \
        "-5 blocks read: ERROR"
    check read-across-end-seen-by-device \
        "$(device_says first 'virtio read 86000000 14000 2')" \
        "$(counts 0 0 0 0 1 0)"

    e2fsck -fn "$tmp/disk.img" >"$tmp/e2fsck" 2>&1
    check e2fsck "status $?" "status 0"

    check total-io-errors \
        "$(total first io_errors) $(total second io_errors)" "2 0"
    check total-writes "$(total first writes) $(total second writes)" "2 0"
    check flush-after-each-write \
        "$(total first backend_flushes) $(total second backend_flushes)" "2 0"
    check total-bytes-read "$(total first bytes_read | awk -v file=$FILE_BYTES \
        '{print ($1 >= 16777216 + 512 + file) ? "enough" : $1}')" enough
    check events "$(sed 's/.*(\(V[0-9]*\)).*/\1/' "$tmp/first.events" \
        "$tmp/second.events" | tr '\n' ' ')" "V13 V13 "
}

session() { # name of the build, its flags
    build=$1
    before=$failures
    # shellcheck disable=SC2086
    if ! $CC $WARN $CFLAGS $2 -I"$here/../../.." "$here/machine.c" \
        -o "$tmp/machine" -lunicorn -lpthread; then
        check build failed built
        return
    fi
    rm -f "$tmp"/*.console "$tmp"/*.events
    cp "$tmp/made.img" "$tmp/disk.img"
    judge
    [ $failures -eq $before ] || explain
}

dtc -q -I dts -O dtb -o "$tmp/machine.dtb" "$here/machine.dts" || exit 1
session plain ""
[ -z "$SANITIZE" ] || session sanitized "$SANITIZE"
[ $failures -eq 0 ]
