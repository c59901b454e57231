#!/bin/sh
# rules.sh TEST-BINARY [ID]: each rule of rules.txt and the tests named after
# it. Fails for a rule without a test, and for an id that is no rule where one
# is cited: in the name of a test, a comment of a C file, the text of an event,
# another rule. With an ID: that rule, where it is cited, and its tests, run.
binary=$1
id=$(printf %s "$2" | tr '[:lower:]' '[:upper:]')
case $binary in
/*) ;;
*) binary=$PWD/$binary ;;
esac
cd "$(dirname "$0")/.." || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
"$binary" -l >"$tmp/tests" || exit 1

# The ids at the start of a test's name: v2_p5_no_place_... has two.
awk '{
    n = split($0, part, "_")
    for (i = 1; i <= n && part[i] ~ /^[pmfqvxtrwbe][0-9][0-9]?$/; i++)
        print toupper(part[i]), $0
}' "$tmp/tests" >"$tmp/names"

# The ids in comments and rules, as words of their own; and in the strings of
# vblk.h, in brackets: "... is ignored (M7, P13)". Literals in a row are one.
awk '
function words(text) {
    text = " " text " "
    while (match(text, /[PMFQVXTRWBE][0-9][0-9]?/)) {
        after = substr(text, RSTART + RLENGTH)
        if (substr(text, RSTART - 1, 1) !~ /[A-Za-z0-9_.-]/ &&
            after !~ /^([A-Za-z0-9_]|\.[0-9])/)
            print substr(text, RSTART, RLENGTH), at
        text = substr(text, RSTART + RLENGTH - 1)
    }
}
function literal_ends(    ids) {
    while (match(texts, /\([A-Z][0-9][0-9]?(, [A-Z][0-9][0-9]?)*\)/)) {
        ids = substr(texts, RSTART, RLENGTH)
        texts = substr(texts, RSTART + RLENGTH)
        words(ids)
    }
    texts = ""
}
FNR == 1 { comment = 0; texts = "" }
FILENAME ~ /txt$/ {
    at = FILENAME ":" FNR
    sub(/^[A-Z][0-9]+ /, "")
    words($0)
    next
}
{
    rest = $0
    while (rest != "") {
        if (comment) {
            end = index(rest, "*/")
            comment = !end
            at = FILENAME ":" FNR
            words(end ? substr(rest, 1, end - 1) : rest)
            rest = end ? substr(rest, end + 2) : ""
            continue
        }
        if (!match(rest, /\/\/|\/\*|["\047]/)) RSTART = length(rest) + 1
        code = substr(rest, 1, RSTART - 1)
        rest = substr(rest, RSTART)
        what = substr(rest, 1, 1 + (rest ~ /^\//))
        rest = substr(rest, length(what) + 1)
        if (code ~ /[^ \\]/) literal_ends()
        at = FILENAME ":" FNR
        if (what == "//") {
            words(rest)
            rest = ""
        } else if (what == "/*") {
            comment = 1
        } else if (what != "") {
            for (i = 1; i <= length(rest) && substr(rest, i, 1) != what; i++)
                i += substr(rest, i, 1) == "\\"
            if (what == "\"" && FILENAME == "vblk.h")
                texts = texts substr(rest, 1, i - 1)
            rest = substr(rest, i + 1)
        }
    }
}' vblk.h tests/rules.txt tests/*.[ch] examples/*.c examples/serve/*.c >"$tmp/cited" || exit 1

awk -v id="$id" -v run="$tmp/run" '
function fail(line) { failed++; failures = failures "FAILED " line "\n" }
FILENAME ~ /names$/ {
    tests[$1] = tests[$1] "       " $2 "\n"
    if ($1 == id) print $2 >run
    if (!($2 in seen)) named++
    seen[$2] = 1
    where[++places] = $0
    next
}
FILENAME ~ /cited$/ {
    cited[$1] = cited[$1] "       " $2 "\n"
    where[++places] = $0
    next
}
/^#/ { next }
/^[A-Z]\. / {
    group = substr($0, 1, 1)
    show(rule)
    rule = ""
    if (id == "") print "\n" $0 "\n"
    next
}
/^[A-Z][0-9]/ {
    show(rule)
    rule = $1
    text = ""
    if (rule in known) fail(rule ": is a rule twice")
    if (substr(rule, 1, 1) != group) fail(rule ": stands in group " group)
    known[rule] = 1
    rules++
}
/^$/ { show(rule); rule = "" }
{ text = text $0 "\n" }
function show(rule) {
    if (rule == "") return
    if (id == "") printf "%s%s\n", text, tests[rule]
    if (id == rule)
        printf "%s\ncited\n%s\ntests\n", text, cited[rule]
    if (tests[rule] == "") fail(rule ": no test is named after it")
    else passed++
}
END {
    show(rule)
    if (id != "") {
        if (!(id in known)) print id ": no such rule"
        exit !(id in known)
    }
    for (i = 1; i <= places; i++) {
        split(where[i], f, " ")
        if (!(f[1] in known)) fail(f[1] ": no such rule, cited in " f[2])
    }
    printf "%s%d rules, %d tests\n", failures, rules, named
    printf "%d passed, %d failed\n", passed, failed
    exit failed > 0
}' "$tmp/names" "$tmp/cited" tests/rules.txt || exit 1
[ -n "$id" ] || exit 0

# A name may be part of another: what counts is the line of its own.
[ -f "$tmp/run" ] || : >"$tmp/run"
passed=0 failed=0
while read -r name; do
    "$binary" -v "$name" >"$tmp/out"
    if grep -qx "ok $name" "$tmp/out"; then
        echo "       ok $name"
        passed=$((passed + 1))
    else
        grep -v '^ok ' "$tmp/out"
        failed=$((failed + 1))
    fi
done <"$tmp/run"
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed != 0 ]
