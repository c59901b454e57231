#!/bin/sh
# elsewhere.sh 32|be|O SOURCES...: the test binary as a 32-bit program, on a
# big-endian machine, or at every level of optimisation.
B=${B:-build}
what=$1
shift
flags="-std=c99 -D_GNU_SOURCE -DFUZZ_IN_TESTS -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes -Werror"
mkdir -p "$B"

skip() { # why, packages
    echo "SKIP: test-$what $1 (apt install $2)"
    exit 0
}

# Machines that do not run such programs emulate them.
cross() { # compiler, emulator, packages of the compiler, sources...
    compiler=$1 emulator=$2 packages=$3
    shift 3
    printf '#include <errno.h>\n#include <pthread.h>\nint main(void) {}\n' \
        >"$B/probe.c"
    "$compiler" -static "$B/probe.c" -o "$B/probe" -lpthread 2>/dev/null ||
        skip "needs $compiler and its libc" "$packages"
    if ("$B/probe") 2>/dev/null; then
        emulator=
    elif ! "$emulator" "$B/probe" 2>/dev/null; then
        skip "needs $emulator on this machine" qemu-user
    fi
    "$compiler" $flags -O2 -static -o "$B/vblk_test$what" "$@" -lpthread &&
        timeout 900 $emulator "$B/vblk_test$what" $FILTER
}

case $what in
32)
    cross i686-linux-gnu-gcc qemu-i386 \
        "gcc-i686-linux-gnu libc6-dev-i386-cross" "$@"
    ;;
be)
    cross s390x-linux-gnu-gcc qemu-s390x \
        "gcc-s390x-linux-gnu libc6-dev-s390x-cross" "$@"
    ;;
*)
    for level in -O0 -O2 -O3 -Os; do
        echo "== $level"
        ${CC:-cc} $flags $level -o "$B/vblk_testO" "$@" -lpthread &&
            "$B/vblk_testO" || exit 1
    done
    ;;
esac
