#!/bin/sh
# How large the device is: device.c, linked with the little that an image needs
# beside it, the stack that its drain takes, and what a host keeps.
cd "$(dirname "$0")/../.." || exit 1
B=${B:-build}/size
image='tests/image/device.c tests/image/bare.c tests/image/mem.c'
few='-Os -DVBLK_MAX_SEGS=16 -DVBLK_SCRATCH=512 -DVBLK_MAX_RANGES=0'
mkdir -p "$B"

# The deepest chain of calls from device_run, in bytes, by what gcc writes of
# each function (-fcallgraph-info=su). A call by a pointer counts as the deepest
# of the accessors and the disk's functions; what the host's own functions take
# comes on top. $1: a function that is left out.
stack() {
    awk -v without="$1" '
        function plain(name) {
            sub(/.*:/, "", name)
            sub(/\..*/, "", name)
            return name
        }
        function deepest(name,   most, n, i) {
            if (name in known) return known[name]
            if (name == without) return 0
            if (name in open) { print "recursion: " name; exit 1 }
            open[name] = 1
            most = 0
            for (i = 1; i <= calls[name]; i++) {
                n = deepest(call[name, i])
                if (n > most) most = n
            }
            delete open[name]
            return known[name] = bytes[name] + most
        }
        /^node:/ {
            split($0, q, "\"")
            name = plain(q[2])
            if (match(q[4], /[0-9]+ bytes/)) {
                n = substr(q[4], RSTART, RLENGTH) + 0
                if (n > bytes[name]) bytes[name] = n
            }
            if (name ~ /^vblk__(regions|ramdisk)_(read|write|map|flush)$/) {
                call["__indirect_call", ++calls["__indirect_call"]] = name
            }
        }
        /^edge:/ {
            split($0, q, "\"")
            from = plain(q[2])
            if (from !~ /^vblk_(_emit|notify)$/) {
                call[from, ++calls[from]] = plain(q[4])
            }
        }
        END { print deepest("device_run") }' "$B"/*.ci
}

# column NAME TOOLS FLAGS...: one of the table, into $B/NAME.
column() {
    name=$1 tools=$2
    shift 2
    rm -f "$B"/*.ci
    "${tools}gcc" -std=c99 -ffreestanding -ffunction-sections -fdata-sections \
        -fno-tree-loop-distribute-patterns -fcallgraph-info=su -nostdlib \
        -static -Wl,--gc-sections,-e,start "$@" -o "$B/image" $image || exit 1
    echo 'vblk_dev a_dev; vblk_queue a_queue; vblk_request a_request;' |
        "${tools}gcc" -std=c99 -ffreestanding -fno-common "$@" \
            -include vblk.h -x c -c - -o "$B/structs.o" || exit 1
    {
        "${tools}size" -A "$B/image" | awk '
            $1 ~ /^\.(text|rodata|data|sdata|srodata|ARM\.exidx)/ { n += $2 }
            END { print n }'
        stack vblk__move_copied
        stack
        "${tools}nm" -S "$B/structs.o" | awk '
            { n[$4] = $2 }
            END { print "0x" n["a_dev"], "0x" n["a_queue"], "0x" n["a_request"] }' |
            xargs printf '%d\n%d\n%d\n'
    } >"$B/$name"
    columns="$columns $name"
}

# has TOOLS PACKAGE: whether there is such a compiler.
has() {
    "$1gcc" -fcallgraph-info=su -x c -c /dev/null -o "$B/probe.o" \
        2>/dev/null && return
    echo "SKIP: size needs ${1}gcc 10 or later (apt install $2)"
    return 1
}

if [ "$(uname -m)" = x86_64 ] && has '' gcc; then
    column x86-64,-O2 '' -O2 -fno-pie -no-pie
    column x86-64,-Os '' $few -fno-pie -no-pie
fi
has arm-none-eabi- gcc-arm-none-eabi &&
    column Cortex-M4,-Os arm-none-eabi- $few -mcpu=cortex-m4 -mthumb
has riscv64-linux-gnu- gcc-riscv64-linux-gnu &&
    column rv32,-Os riscv64-linux-gnu- $few -march=rv32imac -mabi=ilp32 \
        -Wl,-melf32lriscv

[ -n "$columns" ] || exit 0
cd "$B" || exit 1
{
    echo $columns
    paste -d ' ' $columns
} | awk '
    BEGIN {
        split("bytes;image: code and constants;stack of vblk_poll(), with map;" \
              "the same without map;vblk_dev, one queue in it;vblk_queue;" \
              "vblk_request", row, ";")
    }
    {
        gsub(/,/, " ")
        printf "%-30s", row[NR]
        for (i = 1; i <= NF; i++) {
            printf NR == 1 ? (i % 2 ? "%9s" : " %-4s") : "%10s    ", $i
        }
        print ""
    }
    END { print "-Os: VBLK_MAX_SEGS 16, VBLK_SCRATCH 512, VBLK_MAX_RANGES 0" }'
