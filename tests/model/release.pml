/* A thread that was left behind comes back: released() speaks of what is so, and
 * a reset in it, or beside it, brings the device back; a second one, that comes
 * late, does nothing to the driver that is up by then.
 *
 *     spin -a release.pml && cc -o pan pan.c && ./pan
 *     spin -a -DCALL_FIRST release.pml ...      must find a reset in vain
 *     spin -a -DLATE release.pml ...            must find a driver reset
 */
bool back;                 /* under `parking` */
bool left = true, live;    /* under `registers`: left_behind, a driver */
bool locked;

inline reset(late_check, ok) {
    atomic { !locked -> locked = true };
    if
    :: late_check && !left -> ok = true /* somebody was quicker */
    :: else ->
        if
        :: left && back -> left = false
        :: else
        fi;
        if
        :: !left -> live = false; ok = true
        :: else -> ok = false
        fi
    fi;
    locked = false
}

active proctype thread() {
    bool ok;
#ifndef CALL_FIRST
    back = true;
#endif
#ifndef LATE
    reset(true, ok);
#else
    reset(false, ok);
#endif
    assert(ok);
    back = true
}

active proctype guest() {
    bool ok;
    do
    :: reset(false, ok);
        if
        :: ok -> break
        :: else
        fi
    od;
    live = true;
    (back);
end: (!live);
    assert(false)          /* nobody resets a driver that is up */
}
