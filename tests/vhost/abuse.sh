#!/bin/sh
# Broken messages, rings and requests against a sanitized vblk-serve, which
# has to go on serving, and must not touch its image; the same against one of
# 32 bits; then what its command line and its surroundings may do to it.
#
#     SANITIZE  flags of the daemon; empty: none
test=abuse-vhost
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/slowdisk.sh"
SANITIZE=${SANITIZE--fsanitize=address,undefined -fno-sanitize-recover=all}

# shellcheck disable=SC2086
build_both $SANITIZE
serve=$tmp/vblk-serve
head -c 4194304 /dev/urandom >"$shm/image"
truncate -s 256M "$shm/image"
before=$(sha256sum <"$shm/image")

check() { # name, what is wrong, if anything
    if [ -z "$2" ]; then
        echo "ok $1"
    else
        echo "FAIL $1: $2"
    fi >>"$tmp/results"
}

differs() { # seen, expected; says what was seen, if it is something else
    [ "$1" = "$2" ] || echo "saw '$1', expected '$2'"
}

unchanged() {
    [ "$(sha256sum <"$shm/image")" = "$before" ] || echo "the image changed"
}


# ---- Front ends that lie ----------------------------------------------------

lie_to() { # what, program, front, image, options of the daemon...
    what=$1
    program=$2
    front=$3
    image=$4
    shift 4
    start "$shm/s" "$program" --socket "$shm/s" --image "$image" "$@" || {
        check "$what-starts" "$(tail -n 1 "$shm/s.log")"
        return
    }
    timeout 240 "$front" "$shm/s" abuse --ref "$image" \
        --pid "$daemon" >"$tmp/lies" 2>"$tmp/front.log"
    status=$?
    sed "s/ / $what-/" "$tmp/lies" >>"$tmp/results"
    [ $status -le 1 ] || check "$what-front-end-ends" \
        "status $status, $(tail -n 1 "$tmp/front.log")"
    end "$daemon"
    check "$what-ends-well" "$(differs $? 0)"
    check "$what-no-sanitizer-speaks" "$(grep -m 1 -e Sanitizer \
        -e 'runtime error' "$shm/s.log")"
    check "$what-image-is-untouched" "$(cmp "$image" "$shm/image" 2>&1)"
    cp "$shm/s.log" "$tmp/$what.log"
}

lie_to daemon "$serve" "$tmp/front" "$shm/image"
check image-is-untouched "$(unchanged)"

# In a file that io_uring has, around the page cache if it goes.
cp "$shm/image" "$tmp/image"
direct=--direct
dd if="$tmp/image" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null ||
    direct=
lie_to uring "$serve" "$tmp/front" "$tmp/image" $direct
lie_to threads "$serve" "$tmp/front" "$tmp/image" --threads

