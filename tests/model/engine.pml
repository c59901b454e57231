/* An engine between a driver and a kernel: it starts what the driver offers, as
 * far as it has slots, completes what has ended, and sleeps. No request is
 * stranded or answered twice; and when a reset has returned, the kernel moves
 * nothing any more, and nothing is answered.
 *
 *     spin -a engine.pml && cc -DSAFETY -o pan pan.c && ./pan
 *     spin -a -DNO_WAIT engine.pml ...     must find a byte that moves late
 *     spin -a -DDEAF engine.pml ...        must find a request that is stranded
 *     spin -a -DLATE_CLEAR engine.pml ...  must find one whose end is not heard
 *
 * What barriers are for is in notify.pml: here each sees the other's stores at
 * once.
 */
#define REQUESTS 4
#define SLOTS    2

#define IDLE      0
#define UNDER_WAY 1
#define ENDED     2
#define CANCELLED 3

byte avail;               /* the driver's */
bool notify_on = true, kicked;
byte op[REQUESTS];        /* what the kernel has */
bool ended;               /* wakes the engine */
bool cancelling;
bool answered[REQUESTS];
byte answers;
bool stop, quiet;         /* a reset is asked for, and has returned */

active proctype driver() {
    do
    :: avail < REQUESTS ->
        avail++;
        if
        :: notify_on -> kicked = true
        :: else
        fi
    :: avail == REQUESTS -> break
    :: stop = true; kicked = true; (quiet); break
    od
}

active proctype kernel() {
    byte i;
end:
    do
    :: atomic { op[0] == UNDER_WAY -> i = 0 } goto moves
    :: atomic { op[1] == UNDER_WAY -> i = 1 } goto moves
    :: atomic { op[2] == UNDER_WAY -> i = 2 } goto moves
    :: atomic { op[3] == UNDER_WAY -> i = 3 } goto moves
    od;
moves:
    if
    :: assert(!quiet); atomic { op[i] = ENDED; ended = true }
    :: atomic { cancelling -> op[i] = CANCELLED; ended = true }
    fi;
    goto end
}

active proctype engine() {
    byte next, under_way, i;
    do
    :: stop -> break
    :: !stop && answers == REQUESTS -> goto out
    :: else ->
#ifndef LATE_CLEAR
        ended = false;
#endif
        i = 0;
        do
        :: i < REQUESTS && op[i] == ENDED ->
            assert(!answered[i] && !quiet);
            answered[i] = true;
            answers++;
            op[i] = IDLE;
            under_way--;
            i++
        :: i < REQUESTS && op[i] != ENDED -> i++
        :: i == REQUESTS -> break
        od;
#ifdef LATE_CLEAR
        ended = false;
#endif
        notify_on = false;
        do
        :: next < avail && under_way < SLOTS ->
            op[next] = UNDER_WAY;
            under_way++;
            next++
        :: else -> break
        od;
        if
        :: under_way < SLOTS -> notify_on = true
        :: else
        fi;
        if
        :: under_way < SLOTS && next < avail
        :: else ->
#ifdef DEAF
            if
            :: under_way < SLOTS -> (kicked || stop)
            :: else -> (ended || stop)
            fi;
#else
            (kicked || ended || stop || answers == REQUESTS);
#endif
            kicked = false
        fi
    od;
    cancelling = true;
    do
#ifdef NO_WAIT
    :: break
#else
    :: under_way == 0 -> break
#endif
    :: under_way > 0 ->
        (ended);
        ended = false;
        i = 0;
        do
        :: i < REQUESTS && op[i] >= ENDED ->
            op[i] = IDLE; /* and forgotten */
            under_way--;
            i++
        :: i < REQUESTS && op[i] < ENDED -> i++
        :: i == REQUESTS -> break
        od
    od;
out:
end:
    (stop);
    quiet = true
}
