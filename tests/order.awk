# In the implementation no function calls one that stands below it, but through
# a pointer: the file reads downhill. Run over the header twice.
FNR == 1 { pass++; inside = 0; start = "" }
/^#if defined\(VBLK_IMPLEMENTATION\) && !/ { inside = 1 }
!inside { next }
{ code = $0; sub(/\/\/.*/, "", code); gsub(/"([^"\\]|\\.)*"/, "", code) }
# A definition is a name at the outermost level whose text reaches a brace.
code ~ /^(static|VBLKDEF|VBLK__FLAT|VBLK__RARE)/ { start = code; at = FNR }
code !~ /^(static|VBLKDEF|VBLK__FLAT|VBLK__RARE)/ && start != "" { start = start code }
start ~ /;[ ]*$/ { start = "" }
start ~ /\{[ ]*$/ {
    if (start ~ /\)[ ]*\{/ && match(start, /vblk_[a-z0-9_]*\(/)) {
        name = substr(start, RSTART, RLENGTH - 1)
        if (pass == 1) { line[name] = at }
        here = name
    }
    start = ""
    next
}
pass == 2 && start == "" {
    rest = code
    while (match(rest, /vblk_[a-z0-9_]*\(/)) {
        name = substr(rest, RSTART, RLENGTH - 1)
        rest = substr(rest, RSTART + RLENGTH)
        if (name in line && line[name] > FNR && name != here) {
            print FILENAME ":" FNR ": " here "() calls " name \
                "(), which stands below, at " line[name]
            bad = 1
        }
    }
}
END { exit bad }
