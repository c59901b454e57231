#!/bin/sh
# conformance.sh TEST-BINARY: a line for each statement of the standard: the
# test that checks it, in the standard profile, and whether it passed.
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
{ good = $1 ~ /^STRICT/ ? strict[$2] : ok[$2]
  printf "%-10s %-7s %s\n", $1, good ? "passed" : "FAILED", $2
  if (good) passed++; else failed++ }
END { printf "%d not applicable\n%d passed, %d failed\n", na, passed, failed
      exit failed > 0 }' "$tmp" "$here/conformance.txt"
