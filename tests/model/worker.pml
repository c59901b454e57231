/* The worker's states: kicks, pause and resume, stop. A kick that comes while
 * the thread rests or is asked to rest is not lost; a pause that is reported
 * holds until resume; stop ends it from every state.
 *
 *     spin -a worker.pml && cc -o pan pan.c && ./pan
 *     spin -a -DLOSE_KICK worker.pml ...        must find a lost kick
 *     spin -a -DNO_SIGNAL worker.pml ...        must find a stuck pause
 */
#define KICKS  2
#define PAUSES 2

bool kick_fd, pause_fd, stop_fd;   /* eventfds */
bool want_pause, stopping;
bool parked = true, touching;      /* touching: in rings and guest memory */
bool ended;
byte added, served;

/* Under the mutex `parking`, so each of these steps is atomic. */
active proctype worker() {
    bool again = true;
    do
    :: /* rest */
        do
        :: atomic { want_pause && !stopping -> parked = true };
            (!want_pause || stopping)
        :: atomic { !want_pause || stopping -> parked = false; break }
        od;
        /* wait, and take what the descriptors hold */
        if
        :: again || kick_fd || pause_fd || stop_fd
        fi;
        if
        :: stop_fd -> break
        :: else
        fi;
#ifdef LOSE_KICK
        if
        :: pause_fd -> pause_fd = false; kick_fd = false; goto next
        :: else
        fi;
        if
        :: kick_fd -> kick_fd = false; again = true
        :: else
        fi;
#else
        if
        :: kick_fd -> kick_fd = false; again = true
        :: else
        fi;
        if
        :: pause_fd -> pause_fd = false; goto next
        :: else
        fi;
#endif
        if
        :: again ->
            again = false;
            touching = true;
            assert(!parked);
            do
            :: want_pause || stopping -> again = true; break /* yield */
            :: served < added -> served++
            :: else -> break
            od;
            touching = false
        :: else
        fi;
next:   skip
    od;
    ended = true;
    parked = true
}

active proctype driver() {
    byte i;
    for (i : 1 .. KICKS) {
        added++;
        kick_fd = true
    }
}

active proctype host() {
    byte i;
    for (i : 1 .. PAUSES) {
        atomic {
            want_pause = true;
#ifndef NO_SIGNAL
            pause_fd = true
#endif
        }
        /* paused, or ended: either way hands off */
        (parked);
        assert(!touching);
        want_pause = false
    }
    /* all that was added is served without another kick */
    (added == KICKS && served == added);
    if
    :: want_pause = true /* stop a worker that is asked to rest */
    :: skip
    fi;
    atomic { stopping = true; stop_fd = true };
    (ended)
}
