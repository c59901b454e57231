# shellcheck shell=sh
# A disk that is slow, fails, does not answer, or loses its power (slowdisk.c),
# for scripts with $CC, $tmp, $running and $root. Behind a loop device, as io_uring has a FUSE file only
# by threads of the kernel.

# Leaves its process in $slow, its file in $slow_file and the device in
# $slow_disk; false if it cannot be had.
begin_slow_disk() { # image, microseconds of a transfer, seed, liar
    mkdir -p "$tmp/mount"
    # shellcheck disable=SC2046
    $CC -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -O2 -Wall -Wextra \
        -o "$tmp/slowdisk" "$root/tests/vhost/slowdisk.c" \
        $(pkg-config --cflags --libs fuse3 2>/dev/null) 2>/dev/null || return
    slow_file=$tmp/mount/disk
    "$tmp/slowdisk" "$tmp/mount" "$@" >"$tmp/slow.log" 2>&1 &
    slow=$!
    running="$running $slow"
    for try in $(seq 100); do [ -f "$slow_file" ] && break || sleep 0.05
    done
    slow_disk=$(losetup -f --show --direct-io=on "$slow_file" 2>/dev/null)
    [ -n "$slow_disk" ] || { end_slow_disk; return 1; }
}

end_slow_disk() {
    [ -z "$slow" ] || kill -HUP "$slow" 2>/dev/null
    [ -z "$slow_disk" ] || losetup -d "$slow_disk"
    umount "$tmp/mount" 2>/dev/null || umount -l "$tmp/mount" 2>/dev/null
    slow=
    slow_disk=
}

slow=
slow_disk=
trap 'end_slow_disk; clean_up' EXIT
