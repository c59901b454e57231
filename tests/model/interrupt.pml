/* The decision to interrupt, by used_event, where the host takes its time: it
 * shows completions whenever the ring is empty for a moment, and decides only
 * when there is nothing left to take. Indices are taken modulo 4 here, so once
 * round comes soon. A driver that sleeps is always woken.
 *
 *     spin -a interrupt.pml && cc -o pan pan.c && ./pan
 *     spin -a -DNO_COUNT interrupt.pml ...      must find a sleep without end
 */
#define ROUND 4
#define TOTAL 9
#define DEPTH 2

byte used, event;     /* in the rings */
byte offered, done;   /* in all */
bool irq;

active proctype device() {
    byte decided, undecided, ahead;
    do
    :: done == TOTAL && undecided == 0 -> break
    :: offered > done ->
        atomic {
            done++;
            used = (used + 1) % ROUND;
            undecided = (undecided < ROUND -> undecided + 1 : undecided)
        }
    :: offered == done && undecided > 0 ->
        /* the index is out, and then the event is read */
        ahead = (used + 2 * ROUND - event - 1) % ROUND;
        if
        :: ahead < (used + ROUND - decided) % ROUND -> irq = true
#ifndef NO_COUNT
        :: undecided == ROUND -> irq = true
#endif
        :: else
        fi;
        decided = used;
        undecided = 0
    od
}

active proctype driver() {
    byte seen, taken;
    do
    :: taken == TOTAL -> break
    :: offered < TOTAL && offered - taken < DEPTH -> offered++
    :: used != seen ->
        seen = (seen + 1) % ROUND;
        taken++
    :: used == seen && taken < offered -> /* sleep, after one more look */
        event = seen;
        if
        :: used != seen
        :: used == seen -> (irq); irq = false
        fi
    od
}
