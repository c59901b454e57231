#!/bin/sh
# The header in every language and configuration it claims, without a warning;
# the code of the README, compiled and run. Ends with "N passed, N failed".
cd "$(dirname "$0")/../.." || exit 1
here=tests/compile
B=${B:-build}
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wswitch-enum -Werror"
passed=0 failed=0

# try NAME COMMAND...: counts, and prints what the command said if it failed
try() {
    name=$1
    shift
    if "$@" >"$B/compile.log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED compile: $name"
        cat "$B/compile.log"
    fi
}

have() {
    command -v "$1" >/dev/null || {
        echo "SKIP: $1 (apt install $2)"
        return 1
    }
}

mkdir -p "$B"
for cc in gcc clang; do
    have $cc $cc || continue
    for std in c99 c11; do
        try "$cc $std" $cc -std=$std -D_GNU_SOURCE $warn -Wstrict-prototypes \
            -O1 -I. -DVBLK_IMPLEMENTATION_THREADED -c $here/unit_b.c \
            -o "$B/compile.o"
    done
    try "$cc, static" $cc -std=c99 -D_GNU_SOURCE $warn -I. $here/static.c \
        -o "$B/compile" -lpthread
    try "$cc, two static units" $cc -std=c99 -D_GNU_SOURCE $warn -I. \
        $here/static_a.c $here/static_b.c -o "$B/compile" -lpthread
    try "$cc, two static units run" timeout 20 "$B/compile"
    try "$cc, included twice" $cc -std=c99 -D_GNU_SOURCE $warn -I. \
        $here/twice.c -o "$B/compile" -lpthread
    try "$cc, two units" $cc -std=c99 -D_GNU_SOURCE $warn -I. \
        $here/unit_a.c $here/unit_b.c -o "$B/compile" -lpthread
    try "$cc, two units run" "$B/compile"
    try "$cc, two units, other macros" $cc -std=c99 -D_GNU_SOURCE $warn -I. \
        $here/layout_a.c $here/layout_b.c -o "$B/compile" -lpthread
    try "$cc, two units, other macros run" "$B/compile"
    for system in "" -D__APPLE__ -U__linux__; do
        try "$cc, POSIX files $system" $cc -std=c99 -D_POSIX_C_SOURCE=200809L \
            $warn $system -I. $here/files.c -o "$B/compile" -lpthread
        try "$cc, POSIX files $system run" "$B/compile" "$B/compile.img"
    done
    try "$cc, files" $cc -std=c99 $warn -I. $here/files.c -o "$B/compile" \
        -lpthread
    try "$cc, files run" "$B/compile" "$B/compile.img"
    try "$cc, no assertions" $cc -std=c99 $warn -I. $here/ndebug.c \
        -o "$B/compile"
    try "$cc, no assertions run" "$B/compile"
    try "$cc, another memcpy" $cc -std=c99 -D_GNU_SOURCE $warn -I. \
        -DVBLK_MEMCPY=other_copy -DVBLK_MEMSET=other_fill \
        -c $here/memcpy.c -o "$B/compile.o"
    try "$cc, freestanding" $cc -std=c99 -ffreestanding -nostdlib $warn -Os \
        -I. -c $here/small.c -o "$B/compile.o"
    cp $here/unit_b.c "$B/unit_b.cc"
done
for cxx in g++ clang++; do
    have $cxx $cxx || continue
    for std in c++11 c++17; do
        try "$cxx $std" $cxx -std=$std $warn -O1 -I. \
            -DVBLK_IMPLEMENTATION_THREADED -c -x c++ $here/unit_b.c \
            -o "$B/compile.o"
    done
done
# Compilers of other families.
have clang clang && {
    try "neither gcc nor clang" clang -fgnuc-version=0 -U__clang__ -std=c11 \
        -D_GNU_SOURCE -DVBLK_SINGLE_THREADED $warn -O1 examples/emulator.c \
        -o "$B/compile"
    try "neither gcc nor clang, run" timeout 60 "$B/compile"
}
have tcc tcc && {
    try "tcc" tcc -D_GNU_SOURCE -DVBLK_SINGLE_THREADED examples/emulator.c \
        -o "$B/compile"
    try "tcc, run" timeout 60 "$B/compile"
}
sed -n '/^```c$/,/^```$/p' README.md | sed '/^```/d' >"$B/readme.c"
try "README compiles" ${CC:-cc} -std=c99 $warn -I. "$B/readme.c" -o "$B/readme"
try "README runs" "$B/readme"
rm -f "$B"/compile "$B"/compile.o "$B"/compile.img "$B"/compile.log "$B"/unit_b.cc
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
