#!/bin/sh
# Instructions a request, by callgrind, beside those in tests/count.txt: a row
# that grew by more than 3 % fails.
#
#     tests/count.sh record   write tests/count.txt
cd "$(dirname "$0")/.." || exit 1
B=${B:-build}
CC=${CC:-cc}
count=tests/count.txt
command -v valgrind >/dev/null || {
    echo 'SKIP: count needs callgrind (apt install valgrind)'
    exit 0
}
mkdir -p "$B"
$CC -std=c99 -D_GNU_SOURCE -O2 -g -o "$B/count" tests/count.c || exit 1
by="$($CC -dM -E -x c /dev/null | awk '
    $2 == "__VERSION__" { gsub(/"/, ""); sub(/^[^ ]* [^ ]* /, ""); v = $0 }
    $2 == "__clang__" { c = 1 }
    $2 ~ /^__(x86_64|aarch64|i386|riscv)__$/ { m = $2; gsub(/^__|__$/, "", m) }
    END { print (c ? "" : "gcc ") v ", " m }')"
# The instructions that a run of $2 requests of row $1 takes.
run() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        "$B/count" "$1" "$2" 2>&1 | awk '/Collected/ { print $NF }'
}
row=0
"$B/count" | while read -r name; do
    few=$(run $row 256)
    many=$(run $row 768)
    [ -n "$few" ] && [ -n "$many" ] || exit 1
    echo "$(((many - few + 256) / 512))	$name"
    row=$((row + 1))
done >"$B/count.txt" || exit 1
if [ "$1" = record ]; then
    { echo "$by"; cat "$B/count.txt"; } >$count
fi
awk -F '\t' -v by="$by" '
    NR == 1 && $0 != by { other = $0 }
    FNR == 1 && NR == 1 { next }
    FNR == NR { was[$2] = $1; next }
    {
        grew = was[$2] && $1 > was[$2] * 1.03
        printf "%9d %9s  %s%s\n", $1, was[$2], $2, grew ? "  GREW" : ""
        bad += grew && !other
        if (!was[$2]) { print "not in tests/count.txt: " $2; bad++ }
    }
    END {
        if (other) {
            print "SKIP: counted with " other ", this is " by \
                ": not compared (CC=...)"
            exit
        }
        print FNR - bad " passed, " bad + 0 " failed"
        exit bad > 0
    }' $count "$B/count.txt"
