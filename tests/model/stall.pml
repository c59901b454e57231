/* Two queues, of which one waits for its limit: a kick for the other is served
 * though the timer has not fired, and perhaps never does. With a pause in
 * between the kick is not lost.
 *
 *     spin -a stall.pml && cc -o pan pan.c && ./pan
 *     spin -a -DSWALLOW stall.pml ...           must find a request that waits
 *     spin -a -DLOSE_KICK stall.pml ...         must find one after a pause
 */
bool kick_fd, pause_fd, want_pause;
bool waits, served;   /* in the other queue */

active proctype worker() {
    bool kick, pause;
end: do
    :: !want_pause && (kick_fd || pause_fd) ->
        atomic { kick = kick_fd; kick_fd = false };
        atomic { pause = pause_fd; pause_fd = false };
        if
        :: kick && pause ->
#ifndef LOSE_KICK
            kick_fd = true
#else
            skip
#endif
        :: kick && !pause ->
#ifndef SWALLOW
            if
            :: waits -> waits = false; served = true
            :: else
            fi
#else
            skip
#endif
        :: else
        fi
    od
}

active proctype driver() {
    waits = true;
    kick_fd = true;
    (served)
}

active proctype host() {
    atomic { want_pause = true; pause_fd = true };
    want_pause = false
}
