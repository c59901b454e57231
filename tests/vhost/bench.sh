#!/bin/sh
# Throughput, latency and processor time of vblk-serve, and of
# qemu-storage-daemon in turn with it, each beside the better of two bare loops
# in the same second: preadv or pwritev, and io_uring. The image is 256 MiB: in
# memory; on a disk and cached; on a disk with an empty cache; and on a disk
# with O_DIRECT on all sides. A driver sleeps on its eventfd, or polls. Front
# end and servers have a processor each.
#
#     SECS    seconds of a turn of a server (.4)
#     ROUNDS  at most so many turns for a cell of the table (9): there are as
#             many, three at least, as it takes until a further one moves no
#             server's median by more than 3 %. The last column says how many,
#             with a ? where that was not enough
#     DEPTHS  requests under way ("1 8 32 128")
#     FILES   "memory cached empty direct"
#     DRIVERS "sleeps polls"
test=bench-vhost
. "$(dirname "$0")/common.sh"
SECS=${SECS:-.4}
ROUNDS=${ROUNDS:-9}
DEPTHS=${DEPTHS:-1 8 32 128}
FILES=${FILES:-memory cached empty direct}
DRIVERS=${DRIVERS:-sleeps polls}

build_both
disk=$(mktemp -d "/var/tmp/$test.XXXXXX") || exit 1

export=type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix

one=
two=
if [ "$(nproc)" -gt 1 ] && command -v taskset >/dev/null; then
    one="taskset -c 0"
    two="taskset -c 1"
fi

start_qsd() { # name, options of the file
    # shellcheck disable=SC2086
    start "$shm/$1" $two qemu-storage-daemon \
        --blockdev "driver=file,node-name=f,locking=off,filename=$image,$2" \
        --export "$export,addr.path=$shm/$1"
}

start_serve() { # name, options
    name=$1
    shift
    # shellcheck disable=SC2086
    start "$shm/$name" $two "$tmp/vblk-serve" --socket "$shm/$name" \
        --image "$image" --no-lock "$@"
}

# A server is name:pid; one that does not start says why.
add() { # name, command...
    name=$1
    shift
    if "$@"; then
        servers="$servers $name:$daemon"
    else
        echo "$name: not here: $(tail -n 1 "$shm/$name.log" |
            sed 's/.*locking=off[^:]*: //' | cut -c 1-60)"
    fi
}

start_servers() {
    servers=
    direct=
    cache=
    if [ "$where" = direct ]; then
        direct=--direct
        cache=,cache.direct=on
        [ -z "$qsd" ] || add qsd-native start_qsd qsd-native "aio=native$cache"
    fi
    add vblk-uring start_serve vblk-uring --aio uring $direct
    serve_pid=$daemon
    add vblk-sync start_serve vblk-sync --aio sync $direct
    if [ -n "$qsd" ]; then
        add qsd-threads start_qsd qsd-threads "aio=threads$cache"
        add qsd-io_uring start_qsd qsd-io_uring "aio=io_uring$cache"
    fi
}

stop_servers() {
    for server in $servers; do
        end "${server#*:}"
    done
    rm -f "$shm"/qsd-* "$shm"/vblk-*
}

medians() { # of each column
    awk '{ for (i = 1; i <= NF; i++) v[i, NR] = $i; n = NF }
    END {
        for (i = 1; i <= n; i++) {
            for (a = 2; a <= NR; a++)
                for (b = a; b > 1 && v[i, b - 1] + 0 > v[i, b] + 0; b--) {
                    t = v[i, b]; v[i, b] = v[i, b - 1]; v[i, b - 1] = t
                }
            m[i] = v[i, int((NR + 1) / 2)]
        }
        printf "%9.0f %6.2f %8.1f %8.1f %8.2f %6.2f\n", m[1], m[2], m[3], m[4],
            m[5], m[6]
    }'
}

settled() { # rounds so far
    [ "$1" -ge 3 ] || return
    for server in $servers; do
        file=$tmp/cell.${server%:*}
        echo "$(medians <"$file") $(sed '$d' "$file" | medians)"
    done | awk '{ move = $1 / $7 - 1; if (move > .03 || move < -.03) bad = 1 }
        END { exit bad }'
}

# The first write to a page of a file that is clean costs more than the next.
make_dirty() {
    timeout 20 "$tmp/front" "$shm/vblk-sync" load --ref "$image" \
        --pid "$serve_pid" --secs 1 --rw randwrite --depth 32
} >/dev/null

cell() { # rw, bytes, depth
    how=
    [ "$driver" = sleeps ] || how=--poll
    [ "$where" != direct ] || how="$how --direct"
    [ "$where" != empty ] || how="$how --cold"
    for server in $servers; do
        : >"$tmp/cell.${server%:*}"
    done
    sure='?'
    for round in $(seq "$ROUNDS"); do
        for server in $servers; do
            # shellcheck disable=SC2086
            timeout $((${SECS%.*} + 20)) $one "$tmp/front" \
                "$shm/${server%:*}" load --ref "$image" --pid "${server#*:}" \
                --secs "$SECS" --rw "$1" --bs "$2" --depth "$3" $how \
                >>"$tmp/cell.${server%:*}" ||
                { echo "FAIL $1 $2 $3 ${server%:*}"; exit 1; }
        done
        settled "$round" && sure= && break
    done
    for server in $servers; do
        printf '%-6s %-9s %4sk %5s %-6s %-12s %s %6s\n' "$where" "$1" \
            $(($2 / 1024)) "$3" "$driver" "${server%:*}" \
            "$(medians <"$tmp/cell.${server%:*}")" "$round$sure"
    done
}

table() {
    printf '%-6s %-9s %5s %5s %-6s %-12s %9s %6s %8s %8s %8s %6s %6s\n' \
        image kind size depth driver server IOPS ratio 'p50 us' 'p99 us' \
        'cpu us' x rounds
    for where in $FILES; do
        image=$shm/image
        [ "$where" = memory ] || image=$disk/image
        head -c 268435456 /dev/urandom >"$image" || exit 1
        sync "$image"
        start_servers
        for driver in $DRIVERS; do
            for kind in randread randwrite; do
                [ $kind != randwrite ] || [ "$where" != empty ] || continue
                [ $kind = randread ] || [ "$where" = direct ] || make_dirty
                for depth in $DEPTHS; do
                    cell $kind 4096 "$depth"
                done
            done
            cell read 131072 8
        done
        stop_servers
        rm "$image"
    done
}

qsd=$(command -v qemu-storage-daemon)
[ -n "$qsd" ] || echo "SKIP: bench-vhost compares with qemu-storage-daemon" \
    "(apt install qemu-system-common)"
echo "$(nproc) processors (front end: ${one:-any}, servers: ${two:-any})," \
    "Linux $(uname -r), load $(cut -d ' ' -f 1 /proc/loadavg), an eventfd" \
    "there and back in $("$tmp/front" - pingpong --ref /dev/null --pid $$) us;" \
    "ratio: to the better bare loop; cpu: of the server for a request, and" \
    "how often that loop's"
table