i686=i686-linux-gnu-gcc
echo 'int main(void) { return 0; }' >"$tmp/probe.c"
if $i686 -static "$tmp/probe.c" -o "$tmp/probe" 2>/dev/null &&
    "$tmp/probe" 2>/dev/null; then
    build "$tmp/front-small" -DSMALL "$here/front.c" "$here/abuse.c" \
        "$here/bare.c"
    CC=$i686 build "$tmp/small" -static "$here"/../../examples/serve/*.c
    lie_to daemon-of-32-bits "$tmp/small" "$tmp/front-small" "$shm/image"
else
    echo "SKIP: abuse of 32 bits needs a compiler and a processor for them" \
        "(apt install gcc-i686-linux-gnu libc6-dev-i386-cross)"
fi


# ---- The command line -------------------------------------------------------

under_limit() { # of the shell, then the command; in a subshell
    # shellcheck disable=SC2086
    ulimit $1 && shift && exec "$@"
}

refused() { # name, what it says, options...
    name=$1
    words=$2
    shift 2
    (under_limit "-f 1024" timeout 10 "$serve" "$@") >"$tmp/refused.log" 2>&1
    check "$name" "$(differs $? 1)"
    check "$name-says-so" "$(grep -q -e "$words" "$tmp/refused.log" ||
        tail -n 1 "$tmp/refused.log")"
}

refused socket-is-the-image 'something else than a socket' \
    --socket "$shm/image" --image "$shm/image"
check socket-is-the-image-still-there "$(unchanged)"
refused image-is-a-directory directory --socket "$shm/x" --image "$shm" \
    --read-only
refused image-is-dev-null 'Block device required' --socket "$shm/x" \
    --image /dev/null
: >"$shm/empty"
refused image-is-empty 'no disk' --socket "$shm/x" --image "$shm/empty"
refused create-too-large 'not to be had' --socket "$shm/x" \
    --image "$shm/new" --create 1G
check create-leaves-nothing "$([ ! -e "$shm/new" ] || echo "a file")"

start "$shm/t" "$serve" --socket "$shm/t" --image "$shm/image" ||
    check second-starts "$(tail -n 1 "$shm/t.log")"
cp "$shm/image" "$shm/other"
refused socket-is-taken 'another process listens' --socket "$shm/t" \
    --image "$shm/other"
rm "$shm/t"
echo mine >"$shm/t"
end "$daemon"
check socket-that-is-not-ours-stays "$(differs "$(cat "$shm/t")" mine)"
rm "$shm/t"
start "$shm/t" "$serve" --socket "$shm/t" --image "$shm/image" ||
    check third-starts "$(tail -n 1 "$shm/t.log")"
kill -KILL "$daemon"
ln "$shm/t" "$shm/left"
"$serve" --socket "$shm/t" --image "$shm/image" >"$shm/t.log" 2>&1 &
daemon=$!
running="$running $daemon"
for try in $(seq 100); do
    [ "$shm/t" -ef "$shm/left" ] || break
    sleep 0.05
done
check socket-that-was-left-is-replaced "$(timeout 10 "$tmp/front" "$shm/t" \
    load --secs 0.1 --ref "$shm/image" --pid "$daemon" 2>&1 >/dev/null)"
end "$daemon"

told() { # words; within a second
    for try in $(seq 20); do
        grep -q "$1" "$shm/t.log" && return
        sleep 0.05
    done
    tail -n 1 "$shm/t.log" | grep . || echo "nothing was said"
}

# SIGHUP: the image has another size.
start "$shm/t" "$serve" --socket "$shm/t" --image "$shm/other" ||
    check fourth-starts "$(tail -n 1 "$shm/t.log")"
timeout 10 "$tmp/front" "$shm/t" load --secs 1 --ref "$shm/other" \
    --pid "$daemon" >"$tmp/load.log" 2>&1 &
front=$!
sleep 0.5
truncate -s +1M "$shm/other"
kill -HUP "$daemon"
check grown-image-is-told "$(told 'has grown to 526336 sectors')"
check grown-image-front-end-without-channel "$(told 'takes no word of it')"
wait "$front"
check grown-image-load-goes-on "$(differs $? 0)"
truncate -s -2M "$shm/other"
kill -HUP "$daemon"
check shrunk-image-is-refused "$(told 'can only grow')"
end "$daemon"
check shrunk-image-ends-well "$(differs $? 0)"
truncate -s +1M "$shm/other"


# ---- Surroundings -----------------------------------------------------------

# Messages of a daemon without standard descriptors would go into the image.
cat >"$tmp/closed" <<'CLOSED'
exec 0<&- 1>&- 2>&-
exec "$@"
CLOSED
start "$shm/u" sh "$tmp/closed" "$serve" --socket "$shm/u" \
    --image "$shm/image" --stats || check closed-descriptors-start "no socket"
echo nonsense | timeout 5 "$tmp/front" "$shm/u" abuse --ref "$shm/image" \
    --pid "$daemon" >"$tmp/closed.log" 2>&1
end "$daemon"
check closed-descriptors "$(unchanged)"

# A front end that writes is told of an error; the signal kills nobody.
under_limit "-f 1024" "$serve" --socket "$shm/v" --image "$shm/other" \
    >"$shm/v.log" 2>&1 &
daemon=$!
running="$running $daemon"
for try in $(seq 100); do [ -S "$shm/v" ] && break || sleep 0.05; done
"$tmp/front" "$shm/v" load --rw randwrite --secs 0.2 --ref "$shm/other" \
    --pid "$daemon" >"$tmp/limit.log" 2>&1
check file-size-limit-is-an-error "$(grep -q 'status 1' "$tmp/limit.log" ||
    tail -n 1 "$tmp/limit.log")"
end "$daemon"
check file-size-limit-kills-nobody "$(differs $? 0)"

# What is no whole block is told; a lock that cannot be had is no other user.
head -c 1000 /dev/urandom >"$shm/odd"
start "$shm/x" "$serve" --socket "$shm/x" --image "$shm/odd" ||
    check odd-image-starts "$(tail -n 1 "$shm/x.log")"
end "$daemon"
check odd-image-is-told "$(grep -q 'no whole block.*bytes 488' "$shm/x.log" ||
    head -n 1 "$shm/x.log")"
printf '#include <errno.h>\nint flock(int fd, int how);
int flock(int fd, int how) { errno = ENOLCK; return how ? -1 : fd; }\n' \
    >"$tmp/flock.c"
build "$tmp/flock.so" -shared -fPIC "$tmp/flock.c"
build "$tmp/plain" "$here"/../../examples/serve/*.c
LD_PRELOAD="$tmp/flock.so" timeout 10 "$tmp/plain" --socket "$shm/y" \
    --image "$shm/other" >"$tmp/flock.log" 2>&1
check no-locks-to-be-had "$(differs $? 1)"
check no-locks-to-be-had-says-so "$(grep -q 'No locks.*--no-lock' \
    "$tmp/flock.log" || tail -n 1 "$tmp/flock.log")"

# Without a descriptor for the next front end it waits, and does not spin.
under_limit "-n 7" "$serve" --socket "$shm/w" --image "$shm/other" \
    >"$shm/w.log" 2>&1 &
daemon=$!
running="$running $daemon"
for try in $(seq 100); do [ -S "$shm/w" ] && break || sleep 0.05; done
"$tmp/front" "$shm/w" load --secs 0.1 --ref "$shm/other" --pid "$daemon" \
    >/dev/null 2>&1 &
front=$!
running="$running $front"
sleep 1.5
ticks=$(cut -d ' ' -f 14,15 "/proc/$daemon/stat" | tr ' ' + )
check no-descriptors-no-spinning \
    "$([ $(($ticks)) -lt 30 ] || echo "$ticks ticks of processor time")"
check no-descriptors-says-so "$(grep -q 'trying again' "$shm/w.log" ||
    tail -n 1 "$shm/w.log")"
end "$front" >/dev/null 2>&1
end "$daemon"
check no-descriptors-ends-well "$(differs $? 0)"


# ---- A disk that is slow, fails, or does not answer --------------------------

# Where each transfer takes 2 ms.
load() { # options...; what went wrong, if anything
    timeout 30 "$tmp/front" "$shm/z" load --secs 0.3 --ref "$tmp/slow.img" \
        --pid "$daemon" "$@" >"$tmp/load.log" 2>&1 && return
    tail -n 1 "$tmp/load.log" | grep . || echo "status $?"
}

serve_slow() { # name, options...
    what=$1
    shift
    start "$shm/z" "$serve" --socket "$shm/z" "$@" ||
        check "$what-starts" "$(tail -n 1 "$shm/z.log")"
}

slow_disk() { # name, options...
    serve_slow "$@"
    check "$what-reads" "$(load --depth 32)"
    rate=$(awk '{ print int($1) }' "$tmp/load.log")
    check "$what-writes" "$(load --depth 32 --rw randwrite)"
    kill -USR1 "$slow"
    check "$what-fails" "$(load | grep -q 'status 1' || cat "$tmp/load.log")"
    check "$what-fails-and-says-so" "$(grep -q 'failed to read' "$shm/z.log" ||
        tail -n 1 "$shm/z.log")"
    kill -HUP "$slow"
    check "$what-is-repaired" "$(load)"
    kill -USR2 "$slow"
    timeout 2 "$tmp/front" "$shm/z" load --ref "$tmp/slow.img" \
        --pid "$daemon" >"$tmp/load.log" 2>&1
    check "$what-hangs" "$(differs $? 124)"
    (sleep 8 && kill -HUP "$slow") &
    for try in $(seq 30); do
        [ -z "$(load)" ] && break
        sleep 0.5
    done
    check "$what-comes-back" "$(load)"
    check "$what-hung-and-says-so" "$(grep -q 'does not answer' "$shm/z.log" ||
        [ "$what" = slow-sync ] || tail -n 1 "$shm/z.log")"
    end "$daemon"
    check "$what-ends-well" "$(differs $? 0)"
    check "$what-no-sanitizer-speaks" "$(grep -m 1 -e Sanitizer \
        -e 'runtime error' "$shm/z.log")"
}

# Who comes after one that was killed would change what the kernel still has
# under way for it: as long as that is so, the image is in use.
killed_with_requests() { # name, options...
    serve_slow "$@"
    kill -USR2 "$slow"
    timeout 2 "$tmp/front" "$shm/z" load --ref "$tmp/slow.img" --depth 32 \
        --rw randwrite --pid "$daemon" >"$tmp/load.log" 2>&1
    kill -KILL "$daemon"
    rm "$shm/z"
    shift
    timeout 10 "$serve" --socket "$shm/z" "$@" >"$tmp/next.log" 2>&1 &
    next=$!
    sleep 3
    kill -0 $next 2>/dev/null && kill -HUP "$slow" # it may be stuck there
    wait $next
    check "$what-holds-the-image" "$(differs $? 1)"
    check "$what-and-that-is-said" "$(grep -q 'in use by another' \
        "$tmp/next.log" || tail -n 1 "$tmp/next.log")"
    kill -HUP "$slow"
    serve_slow "$what" "$@"
    check "$what-lets-it-go" "$(load)"
    end "$daemon"
}

truncate -s 64M "$tmp/slow.img"
if begin_slow_disk "$tmp/slow.img" 2000; then
    slow_disk slow-uring --image "$slow_disk" --no-lock --direct
    check slow-uring-does-many-at-once \
        "$([ "$rate" -gt 1500 ] || echo "$rate a second")"
    slow_disk slow-threads --image "$slow_disk" --no-lock --direct --threads
    slow_disk slow-sync --image "$slow_file" --no-lock --direct
    killed_with_requests killed-uring --image "$slow_disk" --direct
    killed_with_requests killed-threads --image "$slow_disk" --direct --threads
    end_slow_disk
else
    echo "SKIP: a slow disk needs FUSE, a loop device and the right to both" \
        "(apt install libfuse3-dev pkg-config)"
fi

cat "$tmp/results"
failed=$(grep -c '^FAIL' "$tmp/results")
if [ "$failed" -gt 0 ]; then
    tail -n 40 "$tmp"/daemon*.log "$shm"/[tuvw].log >&2
fi
echo "$(grep -c '^ok' "$tmp/results") passed, $failed failed"
[ "$failed" = 0 ]
