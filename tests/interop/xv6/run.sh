#!/bin/sh
# xv6 for RISC-V, unmodified, lives on a disk of examples/serve over
# virtio-mmio: its own tests pass, and what it wrote is there after a restart.
# XV6 names its sources (https://github.com/mit-pdos/xv6-riscv). One line per
# check; the status is 0 if all are ok, or if something is not there and
# INTEROP_REQUIRED is not 1. vhost/common.sh has the variables.
test=xv6
packages="qemu-system-misc gcc-riscv64-linux-gnu make perl"
. "$(dirname "$0")/../vhost/common.sh"

LIMIT=1800 # seconds for what takes six minutes

need_tools qemu-system-riscv64 riscv64-linux-gnu-gcc make perl timeout
[ -f "${XV6:-}/kernel/virtio_disk.c" ] || {
    echo "SKIP: interop-xv6 needs the sources of xv6-riscv: XV6=directory"
    [ "${INTEROP_REQUIRED:-0}" = 1 ] && exit 1
    exit 0
}
# shellcheck disable=SC2086
build "$tmp/serve" $SANITIZE

cp -R "$XV6" "$tmp/xv6" || exit 1
(cd "$tmp/xv6" && make clean &&
    make TOOLPREFIX=riscv64-linux-gnu- kernel/kernel fs.img) \
    >"$tmp/make.log" 2>&1 || {
    tail -n 25 "$tmp/make.log"
    echo "FAIL build of xv6"
    exit 1
}

# timeout passes a TERM on to QEMU, but not the KILL of clean_up.
guest_pid=
trap 'end_guest; clean_up' EXIT

end_guest() {
    [ -n "$guest_pid" ] && kill -TERM $guest_pid 2>/dev/null &&
        wait $guest_pid 2>/dev/null
}

mkfifo "$tmp/keys" || exit 1
exec 3<>"$tmp/keys"

boot() { # name
    console=$tmp/$1.console
    timeout -k 5 $LIMIT qemu-system-riscv64 -bios none -m 128M -smp 3 \
        -machine virt,accel=tcg,memory-backend=m -nographic \
        -object memory-backend-memfd,id=m,size=128M,share=on \
        -kernel "$tmp/xv6/kernel/kernel" \
        -global virtio-mmio.force-legacy=false \
        -chardev "socket,id=d,path=$tmp/disk.sock" \
        -device vhost-user-blk,chardev=d,bus=virtio-mmio-bus.0 \
        <"$tmp/keys" >"$console" 2>"$tmp/$1-qemu.err" &
    guest_pid=$!
    running="$running $guest_pid"
}

see() { # expression; false if the guest ends without it
    until grep -aqE "$1" "$console"; do
        kill -0 $guest_pid 2>/dev/null || return 1
        sleep 0.5
    done
}

# It has no way to turn itself off, so QEMU's console is told to.
turn_off() { # name
    printf '\001x' >&3
    wait $guest_pid
    check "$1-ends" "status $?" "status 0"
    forget $guest_pid
    guest_pid=
    check "$1-qemu-silent" "$(cat "$tmp/$1-qemu.err")" ""
}

word=$(od -An -N 16 -tx1 /dev/urandom | tr -d ' \n')
line="^(\\$ )?$word\$" # the prompt, if the command was typed ahead
start disk "$tmp/serve" --image "$tmp/xv6/fs.img"
boot first
see '^\$ |panic'
echo "usertests -q" >&3
see 'ALL TESTS PASSED|FAILED|panic'
check usertests "$(grep -c 'ALL TESTS PASSED' "$console")" 1
check usertests-run "$(between "$(grep -c 'OK$' "$console")" 50 1000)" yes
echo "echo $word >word" >&3
echo "cat word" >&3
see "$line|panic"
check host-sees-word "$(status_of grep -q "$word" "$tmp/xv6/fs.img")" 0
turn_off first

boot second
see '^\$ |panic'
echo "cat word" >&3
see "$line|panic"
check word-after-restart "$(grep -cE "$line" "$console")" 1
turn_off second

end TERM
check daemon-ends "status $status" "status 0"
check errors "$(counter disk io_errors) $(counter disk broken_rings)" "0 0"
check silent "$(cat "$tmp/disk.err")" ""

explain
[ $failures -eq 0 ]
