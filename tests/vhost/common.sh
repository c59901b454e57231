# shellcheck shell=sh
# What abuse.sh and bench.sh share; sourced with `test` set to the name of the
# make target.
#
#     BUILD      where temporary files go, and are removed from; default /tmp
#     CC CFLAGS  as usual
set -u
LC_ALL=C
export LC_ALL

here=$(cd "$(dirname "$0")" && pwd) || exit 1
root=$here/../..
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2 -g}
WARN="-std=c99 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes"

skip() {
    echo "SKIP: $test $*"
    exit 0
}

command -v "${CC%% *}" >/dev/null || skip "needs a C compiler"
command -v timeout >/dev/null || skip "needs timeout (apt install coreutils)"
[ -d /dev/shm ] && [ -w /dev/shm ] || skip "needs /dev/shm"

mkdir -p "${BUILD:-/tmp}" || exit 1
tmp=$(mktemp -d "${BUILD:-/tmp}/$test.XXXXXX") || exit 1
tmp=$(cd "$tmp" && pwd) || exit 1
shm=$(mktemp -d "/dev/shm/$test.XXXXXX") || exit 1
disk=
running=
trap 'clean_up' EXIT
trap 'exit 1' HUP INT TERM

clean_up() {
    for pid in $running; do
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    rm -rf "$tmp" "$shm" ${disk:+"$disk"}
}

build() { # output, flags and sources...
    output=$1
    shift
    # shellcheck disable=SC2086
    $CC $WARN $CFLAGS "$@" -o "$output" -lpthread ||
        { echo "FAIL build of ${output##*/}"; exit 1; }
}

build_both() { # flags of the daemon...
    build "$tmp/front" "$here/front.c" "$here/abuse.c" \
        "$here/bare.c"
    build "$tmp/vblk-serve" "$@" "$here"/../../examples/serve/*.c
}

# Runs in the background; false unless its socket comes to be. A path of a
# socket is short: they are in $shm.
start() { # socket, command...
    socket=$1
    shift
    rm -f "$socket" # one that a killed daemon left is no sign
    "$@" >"$socket.log" 2>&1 &
    daemon=$!
    running="$running $daemon"
    for try in $(seq 100); do
        [ -S "$socket" ] && return
        kill -0 $daemon 2>/dev/null || break
        sleep 0.05
    done
    return 1
}

end() { # pid; its exit status
    kill -TERM "$1" 2>/dev/null
    for try in $(seq 100); do
        grep -qs '^State:.[^Z]' "/proc/$1/status" || break
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null
    running=$(echo " $running " | sed "s/ $1 / /")
    wait "$1" 2>/dev/null
}
