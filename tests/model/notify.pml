/* The notification switch: a driver that adds requests and kicks only when the
 * rule of EVENT_IDX tells it to, a device that drains, writes avail_event and
 * looks again. No request may be stranded.
 *
 *     spin -a notify.pml && cc -o pan pan.c && ./pan
 *     spin -a -DNO_BARRIER notify.pml ...       must find a hang
 *
 * Stores go through a buffer of one entry for each side, as on x86 and weaker
 * machines: a store is seen by the other side when the buffer is written back,
 * which a full barrier forces and which may happen at any other time.
 */
#define REQUESTS 3

/* What both see. */
byte avail_idx, avail_event;
bool kicked;

/* Store buffers: what a side has stored and the other does not see yet. */
bool driver_buffered, device_buffered;
byte driver_value, device_value;

byte served;

inline write_back_driver() {
    if
    :: driver_buffered -> avail_idx = driver_value; driver_buffered = false
    :: else
    fi
}

inline write_back_device() {
    if
    :: device_buffered -> avail_event = device_value; device_buffered = false
    :: else
    fi
}

active proctype driver() {
    byte made = 0, event;
    do
    :: made < REQUESTS ->
        atomic { write_back_driver(); made++; driver_value = made;
                 driver_buffered = true }
        atomic { write_back_driver() } /* the driver's full barrier */
        event = avail_event;
        /* kick iff the index just filled is the one asked for */
        if
        :: event == made - 1 -> kicked = true
        :: else
        fi
    :: else -> break
    od
}

active proctype device() {
    byte next = 0, seen;
    do
    :: kicked ->
        kicked = false;
        do
        :: seen = avail_idx;
            if
            :: seen != next -> next = seen; served = next
            :: else ->
                atomic { write_back_device(); device_value = next;
                         device_buffered = true }
#ifndef NO_BARRIER
                atomic { write_back_device() }
#endif
#ifdef NO_SECOND_LOOK
                break
#else
                seen = avail_idx;
                if
                :: seen == next -> break
                :: else -> next = seen; served = next
                fi
#endif
            fi
        od
    :: served == REQUESTS -> break
    od
}

/* The buffers are written back sometime, whatever the sides do. */
active proctype hardware() {
end:
    do
    :: atomic { driver_buffered -> write_back_driver() }
    :: atomic { device_buffered -> write_back_device() }
    od
}
