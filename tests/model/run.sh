#!/bin/sh
# Check the models with spin: as they are, no error; weakened, an error.
cd "$(dirname "$0")" || exit 1
command -v spin >/dev/null || {
    echo "SKIP: model needs spin (apt install spin)"
    exit 0
}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

# check MODEL WANTED-ERRORS FLAGS...
check() {
    model=$PWD/$1 want=$2
    shift 2
    errors=$(cd "$tmp" && spin -a "$@" "$model" >spin.log 2>&1 &&
        ${CC:-cc} -O2 -DSAFETY -o pan pan.c 2>>spin.log &&
        ./pan -m100000 | sed -n 's/.*errors: \([0-9]*\).*/\1/p')
    if [ "$errors" = "$want" ]; then
        passed=$((passed + 1))
        echo "ok $(basename "$model") $*"
    else
        failed=$((failed + 1))
        echo "FAIL $(basename "$model") $*: $errors errors, expected $want"
        cat "$tmp/spin.log"
    fi
}

check notify.pml 0
check notify.pml 1 -DNO_BARRIER
check notify.pml 1 -DNO_SECOND_LOOK
check worker.pml 0
check worker.pml 1 -DLOSE_KICK
check worker.pml 1 -DNO_SIGNAL
check interrupt.pml 0
check interrupt.pml 1 -DNO_COUNT
check stall.pml 0
check stall.pml 1 -DSWALLOW
check stall.pml 1 -DLOSE_KICK
check release.pml 0
check release.pml 1 -DLATE
check release.pml 1 -DUNLOCKED
check engine.pml 0
check engine.pml 1 -DNO_WAIT
check engine.pml 1 -DDEAF
check engine.pml 1 -DLATE_CLEAR
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
