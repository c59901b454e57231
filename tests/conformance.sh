#!/bin/sh
# conformance.sh TEST-BINARY [ID]: for each statement of the standard the test
# that checks it, in the standard profile, and whether it passed; below it, the
# statement. "differs": the device does something else on purpose, which the
# test checks. With an ID, or a group of them (SPLIT), those alone.
binary=$1
list=$(dirname "$0")/conformance.txt
id=$(printf %s "$2" | tr '[:lower:]' '[:upper:]')
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# run strict|standard NAME: the tests with that in their name; all of none.
run() {
    case $1 in
    standard) "$binary" -v -p "$2" ;;
    strict) "$binary" -v "$2" | sed 's/^ok /strict /' ;;
    esac >>"$tmp/out"
}

: >"$tmp/out"
if [ -z "$id" ]; then
    run standard ''
    run strict ''
else
    awk -v id="$id" '
    /^[#\t ]/ || NF == 0 || (id != $1 && index($1, id "-") != 1) { next }
    { name = $2 == "!" ? $3 : $2; found = 1 }
    name ~ /^[-=]$/ || seen[name]++ { next }
    { print $1 ~ /^STRICT/ ? "strict" : "standard", name }
    END { exit !found }' "$list" >"$tmp/tests" || {
        echo "$id: no such statement in $list"
        exit 1
    }
    while read -r profile name; do
        run "$profile" "$name"
    done <"$tmp/tests"
fi

result=$(awk -v id="$id" '
FILENAME == ARGV[1] { if ($1 == "ok") ok[$2] = 1
                      if ($1 == "strict") strict[$2] = 1
                      next }
/^#/ || NF == 0 { next }
/^[\t ]/ { if (wanted) print "           " substr($0, 5); next }
{ wanted = id == "" || id == $1 || index($1, id "-") == 1 }
!wanted { next }
$2 == "-" { reason = $0; sub(/^[^-]*-[0-9A-Z]* - /, "", reason)
            printf "%-10s n/a     %s\n", $1, reason; na++; next }
$2 == "=" { means = $0; sub(/^[^=]*= /, "", means)
            printf "%-10s see     %s\n", $1, means; see++; next }
{ name = $2 == "!" ? $3 : $2
  good = $1 ~ /^STRICT/ ? strict[name] : ok[name]
  why = $2 == "!" ? $0 : ""
  sub(/^.* - /, ": ", why)
  differ += $2 == "!"
  printf "%-10s %-7s %s%s\n", $1,
         !good ? "FAILED" : why ? "differs" : "passed", name, why
  if (good) passed++; else failed++ }
END { printf "%d not applicable, %d checked by other means, %d differ\n", na,
             see, differ
      printf "%d passed, %d failed\n", passed, failed
      exit failed > 0 }' "$tmp/out" "$list")
bad=$?
[ -z "$id" ] || [ $bad = 0 ] ||
    grep -vE '^(ok|strict) |^[0-9]+ passed' "$tmp/out"
echo "$result"
exit $bad
