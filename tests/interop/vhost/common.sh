# What the tests of examples/serve share; sourced with `test` set to
# the name of the test and `packages` to what it needs of Debian.
#
#     BUILD     where temporary files go, and are removed from; default /tmp
#     CC CFLAGS as usual
#     AIO       sync, uring or auto, of the daemon; default its own default
#     SANITIZE  flags of the sanitized build; empty: none
set -u
LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
export LC_ALL PATH

root=$(dirname "$0")/../../..
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O2 -g}
SANITIZE=${SANITIZE--fsanitize=address,undefined -fno-sanitize-recover=all}
WARN="-std=c99 -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wstrict-prototypes"

mkdir -p "${BUILD:-/tmp}" || exit 1
tmp=$(mktemp -d "${BUILD:-/tmp}/$test.XXXXXX") || exit 1
tmp=$(cd "$tmp" && pwd) || exit 1
mkfifo "$tmp/input" || exit 1
running=
trap 'clean_up' EXIT
trap 'exit 1' HUP INT TERM

clean_up() {
    for pid in $running; do
        kill -KILL "$pid" 2>/dev/null
    done
    kill_guest
    umount "$tmp/small" 2>/dev/null # powerloss.sh
    rm -rf "$tmp"
}

skip() { # why
    echo "SKIP: interop-$test$1"
    [ "${INTEROP_REQUIRED:-0}" = 1 ] && exit 1
    exit 0
}

missing() {
    skip " needs $1 (apt install $packages)"
}

need_tools() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing "$tool"
    done
}


# ---- Judging ----------------------------------------------------------------

failures=0

check() { # name, seen, expected
    if [ "$2" = "$3" ]; then
        echo "ok $1"
    else
        echo "FAIL $1: saw '$2', expected '$3'"
        failures=$((failures + 1))
    fi
}

# The ends of all logs, if something failed.
explain() {
    if [ $failures -gt 0 ]; then
        for log in "$tmp"/*.err "$tmp"/*.console; do
            [ -f "$log" ] || continue
            echo "---- ${log##*/}"
            tail -n 25 "$log"
        done >&2
    fi
}

between() { # value, least, most; says "yes", or the value
    awk -v v="$1" -v a="$2" -v b="$3" \
        'BEGIN { print (v != "" && v >= a && v <= b) ? "yes" : "value " v }'
}

sum_of() { # file
    sha256sum <"$1" | cut -d ' ' -f 1
}

status_of() { # command...
    "$@" >"$tmp/status.log" 2>&1
    echo $?
}


# ---- The daemon -------------------------------------------------------------

