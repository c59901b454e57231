#!/bin/sh
# How many mutants of vblk.h the tests notice. MUTANTS chooses:
#
#     every 7             1, 8, 15, ...
#     every 7 from 3      3, 10, 17, ...
#     100 to 200          these
#     5 50 500            these
#
# and all without it, which takes hours. A mutant that gives the same code
# at -O2 is equivalent. One that hangs is caught.
cd "$(dirname "$0")/.." || exit 1
M=${B:-build}/mutants
CC=${CC:-cc}
std="-std=c99 -D_GNU_SOURCE -DFUZZ_IN_TESTS -w -DTEST_PATIENCE=2"
flags=${MUTANT_CFLAGS:--O1}
slow='fault_in|model_agrees|t_a_long|t6_t|w_party|w5_pause_in|q6_|x2_a'

# A copy whose tests stop at the first failure, give up on a hang, and have
# the slow ones last, to be run with SLOW=1 alone.
rm -rf "$M"
mkdir -p "$M/tests" || exit 1
cp vblk.h "$M/original.h"
cp tests/*.[ch] "$M/tests"
awk -v slow="^ *X\\\\(($slow)" '
    $0 ~ slow { last = last $0 "\n"; next }
    /^ *X\(.*[^\\]$/ { printf "%s", last }
    { print }' tests/tests.h >"$M/tests/tests.h"
slow=$(($(grep -cE "^ *X\(($slow)" tests/tests.h) + 1))
sed -i "s/size_t i = 0; i < COUNT(tests)/size_t i = SLOW ? QUICK : 0; \
i < (SLOW ? COUNT(tests) : QUICK)/
    s/failed += !ok;/if (!ok) return 1;/
    s/^\( *\)bool ok = run_one/\1alarm(SLOW ? 40 : 4);\n&/
    s/^int main/#define SLOW getenv(\"SLOW\")\n\
#define QUICK (COUNT(tests) - $slow)\n&/" \
    "$M/tests/main.c"

$CC -std=c99 -O1 -o "$M/mutate" tests/mutate.c || exit 1
objects=
sources=$(sed -n '/^TESTS/,/[^\\]$/p' Makefile | grep -o 'tests/[a-z_]*')
for test in $sources; do
    [ "$test" = tests/main ] && continue
    cp "$M/original.h" "$M/vblk.h"
    $CC $std $flags -c "$M/$test.c" -o "$M/$test.o" || exit 1
    objects="$objects $M/$test.o"
done

# Real time is hard on the worker's tests: they have a second chance.
fails() {
    ! timeout 60 "$M/test" >"$M/output" 2>&1
}

# What happens to the vblk.h that is in $M
fate() {
    if ! $CC $std $flags -c "$M/tests/main.c" -o "$M/main.o" 2>/dev/null; then
        echo broken
        return
    fi
    $CC $flags -o "$M/test" "$M/main.o" $objects -lpthread || exit 1
    if fails && { ! grep -q 'FAILED w' "$M/output" || fails; }; then
        echo caught
        return
    fi
    $CC $std -O2 -c "$M/tests/main.c" -o "$M/mutant.o"
    if cmp -s "$M/original.o" "$M/mutant.o"; then
        echo same
    elif SLOW=1 fails; then
        echo caught
    else
        echo lived
    fi
}

if [ "$(fate)" != lived ]; then
    cat "$M/output"
    echo "the tests do not pass as they are"
    exit 1
fi
mv "$M/mutant.o" "$M/original.o"

"$M/mutate" -l vblk.h >"$M/list"
count=$(wc -l <"$M/list")
set -- $MUTANTS
case $* in
every*from*) chosen=$(seq "$4" "$2" "$count") ;;
every*)      chosen=$(seq 1 "$2" "$count") ;;
*to*)        chosen=$(seq "$1" "$3") ;;
'')          chosen=$(seq 1 "$count") ;;
*)           chosen=$* ;;
esac

caught=0 same=0 lived=0 broken=0
for n in $chosen; do
    "$M/mutate" -n "$n" "$M/original.h" >"$M/vblk.h"
    case $(fate) in
    broken) broken=$((broken + 1)) ;;
    caught) caught=$((caught + 1)) ;;
    same)   same=$((same + 1)) ;;
    *)
        lived=$((lived + 1))
        sed -n "${n}p" "$M/list"
        ;;
    esac
done
all=$((caught + same + lived))
echo "$broken did not compile"
echo "$all mutants, $caught caught, $same equivalent, $lived survived:" \
    "$(awk "BEGIN { printf \"%.1f\", 100 * $caught / ($caught + $lived + 1e-9)
    }") %"
