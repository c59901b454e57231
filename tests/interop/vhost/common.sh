# What the tests of examples/vhost_user_blk.c share; sourced with `test` set to
# the name of the test and `packages` to what it needs of Debian.
#
#     BUILD     where temporary files go, and are removed from; default /tmp
#     CC CFLAGS as usual
#     SANITIZE  flags of the sanitized build; empty: none
set -u
LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL PATH

root=$(dirname "$0")/../../..
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2 -g}
SANITIZE=${SANITIZE--fsanitize=address,undefined -fno-sanitize-recover=all}
WARN="-std=c99 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes"

mkdir -p "${BUILD:-/tmp}" || exit 1
tmp=$(mktemp -d "${BUILD:-/tmp}/$test.XXXXXX") || exit 1
tmp=$(cd "$tmp" && pwd) || exit 1
mkfifo "$tmp/input" || exit 1
running=
trap 'clean_up' EXIT
trap 'exit 1' HUP INT TERM

clean_up() {
    for pid in $running; do
        kill -KILL "$pid" 2>/dev/null
    done
    kill_guest
    umount "$tmp/small" 2>/dev/null # powerloss.sh
    rm -rf "$tmp"
}

skip() { # why
    echo "SKIP: interop-$test$1"
    [ "${INTEROP_REQUIRED:-0}" = 1 ] && exit 1
    exit 0
}

missing() {
    skip " needs $1 (apt install $packages)"
}

need_tools() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing "$tool"
    done
}


# ---- Judging ----------------------------------------------------------------

failures=0

check() { # name, seen, expected
    if [ "$2" = "$3" ]; then
        echo "ok $1"
    else
        echo "FAIL $1: saw '$2', expected '$3'"
        failures=$((failures + 1))
    fi
}

# The ends of all logs, if something failed.
explain() {
    if [ $failures -gt 0 ]; then
        for log in "$tmp"/*.err "$tmp"/*.console; do
            echo "---- ${log##*/}"
            tail -n 25 "$log"
        done >&2
    fi
}

between() { # value, least, most; says "yes", or the value
    awk -v v="$1" -v a="$2" -v b="$3" \
        'BEGIN { print (v != "" && v >= a && v <= b) ? "yes" : "value " v }'
}

sum_of() { # file
    sha256sum <"$1" | cut -d ' ' -f 1
}

status_of() { # command...
    "$@" >"$tmp/status.log" 2>&1
    echo $?
}


# ---- The daemon -------------------------------------------------------------

build() { # output, flags...
    output=$1
    shift
    # shellcheck disable=SC2086
    $CC $WARN $CFLAGS "$@" -I"$root" "$root/examples/vhost_user_blk.c" \
        -o "$output" -lpthread || { echo "FAIL build"; exit 1; }
}

start() { # name, program, options...; its socket is $tmp/name.sock
    name=$1
    shift
    "$@" --socket "$tmp/$name.sock" >"$tmp/$name.out" 2>"$tmp/$name.err" &
    daemon=$!
    running="$running $daemon"
    for try in $(seq 100); do
        [ -S "$tmp/$name.sock" ] && return
        kill -0 $daemon 2>/dev/null || break
        sleep 0.05
    done
    check "$name-starts" "$(cat "$tmp/$name.err")" "a socket"
}

forget() { # pid
    running=$(echo " $running " | sed "s/ $1 / /")
}

end() { # signal; leaves the exit status in $status
    kill -"$1" "$daemon" 2>/dev/null
    wait "$daemon" 2>/dev/null
    status=$?
    forget "$daemon"
}

counter() { # name of the daemon, name of the counter
    sed -n "s/^$2 //p" "$tmp/$1.out"
}


# ---- User-Mode Linux --------------------------------------------------------

guest=

# It does not end on SIGTERM, and its processes are traced, so a session of
# its own is killed as a whole.
kill_guest() {
    if [ -n "$guest" ]; then
        kill -KILL "-$guest" 2>/dev/null
        wait "$guest" 2>/dev/null
        guest=
    fi
}

# Its root directory: this script's host sees what the guest leaves there.
make_uml_root() {
    modules=$(find /usr/lib/uml -name virtio_blk.ko 2>/dev/null | head -n 1)
    [ -n "$modules" ] || missing "virtio_blk.ko for User-Mode Linux"
    mkdir -p "$tmp/root/bin" "$tmp/root/proc" "$tmp/root/sys" \
        "$tmp/root/dev" "$tmp/root/mnt" "$tmp/root/shared" || exit 1
    cp /bin/busybox "$tmp/root/bin/" || exit 1
    cp "$modules" "$tmp/root/" || exit 1
    for name in $(/bin/busybox --list); do
        [ "$name" = busybox ] || ln -s busybox "$tmp/root/bin/$name"
    done
    cat >"$tmp/root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
say() { echo "guest $*"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
insmod /virtio_blk.ko
i=0
while [ ! -b /dev/vda ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done
. /job
say done
poweroff -f
INIT
    chmod +x "$tmp/root/init"
}

# Nothing, if it starts a process and ends, or else its last words. It does
# not where the host's processor has more registers than it makes room for.
uml_trouble() {
    setsid linux.uml mem=96M rootfstype=hostfs rootflags="$tmp/root" \
        root=/dev/root init=/bin/poweroff con=null con0=null,fd:1 quiet \
        uml_dir="$tmp/" -- -f </dev/null >"$tmp/probe" 2>&1 &
    guest=$!
    wait_uml 20 || echo "not done in 20 seconds" >>"$tmp/probe"
    tr -d '\r' <"$tmp/probe" | awk '
        /^reboot: System halted/ { last = ""; exit }
        /^Kernel panic/          { exit }
        NF                       { last = $0 }
        END                      { print last }'
}

need_uml() {
    need_tools linux.uml setsid
    make_uml_root
    trouble=$(uml_trouble)
    [ -z "$trouble" ] ||
        skip ": User-Mode Linux cannot run here ($trouble)"
}

# What the guest is to do is on standard input.
job() {
    cat >"$tmp/root/job"
}

# Not in a pipeline, where what it remembers would be lost.
start_uml() { # console, socket
    setsid linux.uml mem=96M rootfstype=hostfs rootflags="$tmp/root" rw \
        root=/dev/root init=/init con=null con0=fd:0,fd:1 quiet \
        uml_dir="$tmp/" \
        virtio_uml.device="$2:2" <>"$tmp/input" >"$1" 2>&1 &
    guest=$!
}

# For a job that reads. Opened for reading too, it does not wait for a reader.
tell_guest() { # line
    echo "$1" 1<>"$tmp/input"
}

wait_uml() { # seconds; false if they were not enough
    for try in $(seq $(($1 * 10))); do
        kill -0 "$guest" 2>/dev/null || break
        sleep 0.1
    done
    ! kill -0 "$guest" 2>/dev/null
    ended=$?
    kill_guest
    return $ended
}

run_uml() { # name of the test, name of the daemon
    console=$tmp/$1.console
    start_uml "$console" "$tmp/$2.sock"
    wait_uml 60
    check "$1-finished" "$(grep -c "^guest done" "$console")" 1
}

says() { # name of the test, key
    tr -d "\r" <"$tmp/$1.console" |
        sed -n "s/^guest $2\\( \\|\$\\)//p"
}