build() { # output, flags...
    output=$1
    shift
    # shellcheck disable=SC2086
    $CC $WARN $CFLAGS "$@" -I"$root" "$root"/examples/serve/*.c \
        -o "$output" -lpthread || { echo "FAIL build"; exit 1; }
}

start() { # name, program, options...; its socket is $tmp/name.sock, or false
    name=$1
    shift
    rm -f "$tmp/$name.sock" # one that a killed daemon left is no sign
    # shellcheck disable=SC2086
    "$@" ${AIO:+--aio $AIO} --socket "$tmp/$name.sock" >"$tmp/$name.out" \
        2>"$tmp/$name.err" &
    daemon=$!
    running="$running $daemon"
    for try in $(seq 100); do
        [ -S "$tmp/$name.sock" ] && return
        kill -0 $daemon 2>/dev/null || break
        sleep 0.05
    done
    [ -n "${quietly:-}" ] ||
        check "$name-starts" "$(cat "$tmp/$name.err")" "a socket"
    forget $daemon
    false
}

forget() { # pid
    running=$(echo " $running " | sed "s/ $1 / /")
}

end() { # signal; leaves the exit status in $status
    kill -"$1" "$daemon" 2>/dev/null
    wait "$daemon" 2>/dev/null
    status=$?
    forget "$daemon"
}

counter() { # name of the daemon, name of the counter
    sed -n "s/^$2 //p" "$tmp/$1.out"
}


# ---- The guest --------------------------------------------------------------

# Linux as a process of the host (GUEST=uml), or under QEMU without hardware
# virtualization (GUEST=qemu). The latter is slower, and runs everywhere.
GUEST=${GUEST:-}
LIMIT=60 # seconds for what takes less than ten
guest=

need_guest() {
    case $GUEST in
    uml) need_uml ;;
    qemu) need_qemu ;;
    *) if [ -z "$(need_uml)" ]; then GUEST=uml; else need_qemu; fi ;;
    esac
}

need_uml() {
    GUEST=uml
    packages="$packages user-mode-linux"
    need_tools linux.uml setsid
    module=$(find /usr/lib/uml -name virtio_blk.ko 2>/dev/null | head -n 1)
    [ -n "$module" ] || missing "virtio_blk.ko for User-Mode Linux"
    make_root "$module"
    trouble=$(uml_trouble)
    [ -z "$trouble" ] ||
        skip ": User-Mode Linux cannot run here ($trouble)"
}

need_qemu() {
    GUEST=qemu
    LIMIT=150
    packages="$packages qemu-system-x86 linux-image-cloud-amd64 cpio"
    need_tools qemu-system-x86_64 cpio setsid
    kernel=$(ls /boot/vmlinuz-*-cloud-amd64 2>/dev/null | tail -n 1)
    [ -r "$kernel" ] || missing "a kernel"
    drivers=/usr/lib/modules/${kernel#/boot/vmlinuz-}/kernel/drivers
    [ -f "$drivers/block/virtio_blk.ko" ] || missing virtio_blk.ko
    make_root "$drivers"/virtio/*.ko "$drivers/block/virtio_blk.ko"
}

# Its root directory. A host of User-Mode Linux sees what the guest leaves
# there; QEMU is given a copy at each start.
make_root() { # modules...
    mkdir -p "$tmp/root/bin" "$tmp/root/proc" "$tmp/root/sys" \
        "$tmp/root/dev" "$tmp/root/mnt" "$tmp/root/shared" || exit 1
    cp "$@" "$tmp/root/" || exit 1
    cp /bin/busybox "$tmp/root/bin/" || exit 1
    for name in $(/bin/busybox --list); do
        [ "$name" = busybox ] || ln -sf busybox "$tmp/root/bin/$name"
    done
    cat >"$tmp/root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
say() { echo "guest $*"; }
mount -t proc proc /proc
mount -t sysfs sys /sys
[ -c /dev/null ] || mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev \
    virtio_pci virtio_mmio virtio_blk; do
    [ ! -e /$module.ko ] || insmod /$module.ko
done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done
. /job
say done
poweroff -f
reboot -f
INIT
    chmod +x "$tmp/root/init"
}

# What the guest is to do is on standard input.
job() {
    cat >"$tmp/root/job"
}

# Not in a pipeline, where what it remembers would be lost.
start_guest() { # console, socket
    if [ "$GUEST" = uml ]; then
        start_uml "$1" rw init=/init virtio_uml.device="$2:2"
    else
        start_qemu "$1" -M q35,accel=tcg,memory-backend=m \
            -chardev "socket,id=disk,path=$2" \
            -device vhost-user-blk-pci,chardev=disk
    fi
}

# In a session of its own, as its processes are.
start_uml() { # console, arguments...
    output=$1
    shift
    setsid linux.uml mem=96M rootfstype=hostfs rootflags="$tmp/root" \
        root=/dev/root con=null con0=fd:0,fd:1 quiet uml_dir="$tmp/" \
        "$@" <>"$tmp/input" >"$output" 2>&1 &
    guest=$!
}

kernel_options=

start_qemu() { # console, options...
    output=$1
    shift
    (cd "$tmp/root" && find . | cpio -o -H newc --quiet) \
        >"$tmp/initrd.cpio" || exit 1
    setsid qemu-system-x86_64 -cpu max -m 256 -nodefaults -no-user-config \
        -display none -serial stdio \
        -object memory-backend-memfd,id=m,size=256M,share=on \
        -kernel "$kernel" -initrd "$tmp/initrd.cpio" \
        -append "console=ttyS0 quiet panic=-1 reboot=t $kernel_options" \
        "$@" <>"$tmp/input" >"$output" 2>&1 &
    guest=$!
}

# Nothing, if it starts a process and ends, or else its last words. It does
# not where the host's processor has more registers than it makes room for.
uml_trouble() {
    LIMIT=20
    start_uml "$tmp/probe" init=/bin/poweroff -- -f
    wait_guest || echo "not done in $LIMIT seconds" >>"$tmp/probe"
    tr -d '\r' <"$tmp/probe" | awk '
        /^reboot: System halted/ { last = ""; exit }
        /^Kernel panic/          { exit }
        NF                       { last = $0 }
        END                      { print last }'
}

# For a job that reads. Opened for reading too, it does not wait for a reader.
tell_guest() { # line
    echo "$1" 1<>"$tmp/input"
}

guest_runs() {
    kill -0 "$guest" 2>/dev/null
}

# User-Mode Linux does not end on SIGTERM, and its processes are traced, so the
# session is killed as a whole.
kill_guest() {
    if [ -n "$guest" ]; then
        kill -KILL "-$guest" 2>/dev/null
        wait "$guest" 2>/dev/null
        guest=
    fi
}

wait_guest() { # false if LIMIT was not enough
    for try in $(seq $((LIMIT * 10))); do
        guest_runs || break
        sleep 0.1
    done
    ! guest_runs
    ended=$?
    kill_guest
    return $ended
}

run_guest() { # name of the test, name of the daemon
    console=$tmp/$1.console
    start_guest "$console" "$tmp/$2.sock"
    wait_guest
    check "$1-finished" "$(grep -c "^guest done" "$console")" 1
}

says() { # name of the test, key
    tr -d "\r" <"$tmp/$1.console" |
        sed -n "s/^guest $2\\( \\|\$\\)//p"
}
