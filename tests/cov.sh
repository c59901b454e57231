#!/bin/sh
# What of the implementation the tests and the corpus reach: lines, branches,
# and each that is not reached. Wants TESTS (sources), from the Makefile.
cd "$(dirname "$0")/.." || exit 1
B=${B:-build}
for tool in clang llvm-profdata llvm-cov; do
    command -v $tool >/dev/null || {
        echo "SKIP: cov needs $tool (apt install clang llvm)"
        exit 0
    }
done
mkdir -p "$B"
rm -f "$B"/cov.*
# assert() itself returns nowhere, and hides the line behind it.
clang -std=c99 -D_GNU_SOURCE -O1 -g -w -include signal.h \
    '-DVBLK_ASSERT(x)=((x) ? 0 : raise(SIGABRT))' -fprofile-instr-generate \
    -fcoverage-mapping -o "$B/cov.test" $TESTS -lpthread || exit 1
LLVM_PROFILE_FILE="$B/cov.raw" "$B/cov.test" "$@" >"$B/cov.log" 2>&1 || {
    grep -v '^ ' "$B/cov.log"
    exit 1
}
llvm-profdata merge -o "$B/cov.prof" "$B/cov.raw" &&
    llvm-cov export -format=lcov -instr-profile="$B/cov.prof" "$B/cov.test" \
        vblk.h >"$B/cov.info" || exit 1

# A branch is a condition and a side of it: BRDA:line,block,branch,count, the
# sides of a condition next to each other. An assertion has a side that is not
# to be reached.
awk '
FNR == NR {
    text[FNR] = $0
    if (/^#if defined\(VBLK_IMPLEMENTATION\) &&/) { first = FNR }
    if (/^#if defined\(VBLK_IMPLEMENTATION_THREADED\)/) { second = FNR }
    next
}
{ part = $0; sub(/^[A-Z]+:/, "", part); split(part, f, ",") }
/^DA:/ && f[1] > first && text[f[1]] !~ /^#/ {
    p = f[1] > second
    lines[p]++
    if (f[2] == 0) { bare[f[1]] = 1 } else { reached[p]++ }
}
/^BRDA:/ && f[1] > first && text[f[1]] !~ /VBLK_ASSERT/ {
    p = f[1] > second
    branches[p]++
    if (f[1] != at) { at = f[1]; n = 0 }
    n++
    if (f[4] == 0 || f[4] == "-") {
        missed[f[1]] = missed[f[1]] sprintf(" %d:%s", (n + 1) / 2,
                                            n % 2 ? "true" : "false")
    } else {
        taken[p]++
    }
}
END {
    for (i = first; i in text; i++) {
        if (i in bare) { printf "line   %d:%s\n", i, text[i] }
        else if (i in missed) {
            printf "branch %d:%s   [condition never%s]\n", i, text[i],
                   missed[i]
        }
    }
    name[0] = "core"
    name[1] = "Linux part"
    for (p = 0; p < 2; p++) {
        printf "%s: lines %d of %d (%.1f %%), branches %d of %d (%.1f %%)\n",
               name[p], reached[p], lines[p], 100 * reached[p] / lines[p],
               taken[p], branches[p], 100 * taken[p] / branches[p]
    }
}' vblk.h "$B/cov.info"
