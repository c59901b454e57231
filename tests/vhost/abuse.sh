#!/bin/sh
# Broken messages, rings and requests against a sanitized vblk-serve, which
# has to go on serving, and must not touch its image.
#
#     SANITIZE  flags of the daemon; empty: none
test=abuse-vhost
. "$(dirname "$0")/common.sh"
SANITIZE=${SANITIZE--fsanitize=address,undefined -fno-sanitize-recover=all}

# shellcheck disable=SC2086
build_both $SANITIZE
head -c 4194304 /dev/urandom >"$shm/image"
before=$(sha256sum <"$shm/image")

check() { # name, what is wrong, if anything
    if [ -z "$2" ]; then
        echo "ok $1"
    else
        echo "FAIL $1: $2"
    fi >>"$tmp/results"
}

if start "$shm/s" "$tmp/vblk-serve" --socket "$shm/s" --image "$shm/image"
then
    timeout 120 "$tmp/front" "$shm/s" abuse --ref "$shm/image" \
        --pid "$daemon" >"$tmp/results" 2>"$tmp/front.log"
    status=$?
    [ $status -le 1 ] || check the-front-end-ends \
        "status $status, $(tail -n 1 "$tmp/front.log")"
    end "$daemon"
    status=$?
    check the-daemon-ends-well "$([ $status = 0 ] || echo "status $status")"
    check no-sanitizer-speaks "$(grep -m 1 -e Sanitizer -e 'runtime error' \
        "$shm/s.log")"
    check the-image-is-untouched \
        "$([ "$(sha256sum <"$shm/image")" = "$before" ] || echo changed)"
else
    check the-daemon-starts "$(tail -n 1 "$shm/s.log")"
fi

cat "$tmp/results"
failed=$(grep -c '^FAIL' "$tmp/results")
if [ "$failed" -gt 0 ]; then
    tail -n 40 "$shm/s.log" >&2
fi
echo "$(grep -c '^ok' "$tmp/results") passed, $failed failed"
[ "$failed" = 0 ]
