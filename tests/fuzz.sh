#!/bin/sh
# Fuzz the device for FUZZ_SECONDS (60) from tests/corpus. What breaks a rule
# is left in build/fuzz-*; new inputs are in build/fuzz.d.
#
#     tests/fuzz.sh merge   add what build/fuzz.d reaches and tests/corpus not
cd "$(dirname "$0")/.." || exit 1
B=${B:-build}
skip='SKIP: fuzz needs clang with libFuzzer'
skip="$skip (apt install clang libclang-rt-14-dev)"
flags='-std=c99 -D_GNU_SOURCE -O2 -g'
san='-fsanitize=address,undefined -fno-sanitize-recover=all'

# The device is a unit of its own: branches of the driver are not counted. Guest
# memory is small, so that it is soon compared.
small='-DSEAM=0x20000u -DRAM_END=0x40000u -DSECTORS=8u'
build() {
    objects="$B/fuzz_vblk.o $B/fuzz_guest.o"
    clang $flags $san -fsanitize=fuzzer-no-link -D_FILE_OFFSET_BITS=64 \
        -DURING_HOOKS -include tests/uring.h -DVBLK_IMPLEMENTATION_THREADED -x c -c vblk.h -o "$B/fuzz_vblk.o" &&
        clang $flags $san $small -c tests/guest.c -o "$B/fuzz_guest.o" ||
        return 1
    for unit in test model uring test_model fuzz; do
        clang $flags $small -c tests/$unit.c -o "$B/fuzz_$unit.o" || return 1
        objects="$objects $B/fuzz_$unit.o"
    done
    clang $san -fsanitize=fuzzer -o "$B/fuzz" $objects
}

command -v clang >/dev/null || {
    echo "$skip"
    exit 0
}
mkdir -p "$B/fuzz.d"
echo 'int LLVMFuzzerTestOneInput(const char *p, long n) { return !p && n; }' |
    clang -fsanitize=fuzzer,address -x c - -o "$B/fuzz" 2>/dev/null || {
    echo "$skip"
    exit 0
}
build || exit 1
case $1 in
merge)
    "$B/fuzz" -merge=1 -use_counters=0 tests/corpus "$B/fuzz.d" 2>/dev/null
    ls tests/corpus | wc -l
    ;;
*)
    seconds=${FUZZ_SECONDS:-60}
    echo "fuzzing for $seconds s"
    # FUZZ_RUNS: so many from a fixed seed, the same each time.
    how=-max_total_time=$seconds
    [ -n "$FUZZ_RUNS" ] && how="-runs=$FUZZ_RUNS -seed=1" && rm -f "$B/fuzz.d"/*
    if "$B/fuzz" $how -max_len=3000 -timeout=10 \
        -artifact_prefix="$B/fuzz-" -print_final_stats=1 \
        "$B/fuzz.d" tests/corpus >"$B/fuzz.log" 2>&1; then
        grep -E 'DONE|number_of_executed|average_exec' "$B/fuzz.log"
        echo "1 passed, 0 failed"
    else
        grep -E ': model 0|step:|ERROR|runtime error|Assertion|written to' "$B/fuzz.log"
        echo "0 passed, 1 failed"
        exit 1
    fi
    ;;
esac
