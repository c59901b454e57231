#!/bin/sh
# A guest of some hundred instructions on examples/kvm.c, with sanitizers, where
# there is /dev/kvm. What the VMM refuses is seen everywhere.
#
#     CC CFLAGS  as usual
#     SANITIZE   flags of the sanitized build; empty: none
#     BUILT      a directory where `kvm` and `guest` are already
cd "$(dirname "$0")/../.." || exit 1
CC=${CC:-cc}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || {
    echo "SKIP: test-kvm: the VMM is one for Linux on x86-64"
    exit 0
}
if [ -n "$BUILT" ]; then
    cp "$BUILT/kvm" "$BUILT/guest" "$tmp/" || exit 1
else
    # shellcheck disable=SC2086
    $CC -std=c99 -D_GNU_SOURCE ${CFLAGS:--O1 -g} -fno-sanitize-recover=all \
        ${SANITIZE--fsanitize=address,undefined} -o "$tmp/kvm" \
        examples/kvm.c -lpthread || exit 1
    CC=$CC sh tests/kvm/guest.sh "$tmp/guest" || exit 1
fi

passed=0 failed=0
check() { # name, seen, expected
    if [ "$2" = "$3" ]; then
        passed=$((passed + 1))
    else
        echo "FAILED $1: saw '$2', expected '$3'"
        failed=$((failed + 1))
    fi
}

run() { # arguments...; leaves what it said and its status
    said=$(timeout 60 "$tmp/kvm" "$@" 2>&1 </dev/null)
    status=$?
}

for refused in "" "--disk" "--memory 1 k" "--iops 1k k" "--memory 16M k" \
    "--memory 9999999 k" "--what k" "k k" "k --disk" "k --what 1" \
    "k $(printf '%s %s ' $(for i in 1 2 3 4 5 6 7 8 9; do
        echo --disk $i; done))"; do
    # shellcheck disable=SC2086
    run $refused
    check "refuses '$refused'" "$status ${said%% \[*}" "1 kvm: bzImage"
done
run k --append "$(printf '%2001s')"
check "refuses a long --append" "$status ${said%% \[*}" "1 kvm: bzImage"

# The guest runs in the background; once it has said this, it gets input, or a
# signal.
meet() { # what it says, its word, command...
    until_said=$1 word=$2
    shift 2
    mkfifo "$tmp/in"
    "$tmp/kvm" "$tmp/guest" --memory 16 --disk "$tmp/disk" --append "$word" \
        <"$tmp/in" >"$tmp/out" 2>&1 &
    pid=$!
    exec 3>"$tmp/in"
    for try in $(seq 200); do
        grep -q "$until_said" "$tmp/out" && break
        sleep 0.05
    done
    "$@"
    for try in $(seq 200); do
        kill -0 $pid 2>/dev/null || break
        sleep 0.05
    done
    kill -KILL $pid 2>/dev/null
    wait $pid
    status=$?
    said=$(cat "$tmp/out")
    exec 3>&-
    rm "$tmp/in"
}

counts() { # disk, reads, writes
    echo "kvm: $tmp/$1: $2 reads, $3 writes, 0 flushes, 0 discards, 0 waited, \
0 failed, 0 exits to notify"
}

truncate -s 1M "$tmp/disk" "$tmp/other"
run "$tmp/guest" --memory 16
case $said in
*/dev/kvm*|*KVM_CREATE_*)
    check "refuses" $status 1
    echo "SKIP: test-kvm: a guest needs a usable KVM: $said"
    ;;
*)
    check "without a disk" "$status $said" \
        "0 FAIL no block device in the window, sector 0"
    for how in "edge 128" "level 256 --level --append level"; do
        # shellcheck disable=SC2086
        set -- $how
        kind=$1 interrupts=$2
        shift 2
        run "$tmp/guest" --memory 16 --disk "$tmp/disk" --disk "$tmp/other" "$@"
        check "$kind" "$status $said" "0 ok by polling: 64 sectors, interrupts 0
ok by $kind: 64 sectors, interrupts $interrupts
$(counts disk 128 128)
$(counts other 0 0)"
    done
    run "$tmp/guest" --memory 16 --disk "$tmp/disk" --iops 100
    waited=$(echo "$said" | sed -n 's/.* \([0-9]*\) waited.*/\1/p')
    check "limited" "$status $((waited > 0 && waited <= 156))" "0 1"
    check "the image" "$(od -An -tu1 -N 5 -j 512 "$tmp/disk")" \
        " 132 139 146 153 160"
    run "$tmp/guest" --memory 16 --disk "$tmp/disk" --append crash
    check "crashes" "$status $said" \
        "1 kvm: a triple fault: the guest crashed, or has reboot=t
$(counts disk 0 0)"
    meet listening echo sh -c "echo typed >&3"
    check "types" "$status $said" "0 listening
+t+y+p+e+d+
$(counts disk 0 0)"
    for signal in INT TERM; do
        meet sleeping sleep eval "kill -$signal \$pid"
        check "ends by SIG$signal" "$status $said" "0 sleeping
$(counts disk 0 0)"
    done
    run "$tmp/guest" --disk "$tmp/disk" --disk "$tmp/disk"
    check "a disk twice" "$status $said" \
        "1 kvm: $tmp/disk: in use: Resource temporarily unavailable"
    run "$tmp/none"
    check "no kernel" "$status $said" \
        "1 kvm: $tmp/none: No such file or directory"
    run examples/kvm.c
    check "no bzImage" "$status $said" \
        "1 kvm: examples/kvm.c: no bzImage of a 64-bit kernel, 3.8 or later"
    run "$tmp/guest" --disk "$tmp/none"
    check "no disk" "$status $said" \
        "1 kvm: $tmp/none: No such file or directory"
    ;;
esac
echo "$passed passed, $failed failed"
[ $failed = 0 ]
