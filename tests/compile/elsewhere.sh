#!/bin/sh
# elsewhere.sh 32|be|O SOURCES...: the test binary as a 32-bit program, on a
# big-endian machine, or at every level of optimisation.
B=${B:-build}
what=$1
shift
flags="-std=c99 -D_GNU_SOURCE -DFUZZ_IN_TESTS -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes -Werror"
mkdir -p "$B"

builds() {
    printf '#include <errno.h>\n#include <pthread.h>\nint main(void) {}\n' \
        >"$B/probe.c"
    "$@" "$B/probe.c" -o "$B/probe" -lpthread 2>/dev/null
}

case $what in
32)
    # The headers of the 64-bit libc serve where gcc-multilib is not whole.
    cc="gcc -m32 -idirafter /usr/include/x86_64-linux-gnu"
    builds $cc || {
        echo "SKIP: test-32 needs a 32-bit libc (apt install gcc-multilib)"
        exit 0
    }
    $cc $flags -O2 -o "$B/vblk_test32" "$@" -lpthread && "$B/vblk_test32"
    ;;
be)
    builds s390x-linux-gnu-gcc -static && command -v qemu-s390x >/dev/null || {
        echo "SKIP: test-be needs an s390x compiler and qemu-user" \
            "(apt install gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user)"
        exit 0
    }
    s390x-linux-gnu-gcc $flags -O2 -static -o "$B/vblk_testbe" "$@" \
        -lpthread && timeout 900 qemu-s390x "$B/vblk_testbe" $FILTER
    ;;
*)
    for level in -O0 -O2 -O3 -Os; do
        echo "== $level"
        ${CC:-cc} $flags $level -o "$B/vblk_testO" "$@" -lpthread &&
            "$B/vblk_testO" || exit 1
    done
    ;;
esac
