#!/bin/sh
# conformance.sh TEST-BINARY: a line for each statement of the standard: the
# test that checks it, in the standard profile, and whether it passed. "differs":
# the device does something else on purpose, which the test checks.
here=$(dirname "$0")
tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT
"$1" -v -p >"$tmp"
"$1" -v | sed 's/^ok /strict /' >>"$tmp"
awk '
NR == FNR { if ($1 == "ok") ok[$2] = 1; if ($1 == "strict") strict[$2] = 1
            next }
/^#/ || NF == 0 { next }
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
      exit failed > 0 }' "$tmp" "$here/conformance.txt"
