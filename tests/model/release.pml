/* A thread that was left behind comes back: it makes the reset whole that left
 * it, and no driver that is up by then is reset; or, if the worker was closed
 * meanwhile, it frees all, which then nobody else does.
 *
 *     spin -a release.pml && cc -o pan pan.c && ./pan
 *     spin -a -DLATE release.pml ...            must find a driver reset
 *     spin -a -DUNLOCKED release.pml ...        must find a leak
 */
bool back, left = true, orphaned;  /* under `registers`: left_behind, GONE */
bool live;                         /* a driver is up */
bool freed, closed, ended;
bool locked;

inline lock()   { atomic { !locked -> locked = true } }
inline unlock() { locked = false }

active proctype thread() {
    bool all_is_mine;
#ifdef UNLOCKED
    all_is_mine = orphaned;
    lock();
#else
    lock();
    all_is_mine = orphaned;
#endif
#ifndef LATE
    if
    :: !all_is_mine -> assert(!live) /* the reset */
    :: else
    fi;
#endif
    back = true;
    unlock();
#ifdef LATE
    assert(!live || all_is_mine);
#endif
    if
    :: all_is_mine -> assert(!freed); freed = true
    :: else
    fi;
    ended = true
}

inline collect() {
    if
    :: left && back -> left = false
    :: else
    fi
}

active proctype host() {
    /* a driver's resets, until one is whole, or not even that */
    do
    :: lock();
        collect();
        if
        :: !left -> unlock(); live = true; break
        :: else -> unlock()
        fi
    :: break
    od;
    if
    :: lock(); /* close */
        collect();
        live = false;
        orphaned = left;
        unlock();
        if
        :: !orphaned -> (ended); assert(!freed); freed = true
        :: else
        fi;
        closed = true
    :: skip
    fi
}

active proctype all() {
end: (ended && closed);
    assert(freed)
}
