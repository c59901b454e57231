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
slow='fault_in|model_|fuzz_|t_a_long|t6_t|q6_|x2_a'
party='w_party|w5_pause_in'
address='-fsanitize=address,undefined -fno-sanitize-recover=all'

# A copy whose tests stop at the first failure and give up on a hang, in three
# groups: quick ones, slow ones, and those where threads race.
rm -rf "$M"
mkdir -p "$M/tests" || exit 1
cp vblk.h "$M/original.h"
cp tests/*.[ch] "$M/tests"
cp -r examples "$M"
awk -v slow="^ *X\\\\(($slow)" -v party="^ *X\\\\(($party)" '
    $0 ~ slow { last = last $0 "\n"; next }
    $0 ~ party { very_last = very_last $0 "\n"; next }
    /^ *X\(.*[^\\]$/ { printf "%s%s", last, very_last }
    { print }' tests/tests.h >"$M/tests/tests.h"
slow=$(grep -cE "^ *X\(($slow)" tests/tests.h)
party=$(($(grep -cE "^ *X\(($party)" tests/tests.h) + 1)) # and the last
sed -i "s/size_t i = 0; i < COUNT(tests)/size_t i = from[GROUP]; \
i < from[GROUP + 1]/
    s/failed += !ok;/if (!ok) return 1;/
    s/^\( *\)bool ok = run_one/\1alarm(GROUP ? 40 : 4);\n&/
    s/^int main/#define GROUP (getenv(\"GROUP\")[0] - '0')\n\
static const size_t from[] = {\n\
    0, COUNT(tests) - $slow - $party, COUNT(tests) - $party, COUNT(tests)};\n&/
    " "$M/tests/main.c"

$CC -std=c99 -O1 -o "$M/mutate" tests/mutate.c || exit 1
cp "$M/original.h" "$M/vblk.h"
objects= address_objects=
sources=$(sed -n '/^TESTS/,/[^\\]$/p' Makefile | grep -o 'tests/[a-z_]*')
for test in $sources; do
    [ "$test" = tests/main ] && continue
    $CC $std -O2 -c "$M/$test.c" -o "$M/$test.o" &&
        $CC $std -O1 $address -c "$M/$test.c" -o "$M/$test.a.o" || exit 1
    objects="$objects $M/$test.o"
    address_objects="$address_objects $M/$test.a.o"
done

# fails GROUP: real time is hard on the worker's tests, they have a second
# chance.
once() {
    ! GROUP=$1 timeout 60 "$M/test" >"$M/output" 2>&1
}
fails() {
    once "$1" && { ! grep -q 'FAILED w' "$M/output" || once "$1"; }
}

# What happens to the vblk.h that is in $M, which was changed as $1 says.
fate() {
    if ! $CC $std $flags -c "$M/tests/main.c" -o "$M/main.o" 2>/dev/null; then
        echo broken
        return
    fi
    $CC -o "$M/test" "$M/main.o" $objects -lpthread || exit 1
    if fails 0; then
        echo caught
        return
    fi
    $CC $std -O2 -c "$M/tests/main.c" -o "$M/mutant.o"
    if cmp -s "$M/original.o" "$M/mutant.o"; then
        echo same
        return
    fi
    line=${1#*: line }
    case $1 in *barrier*) line=99999 ;; esac
    if fails 1 || { [ "${line%%:*}" -gt "$linux" ] && fails 2; }; then
        echo caught
        return
    fi
    $CC $std -O1 $address -o "$M/test" "$M/tests/main.c" $address_objects \
        -lpthread || exit 1
    if fails 0; then echo caught; else echo lived; fi
}

linux=$(awk '/^#if defined\(VBLK_IMPLEMENTATION_THREADED\)/ { n = NR }
    END { print n }' vblk.h)
if [ "$(fate '0: line 99999:')" != lived ]; then
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
    echo "$n" >"$M/at"
    case $(fate "$(sed -n "${n}p" "$M/list")") in
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
