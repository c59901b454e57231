/*
    vblk.h - v0.1.0 - the device side of virtio-blk in one C99 header

    In exactly one source file:

        #define VBLK_IMPLEMENTATION
        #include "vblk.h"

    and a plain #include everywhere else. No other files, no allocation, no
    clock, no I/O: guest memory, the disk and the time come from you.

    On Linux, VBLK_IMPLEMENTATION_THREADED in place of VBLK_IMPLEMENTATION
    adds file backends and a worker thread, on any POSIX system
    VBLK_IMPLEMENTATION_FILES the files alone; link with -lpthread where libc
    needs it. In that unit include vblk.h before every other header, or
    compile with -D_GNU_SOURCE. Units that only call those functions define
    VBLK_THREADED or VBLK_FILES before including.

    Written against VIRTIO 1.2 (1.3 and 1.4 agree for this device). A number
    in brackets, [2.7.8], is a section of that document.


    CONTENTS

        Quick start          the smallest disk that works
        You provide          guest memory, a backend, an interrupt, options
        Request life         from the driver's ring to the used ring
        Time                 what now_ns is, and when 0 will do
        Other hosts          asynchronous I/O, a worker thread
        Threads              who may call what, when
        Errors               three kinds, three channels
        Rules                what is refused, and how it ends
        Profiles             strict and standard
        Hostile guests       what any guest can and cannot do
        Limits               what is fixed, what is not done
        Compile-time options
        History              newest first
        License              at the end of the file


    QUICK START

        static uint8_t ram[64 << 20];                 // guest memory at 0
        static uint8_t disk[1 << 20];

        static const vblk_region region = {0, sizeof ram, ram, false};
        static const vblk_ram    guest  = {&region, 1};
        static vblk_memdisk      image  = {disk, sizeof disk, false};
        static vblk_dev          dev;

        static void interrupt(void *user, int queue, bool fire) {
            if (fire) {
                inject_irq(user);
            }
        }

        vblk_options o = {0};
        o.memory    = vblk_ram_memory(&guest);
        o.backend   = vblk_memdisk_backend(&image);
        o.interrupt = interrupt;
        int err = vblk_init(&dev, &o);
        if (err) {
            fprintf(stderr, "disk: %s\n", vblk_strerror(err));
        }

    Where the guest loads from the 0x200-byte register window:

        value = vblk_mmio_read(&dev, offset, bytes);

    and where it stores to it:

        int queue = vblk_mmio_write(&dev, offset, bytes, value);
        while (vblk_drain(&dev, queue, 0).state == VBLK_MORE) {
        }

    vblk_mmio_write() says which queue has work, vblk_drain() does the work.
    Tell the guest where the window is and which interrupt belongs to it: a
    "virtio,mmio" node in its device tree, or virtio_mmio.device= on the
    command line of Linux. examples/demo.c is all this, complete, with a
    driver.


    YOU PROVIDE

    Guest memory is a vblk_memory: two functions, read and write, that copy
    between guest-physical addresses and a buffer and refuse what is not
    guest memory; and, where the host can reach guest memory by pointer, a
    third, map. With map, rings are looked up once and data moves without a
    copy. For plain RAM in one or several pieces, vblk_ram_memory() gives all
    three from a table of regions.

    A backend is a vblk_backend: read, write, flush and size over scattered
    memory. vblk_memdisk_backend() is one over an array; the POSIX part has
    files. What the guest is offered follows from it: without write the disk
    is read-only, without flush there is no FLUSH. Functions may be replaced:
    a memory disk that is a shared mapping gets a flush of yours that calls
    msync(). A slot without a disk needs no device: let MagicValue read
    0x74726976, Version 2 and all else 0, and DeviceID 0 tells the driver.

    The interrupt function is called with true to fire. An edge (an irqfd, a
    message) needs no more. For a level line, ignore the arguments and, under
    your own lock, set the line to vblk_interrupt_line(): the function is
    called whenever that may have changed.

    Options are one struct. Zero is the sensible default in every field, so
    start from {0}, in C++ from {}, and name what differs.


    REQUEST LIFE

        driver's ring -> vblk_next() -> request -> you -> vblk_complete()
                      -> vblk_publish() -> used ring, interrupt

    vblk_next() takes a chain, validates it whole, and hands out a request:
    a byte range of the disk and the guest memory it goes to or comes from.
    What the device can answer alone (a bad request, GET_ID, an empty read)
    never shows. vblk_drain() is a loop around these three and the backend.

    Every chain that is taken ends in exactly one way: completed once,
    dropped by rule V1, V2 or V17, NEEDS_RESET, or thrown away because its
    queue was reset or stopped.


    TIME

    now_ns is any clock that does not go backwards, in nanoseconds. Nothing
    looks at it unless a limit is set; pass 0.

    With a limit, VBLK_STALLED and wait_ns say when to call again: at that
    moment the request at the head passes, a nanosecond earlier it does not.
    Until then it is in the ring, unseen by the guest, and nothing passes it.
    The guest will not notify again for it, so the call is yours to make. An
    early call is harmless: it says VBLK_STALLED again, with what is left.

    With several queues, the one that stalled first goes first: when the time
    has come, drain VBLK_ALL_QUEUES. That another queue is VBLK_EMPTY says
    nothing of the one that waits: keep its time. examples/emulator.c does.


    OTHER HOSTS

    For io_uring, a thread pool or an event loop: call vblk_next() for the
    queue that vblk_mmio_write() named, or for each, until it says neither
    VBLK_REQUEST nor VBLK_MORE, start what it gives, and call vblk_complete()
    as they end, in any order, then vblk_publish() once for the lot. Go on
    with the rest of a short transfer yourself: nobody calls again. Of the
    backend only what there is counts then (write, or the disk is read-only;
    flush, or FLUSH is not offered), and size, called once; without it the
    backing is as long as the capacity. A vblk_request may be copied.

    A reset in between is no danger: a request of an earlier driver session is
    recognised by vblk_complete() and thrown away. But its memory belongs to
    the guest again, so cancel or wait out what still moves data before you
    forward the guest's write of 0 to Status or QueueReady. A request with
    `durable` set must be on stable storage before it is completed.

    For a thread per device, vblk_worker_init() and what follows it (Linux).
    A kick is then an eventfd and a vCPU never waits for the disk. Stopping is
    bounded whatever the backend does: a thread stuck in it is left behind and
    touches nothing afterwards. What its system call itself still moves is
    beyond anybody's reach; therefore Status shows DEVICE_NEEDS_RESET until it
    has ended, and released() says when backend and memory may go. Callbacks
    other than the backend, the interrupt and the event hook must not block.

    A worker serves an interpreter too, if the guest's fences are fences of
    the host and its stores to the rings are single accesses. irq_fd need not
    be read: poll vblk_interrupt_line() between two instructions, and to wake
    a loop that sleeps until something happens, wait for irq_fd in it.


    THREADS

    The core starts none and takes no lock. Three kinds of call:

        registers   vblk_mmio_write, vblk_set_memory, vblk_accept,
                    vblk_set_status, vblk_queue_start, vblk_queue_stop
                    (vblk_interrupt_ack: any time)
        draining    vblk_next, vblk_execute, vblk_complete, vblk_publish,
                    vblk_drain, vblk_get, vblk_put, vblk_set_limits
        any time    vblk_mmio_read, vblk_counters, vblk_interrupt_line,
                    vblk_needs_reset, and all other queries

    Register calls: one at a time for a device. Draining calls: one at a time
    for a queue; different queues may be drained by different threads, unless
    a limit is set: then one at a time for the device. vblk_set_limits() is a
    draining call of every queue: for it the draining threads must be outside,
    and come back by the rule that holds then.

    A register call may overlap draining calls, except those that start or
    stop a queue or change the memory: a Status of 0, QueueReady after
    DRIVER_OK, vblk_queue_start(), vblk_queue_stop() and vblk_set_memory().
    For those, the draining threads must be outside.
    Distinct devices share nothing.

    Callbacks run inside the call that caused them, on its thread: those of a
    register call on the thread that made it, the rest on a drainer's. They
    must not call back into the same device, vblk_interrupt_line() and
    vblk_counters() excepted. A worker's thread blocks all signals but those
    of its own faults.


    ERRORS

    The caller's mistakes fail vblk_init() with a negative VBLK_ERR_ code, in
    which case nothing was set up, and assert elsewhere. The backend's become
    the status byte the guest reads, a counter and an event. The guest's never
    assert: they are events and, by the rules below, a status byte, a dropped
    chain, or DEVICE_NEEDS_RESET.

    An event is a code, a queue, a head and two numbers; vblk_event_text()
    makes a sentence of the code. Print them to stderr at first: "my guest
    does not find its disk" is usually answered by the first line.


    RULES

    IOERR and UNSUPP are status bytes; "dropped" means that the chain is not
    returned (standard: IOERR, or returned with length 0, P5). Each but V11
    and Q4 counts one io_error; Q4 counts one invalid_avail_idx. Other letters
    in the text of an event name its group: M registers, F features and
    status, B backends, W the host; Q3 a queue's notifications.

        V1   a chain of more than seg_max + 2 descriptors, one that
             loops or leaves its table, a bad indirect table       dropped
        V2   no writable byte for the status at the end            dropped
        V3   no 16-byte header at the start                        IOERR
        V4   header outside guest memory                           IOERR
        V5   a data descriptor longer than size_max                IOERR
        V6   IN, OUT or GET_ID without data                        IOERR
        V7   FLUSH with data                                       IOERR
        V8   IN or OUT of no multiple of 512 bytes                 IOERR
        V9   OUT on a read-only disk                               IOERR
        V11  unknown type (no io_error)                            UNSUPP
        V12  data in the wrong direction                           IOERR
        V13  a range that is not wholly on the disk, or 4 GiB      IOERR
        V16  GET_ID with less than 20 bytes in its first buffer    IOERR
        V17  status byte outside guest memory        dropped in any profile
        X2   a read that ends before the backing does              IOERR
        X3   the backend failed                                    IOERR
        X5   data outside guest memory, or read to where it is
             read-only                                             IOERR
        Q4   an avail.idx more than the queue size ahead, a head
             beyond the queue, a misplaced ring, an available or
             used ring outside guest memory                      NEEDS_RESET


    PROFILES

    VBLK_STRICT refuses whatever a well-behaved Linux driver never sends.
    VBLK_STANDARD takes all that the standard lets a driver do, and what
    shipped drivers really do. It differs in these points alone:

        P1  any framing: the header is the first 16 readable bytes, the
            status the last writable one, data what lies between
        P2  DRIVER is taken without ACKNOWLEDGE (U-Boot 2023.01), several
            steps are taken at once (SeaBIOS), a Status write adds its bits
            to those that are set (NuttX), unknown bits are ignored
        P3  size_max binds only a driver that accepted SIZE_MAX
        P4  an empty IN or OUT succeeds, FLUSH ignores data, GET_ID copies
            what fits
        P5  what strict drops by V1 and V2 is IOERR where the chain has an
            end and a writable byte, else it is returned with length 0
        P6  the used length never counts bytes that were not written:
            0 for a failed read
        P7  a completion whose interrupt the driver suppressed leaves
            InterruptStatus alone
        P8  QueueReady may be cleared while the device is live; that queue
            starts again from position 0
        P9  bit 31 of a request's type is ignored (SLOF)
        P10 FEATURES_OK is taken without VERSION_1 (xv6, legacy drivers
            behind a transitional device); the layout stays the modern one
        P11 VendorID is 0x554d4551 by default (xv6 insists on it)
        P12 SIZE_MAX is offered only where options.size_max is set (viostor
            sends more, FreeBSD does not attach below its maxphys)
        P13 queue registers count from DRIVER on (LK)

    Where strict refuses what standard would take, the event's text says so.

    Some drivers need more than a profile: virtio-drivers (Rust) a queue_size
    of 16 or more; barebox reads its partition table before DRIVER_OK, which
    no device may serve [2.1.2], and stays one completion behind; Phoenix-RTOS
    takes the bytes of a read from its used length less 1; RT-Thread speaks
    version 1 alone, and an event says so.


    HOSTILE GUESTS

    Every number from the guest is checked before it is used, and each is
    read once. Whatever a guest writes to its memory and to the registers,
    also while a request is under way, the device reads and writes only guest
    memory through your functions and the disk within its capacity, does
    bounded work per call, and goes on serving its other queues. The one
    exception is yours to close: data may change under a backend while it is
    written out, as with any device that does not copy.


    LIMITS

    Split rings up to 32768 entries, indirect descriptors, EVENT_IDX, up to
    VBLK_MAX_QUEUES queues. IN, OUT, FLUSH, GET_ID. Not done: packed rings,
    DISCARD, WRITE_ZEROES, zoned disks, the legacy interface.

    A drain takes 8 KB of stack beside what your functions take; with
    VBLK_MAX_SEGS 16 and VBLK_SCRATCH 512, 2 KB.


    COMPILE-TIME OPTIONS

        VBLK_STATIC            all functions static; with VBLK_IMPLEMENTATION
                               in each unit that uses them
        VBLKDEF                or your own linkage; default extern
        VBLK_MAX_QUEUES        queues in a vblk_dev; default 8
        VBLK_MAX_SEGS          largest seg_max; default 128
        VBLK_QUEUE_SIZE        default of options.queue_size; default 256
        VBLK_SCRATCH           bytes of stack that replace map; default 4096
        VBLK_SINGLE_THREADED   no atomics: one thread, guest included;
                               else some 32-bit targets need -latomic
        VBLK_ASSERT(x)         default assert
        VBLK_MEMCPY(d, s, n), VBLK_MEMSET(d, c, n)  default string.h; both


    HISTORY

        0.2.0  (to come)     vblk_complete() takes a result as of read(2);
                             vblk_set_memory() returns a code;
                             vblk_limiter_init() takes vblk_limits;
                             vblk_worker_set_cpus() and _set_parked_fd() in
                             place of options; a level for each log line;
                             vblk_region has read_only; size_max is 4096 or
                             more; BACKEND_FAILED is READ_, WRITE_ and
                             FLUSH_FAILED, BACKEND_STUCK is WRITE_STUCK,
                             NOTIFY_IGNORED is one of three
        0.1.0  (2026-11-20)  first release
*/
#if defined(VBLK_IMPLEMENTATION_THREADED) && !defined(VBLK_IMPLEMENTATION_FILES)
#define VBLK_IMPLEMENTATION_FILES
#endif
#if defined(VBLK_IMPLEMENTATION_FILES) && !defined(VBLK_IMPLEMENTATION)
#define VBLK_IMPLEMENTATION
#endif
#if defined(VBLK_IMPLEMENTATION_THREADED) && !defined(VBLK_THREADED)
#define VBLK_THREADED
#endif
#if (defined(VBLK_IMPLEMENTATION_FILES) || defined(VBLK_THREADED)) &&          \
    !defined(VBLK_FILES)
#define VBLK_FILES
#endif
// These have an effect if nothing was included before.
#if defined(VBLK_IMPLEMENTATION_FILES) && defined(__linux__) &&                \
    !defined(_GNU_SOURCE) &&                                                   \
    (defined(VBLK_IMPLEMENTATION_THREADED) || !defined(_POSIX_C_SOURCE))
#define _GNU_SOURCE // preadv; the worker
#endif
#if defined(VBLK_IMPLEMENTATION_FILES) && !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64 // a 32-bit program's files over 2 GiB
#endif

#ifndef VBLK_H
#define VBLK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef VBLKDEF
#if defined(VBLK_STATIC) && (defined(__GNUC__) || defined(__clang__))
#define VBLKDEF static __attribute__((unused))
#elif defined(VBLK_STATIC)
#define VBLKDEF static
#else
#define VBLKDEF extern
#endif
#endif

#define VBLK_VERSION_MAJOR 0 // breaks source or behaviour
#define VBLK_VERSION_MINOR 1 // adds
#define VBLK_VERSION_PATCH 0 // repairs

#ifndef VBLK_MAX_QUEUES
#define VBLK_MAX_QUEUES 8
#endif
#ifndef VBLK_MAX_SEGS
#define VBLK_MAX_SEGS 128
#endif
#ifndef VBLK_QUEUE_SIZE
#define VBLK_QUEUE_SIZE 256
#endif
#ifndef VBLK_SCRATCH
#define VBLK_SCRATCH 4096
#endif
#if VBLK_MAX_QUEUES < 1 || VBLK_MAX_QUEUES > 65535 || VBLK_MAX_SEGS < 1
#error "vblk.h: VBLK_MAX_QUEUES is 1 to 65535, VBLK_MAX_SEGS at least 1"
#endif
#if VBLK_SCRATCH < 512 || VBLK_SCRATCH % 512 != 0
#error "vblk.h: VBLK_SCRATCH must be a multiple of 512"
#endif
#if VBLK_QUEUE_SIZE < 1 || VBLK_QUEUE_SIZE > 32768 ||                          \
    (VBLK_QUEUE_SIZE & (VBLK_QUEUE_SIZE - 1)) != 0
#error "vblk.h: VBLK_QUEUE_SIZE must be a power of two from 1 to 32768"
#endif

#ifdef __cplusplus
extern "C" {
#endif


// ---- Constants of the standard ---------------------------------------------

// Feature bits [5.2.3, 6].
#define VBLK_F_SIZE_MAX      (UINT64_C(1) << 1)
#define VBLK_F_SEG_MAX       (UINT64_C(1) << 2)
#define VBLK_F_RO            (UINT64_C(1) << 5)
#define VBLK_F_BLK_SIZE      (UINT64_C(1) << 6)
#define VBLK_F_FLUSH         (UINT64_C(1) << 9)
#define VBLK_F_MQ            (UINT64_C(1) << 12)
#define VBLK_F_INDIRECT_DESC (UINT64_C(1) << 28)
#define VBLK_F_EVENT_IDX     (UINT64_C(1) << 29)
#define VBLK_F_VERSION_1     (UINT64_C(1) << 32)

// Device status [2.1].
#define VBLK_STATUS_ACKNOWLEDGE 0x01u
#define VBLK_STATUS_DRIVER      0x02u
#define VBLK_STATUS_DRIVER_OK   0x04u
#define VBLK_STATUS_FEATURES_OK 0x08u
#define VBLK_STATUS_NEEDS_RESET 0x40u
#define VBLK_STATUS_FAILED      0x80u

// InterruptStatus [4.2.2].
#define VBLK_INTERRUPT_USED   1u
#define VBLK_INTERRUPT_CONFIG 2u

// Request types and status bytes [5.2.6].
#define VBLK_T_IN     0u
#define VBLK_T_OUT    1u
#define VBLK_T_FLUSH  4u
#define VBLK_T_GET_ID 8u
#define VBLK_S_OK     0
#define VBLK_S_IOERR  1
#define VBLK_S_UNSUPP 2

#define VBLK_SECTOR   512u // bytes, whatever the block size
#define VBLK_ID_BYTES 20u

// Register offsets [4.2.2].
#define VBLK_REG_MAGIC_VALUE         0x000u
#define VBLK_REG_VERSION             0x004u
#define VBLK_REG_DEVICE_ID           0x008u
#define VBLK_REG_VENDOR_ID           0x00cu
#define VBLK_REG_DEVICE_FEATURES     0x010u
#define VBLK_REG_DEVICE_FEATURES_SEL 0x014u
#define VBLK_REG_DRIVER_FEATURES     0x020u
#define VBLK_REG_DRIVER_FEATURES_SEL 0x024u
#define VBLK_REG_QUEUE_SEL           0x030u
#define VBLK_REG_QUEUE_NUM_MAX       0x034u
#define VBLK_REG_QUEUE_NUM           0x038u
#define VBLK_REG_QUEUE_READY         0x044u
#define VBLK_REG_QUEUE_NOTIFY        0x050u
#define VBLK_REG_INTERRUPT_STATUS    0x060u
#define VBLK_REG_INTERRUPT_ACK       0x064u
#define VBLK_REG_STATUS              0x070u
#define VBLK_REG_QUEUE_DESC_LOW      0x080u
#define VBLK_REG_QUEUE_DESC_HIGH     0x084u
#define VBLK_REG_QUEUE_DRIVER_LOW    0x090u
#define VBLK_REG_QUEUE_DRIVER_HIGH   0x094u
#define VBLK_REG_QUEUE_DEVICE_LOW    0x0a0u
#define VBLK_REG_QUEUE_DEVICE_HIGH   0x0a4u
#define VBLK_REG_SHM_LEN_LOW         0x0b0u
#define VBLK_REG_SHM_LEN_HIGH        0x0b4u
#define VBLK_REG_SHM_BASE_LOW        0x0b8u
#define VBLK_REG_SHM_BASE_HIGH       0x0bcu
#define VBLK_REG_CONFIG_GENERATION   0x0fcu
#define VBLK_REG_CONFIG              0x100u // config space from here on


// ---- Errors and events -----------------------------------------------------

#define VBLK_ERRORS(X)                                                         \
    X(OK, 0, "no error")                                                       \
    X(ERR_MEMORY, -1, "memory needs both read and write, or neither to be "    \
      "given later by vblk_set_memory()")                                      \
    X(ERR_BACKEND, -2, "backend.read is missing")                              \
    X(ERR_CAPACITY, -3, "capacity is 0 and the backend has no size function, " \
      "or it is more than 2^63 bytes; it is in sectors of 512 bytes")          \
    X(ERR_CACHE, -4, "cache is none of the vblk_cache values")                 \
    X(ERR_PROFILE, -5, "profile is none of the vblk_profile values")           \
    X(ERR_QUEUES, -6, "queues is more than VBLK_MAX_QUEUES")                   \
    X(ERR_QUEUE_SIZE, -7, "queue_size is no power of two from 1 to 32768")     \
    X(ERR_SEG_MAX, -8, "seg_max is more than VBLK_MAX_SEGS or than "           \
      "queue_size - 2; without INDIRECT_DESC a queue_size below 3 leaves no "  \
      "request at all")                                                        \
    X(ERR_SIZE_MAX, -9, "size_max is less than 4096 bytes: no Linux since "    \
      "6.9 binds such a disk")                                                 \
    X(ERR_FEATURES, -10, "features_off may hold SIZE_MAX, SEG_MAX, BLK_SIZE, " \
      "INDIRECT_DESC and EVENT_IDX alone; the rest follows from the options")  \
    X(ERR_LIMITS, -11, "limits: a burst, iops_burst or bps_burst, needs its "  \
      "rate and, but for a limiter's, may not be smaller than one second's "   \
      "worth of it; neither may be 2^63 or more")                              \
    X(ERR_FILE, -12, "the image is not to be had as a disk; errno says why")   \
    X(ERR_LOCK, -13, "the lock cannot be made; errno says why")                \
    X(ERR_WORKER, -14, "an eventfd, timerfd, epoll descriptor or lock cannot " \
      "be had; errno says why")                                                \
    X(ERR_CPUS, -15, "cpus names a processor below 0 or above what cpu_set_t " \
      "holds")                                                                 \
    X(ERR_BUSY, -16, "the worker did not come to rest within stop_ms: its "    \
      "backend is slow or stuck; nothing changed")                             \
    X(ERR_STOP_MS, -17, "stop_ms is more than INT_MAX milliseconds")

typedef enum vblk_error {
#define VBLK_X(name, value, text) VBLK_##name = (value),
    VBLK_ERRORS(VBLK_X)
#undef VBLK_X
    VBLK_ERROR_LAST = -17
} vblk_error;

// Code, then a sentence. The comment names the two numbers, a and b.
#define VBLK_EVENTS(X)                                                         \
    X(NONE, "nothing")                                                         \
    /* capacity: a = backend's size in bytes, or as the text says */           \
    X(CAPACITY_LARGE, "capacity is more than the backend has: beyond its end " \
      "reads give zeroes, and writes may extend it; a = backend's bytes, "     \
      "b = capacity in bytes (X2)")                                            \
    X(CAPACITY_ROUNDED, "the backend's last bytes are no whole sector and "    \
      "not on the disk; a = how many (B4)")                                    \
    X(CAPACITY_ZERO, "the backend is smaller than one sector: the disk has "   \
      "no sectors (B4)")                                                       \
    /* registers: a = offset, or as the text says; b = value or width */       \
    X(REG_WIDTH, "a register below 0x100 was accessed with a width other "     \
      "than 4 bytes (M2)")                                                     \
    X(REG_FEATURES_WINDOW, "DriverFeatures was written outside the window "    \
      "from DRIVER to FEATURES_OK and is ignored; a = Status, b = value (M5)") \
    X(REG_QUEUE_WINDOW, "a queue register was written outside the window "     \
      "from FEATURES_OK to DRIVER_OK and is ignored; in the standard profile " \
      "it begins with DRIVER (M7, P13)")                                       \
    X(REG_LEGACY, "a register of version 1 was written, which is not served: " \
      "the driver did not look at Version; a = offset (M12)")                  \
    X(REG_QUEUE_FROZEN, "QueueReady was cleared while the device is live and " \
      "is ignored; the standard profile stops the queue (M7, P8)")             \
    X(REG_QUEUE_SIZE, "QueueNum is 0, over QueueNumMax or no power of two "    \
      "and is ignored (M7)")                                                   \
    X(NOTIFY_NO_QUEUE, "QueueNotify for a queue that does not exist is "       \
      "ignored; a = queue (M10)")                                              \
    X(NOTIFY_NOT_READY, "QueueNotify for a queue that is not ready is "        \
      "ignored; a = queue (M10)")                                              \
    X(NOTIFY_EARLY, "QueueNotify before DRIVER_OK is ignored: nothing is "     \
      "served until then; a = queue, b = Status (M10)")                        \
    /* status: a = Status, b = value written */                                \
    X(STATUS_CLEARS, "a Status write that would clear a bit is refused: only " \
      "0 clears, and resets; the standard profile adds what is new in it "     \
      "(F2, P2)")                                                              \
    X(STATUS_BITS, "a Status write that adds two bits or an unknown bit is "   \
      "refused: 1, 3, 11, 15 in turn; the standard profile takes several "     \
      "steps at once and masks the unknown (F2, P2)")                          \
    X(STATUS_ORDER, "a Status write out of the order ACKNOWLEDGE, DRIVER, "    \
      "FEATURES_OK, DRIVER_OK is refused (F2)")                                \
    X(STATUS_NO_ACK, "DRIVER without ACKNOWLEDGE is refused; the standard "    \
      "profile takes it (F2, P2)")                                             \
    X(STATUS_NEEDS_RESET, "the device needs a reset: Status writes other "     \
      "than 0 are refused (F7)")                                               \
    X(STATUS_FAILED, "the driver gave up on the device (F5)")                  \
    /* a = features accepted, b = features offered */                          \
    X(FEATURES_VERSION, "FEATURES_OK is refused: VERSION_1 was not accepted; " \
      "the standard profile serves such a driver (F3, P10)")                   \
    X(FEATURES_UNOFFERED, "FEATURES_OK is refused: a feature was accepted "    \
      "that is not offered (F3)")                                              \
    /* queue broken: a, b as named */                                          \
    X(RING_SIZE, "the queue was started without a valid QueueNum (Q4)")        \
    X(RING_PLACE, "a ring is misaligned or wraps the address space: "          \
      "descriptors 16, driver area 2, device area 4 bytes; a = address (Q4)")  \
    X(AVAIL_UNREADABLE, "the available ring is outside guest memory; "         \
      "a = address (Q4)")                                                      \
    X(AVAIL_JUMP, "avail.idx is more than the queue size ahead; a = avail.idx" \
      ", b = device's position (Q4)")                                          \
    X(HEAD_RANGE, "a head in the available ring is not below the queue size; " \
      "a = head (Q4)")                                                         \
    X(QUEUE_OVERRUN, "more chains are under way than the queue has entries; "  \
      "a = how many (Q4)")                                                     \
    X(USED_UNWRITABLE, "the used ring is outside guest memory or read-only; "  \
      "a = address (Q4)")                                                      \
    X(NOTIFY_SWITCH, "guest notifications cannot be switched on: the used "    \
      "ring is outside guest memory or read-only; a = address (Q3)")           \
    X(HOST_RESET, "the host asked for a reset of the device")                  \
    /* chain dropped (standard: see P5) */                                     \
    X(CHAIN_LONG, "a chain has more than seg_max + 2 descriptors, or more "    \
      "than its table has: it loops; a = limit (V1)")                          \
    X(CHAIN_NEXT, "a descriptor index is outside its table; a = index, "       \
      "b = entries (V1)")                                                      \
    X(CHAIN_UNREADABLE, "a descriptor, or the table it is in, is outside "     \
      "guest memory; a = address (V1)")                                        \
    X(INDIRECT_OFF, "an indirect descriptor, though INDIRECT_DESC was not "    \
      "negotiated; a = bytes (V1)")                                            \
    X(INDIRECT_NESTED, "an indirect descriptor inside an indirect table; "     \
      "a = bytes (V1)")                                                        \
    X(INDIRECT_NEXT, "an indirect descriptor with NEXT set; a = bytes (V1)")   \
    X(INDIRECT_SIZE, "an indirect table of no positive multiple of 16 bytes; " \
      "a = bytes (V1)")                                                        \
    X(CHAIN_ORDER, "a readable descriptor after a writable one (V2)")          \
    X(STATUS_MISSING, "no writable byte for the status (V2)")                  \
    X(STATUS_FRAMING, "the last of two or more descriptors does not hold the " \
      "status; the standard profile takes the last writable byte (V2, P1)")    \
    X(STATUS_WRAPS, "the status descriptor wraps the address space; "          \
      "a = address (V2)")                                                      \
    X(STATUS_UNWRITABLE, "the status byte is outside guest memory or "         \
      "read-only: the chain is not returned; a = address (V17)")               \
    /* request refused */                                                      \
    X(HEADER_SHORT, "a header of less than 16 bytes; a = bytes (V3)")          \
    X(HEADER_FRAMING, "the first descriptor does not hold the header; the "    \
      "standard profile takes the first 16 readable bytes; a = readable "      \
      "bytes (V3, P1)")                                                        \
    X(HEADER_UNREADABLE, "the header is outside guest memory; a = address "    \
      "(V4)")                                                                  \
    X(TYPE_UNKNOWN, "a request type that is unknown or was not offered; "      \
      "a = type (V11)")                                                        \
    X(TYPE_BARRIER, "a request type with bit 31, BARRIER, which was never "    \
      "offered; the standard profile ignores it; a = type (V11, P9)")          \
    X(SEGMENT_LONG, "a data descriptor longer than size_max; a = bytes, "      \
      "b = size_max (V5)")                                                     \
    X(SEGMENT_LONG_STRICT, "a data descriptor longer than size_max; the "      \
      "standard profile takes it, as the driver did not accept SIZE_MAX; "     \
      "a = bytes, b = size_max (V5, P3)")                                      \
    X(DATA_DIRECTION, "data in the wrong direction for the type; a = type "    \
      "(V12)")                                                                 \
    X(DATA_MISSING, "a request without data; the standard profile lets it "    \
      "pass; a = type (V6, P4)")                                               \
    X(DATA_UNWANTED, "a FLUSH with data; the standard profile ignores the "    \
      "data; a = bytes (V7, P4)")                                              \
    X(DATA_RAGGED, "data of no multiple of 512 bytes; a = bytes (V8)")         \
    X(DATA_LONG, "data of 4 GiB or more: a used length cannot tell it, and "   \
      "no request may hold the device for so long; a = bytes (V13)")           \
    X(DATA_UNMAPPED, "a data buffer is outside guest memory, or read-only "    \
      "where it is read to; a = address, b = bytes (X5)")                      \
    X(READ_ONLY, "a write to a read-only disk; a = sector (V9)")               \
    X(OUT_OF_RANGE, "a range beyond the end of the disk; a = sector, "         \
      "b = bytes (V13)")                                                       \
    X(ID_SHORT, "GET_ID with less than 20 bytes in its first buffer; the "     \
      "standard profile copies what fits; a = bytes (V16, P4)")                \
    /* backend */                                                              \
    X(READ_SHORT, "a read got less than asked, and the backing does not end "  \
      "there; a = sector, b = bytes missing (X2)")                             \
    X(READ_FAILED, "the backend failed to read; a = sector, b = its error "    \
      "number (X3)")                                                           \
    X(WRITE_FAILED, "the backend failed to write; a = sector, b = its error "  \
      "number (X3)")                                                           \
    X(WRITE_STUCK, "the backend wrote less than asked and stopped there; "     \
      "a = sector, b = bytes left (X3)")                                       \
    X(FLUSH_FAILED, "the backend failed to make writes durable; a = sector "   \
      "behind the write, 0 of a FLUSH; b = its error number (X3)")             \
    X(NO_MEMORY, "a queue has work but guest memory was not given yet; the "   \
      "work waits for vblk_set_memory() (W9)")

typedef enum vblk_event_code {
#define VBLK_X(name, text) VBLK_EV_##name,
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    VBLK_EV_COUNT
} vblk_event_code;

#define VBLK_NO_QUEUE   (-1)
#define VBLK_ALL_QUEUES (-2)

typedef struct vblk_event {
    vblk_event_code code;
    int             queue; // VBLK_NO_QUEUE: the device
    uint16_t        head;  // of the chain; 0 where there is none
    uint64_t        a, b;  // as the text of the code, or the list above, says
} vblk_event;


// ---- Types you fill in -----------------------------------------------------

// Access to guest memory. The first two return 0, or anything else when a
// byte of [gpa, gpa + n) is not guest memory, in which case nothing was
// moved. With a NULL buffer they move nothing and only answer. Ring indices
// are asked for with n = 2 at even addresses; where a guest runs on another
// thread, these must be single accesses.
typedef struct vblk_memory {
    int (*read)(void *user, uint64_t gpa, void *dst, uint64_t n);
    int (*write)(void *user, uint64_t gpa, const void *src, uint64_t n);
    // Optional. A host pointer to gpa, valid for *n bytes: *n comes in as
    // what is wanted, more than 0, and goes out as what is contiguous from
    // there, at most that. NULL: not guest memory, or not writable and
    // `writable` is set. Pointers stay valid until vblk_set_memory().
    void *(*map)(void *user, uint64_t gpa, uint64_t *n, bool writable);
    void *user; // first argument of the three
} vblk_memory;

// A piece of guest memory that takes part in a request. `ptr` is NULL where
// the host has no pointer to it; vblk_get() and vblk_put() reach it then.
typedef struct vblk_seg {
    uint8_t *ptr;
    size_t   n;   // bytes, never 0
    uint64_t gpa;
} vblk_seg;

// The disk. `offset` is in bytes, a multiple of 512 but for the rest of a short
// transfer; all is within the capacity. read and write return how many bytes
// they moved, which may be less than asked: they are called again for the
// rest. 0 means no progress: for a read, the end of a backing that never was
// longer, and the rest reads as zeroes; for a write, an error. Negative: an
// error number for the event. A backing that has become shorter has lost data
// and says an error, also to flush.
typedef struct vblk_backend {
    int64_t (*read)(void *user, uint64_t offset, const vblk_seg *seg,
                    unsigned segs);
    // NULL: a read-only disk.
    int64_t (*write)(void *user, uint64_t offset, const vblk_seg *seg,
                     unsigned segs);
    // Make every completed write durable; 0 or a negative error number. After
    // a failure, 0 may only come again once nothing is lost: fsync() itself
    // forgets. NULL: a guest that may write is not offered FLUSH.
    int (*flush)(void *user);
    uint64_t (*size)(void *user); // bytes; NULL if options.capacity is set
    bool  read_only;
    void *user; // first argument of the four
} vblk_backend;

typedef enum vblk_cache {
    VBLK_CACHE_WRITEBACK, // writes are durable after a FLUSH
    VBLK_CACHE_UNSAFE     // FLUSH is not offered, nothing is ever flushed
} vblk_cache;

typedef enum vblk_profile { VBLK_STRICT, VBLK_STANDARD } vblk_profile;

// What the guest may use in the long run. An IN, OUT, FLUSH or GET_ID costs an
// operation and its bytes; one that is refused or empty, or a FLUSH of a
// read-only disk, costs nothing. A rate of 0 is no limit. A burst is
// how much can be saved up while idle: at least one second's worth, which is
// also its default; at most 2^63 - 1.
typedef struct vblk_limits {
    uint64_t iops, iops_burst; // operations a second; operations
    uint64_t bps, bps_burst;   // bytes a second; bytes
} vblk_limits;

// What vblk_init() is told. Zero means the default in every field.
typedef struct vblk_options {
    vblk_memory  memory;     // or none, and vblk_set_memory() later
    vblk_backend backend;    // .read at least
    uint64_t     capacity;   // 512-byte sectors; default backend.size() / 512,
                             // rounded down; more than that reads as zeroes
    const char  *id;         // copied, cut at 20 bytes; default ""
    bool         read_only;  // or by the backend
    vblk_cache   cache;      // default writeback
    vblk_profile profile;    // default strict
    unsigned     queues;     // default 1; more offer MQ
    uint32_t     queue_size; // power of two, 1 to 32768; default 256
    uint32_t     seg_max;    // data segments in a request; default queue_size
                             // - 2, at least 1 and at most VBLK_MAX_SEGS
    uint32_t     size_max;   // bytes in a segment, at least 4096; default
                             // 1 MiB; standard: no limit
    uint32_t     vendor_id;  // default 0; standard: 0x554d4551, QEMU's
    uint64_t     features_off; // of those offered, bits not to offer
    vblk_limits  limits;       // default none
    // Fire (true), because of `queue` or, if VBLK_NO_QUEUE, of the device's
    // configuration or status. Or: InterruptStatus went to 0 (false).
    // NULL: poll it.
    void (*interrupt)(void *user, int queue, bool fire);
    void (*event)(void *user, const vblk_event *event); // NULL: silent
    void *user; // first argument of interrupt and event
} vblk_options;


// ---- Types you hold --------------------------------------------------------

typedef enum vblk_state {
    VBLK_EMPTY,   // nothing to do; the guest will notify
    VBLK_REQUEST, // vblk_next() only: a request was handed out
    VBLK_STALLED, // call again in wait_ns; earlier is harmless
    VBLK_MORE,    // call again: the guest adds faster than one call takes
    VBLK_BROKEN   // this queue needs a reset
} vblk_state;

typedef struct vblk_outcome {
    vblk_state state;
    uint64_t   wait_ns; // with VBLK_STALLED
} vblk_outcome;

// A descriptor that crosses host regions takes a segment for each; this many
// crossings fit before the request goes without pointers.
#define VBLK__SPLITS 16

// A validated request. Read-only to the host; may be copied.
typedef struct vblk_request {
    uint32_t type;    // VBLK_T_IN, VBLK_T_OUT or VBLK_T_FLUSH
    bool     durable; // OUT: must be durable before it is completed
    bool     direct;  // every segment has a pointer
    uint64_t offset;  // bytes from the start of the disk
    uint64_t bytes;   // in all segments
    unsigned segs;
    uint16_t queue, head;
    // Private from here to seg.
    uint64_t epoch;
    uint64_t backing; // how far it was known to reach
    bool     space; // writable bytes stand before the status byte
    uint64_t status_gpa;
    uint8_t *status_ptr;
    vblk_seg seg[VBLK_MAX_SEGS + 2 + VBLK__SPLITS];
} vblk_request;

#if defined(__GNUC__)
#define VBLK__ATOMIC64 __attribute__((aligned(8))) // also on 32-bit machines
#else
#define VBLK__ATOMIC64
#endif

typedef struct VBLK__ATOMIC64 vblk_counts {
    uint64_t reads, writes, flushes; // completed with success
    uint64_t bytes_read;             // from the backing, padding not counted
    uint64_t bytes_written;
    uint64_t io_errors;
    uint64_t throttled;              // stalls: drains that had to stop
    uint64_t currently_throttled;    // queues that wait now
    uint64_t throttled_ns;           // time waited, added when one passes
    uint64_t invalid_avail_idx;      // times a queue broke, for any Q4
} vblk_counts;

// A token bucket; all of it is integer arithmetic and exact. See vblk_bucket_
// functions.
typedef struct vblk_bucket {
    uint64_t rate;     // tokens a second; 0: no limit
    uint64_t burst;    // tokens it holds at most
    int64_t  tokens;   // below 0: a debt that later requests wait out
    uint64_t fraction; // of a token, in 10^-9
    uint64_t last_ns;  // when tokens and fraction were right
} vblk_bucket;

// A virtqueue. Private.
typedef struct vblk_queue {
    // Register calls, before DRIVER_OK.
    bool     ready; // atomic
    uint32_t size;
    uint64_t desc_gpa, avail_gpa, used_gpa;
    // The drainer, from DRIVER_OK to reset.
    bool     poisoned;
    uint64_t epoch;        // changes when requests of this queue go stale
    // The same, and afresh whenever the queue starts. Positions are
    // free-running.
    bool     resolved;     // the pointers below are up to date
    bool     notify_off;   // NO_NOTIFY is set in the used ring
    bool     switch_failed;
    bool     adopt_used;   // take the used position from the ring first
    uint16_t avail_next;   // next entry to take
    uint16_t avail_seen;   // avail.idx as last read
    uint16_t used_next;    // next entry to fill
    uint16_t used_shown;   // used.idx as last stored
    uint16_t used_decided; // used.idx at the last decision to interrupt
    uint32_t undecided;    // completions since then; more than an index tells
                           // apart are 65536
    uint64_t stalled_ns;   // when the request at the head began to wait
    uint64_t stalled_bytes; // what it costs
    bool     stalled;      // there is one
    uint32_t under_way;    // handed out, not completed
    uint8_t *desc, *avail, *used; // NULL: through the accessors
    // Any thread reads, the drainer adds.
    vblk_counts counts;
} vblk_queue;

// A device. Private, of any storage; must not move while a backend or the
// guest uses it.
typedef struct vblk_dev {
    vblk_options o; // with defaults filled in
    uint8_t      id[VBLK_ID_BYTES];
    uint64_t     offered;
    uint64_t     accepted VBLK__ATOMIC64;
    bool         event_idx, indirect, write_through; // from FEATURES_OK on
    bool         no_memory_said, legacy_said; // since the last reset
    uint32_t     device_features_sel, driver_features_sel, queue_sel;
    uint32_t     generation;
    // All drainers.
    uint64_t     backing VBLK__ATOMIC64; // atomic; bytes known to be there
    vblk_bucket  ops, bytes;
    unsigned     turn;  // 1 + the queue that stalled first; 0: none did
    // Atomics: set by any thread.
    uint32_t     yield; // 0, VBLK__YIELD or VBLK__HALT
    uint32_t     state; // Status, InterruptStatus and VBLK__LINE in one
    vblk_queue   queue[VBLK_MAX_QUEUES];
} vblk_dev;


// ---- Set-up ----------------------------------------------------------------

// Bring `dev` to the state a device has after power-on, again if need be: a
// request of before is stale then, as after a reset. `o` is copied; what
// it points to must outlive `dev`. Returns VBLK_OK or the VBLK_ERR_ of the
// first field at fault, in which case `dev` is untouched. There is nothing to
// undo at the end: the device owns nothing.
VBLKDEF int vblk_init(vblk_dev *dev, const vblk_options *o);

// Give the device its guest memory, or another: all pointers from the old one
// are forgotten, ring positions stay. No draining call and no request may be
// under way. Drain all queues afterwards. VBLK_OK, or VBLK_ERR_MEMORY, in which
// case nothing changed.
VBLKDEF int vblk_set_memory(vblk_dev *dev, vblk_memory memory);

// A sentence for a VBLK_ERR_ code, and for an event's code.
VBLKDEF const char *vblk_strerror(int err);
VBLKDEF const char *vblk_event_text(vblk_event_code code);


// ---- Registers [4.2.2] -----------------------------------------------------

// What the guest loads from `bytes` bytes (1 to 8) at byte `offset` of the
// register window, as a little-endian number. Any offset and width is safe.
// Any thread.
VBLKDEF uint64_t vblk_mmio_read(const vblk_dev *dev, uint64_t offset,
                                unsigned bytes);

// The guest stored `value` there. Any value at any offset is safe. Returns
// what to give to vblk_drain(): the queue that was notified, VBLK_ALL_QUEUES
// when the driver said DRIVER_OK or stopped a queue that others waited for,
// else VBLK_NO_QUEUE.
VBLKDEF int vblk_mmio_write(vblk_dev *dev, uint64_t offset, unsigned bytes,
                            uint64_t value);

// The level of the interrupt line: high from a firing until InterruptStatus
// reads 0. Any thread.
VBLKDEF bool vblk_interrupt_line(const vblk_dev *dev);

// Clear bits of InterruptStatus, as a write to InterruptACK does.
VBLKDEF void vblk_interrupt_ack(vblk_dev *dev, uint32_t bits);

// Ask the driver for a reset: Status shows DEVICE_NEEDS_RESET and, while the
// device is live, the configuration interrupt fires [2.1.2]. For a host that
// lost its disk. Any thread.
VBLKDEF void vblk_needs_reset(vblk_dev *dev);


// ---- Other transports: what PCI and vhost-user hosts need instead ----------

// What the device offers, and what the driver accepted. Any thread.
VBLKDEF uint64_t vblk_features(const vblk_dev *dev);
VBLKDEF uint64_t vblk_accepted(const vblk_dev *dev);

// What the driver accepts, all 64 bits. Counts from DRIVER to FEATURES_OK.
VBLKDEF void vblk_accept(vblk_dev *dev, uint64_t features);

// Status [2.1]. A write goes by the rules of the profile and returns what
// vblk_mmio_write() does; read it back to see whether it was taken.
VBLKDEF uint32_t vblk_status(const vblk_dev *dev);
VBLKDEF int vblk_set_status(vblk_dev *dev, uint32_t status);

// Copy `n` bytes of config space from byte `offset` on; past its end, zeroes.
VBLKDEF void vblk_read_config(const vblk_dev *dev, uint64_t offset, void *dst,
                              size_t n);

// A virtqueue to start: size and guest addresses as the driver gave them, and
// the position in the available ring to go on from, 0 for a new one.
typedef struct vblk_ring {
    uint32_t size;
    uint64_t desc, avail, used;
    uint16_t position;
} vblk_ring;

// Start `queue`, at any time after FEATURES_OK, in any profile. The position
// in the used ring is taken from that ring. Returns the queue, for
// vblk_drain(); or VBLK_NO_QUEUE if there is no such queue, it runs already, or
// the size is not valid. Thread: as register calls; the queue's drainer must be
// outside.
VBLKDEF int vblk_queue_start(vblk_dev *dev, int queue, const vblk_ring *ring);

// Stop it. What is under way goes stale, so wait for it first if it must not
// be lost. Returns the position to go on from. Drain the other queues then, if
// there are limits: they may have waited for it. Thread: as above.
VBLKDEF uint16_t vblk_queue_stop(vblk_dev *dev, int queue);


// ---- Requests --------------------------------------------------------------

// Do what waits in `queue` (or in VBLK_ALL_QUEUES, or nothing for
// VBLK_NO_QUEUE): take requests, call the backend, complete, publish, and
// interrupt the guest at most once per queue. Takes at most as many requests
// as the queue has entries; VBLK_MORE then means that there are more. For
// all queues the answer is the most pressing one: MORE, STALLED with the wait
// of the queue whose turn it is, BROKEN, EMPTY. Thread: the queue's drainer.
VBLKDEF vblk_outcome vblk_drain(vblk_dev *dev, int queue, uint64_t now_ns);

// Take the next request of `queue` into `req`. EMPTY: there is none, and the
// guest will notify; MORE: call again; STALLED: call again in wait_ns.
// Whenever it is not VBLK_REQUEST, completions so far are published. For one
// queue, or VBLK_NO_QUEUE, which is EMPTY; for VBLK_ALL_QUEUES ask each.
// Thread: the queue's drainer.
VBLKDEF vblk_outcome vblk_next(vblk_dev *dev, int queue, uint64_t now_ns,
                               vblk_request *req);

// Do `req` with the backend, here and now, and complete it: for a host that
// looks around between two requests, where vblk_drain() would not. Thread: the
// queue's drainer.
VBLKDEF void vblk_execute(vblk_dev *dev, const vblk_request *req);

// `req` has ended with `result`, as of read(2): the bytes that were moved, all
// for a success, 0 for a FLUSH; or a negative error number, for the event. An
// IN that is short is filled with zeroes if it came to where the backing ends,
// as it was made or written; whatever else is short is an error. False if the
// request is of an earlier driver session: nothing was touched. The guest sees
// the completion after vblk_publish(). Thread: the queue's drainer.
VBLKDEF bool vblk_complete(vblk_dev *dev, const vblk_request *req,
                           int64_t result);

// Show completions of `queue` to the guest and interrupt it if it asked for
// that [2.7.7.2, 2.7.8.2]. Thread: the queue's drainer.
VBLKDEF void vblk_publish(vblk_dev *dev, int queue);

// Copy `n` bytes at byte `at` of the request's data from guest memory, or to
// it. False if guest memory refused, or the request is of an earlier driver
// session. For any request; needed where it is not `direct`.
VBLKDEF bool vblk_get(vblk_dev *dev, const vblk_request *req, uint64_t at,
                      void *dst, size_t n);
VBLKDEF bool vblk_put(vblk_dev *dev, const vblk_request *req, uint64_t at,
                      const void *src, size_t n);

// Change the limits while the device runs. Debts and savings stay, savings up
// to the new burst; a bucket that had no limit starts full. Drain all queues
// then: a stalled one may pass. VBLK_OK or VBLK_ERR_LIMITS, in which case
// nothing changed. Thread: as a draining call of every queue.
VBLKDEF int vblk_set_limits(vblk_dev *dev, const vblk_limits *limits,
                            uint64_t now_ns);

// The counters, summed over all queues. They survive resets. Each is exact;
// together they are no snapshot while a queue is drained. Any thread.
VBLKDEF vblk_counts vblk_counters(const vblk_dev *dev);


// ---- Token bucket ----------------------------------------------------------

// Pure functions: state and time in, answer out. Any number below 2^63 is
// safe, and so is a clock that stands still or goes back: no token is gained
// then. A bucket starts full. `n` tokens pass if they are there, or if the
// bucket can never hold them and is not in debt: then it goes into debt.

VBLKDEF void vblk_bucket_init(vblk_bucket *b, uint64_t rate, uint64_t burst);

// Another rate and burst from now on, by the rules of vblk_set_limits().
VBLKDEF void vblk_bucket_change(vblk_bucket *b, uint64_t rate, uint64_t burst,
                                uint64_t now_ns);

// Credit the time that has passed, to the fraction of a token.
VBLKDEF void vblk_bucket_refill(vblk_bucket *b, uint64_t now_ns);

// After a refill at `now_ns`: whether `n` pass; take them, which must have
// been allowed; nanoseconds until they pass, rounded up, 0 if they do.
VBLKDEF bool vblk_bucket_can_take(const vblk_bucket *b, uint64_t n);
VBLKDEF void vblk_bucket_take(vblk_bucket *b, uint64_t n);
VBLKDEF uint64_t vblk_bucket_wait(const vblk_bucket *b, uint64_t n,
                                  uint64_t now_ns);


// ---- Memory and backends ---------------------------------------------------

typedef struct vblk_region {
    uint64_t gpa;
    uint64_t bytes; // at most SIZE_MAX; gpa + bytes may be 2^64, regions may
                    // touch
    void    *host;
    bool     read_only; // ROM, flash: no buffer to write to, and no used ring
} vblk_region;

// Flat RAM: a table of regions in any order. They must not overlap, which is
// not checked: one of them would win.
typedef struct vblk_ram {
    const vblk_region *region;
    unsigned           regions;
} vblk_ram;

// Accessors, map included, over `ram`, which must outlive them.
VBLKDEF vblk_memory vblk_ram_memory(const vblk_ram *ram);

// A disk in memory. A shared mapping would not be made durable by flush.
typedef struct vblk_memdisk {
    void    *data;
    uint64_t bytes;
    bool     read_only;
} vblk_memdisk;

VBLKDEF vblk_backend vblk_memdisk_backend(vblk_memdisk *disk);

#ifdef __cplusplus
}
#endif
#endif // VBLK_H


#if defined(VBLK_FILES) && !defined(VBLK_FILES_H)
#define VBLK_FILES_H
#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif


// ---- Files, locks, limiters (POSIX) ----------------------------------------

// An image file or a block device by positioned I/O and fdatasync(). Safe from
// several threads. What was there once and is not any more, because the file
// was cut or the device has gone, is an error (EIO), for each flush from then
// on too; what never was there reads as zeroes.
typedef struct vblk_file {
    int             fd;
    bool            read_only;
    int             flush_error; // after one failed fdatasync, all fail: the
                                 // kernel forgets which pages are not written
    uint64_t end VBLK__ATOMIC64; // atomic; so long it was, at its longest
    pthread_mutex_t mutex;       // of flush_error
} vblk_file;

// Open `path`. VBLK_OK or VBLK_ERR_FILE, with errno set. vblk_file_close()
// after the device's last use.
VBLKDEF int vblk_file_open(vblk_file *file, const char *path, bool read_only);

// The same for a descriptor that is open, such as a memfd or one that another
// process passed; vblk_file_close() closes it. On failure it stays yours.
// With O_DIRECT it is the guest's buffers that must be aligned. errno may be
// EACCES: not open for reading, or, unless `read_only`, for writing; EINVAL:
// O_APPEND; EISDIR; ENOTBLK: neither a file nor a block device.
VBLKDEF int vblk_file_from(vblk_file *file, int fd, bool read_only);
VBLKDEF void vblk_file_close(vblk_file *file);
VBLKDEF vblk_backend vblk_file_backend(vblk_file *file);

// A lock around a backend that is not safe from several threads: one call of
// it at a time.
typedef struct vblk_locked {
    vblk_backend    inner;
    pthread_mutex_t mutex;
} vblk_locked;

// VBLK_OK or VBLK_ERR_LOCK. vblk_locked_end() after the device's last use.
VBLKDEF int vblk_locked_init(vblk_locked *locked, vblk_backend inner);
VBLKDEF void vblk_locked_end(vblk_locked *locked);
VBLKDEF vblk_backend vblk_locked_backend(vblk_locked *locked);

// A backend whose calls wait until they fit a rate: for several devices on one
// image, or a host without a timer. The calling thread sleeps, so the device's
// own limits are better where they will do.
//
// A call takes its share, at most a tenth of a second's bytes, in the order
// of arrival, sleeps until that has come, and moves as much: large requests
// come again for the rest, behind those that arrived meanwhile. So none waits
// for ever, and a thread can be stopped between two shares.
typedef struct vblk_limiter {
    vblk_backend    inner;
    uint64_t        share;      // bytes, most of a call; whole sectors
    vblk_bucket     ops, bytes; // in debt for what is promised and to come
    struct {
        uint64_t at;            // where a request goes on that was cut
        uint64_t paid;          // bytes, of its share and not yet moved
    } rest[16];
    unsigned        rests;      // remembered so far, the old ones overwritten
    pthread_mutex_t mutex;
    uint64_t (*now)(void);      // nanoseconds, CLOCK_MONOTONIC
    void (*sleep)(uint64_t ns);
} vblk_limiter;

// A rate of 0 is no limit. A burst of 0 is steady: a tenth of a second's
// worth; unlike a device's it may be less than a second's. A read, write or
// flush is one operation. VBLK_OK, VBLK_ERR_LIMITS or VBLK_ERR_LOCK.
// vblk_limiter_end() after the last use. Safe from several threads if `inner`
// is.
VBLKDEF int vblk_limiter_init(vblk_limiter *limiter, vblk_backend inner,
                              const vblk_limits *limits);
VBLKDEF void vblk_limiter_end(vblk_limiter *limiter);
VBLKDEF vblk_backend vblk_limiter_backend(vblk_limiter *limiter);

#ifdef __cplusplus
}
#endif
#endif // VBLK_FILES


#if defined(VBLK_THREADED) && !defined(VBLK_THREADED_H)
#define VBLK_THREADED_H

#ifdef __cplusplus
extern "C" {
#endif


// ---- Worker (Linux) --------------------------------------------------------

typedef enum vblk_level {
    VBLK_LEVEL_ERROR,   // the host is to act: its disk, its memory, a thread
    VBLK_LEVEL_WARNING, // the driver did what it may not
    VBLK_LEVEL_NOTE
} vblk_level;

typedef struct vblk_worker_options {
    unsigned stop_ms; // bound on stop, reset, pause; default 1000, at most
                      // INT_MAX
    // One line of text without a newline, for a log. NULL: stderr, at most
    // some lines a second. Any thread.
    void (*log)(void *user, vblk_level level, const char *line);
    // A thread that was left behind, as a call of yours was told, has ended:
    // all it used is out of its hands, and the device can be reset, from
    // inside this call too (where that does nothing if a reset was quicker).
    // vblk_worker_end() waits for it to return. That thread; may be NULL.
    void (*released)(void *user);
    void *user; // first argument of both
} vblk_worker_options;

// A device with a thread that serves it. Of any storage; must not move.
typedef struct vblk_worker {
    vblk_dev dev;     // for queries: vblk_mmio_read(), vblk_counters(), ...
    int      irq_fd;  // eventfd, signalled to interrupt; good as a KVM irqfd
    int      kick_fd; // eventfd that starts a drain; good as a KVM ioeventfd
    int      number;  // "vblk3" is the thread's name and begins its log lines
    // Private from here.
    vblk_options        o;
    vblk_worker_options wo;
    int                 epoll_fd, stop_fd, timer_fd, pause_fd, done_fd;
    pthread_mutex_t     registers;    // one register call at a time
    struct vblk__thread *thread;      // under `registers`; NULL: not started
    struct vblk__thread *left_behind; // the same
    struct vblk__thread *returned;    // the same; a list, not joined yet
    unsigned char       any_cpu[128]; // where vblk_worker_init() ran; cpu_set_t
    // Under `parking`. `parked` is also read without.
    pthread_mutex_t     parking;
    pthread_cond_t      changed;
    bool                pause, hold; // the host asks, the library asks
    bool                orphaned;    // the one left behind disposes of all
    bool                placed;      // the thread runs on `cpu_set`
    unsigned char       cpu_set[128];
    int                 parked_fd;   // to signal, or -1
    bool                parked_told; // it was, for this pause
    uint32_t            left;        // atomic: one that was left behind lives
    uint32_t            parked;      // atomic; true also while not started
    // Under `logging`.
    pthread_mutex_t     logging;
    vblk_bucket         lines;
    uint64_t            left_out;
} vblk_worker;

// Make a device from `o`, as vblk_init() does, and what a thread needs; the
// thread itself starts when the driver says DRIVER_OK, and again after each
// reset. Without o->event, events go to the log. o->interrupt, if set, is
// called beside irq_fd. It, o->event and the log are called by the thread and
// by those that make register calls, several at once; hold no lock that they
// take around vblk_worker_ calls. The thread blocks all signals but those of a
// fault of its own (SIGBUS, SIGSEGV and the like), and runs on the processors
// that the caller of this runs on. `wo` may be NULL. VBLK_OK or a code.
VBLKDEF int vblk_worker_init(vblk_worker *w, const vblk_options *o,
                             const vblk_worker_options *wo);

// Stop the thread and free all. False: the thread is stuck, in the backend or
// on a page of guest memory that does not come, and was left behind after
// stop_ms. It will touch no ring, no guest memory of its own accord, no
// interrupt, and frees all when it comes back. Until then, until released() is
// called, `w`, what the callbacks and their `user` need, the backend above all,
// and guest memory must stay; without released(), for good.
VBLKDEF bool vblk_worker_end(vblk_worker *w);

// The processors that the thread may run on, from now on: `count` numbers, or
// none for those of vblk_worker_init(). VBLK_OK or VBLK_ERR_CPUS. That the
// kernel will not have it is logged. Any thread.
VBLKDEF int vblk_worker_set_cpus(vblk_worker *w, const int *cpus,
                                 unsigned count);

// An eventfd to signal whenever a pause has taken effect, which workers may
// share; -1: none. Any thread.
VBLKDEF void vblk_worker_set_parked_fd(vblk_worker *w, int fd);

// The guest stored `value` in the register window: kicks, starts, stops and
// resets as needed. QueueNotify and InterruptACK never wait. A Status of 0
// (and, in the standard profile, QueueReady while live) waits up to stop_ms for
// the thread, and other register calls for those. If it is stuck for longer,
// it is left behind and Status reads DEVICE_NEEDS_RESET until it has ended; the
// next reset then brings the device back. Any thread.
VBLKDEF void vblk_worker_mmio_write(vblk_worker *w, uint64_t offset,
                                    unsigned bytes, uint64_t value);

// The same as storing 0 to Status. False: the device is not usable yet, as
// above. Any thread.
VBLKDEF bool vblk_worker_reset(vblk_worker *w);

// Start a drain; harmless at any time. Any thread.
VBLKDEF void vblk_worker_kick(vblk_worker *w);

// Ask the thread to finish its request and rest, and wait for that up to
// `ms`. True: it rests, or is not started; all its writes are visible, it
// reads and writes nothing until vblk_worker_resume(). False: it will rest
// when its backend returns; or, and that at once, one that was left behind has
// not ended. vblk_worker_paused() tells. No kick is lost. Pausing twice is
// pausing, and a pause outlasts a reset: the thread of the next driver rests
// from its start. Any thread.
VBLKDEF bool vblk_worker_pause(vblk_worker *w, unsigned ms);

// True if it was paused. Any thread.
VBLKDEF bool vblk_worker_resume(vblk_worker *w);

// Whether the thread is at rest now: paused, or not started, and none is left
// behind. Any thread.
VBLKDEF bool vblk_worker_paused(const vblk_worker *w);

// vblk_set_memory() and vblk_set_limits() with the thread at rest: their codes,
// or VBLK_ERR_BUSY. Any thread.
VBLKDEF int vblk_worker_set_memory(vblk_worker *w, vblk_memory memory);
VBLKDEF int vblk_worker_set_limits(vblk_worker *w, const vblk_limits *limits);

#ifdef __cplusplus
}
#endif
#endif // VBLK_THREADED


#if defined(VBLK_IMPLEMENTATION) && !defined(VBLK_IMPLEMENTED)
#define VBLK_IMPLEMENTED


// ---- Platform ---------------------------------------------------------------

#if defined(VBLK_SINGLE_THREADED) && defined(VBLK_IMPLEMENTATION_THREADED)
#error "vblk.h: the worker needs atomics: leave out VBLK_SINGLE_THREADED"
#endif
#if defined(VBLK_MEMCPY) != defined(VBLK_MEMSET)
#error "vblk.h: define both of VBLK_MEMCPY and VBLK_MEMSET, or neither"
#endif
#ifndef VBLK_MEMCPY
#include <string.h>
#define VBLK_MEMCPY memcpy
#define VBLK_MEMSET memset
#endif
#ifndef VBLK_ASSERT
#include <assert.h>
#define VBLK_ASSERT assert
#endif

// Status, InterruptStatus, the counters and the ring indices are shared with
// threads, the guest's among them, that are running. The orders:
//
//     LOAD, STORE  relaxed: a single word that nothing else is read by
//     LOAD_ACQUIRE Status, by a drainer: with DRIVER_OK comes all that the
//                  driver set up before; what the driver polls, Status,
//                  InterruptStatus and the line: with them comes the ring
//     ACQUIRE      an index: what it covers is read after it
//     RELEASE      an index: what it covers is written before it
//     OR, CAS      both: what they announce is written before them, and what
//                  they take over is read after them
//     FENCE        full: one side's store before its load of the other's
#if defined(__GNUC__) || defined(__clang__)
typedef uint16_t __attribute__((may_alias)) vblk__shared16; // in guest memory
#else
typedef uint16_t vblk__shared16;
#endif
#if defined(VBLK_SINGLE_THREADED)
#define VBLK__LOAD(p)          (*(p))
#define VBLK__STORE(p, v)      ((void)(*(p) = (v)))
#define VBLK__LOAD_ACQUIRE(p)  (*(p))
#define VBLK__ACQUIRE(p)                                                       \
    (*(const volatile vblk__shared16 *)(const void *)(p))
#define VBLK__RELEASE(p, v)                                                    \
    ((void)(*(volatile vblk__shared16 *)(void *)(p) = (v)))
#define VBLK__OR(p, v)         ((void)(*(p) |= (v)))
#define VBLK__CAS(p, old, new) (*(p) = (new), (void)(old), true)
#define VBLK__FENCE()          ((void)0)
#define VBLK__ONCE()           ((void)0)
#elif defined(__GNUC__) || defined(__clang__)
#define VBLK__LOAD(p)     __atomic_load_n(p, __ATOMIC_RELAXED)
#define VBLK__STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#define VBLK__LOAD_ACQUIRE(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define VBLK__ACQUIRE(p)                                                       \
    __atomic_load_n((const vblk__shared16 *)(const void *)(p),                 \
                    __ATOMIC_ACQUIRE)
#define VBLK__RELEASE(p, v)                                                    \
    __atomic_store_n((vblk__shared16 *)(void *)(p), v, __ATOMIC_RELEASE)
#define VBLK__OR(p, v) ((void)__atomic_fetch_or(p, v, __ATOMIC_ACQ_REL))
#define VBLK__CAS(p, old, new)                                                 \
    __atomic_compare_exchange_n(p, &(old), new, false, __ATOMIC_ACQ_REL,       \
                                __ATOMIC_ACQUIRE)
#define VBLK__FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
// What was copied from the guest before this stays copied: the compiler may
// not fetch it again.
#define VBLK__ONCE() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#else
#error "vblk.h: no atomics for this compiler; define VBLK_SINGLE_THREADED"
#endif


// ---- Wire: little-endian loads and stores, layouts --------------------------

#define VBLK__DESC_NEXT     1u
#define VBLK__DESC_WRITE    2u
#define VBLK__DESC_INDIRECT 4u
#define VBLK__DESC_BYTES    16u
#define VBLK__USED_BYTES    8u
#define VBLK__HEADER_BYTES  16u
#define VBLK__CONFIG_BYTES  36u
#define VBLK__NO_NOTIFY     1u
#define VBLK__NO_INTERRUPT  1u

static inline uint16_t vblk__get16(const uint8_t *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t vblk__get32(const uint8_t *p) {
    return vblk__get16(p) | (uint32_t)vblk__get16(p + 2) << 16;
}

static inline uint64_t vblk__get64(const uint8_t *p) {
    return vblk__get32(p) | (uint64_t)vblk__get32(p + 4) << 32;
}

static inline void vblk__put(uint8_t *p, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        p[i] = (uint8_t)(value >> 8 * i);
    }
}

// A 16-bit word as it lies in memory, little-endian, from and to the host's.
static inline uint16_t vblk__le16(uint16_t value) {
    uint8_t b[2];
    VBLK_MEMCPY(b, &value, 2);
    return vblk__get16(b);
}

// The first bytes of an area of `n` at `gpa` may not be past 2^64.
static inline bool vblk__wraps(uint64_t gpa, uint64_t n) {
    return n > 0 && n - 1 > UINT64_MAX - gpa;
}


// ---- Memory: where addresses become pointers --------------------------------

static inline uint8_t *vblk__map(vblk_dev *dev, uint64_t gpa, uint64_t *n,
                                 bool writable) {
    const vblk_memory *m = &dev->o.memory;
    return (uint8_t *)m->map(m->user, gpa, n, writable);
}

// A pointer to all of [gpa, gpa + n), or NULL.
static inline uint8_t *vblk__whole(vblk_dev *dev, uint64_t gpa, uint64_t n,
                                   bool writable) {
    uint64_t run = n;
    if (!dev->o.memory.map) {
        return NULL;
    }
    uint8_t *p = vblk__map(dev, gpa, &run, writable);
    return run >= n ? p : NULL;
}

static bool vblk__read(vblk_dev *dev, uint64_t gpa, void *dst, uint64_t n) {
    const vblk_memory *m = &dev->o.memory;
    return m->read && !vblk__wraps(gpa, n) &&
           m->read(m->user, gpa, dst, n) == 0;
}

static bool vblk__write(vblk_dev *dev, uint64_t gpa, const void *src,
                        uint64_t n) {
    const vblk_memory *m = &dev->o.memory;
    return m->write && !vblk__wraps(gpa, n) &&
           m->write(m->user, gpa, src, n) == 0;
}

// Sixteen bytes, each read once: a descriptor or a header.
static inline bool vblk__fetch16(vblk_dev *dev, const uint8_t *ptr,
                                 uint64_t gpa, uint8_t *dst) {
    bool ok = true;
    if (ptr) {
        VBLK_MEMCPY(dst, ptr, 16);
    } else {
        ok = vblk__read(dev, gpa, dst, 16);
    }
    VBLK__ONCE();
    return ok;
}

// What a drain is asked for: to end after the request it is at; or, coming
// back from where it was stuck, to write nothing more to the guest.
enum { VBLK__YIELD = 1, VBLK__HALT };

static inline bool vblk__halted(const vblk_dev *dev) {
    return VBLK__LOAD(&dev->yield) == VBLK__HALT;
}

// Ring words. `ptr` is the start of the area or NULL, `gpa` its address. An
// index is loaded with acquire: what it covers is read after it. It is stored
// with release: what it covers is visible before it.
static inline bool vblk__load16(vblk_dev *dev, const uint8_t *ptr,
                                uint64_t gpa, uint64_t at, uint16_t *value) {
    uint16_t le;
    if (ptr) {
        le = VBLK__ACQUIRE(ptr + at);
    } else {
        if (!vblk__read(dev, gpa + at, &le, 2)) {
            return false;
        }
        VBLK__FENCE();
    }
    *value = vblk__le16(le);
    return true;
}

static inline bool vblk__store16(vblk_dev *dev, uint8_t *ptr, uint64_t gpa,
                                 uint64_t at, uint16_t value) {
    uint16_t le = vblk__le16(value);
    if (vblk__halted(dev)) {
        return true;
    }
    if (ptr) {
        VBLK__RELEASE(ptr + at, le);
        return true;
    }
    VBLK__FENCE();
    return vblk__write(dev, gpa + at, &le, 2);
}

static void *vblk__ram_map(void *user, uint64_t gpa, uint64_t *n,
                           bool writable) {
    const vblk_ram *ram = (const vblk_ram *)user;
    for (unsigned i = 0; i < ram->regions; i++) {
        const vblk_region *r = &ram->region[i];
        uint64_t at = gpa - r->gpa;
        if (gpa >= r->gpa && at < r->bytes && !(writable && r->read_only)) {
            *n = *n < r->bytes - at ? *n : r->bytes - at;
            return (uint8_t *)r->host + at;
        }
    }
    return NULL;
}

// All or nothing: the whole range is looked up before a byte moves.
static bool vblk__ram_has(void *user, uint64_t gpa, uint64_t n,
                          bool writable) {
    for (uint64_t run; n > 0; gpa += run, n -= run) {
        run = n;
        if (!vblk__ram_map(user, gpa, &run, writable)) {
            return false;
        }
    }
    return true;
}

// Ring indices are single accesses.
static bool vblk__ram_word(const uint8_t *p, uint64_t n) {
    return n == 2 && ((uintptr_t)p & 1) == 0;
}

static int vblk__ram_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    uint8_t *to = (uint8_t *)dst;
    if (!vblk__ram_has(user, gpa, n, false)) {
        return -1;
    }
    for (uint64_t run; dst && n > 0; gpa += run, to += run, n -= run) {
        run = n;
        uint8_t *p = (uint8_t *)vblk__ram_map(user, gpa, &run, false);
        if (vblk__ram_word(p, run)) {
            uint16_t word = VBLK__ACQUIRE(p);
            VBLK_MEMCPY(to, &word, 2);
        } else {
            VBLK_MEMCPY(to, p, (size_t)run);
        }
    }
    return 0;
}

static int vblk__ram_write(void *user, uint64_t gpa, const void *src,
                           uint64_t n) {
    const uint8_t *from = (const uint8_t *)src;
    if (!vblk__ram_has(user, gpa, n, true)) {
        return -1;
    }
    for (uint64_t run; src && n > 0; gpa += run, from += run, n -= run) {
        run = n;
        uint8_t *p = (uint8_t *)vblk__ram_map(user, gpa, &run, true);
        if (vblk__ram_word(p, run)) {
            uint16_t word;
            VBLK_MEMCPY(&word, from, 2);
            VBLK__RELEASE(p, word);
        } else {
            VBLK_MEMCPY(p, from, (size_t)run);
        }
    }
    return 0;
}


// ---- Events, counters, interrupts -------------------------------------------

// dev->state: Status, the bits of InterruptStatus and whether the line is high,
// in one word, so that they change in one step and a reset leaves nothing of
// what came before it.
#define VBLK__STATUS       0xffu
#define VBLK__INTERRUPT(b) ((uint32_t)(b) << 8)
#define VBLK__INTERRUPTS   VBLK__INTERRUPT(0xff)
#define VBLK__LINE         0x80000000u

static inline bool vblk__has_status(const vblk_dev *dev, uint32_t bit) {
    return (VBLK__LOAD(&dev->state) & bit) != 0;
}

static void vblk__say(const vblk_dev *dev, int queue, vblk_event_code code,
                      uint16_t head, uint64_t a, uint64_t b) {
    if (dev->o.event) {
        vblk_event event = {code, queue, head, a, b};
        dev->o.event(dev->o.user, &event);
    }
}

static int vblk__index(const vblk_dev *dev, const vblk_queue *q) {
    return (int)(q - dev->queue);
}

static void vblk__tell(vblk_dev *dev, const vblk_queue *q,
                       vblk_event_code code, uint16_t head, uint64_t a,
                       uint64_t b) {
    vblk__say(dev, vblk__index(dev, q), code, head, a, b);
}

// One writer, the queue's drainer, so that no locked instruction is needed.
static inline void vblk__count(uint64_t *counter, uint64_t n) {
    VBLK__STORE(counter, VBLK__LOAD(counter) + n);
}

// How far something is known to reach; any thread.
static void vblk__raise_to(uint64_t *reach, uint64_t end) {
    uint64_t old = VBLK__LOAD(reach);
    while (end > old && !VBLK__CAS(reach, old, end)) {
    }
}

// Used buffers: the bit and the line in one step, after what they announce
// (release), then the interrupt. Bits that are set need not be set again: as
// there is a full barrier between the used index and here, an acknowledgement
// that clears them is yet to come, and the driver looks after it.
static void vblk__raise(vblk_dev *dev, int queue, bool fire) {
    uint32_t set = VBLK__INTERRUPT(VBLK_INTERRUPT_USED);
    set |= fire ? VBLK__LINE : 0;
    if ((VBLK__LOAD(&dev->state) & set) != set) {
        VBLK__OR(&dev->state, set);
    }
    if (fire && dev->o.interrupt) {
        dev->o.interrupt(dev->o.user, queue, true);
    }
}

// Status and, on a live device, the configuration interrupt, in one step. A
// DRIVER_OK that comes later is refused.
static void vblk__ask_reset(vblk_dev *dev) {
    uint32_t old = VBLK__LOAD(&dev->state), set;
    do {
        set = VBLK_STATUS_NEEDS_RESET;
        if (old & VBLK_STATUS_DRIVER_OK) {
            set |= VBLK__INTERRUPT(VBLK_INTERRUPT_CONFIG) | VBLK__LINE;
        }
    } while (!VBLK__CAS(&dev->state, old, old | set));
    if (set & VBLK__LINE && dev->o.interrupt) {
        dev->o.interrupt(dev->o.user, VBLK_NO_QUEUE, true);
    }
}

// All of the state but `keep` of it goes, and `set` comes.
static void vblk__change_state(vblk_dev *dev, uint32_t keep, uint32_t set) {
    uint32_t old = VBLK__LOAD(&dev->state), now;
    do {
        now = (old & keep) | set;
        now &= now & VBLK__INTERRUPTS ? ~0u : ~VBLK__LINE;
    } while (!VBLK__CAS(&dev->state, old, now));
    // Either the drainer sees the bits cleared and sets them again, or the
    // driver, which looks at the ring after this, sees what it completed.
    VBLK__FENCE();
    if (old & ~now & VBLK__INTERRUPTS && !(now & VBLK__INTERRUPTS) &&
        dev->o.interrupt) {
        dev->o.interrupt(dev->o.user, VBLK_NO_QUEUE, false);
    }
}

// `q` had its turn, or gives it up: it goes to the next queue that waits.
static void vblk__end_turn(vblk_dev *dev, const vblk_queue *q) {
    unsigned me = (unsigned)vblk__index(dev, q);
    if (dev->turn == 1 + me) {
        dev->turn = 0;
        for (unsigned i = 1; i < dev->o.queues && !dev->turn; i++) {
            unsigned next = (me + i) % dev->o.queues;
            dev->turn = dev->queue[next].stalled ? 1 + next : 0;
        }
    }
}

// The head has passed, or, at a time of 0, never will.
static void vblk__end_stall(vblk_dev *dev, vblk_queue *q, uint64_t now_ns) {
    vblk__end_turn(dev, q);
    if (now_ns > q->stalled_ns) {
        vblk__count(&q->counts.throttled_ns, now_ns - q->stalled_ns);
    }
    q->stalled = false;
    VBLK__STORE(&q->counts.currently_throttled, 0);
}

// What is under way in a broken queue ends with it, and so does its stall: no
// other queue waits for it.
static void vblk__poison(vblk_dev *dev, vblk_queue *q, vblk_event_code code,
                         uint64_t a, uint64_t b) {
    if (q->poisoned) {
        return;
    }
    q->poisoned = true;
    q->epoch++;
    q->under_way = 0;
    vblk__end_stall(dev, q, 0);
    vblk__count(&q->counts.invalid_avail_idx, 1);
    vblk__tell(dev, q, code, 0, a, b);
    vblk__ask_reset(dev);
}


// ---- Bucket: integers in, integers out --------------------------------------

#define VBLK__SECOND UINT64_C(1000000000) // nanoseconds

typedef struct vblk__wide { // 128 bits
    uint64_t hi, lo;
} vblk__wide;

static vblk__wide vblk__multiply(uint64_t a, uint64_t b) {
    uint64_t al = (uint32_t)a, ah = a >> 32;
    uint64_t bl = (uint32_t)b, bh = b >> 32;
    uint64_t middle = (al * bl >> 32) + (uint32_t)(al * bh) +
                      (uint32_t)(ah * bl);
    vblk__wide w = {ah * bh + (al * bh >> 32) + (ah * bl >> 32) +
                        (middle >> 32),
                    a * b};
    return w;
}

// w / d, UINT64_MAX if it is more than that, and the remainder.
static uint64_t vblk__divide(vblk__wide w, uint64_t d, uint64_t *remainder) {
    uint64_t quotient = 0;
    *remainder = 0;
    if (w.hi == 0) {
        *remainder = w.lo % d;
        return w.lo / d;
    }
    if (w.hi >= d) {
        return UINT64_MAX;
    }
    for (int bit = 63; bit >= 0; bit--) { // w.hi < d: the quotient fits
        bool carry = w.hi >> 63;
        w.hi = w.hi << 1 | (w.lo >> bit & 1);
        quotient <<= 1;
        if (carry || w.hi >= d) {
            w.hi -= d;
            quotient |= 1;
        }
    }
    *remainder = w.hi;
    return quotient;
}

VBLKDEF void vblk_bucket_init(vblk_bucket *b, uint64_t rate, uint64_t burst) {
    b->rate = rate;
    b->burst = burst;
    b->tokens = (int64_t)burst;
    b->fraction = 0;
    b->last_ns = 0;
}

VBLKDEF void vblk_bucket_refill(vblk_bucket *b, uint64_t now_ns) {
    if (b->rate == 0 || now_ns <= b->last_ns) {
        return;
    }
    vblk__wide gained = vblk__multiply(now_ns - b->last_ns, b->rate);
    gained.lo += b->fraction;
    gained.hi += gained.lo < b->fraction;
    uint64_t tokens = vblk__divide(gained, VBLK__SECOND, &b->fraction);
    if (tokens >= b->burst - (uint64_t)b->tokens) {
        b->tokens = (int64_t)b->burst;
        b->fraction = 0;
    } else {
        b->tokens = (int64_t)((uint64_t)b->tokens + tokens);
    }
    b->last_ns = now_ns;
}

VBLKDEF void vblk_bucket_change(vblk_bucket *b, uint64_t rate, uint64_t burst,
                                uint64_t now_ns) {
    vblk_bucket was = *b;
    vblk_bucket_refill(&was, now_ns);
    vblk_bucket_init(b, rate, burst);
    b->last_ns = now_ns > was.last_ns ? now_ns : was.last_ns;
    if (was.rate && was.tokens < b->tokens) {
        b->tokens = was.tokens;
        b->fraction = was.fraction;
    }
}

// The balance that lets `n` pass.
static int64_t vblk__bucket_needs(const vblk_bucket *b, uint64_t n) {
    return n > b->burst ? 0 : (int64_t)n;
}

VBLKDEF bool vblk_bucket_can_take(const vblk_bucket *b, uint64_t n) {
    return b->rate == 0 || n == 0 || b->tokens >= vblk__bucket_needs(b, n);
}

VBLKDEF void vblk_bucket_take(vblk_bucket *b, uint64_t n) {
    b->tokens -= b->rate ? (int64_t)n : 0;
}

VBLKDEF uint64_t vblk_bucket_wait(const vblk_bucket *b, uint64_t n,
                                  uint64_t now_ns) {
    uint64_t left, wait, lag;
    if (vblk_bucket_can_take(b, n)) {
        return 0;
    }
    uint64_t missing = (uint64_t)vblk__bucket_needs(b, n) -
                       (uint64_t)b->tokens;
    vblk__wide needed = vblk__multiply(missing, VBLK__SECOND);
    needed.hi -= needed.lo < b->fraction;
    needed.lo -= b->fraction;
    wait = vblk__divide(needed, b->rate, &left);
    wait += left > 0 && wait < UINT64_MAX;
    lag = b->last_ns > now_ns ? b->last_ns - now_ns : 0; // the clock went back
    return wait < UINT64_MAX - lag ? wait + lag : UINT64_MAX;
}


// ---- Queue: take a chain, give it back, publish, switch notifications -------

// Offsets in the rings [2.7.6, 2.7.8].
static uint64_t vblk__avail_bytes(const vblk_queue *q) {
    return 6 + 2 * (uint64_t)q->size;
}

static uint64_t vblk__used_bytes(const vblk_queue *q) {
    return 6 + VBLK__USED_BYTES * (uint64_t)q->size;
}

// Look at a queue for the first time since DRIVER_OK, or since the memory
// changed. A ring without a pointer, be it outside guest memory or across a
// seam of it, is left to the accessors.
static bool vblk__resolve(vblk_dev *dev, vblk_queue *q) {
    uint64_t desc_bytes = VBLK__DESC_BYTES * (uint64_t)q->size;
    if (q->size == 0) {
        vblk__poison(dev, q, VBLK_EV_RING_SIZE, 0, 0);
        return false;
    }
    if (q->desc_gpa % 16 || vblk__wraps(q->desc_gpa, desc_bytes)) {
        vblk__poison(dev, q, VBLK_EV_RING_PLACE, q->desc_gpa, 0);
        return false;
    }
    if (q->avail_gpa % 2 || vblk__wraps(q->avail_gpa, vblk__avail_bytes(q))) {
        vblk__poison(dev, q, VBLK_EV_RING_PLACE, q->avail_gpa, 0);
        return false;
    }
    if (q->used_gpa % 4 || vblk__wraps(q->used_gpa, vblk__used_bytes(q))) {
        vblk__poison(dev, q, VBLK_EV_RING_PLACE, q->used_gpa, 0);
        return false;
    }
    q->desc = vblk__whole(dev, q->desc_gpa, desc_bytes, false);
    q->avail = vblk__whole(dev, q->avail_gpa, vblk__avail_bytes(q), false);
    q->used = vblk__whole(dev, q->used_gpa, vblk__used_bytes(q), true);
    if ((uintptr_t)q->avail & 1) {
        q->avail = NULL;
    }
    if ((uintptr_t)q->used & 1) {
        q->used = NULL;
    }
    q->resolved = true;
    q->notify_off = true; // whatever the driver left there [2.7.10.2]
    if (q->adopt_used) {
        if (!vblk__load16(dev, q->used, q->used_gpa, 2, &q->used_next)) {
            vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + 2, 0);
            return false;
        }
        q->used_shown = q->used_decided = q->used_next;
        q->adopt_used = false;
    }
    return true;
}

// EMPTY, MORE (there is an entry) or BROKEN.
static vblk_state vblk__peek(vblk_dev *dev, vblk_queue *q) {
    uint16_t idx;
    if (q->poisoned) {
        return VBLK_BROKEN;
    }
    if (q->avail_next != q->avail_seen) {
        return VBLK_MORE;
    }
    if (!vblk__load16(dev, q->avail, q->avail_gpa, 2, &idx)) {
        vblk__poison(dev, q, VBLK_EV_AVAIL_UNREADABLE, q->avail_gpa, 0);
        return VBLK_BROKEN;
    }
    if ((uint16_t)(idx - q->avail_next) > q->size) {
        vblk__poison(dev, q, VBLK_EV_AVAIL_JUMP, idx, q->avail_next);
        return VBLK_BROKEN;
    }
    q->avail_seen = idx;
    return idx == q->avail_next ? VBLK_EMPTY : VBLK_MORE;
}

// Notifications off: a hint, so a failure does not matter. With EVENT_IDX
// they are off by themselves once avail_event is passed [2.7.10].
static void vblk__notify_off(vblk_dev *dev, vblk_queue *q) {
    if (!dev->event_idx && !q->notify_off) {
        vblk__store16(dev, q->used, q->used_gpa, 0, VBLK__NO_NOTIFY);
        q->notify_off = true;
    }
}

// Let the driver see what is completed.
static void vblk__show(vblk_dev *dev, vblk_queue *q) {
    if (q->used_next != q->used_shown) {
        if (!vblk__store16(dev, q->used, q->used_gpa, 2, q->used_next)) {
            vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + 2, 0);
        }
        q->used_shown = q->used_next;
    }
}

// Notifications on for whatever comes after avail_seen, and completions out,
// with one full barrier for both. avail.idx must be looked at again after it:
// either the driver sees the switch, or the device sees its entry.
static bool vblk__notify_on(vblk_dev *dev, vblk_queue *q) {
    bool ok = true;
    vblk__show(dev, q);
    if (q->notify_off) {
        ok = vblk__store16(dev, q->used, q->used_gpa, 0, 0);
        q->notify_off = !ok;
    }
    if (ok && dev->event_idx) {
        ok = vblk__store16(dev, q->used, q->used_gpa,
                           vblk__used_bytes(q) - 2, q->avail_seen);
    }
    if (!ok && !q->switch_failed) {
        vblk__tell(dev, q, VBLK_EV_NOTIFY_SWITCH, 0, q->used_gpa, 0);
    }
    q->switch_failed = !ok;
    VBLK__FENCE();
    return ok;
}

// After vblk__peek() said MORE.
static bool vblk__take(vblk_dev *dev, vblk_queue *q, uint16_t *head) {
    uint64_t at = 4 + 2 * (uint64_t)(q->avail_next & (q->size - 1));
    if (!vblk__load16(dev, q->avail, q->avail_gpa, at, head)) {
        vblk__poison(dev, q, VBLK_EV_AVAIL_UNREADABLE, q->avail_gpa + at, 0);
        return false;
    }
    if (*head >= q->size) {
        vblk__poison(dev, q, VBLK_EV_HEAD_RANGE, *head, 0);
        return false;
    }
    q->avail_next++;
    return true;
}

static bool vblk__give_back(vblk_dev *dev, vblk_queue *q, uint16_t head,
                            uint32_t written) {
    uint64_t at = 4 + VBLK__USED_BYTES *
                          (uint64_t)(q->used_next & (q->size - 1));
    uint8_t element[VBLK__USED_BYTES];
    if (vblk__halted(dev)) {
        return false;
    }
    vblk__put(element, head, 4);
    vblk__put(element + 4, written, 4);
    if (q->used) {
        VBLK_MEMCPY(q->used + at, element, sizeof element);
    } else if (!vblk__write(dev, q->used_gpa + at, element, sizeof element)) {
        vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + at, 0);
        return false;
    }
    q->used_next++;
    q->undecided += q->undecided <= UINT16_MAX;
    return true;
}

// Whether the indices from `old` up to but not including `now` hold `event`.
static inline bool vblk__crosses(uint16_t event, uint16_t now, uint16_t old) {
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

// Whether the driver asked for an interrupt since used.idx was `old`
// [2.7.7.2]; yes when it cannot be read.
static bool vblk__wanted(vblk_dev *dev, vblk_queue *q, uint16_t old) {
    uint16_t word;
    if (dev->event_idx) {
        return q->undecided > UINT16_MAX || // once round, past any event
               !vblk__load16(dev, q->avail, q->avail_gpa,
                             vblk__avail_bytes(q) - 2, &word) ||
               vblk__crosses(word, q->used_shown, old);
    }
    return !vblk__load16(dev, q->avail, q->avail_gpa, 0, &word) ||
           !(word & VBLK__NO_INTERRUPT);
}

static void vblk__publish(vblk_dev *dev, vblk_queue *q) {
    uint16_t old = q->used_decided;
    if (vblk__halted(dev)) {
        return;
    }
    if (q->used_next != q->used_shown) {
        vblk__show(dev, q);
        // Either the driver sees the new index when it switches interrupts
        // on, or the device sees the switch.
        VBLK__FENCE();
    }
    if (q->undecided == 0) {
        return;
    }
    q->used_decided = q->used_shown;
    bool fire = vblk__wanted(dev, q, old) || q->switch_failed;
    q->undecided = 0;
    if (fire || dev->o.profile == VBLK_STRICT) { // P7
        vblk__raise(dev, vblk__index(dev, q), fire);
    }
}


// ---- Chain: descriptors to a list -------------------------------------------

#define VBLK__MAX_DESCS (VBLK_MAX_SEGS + 2)
#define VBLK__MAX_WALK  32768u // entries of the largest queue

typedef struct vblk__desc {
    uint64_t gpa;
    uint32_t n;
} vblk__desc;

// A chain as it was read, each descriptor once. Empty descriptors are not in
// the list.
typedef struct vblk__chain {
    unsigned descs;      // read so far, the empty ones too
    unsigned first;      // d[first] to d[count - 1] is what is left of it
    unsigned count;
    vblk_event_code code; // it has an end, and is refused all the same (P5)
    vblk__desc end;      // the last writable one
    bool     first_ok;   // the first descriptor holds a header
    bool     last_ok;    // the last descriptor holds a status byte
    bool     mixed;      // a readable one after a writable one
    uint64_t out_bytes;  // in all readable ones
    uint64_t in_bytes;   // in all writable ones
    uint64_t status_gpa;
    vblk__desc d[VBLK__MAX_DESCS];
} vblk__chain;

// A descriptor table: the queue's own, or an indirect one.
typedef struct vblk__table {
    uint8_t *ptr; // or NULL
    uint64_t gpa;
    uint32_t entries;
    uint32_t taken; // so far: a chain has each entry once
    bool     indirect;
} vblk__table;

static void vblk__append(vblk__chain *c, uint64_t gpa, uint32_t n,
                         bool write) {
    if (c->descs++ == 0) {
        c->first_ok = !write && n >= VBLK__HEADER_BYTES;
    }
    c->last_ok = write && n > 0;
    if (n == 0) {
        return;
    }
    vblk__desc d = {gpa, n};
    if (write) {
        c->in_bytes += n;
        c->end = d;
    } else {
        c->mixed = c->mixed || c->in_bytes > 0;
        c->out_bytes += n;
    }
    if (!c->code) {
        c->d[c->count++] = d;
    }
}

// Go from `t` to the indirect table at `gpa` [2.7.5.3].
static bool vblk__enter(vblk_dev *dev, vblk_queue *q, uint16_t head,
                        vblk__table *t, uint64_t gpa, uint32_t n,
                        unsigned flags) {
    vblk_event_code code = VBLK_EV_NONE;
    if (!dev->indirect) {
        code = VBLK_EV_INDIRECT_OFF;
    } else if (t->indirect) {
        code = VBLK_EV_INDIRECT_NESTED;
    } else if (flags & VBLK__DESC_NEXT) {
        code = VBLK_EV_INDIRECT_NEXT;
    } else if (n == 0 || n % VBLK__DESC_BYTES) {
        code = VBLK_EV_INDIRECT_SIZE;
    } else if (vblk__wraps(gpa, n)) {
        code = VBLK_EV_CHAIN_UNREADABLE;
    }
    if (code) {
        uint64_t a = code == VBLK_EV_CHAIN_UNREADABLE ? gpa : n;
        vblk__tell(dev, q, code, head, a, 0);
        return false;
    }
    t->ptr = vblk__whole(dev, gpa, n, false);
    t->gpa = gpa;
    t->entries = n / VBLK__DESC_BYTES;
    t->taken = 0;
    t->indirect = true;
    return true;
}

// Follow the chain from `head`: at most seg_max + 2 descriptors, and at most
// as many of a table as it has, whatever the guest writes there meanwhile. In
// the standard profile the end of one that is too long is looked for, as far
// as any queue could hold it, and not kept.
static bool vblk__walk(vblk_dev *dev, vblk_queue *q, uint16_t head,
                       vblk__chain *c) {
    vblk__table t = {q->desc, q->desc_gpa, q->size, 0, false};
    unsigned limit = dev->o.seg_max + 2;
    uint32_t i = head;
    for (;;) {
        uint8_t d[VBLK__DESC_BYTES];
        uint64_t at = VBLK__DESC_BYTES * (uint64_t)i;
        if (i >= t.entries) {
            vblk__tell(dev, q, VBLK_EV_CHAIN_NEXT, head, i, t.entries);
            return false;
        }
        if (c->descs == limit) {
            c->code = VBLK_EV_CHAIN_LONG;
        }
        if (t.taken++ == t.entries || c->descs == VBLK__MAX_WALK ||
            (c->code && dev->o.profile == VBLK_STRICT)) {
            vblk__tell(dev, q, VBLK_EV_CHAIN_LONG, head,
                       c->code ? limit : t.entries, 0);
            return false;
        }
        if (!vblk__fetch16(dev, t.ptr ? t.ptr + at : NULL, t.gpa + at, d)) {
            vblk__tell(dev, q, VBLK_EV_CHAIN_UNREADABLE, head, t.gpa + at, 0);
            return false;
        }
        uint64_t gpa = vblk__get64(d);
        uint32_t n = vblk__get32(d + 8);
        unsigned flags = vblk__get16(d + 12);
        if (flags & VBLK__DESC_INDIRECT) {
            if (!vblk__enter(dev, q, head, &t, gpa, n, flags)) {
                return false;
            }
            i = 0;
            continue;
        }
        vblk__append(c, gpa, n, (flags & VBLK__DESC_WRITE) != 0);
        if (!(flags & VBLK__DESC_NEXT)) {
            return true;
        }
        i = vblk__get16(d + 14);
    }
}

// Find the status byte and take its descriptor off the list (V2, P1).
static vblk_event_code vblk__cut_status(const vblk_dev *dev, vblk__chain *c) {
    bool strict = dev->o.profile == VBLK_STRICT;
    if (c->in_bytes == 0) {
        return VBLK_EV_STATUS_MISSING;
    }
    if (strict && (!c->last_ok || c->descs == 1)) {
        return c->mixed ? VBLK_EV_CHAIN_ORDER : VBLK_EV_STATUS_FRAMING;
    }
    if (vblk__wraps(c->end.gpa, c->end.n)) {
        return VBLK_EV_STATUS_WRAPS;
    }
    c->status_gpa = c->end.gpa + (c->end.n - 1);
    if (!strict && c->mixed && !c->code) {
        c->code = VBLK_EV_CHAIN_ORDER;
    }
    if (c->code) {
        c->in_bytes--;
        return VBLK_EV_NONE;
    }
    vblk__desc *last = &c->d[c->count - 1];
    uint32_t cut = strict ? last->n : 1; // V15
    c->in_bytes -= cut;
    last->n -= cut;
    c->count -= last->n == 0;
    return VBLK_EV_NONE;
}

// Read the header and take its bytes off the list (V3, V4, P1).
static vblk_event_code vblk__cut_header(vblk_dev *dev, vblk__chain *c,
                                        uint8_t *header) {
    bool strict = dev->o.profile == VBLK_STRICT;
    uint32_t got = 0;
    if (strict && !c->first_ok) {
        return c->mixed || c->out_bytes < VBLK__HEADER_BYTES
                   ? VBLK_EV_HEADER_SHORT
                   : VBLK_EV_HEADER_FRAMING;
    }
    if (c->out_bytes < VBLK__HEADER_BYTES) {
        return VBLK_EV_HEADER_SHORT;
    }
    while (got < VBLK__HEADER_BYTES) {
        vblk__desc *d = &c->d[c->first];
        uint32_t n = VBLK__HEADER_BYTES - got;
        n = d->n < n ? d->n : n;
        if (vblk__wraps(d->gpa, d->n)) {
            return VBLK_EV_HEADER_UNREADABLE;
        }
        uint8_t *p = vblk__whole(dev, d->gpa, n, false);
        if (p && n == VBLK__HEADER_BYTES) {
            vblk__fetch16(dev, p, 0, header);
        } else if (!vblk__read(dev, d->gpa, header + got, n)) {
            return VBLK_EV_HEADER_UNREADABLE;
        }
        got += n;
        n = strict ? d->n : n;
        c->out_bytes -= n;
        d->gpa += n;
        d->n -= n;
        c->first += d->n == 0;
    }
    return VBLK_EV_NONE;
}


// ---- Request: list to validated request -------------------------------------

// Of the type: an order among requests, which old drivers ask for unasked.
#define VBLK__T_BARRIER 0x80000000u

enum { VBLK__NO_DATA, VBLK__DATA_IN, VBLK__DATA_OUT };

static const struct vblk__kind {
    uint32_t type;
    uint8_t  data;    // direction
    bool     sectors; // a range of the disk
    uint64_t feature; // that must be offered
} vblk__kinds[] = {
    {VBLK_T_IN, VBLK__DATA_IN, true, 0},
    {VBLK_T_OUT, VBLK__DATA_OUT, true, 0},
    {VBLK_T_FLUSH, VBLK__NO_DATA, false, VBLK_F_FLUSH},
    {VBLK_T_GET_ID, VBLK__DATA_IN, false, 0},
};

static const struct vblk__kind *vblk__kind_of(const vblk_dev *dev,
                                              uint32_t type) {
    for (size_t i = 0; i < sizeof vblk__kinds / sizeof vblk__kinds[0]; i++) {
        const struct vblk__kind *k = &vblk__kinds[i];
        bool offered = (dev->offered & k->feature) == k->feature;
        bool harmless = k->data == VBLK__NO_DATA && dev->o.read_only; // V10
        if (k->type == type && (offered || harmless)) {
            return k;
        }
    }
    return NULL;
}

// What a refusal's event says beside its code.
typedef struct vblk__why {
    vblk_event_code code;
    uint64_t        a, b;
} vblk__why;

static vblk__why vblk__because(vblk_event_code code, uint64_t a, uint64_t b) {
    vblk__why why = {code, a, b};
    return why;
}

static vblk__why vblk__check_sizes(const vblk_dev *dev, const vblk__chain *c) {
    bool binds = (dev->accepted & VBLK_F_SIZE_MAX) != 0;
    bool offered = (dev->offered & VBLK_F_SIZE_MAX) != 0;
    if (!binds && (!offered || dev->o.profile == VBLK_STANDARD)) { // P3
        return vblk__because(VBLK_EV_NONE, 0, 0);
    }
    for (unsigned i = c->first; i < c->count; i++) {
        if (c->d[i].n > dev->o.size_max) {
            return vblk__because(binds ? VBLK_EV_SEGMENT_LONG
                                       : VBLK_EV_SEGMENT_LONG_STRICT,
                                 c->d[i].n, dev->o.size_max);
        }
    }
    return vblk__because(VBLK_EV_NONE, 0, 0);
}

// V5 to V9, V12, V13, V16, in the order of a reader's questions: is it the
// right data, is there enough, may it, is it on the disk.
static vblk__why vblk__check(const vblk_dev *dev, const vblk__chain *c,
                             const struct vblk__kind *k, uint64_t sector) {
    bool strict = dev->o.profile == VBLK_STRICT;
    uint64_t bytes = c->in_bytes + c->out_bytes;
    if (k->data == VBLK__NO_DATA) {
        if (strict && bytes > 0) {
            return vblk__because(VBLK_EV_DATA_UNWANTED, bytes, 0);
        }
        return vblk__because(VBLK_EV_NONE, 0, 0);
    }
    vblk__why why = vblk__check_sizes(dev, c);
    if (why.code) {
        return why;
    }
    if (k->data == VBLK__DATA_IN ? c->out_bytes : c->in_bytes) {
        return vblk__because(VBLK_EV_DATA_DIRECTION, k->type, 0);
    }
    if (strict && bytes == 0) {
        return vblk__because(VBLK_EV_DATA_MISSING, k->type, 0);
    }
    if (!k->sectors) {
        if (strict && c->d[c->first].n < VBLK_ID_BYTES) {
            return vblk__because(VBLK_EV_ID_SHORT, c->d[c->first].n, 0);
        }
        return vblk__because(VBLK_EV_NONE, 0, 0);
    }
    if (bytes % VBLK_SECTOR) {
        return vblk__because(VBLK_EV_DATA_RAGGED, bytes, 0);
    }
    if (k->type == VBLK_T_OUT && dev->o.read_only) {
        return vblk__because(VBLK_EV_READ_ONLY, sector, 0);
    }
    if (sector > dev->o.capacity ||
        bytes / VBLK_SECTOR > dev->o.capacity - sector) {
        return vblk__because(VBLK_EV_OUT_OF_RANGE, sector, bytes);
    }
    if (bytes >= UINT32_MAX) {
        return vblk__because(VBLK_EV_DATA_LONG, bytes, 0);
    }
    return vblk__because(VBLK_EV_NONE, 0, 0);
}

static void vblk__add_seg(vblk_request *r, uint8_t *ptr, uint64_t gpa,
                          uint64_t n) {
    vblk_seg *s = &r->seg[r->segs++];
    s->ptr = ptr;
    s->n = (size_t)n;
    s->gpa = gpa;
    r->direct = r->direct && ptr;
}

// One descriptor to one segment, or to one for each host region it lies in.
// `left` descriptors follow and keep their place.
static bool vblk__map_desc(vblk_dev *dev, vblk_request *r, vblk__desc d,
                           unsigned left, bool in) {
    if (vblk__wraps(d.gpa, d.n)) {
        return false;
    }
    if (!dev->o.memory.map) {
        vblk__add_seg(r, NULL, d.gpa, d.n);
        return in ? vblk__write(dev, d.gpa, NULL, d.n)
                  : vblk__read(dev, d.gpa, NULL, d.n);
    }
    const unsigned room = sizeof r->seg / sizeof r->seg[0] - left;
    const unsigned start = r->segs;
    const vblk__desc whole = d;
    bool fits = true;
    for (uint64_t run; d.n > 0; d.gpa += run, d.n -= (uint32_t)run) {
        run = d.n;
        uint8_t *p = vblk__map(dev, d.gpa, &run, in);
        if (!p || run == 0 || run > d.n) { // or a map that breaks its word
            return false;
        }
        fits = fits && r->segs < room;
        if (fits) {
            vblk__add_seg(r, p, d.gpa, run);
        }
    }
    if (!fits) { // too many pieces: the accessors can do it
        r->segs = start;
        vblk__add_seg(r, NULL, whole.gpa, whole.n);
    }
    return true;
}

// All of the list is guest memory before the backend is asked (X5).
static vblk__why vblk__map_data(vblk_dev *dev, vblk_request *r,
                                const vblk__chain *c) {
    r->segs = 0;
    r->direct = true;
    for (unsigned i = c->first; i < c->count; i++) {
        if (!vblk__map_desc(dev, r, c->d[i], c->count - i - 1,
                            r->type != VBLK_T_OUT)) {
            return vblk__because(VBLK_EV_DATA_UNMAPPED, c->d[i].gpa,
                                 c->d[i].n);
        }
    }
    return vblk__because(VBLK_EV_NONE, 0, 0);
}


// ---- Data: between guest memory and the backend -----------------------------

// The piece of segment data at byte `at`; at most `n` bytes of it.
static vblk_seg vblk__piece(const vblk_request *r, uint64_t at, uint64_t n) {
    unsigned i = 0;
    VBLK_ASSERT(at < r->bytes);
    while (at >= r->seg[i].n) {
        at -= r->seg[i++].n;
    }
    vblk_seg s = r->seg[i];
    s.ptr = s.ptr ? s.ptr + at : NULL;
    s.gpa += at;
    s.n -= (size_t)at;
    s.n = s.n < n ? s.n : (size_t)n;
    return s;
}

// A request of an earlier session, or of a queue that broke.
static bool vblk__stale(const vblk_dev *dev, const vblk_request *r) {
    return dev->queue[r->queue].epoch != r->epoch || vblk__halted(dev);
}

// Guest memory refuses the data at byte `at`, which it had agreed to (X5).
static void vblk__refused(vblk_dev *dev, const vblk_request *r, uint64_t at) {
    vblk_seg s = vblk__piece(r, at, r->bytes - at);
    vblk__say(dev, r->queue, VBLK_EV_DATA_UNMAPPED, r->head, s.gpa, s.n);
}

VBLKDEF bool vblk_get(vblk_dev *dev, const vblk_request *req, uint64_t at,
                      void *dst, size_t n) {
    if (vblk__stale(dev, req)) {
        return false;
    }
    for (uint8_t *p = (uint8_t *)dst; n > 0;) {
        vblk_seg s = vblk__piece(req, at, n);
        if (s.ptr) {
            VBLK_MEMCPY(p, s.ptr, s.n);
        } else if (!vblk__read(dev, s.gpa, p, s.n)) {
            vblk__refused(dev, req, at);
            return false;
        }
        p += s.n;
        at += s.n;
        n -= s.n;
    }
    return true;
}

VBLKDEF bool vblk_put(vblk_dev *dev, const vblk_request *req, uint64_t at,
                      const void *src, size_t n) {
    if (vblk__stale(dev, req)) {
        return false;
    }
    for (const uint8_t *p = (const uint8_t *)src; n > 0;) {
        vblk_seg s = vblk__piece(req, at, n);
        if (vblk__halted(dev)) {
            return false;
        }
        if (s.ptr) {
            VBLK_MEMCPY(s.ptr, p, s.n);
        } else if (!vblk__write(dev, s.gpa, p, s.n)) {
            vblk__refused(dev, req, at);
            return false;
        }
        p += s.n;
        at += s.n;
        n -= s.n;
    }
    return true;
}

// From byte `at` on, the data reads as zeroes (X2).
static bool vblk__pad(vblk_dev *dev, const vblk_request *r, uint64_t at) {
    static const uint8_t zeroes[VBLK_SECTOR] = {0};
    while (at < r->bytes) {
        uint64_t most = 1u << 20; // then look whether to go on
        vblk_seg s = vblk__piece(r, at, most);
        if (vblk__halted(dev)) {
            return false;
        }
        if (s.ptr) {
            VBLK_MEMSET(s.ptr, 0, s.n);
        } else {
            s.n = s.n < sizeof zeroes ? s.n : sizeof zeroes;
            if (!vblk__write(dev, s.gpa, zeroes, s.n)) {
                vblk__refused(dev, r, at);
                return false;
            }
        }
        at += s.n;
    }
    return true;
}

// How far a request came, and why it ended there.
typedef struct vblk__progress {
    uint64_t        bytes;
    vblk_event_code code;  // NONE, or what stands against a success
    int64_t         error; // the backend's
} vblk__progress;

// Guest memory refused, and the event is out.
#define VBLK__TOLD VBLK_EV_COUNT

// Call the backend until all is moved, nothing moves, or it fails.
static vblk__progress vblk__move(vblk_dev *dev, uint32_t type, uint64_t offset,
                                 vblk_seg *seg, unsigned segs,
                                 uint64_t bytes) {
    const vblk_backend *b = &dev->o.backend;
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    while (done.bytes < bytes) {
        uint64_t at = offset + done.bytes;
        int64_t n = type == VBLK_T_IN ? b->read(b->user, at, seg, segs)
                                      : b->write(b->user, at, seg, segs);
        if (n < 0) {
            done.code = type == VBLK_T_IN ? VBLK_EV_READ_FAILED
                                          : VBLK_EV_WRITE_FAILED;
            done.error = n;
        }
        if (n <= 0) {
            break;
        }
        VBLK_ASSERT((uint64_t)n <= bytes - done.bytes);
        done.bytes += (uint64_t)n;
        while (segs > 0 && (uint64_t)n >= seg->n) {
            n -= (int64_t)seg->n;
            seg++;
            segs--;
        }
        if (segs > 0) {
            seg->ptr += n;
            seg->gpa += (uint64_t)n;
            seg->n -= (size_t)n;
        }
    }
    return done;
}

// The same without pointers, through a buffer.
static vblk__progress vblk__move_copied(vblk_dev *dev, const vblk_request *r) {
    uint8_t scratch[VBLK_SCRATCH];
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    while (done.bytes < r->bytes && !done.code) {
        uint64_t n = r->bytes - done.bytes;
        n = n < sizeof scratch ? n : sizeof scratch;
        vblk_seg s = {scratch, (size_t)n, 0};
        if (r->type == VBLK_T_OUT &&
            !vblk_get(dev, r, done.bytes, scratch, (size_t)n)) {
            done.code = VBLK__TOLD;
            break;
        }
        vblk__progress got = vblk__move(dev, r->type, r->offset + done.bytes,
                                        &s, 1, n);
        if (r->type == VBLK_T_IN &&
            !vblk_put(dev, r, done.bytes, scratch, (size_t)got.bytes)) {
            got.code = VBLK__TOLD;
        }
        bool ends = got.bytes < n;
        got.bytes += done.bytes;
        done = got;
        if (ends) {
            break;
        }
    }
    return done;
}

// vblk__move() eats the segments it is given, and the padding needs the
// request's.
static vblk__progress vblk__transfer(vblk_dev *dev, const vblk_request *r) {
    vblk_seg seg[sizeof r->seg / sizeof r->seg[0]];
    if (!r->direct) {
        return vblk__move_copied(dev, r);
    }
    for (unsigned i = 0; i < r->segs; i++) {
        seg[i] = r->seg[i];
    }
    return vblk__move(dev, r->type, r->offset, seg, r->segs, r->bytes);
}

// ---- Pipeline: next, complete, publish, drain -------------------------------

// The chain of `r` is done: status byte, then used element [2.7.8.2]. Counts
// the error, if it is one. False: there is no status byte any more.
static bool vblk__finish(vblk_dev *dev, vblk_queue *q, const vblk_request *r,
                         uint8_t status, uint32_t written) {
    bool told = true;
    if (vblk__halted(dev)) {
        return false;
    }
    if (r->status_ptr) {
        *r->status_ptr = status;
    } else {
        told = vblk__write(dev, r->status_gpa, &status, 1);
    }
    vblk__count(&q->counts.io_errors, !told || status == VBLK_S_IOERR);
    if (told) {
        vblk__give_back(dev, q, r->head, written);
    } else { // V17
        vblk__tell(dev, q, VBLK_EV_STATUS_UNWRITABLE, r->head, r->status_gpa,
                   0);
    }
    return told;
}

// The used length when nothing but the status byte was written: it may not
// count what stands before that byte [2.7.8.2], P6.
static uint32_t vblk__only_status(const vblk_request *r) {
    return r->space ? 0 : 1;
}

static void vblk__count_success(vblk_queue *q, const vblk_request *r,
                                uint64_t bytes) {
    vblk_counts *c = &q->counts;
    switch (r->type) {
    case VBLK_T_IN:
        vblk__count(&c->reads, 1);
        vblk__count(&c->bytes_read, bytes);
        break;
    case VBLK_T_OUT:
        vblk__count(&c->writes, 1);
        vblk__count(&c->bytes_written, bytes);
        break;
    default: vblk__count(&c->flushes, 1); break;
    }
}

// `r` has come as far as `done`: the event of a failure, with the sector; then
// padding, status, used element, counters.
static bool vblk__end(vblk_dev *dev, const vblk_request *r,
                      vblk__progress done) {
    vblk_queue *q = &dev->queue[r->queue];
    if (vblk__stale(dev, r)) {
        return false;
    }
    VBLK_ASSERT(q->under_way > 0); // else it was completed before
    if (q->under_way == 0) {
        return false;
    }
    q->under_way--;
    bool in = r->type == VBLK_T_IN;
    if (r->type == VBLK_T_OUT && done.bytes < r->bytes && !done.code) {
        done.code = VBLK_EV_WRITE_STUCK;
    }
    if (done.code && done.code != VBLK__TOLD) {
        vblk__tell(dev, q, done.code, r->head,
                   (r->offset + done.bytes) / VBLK_SECTOR,
                   done.error ? 0 - (uint64_t)done.error
                              : r->bytes - done.bytes);
    }
    bool ok = !done.code && (!in || vblk__pad(dev, r, done.bytes));
    uint32_t written = ok && in ? (uint32_t)r->bytes + 1
                                : vblk__only_status(r);
    if (vblk__finish(dev, q, r, ok ? VBLK_S_OK : VBLK_S_IOERR, written) &&
        ok) {
        vblk__count_success(q, r, done.bytes);
    }
    if (ok && r->type == VBLK_T_OUT) {
        vblk__raise_to(&dev->backing, r->offset + r->bytes);
    }
    return true;
}

VBLKDEF bool vblk_complete(vblk_dev *dev, const vblk_request *req,
                           int64_t result) {
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    VBLK_ASSERT(result < 0 || (uint64_t)result <= req->bytes);
    if (result < 0) {
        done.error = result;
        done.code = req->type == VBLK_T_IN    ? VBLK_EV_READ_FAILED
                    : req->type == VBLK_T_OUT ? VBLK_EV_WRITE_FAILED
                                              : VBLK_EV_FLUSH_FAILED;
    } else {
        done.bytes = (uint64_t)result < req->bytes ? (uint64_t)result
                                                   : req->bytes;
    }
    if (!done.code && req->type == VBLK_T_IN && done.bytes < req->bytes &&
        req->offset + done.bytes < req->backing) {
        done.code = VBLK_EV_READ_SHORT;
    }
    return vblk__end(dev, req, done);
}

// The backend knows itself where it ends.
VBLKDEF void vblk_execute(vblk_dev *dev, const vblk_request *r) {
    const vblk_backend *b = &dev->o.backend;
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    if (r->type != VBLK_T_FLUSH) {
        done = vblk__transfer(dev, r);
    }
    bool whole = !done.code && done.bytes == r->bytes;
    if (r->type == VBLK_T_FLUSH || (r->durable && whole)) {
        done.error = b->flush(b->user);
        done.code = done.error ? VBLK_EV_FLUSH_FAILED : VBLK_EV_NONE;
    }
    vblk__end(dev, r, done);
}

// V1 and V2, and there is no status byte to tell the driver by (P5).
static void vblk__drop(vblk_dev *dev, vblk_queue *q, uint16_t head) {
    vblk__count(&q->counts.io_errors, 1);
    if (dev->o.profile == VBLK_STANDARD) {
        vblk__give_back(dev, q, head, 0);
    }
}

// GET_ID needs no backend: the id goes out as far as there is space (V16).
static void vblk__get_id(vblk_dev *dev, vblk_queue *q, const vblk_request *r,
                         uint64_t space) {
    bool to_status = r->bytes == space || dev->o.profile == VBLK_STRICT; // P6
    if (!vblk_put(dev, r, 0, dev->id, (size_t)r->bytes)) {
        vblk__finish(dev, q, r, VBLK_S_IOERR, vblk__only_status(r));
        return;
    }
    vblk__finish(dev, q, r, VBLK_S_OK, (uint32_t)r->bytes + to_status);
}

// Read the chain at `r->head` and find its status byte. False: it was dropped,
// or can never be returned.
static bool vblk__open_chain(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                             vblk__chain *c) {
    c->descs = c->first = c->count = 0;
    c->out_bytes = c->in_bytes = 0;
    c->first_ok = c->last_ok = c->mixed = false;
    c->code = VBLK_EV_NONE;
    c->end.gpa = c->end.n = 0;
    if (!vblk__walk(dev, q, r->head, c)) {
        vblk__drop(dev, q, r->head);
        return false;
    }
    vblk_event_code code = vblk__cut_status(dev, c);
    if (code) {
        vblk__tell(dev, q, code, r->head,
                   code == VBLK_EV_STATUS_WRAPS ? c->end.gpa : 0, 0);
        vblk__drop(dev, q, r->head);
        return false;
    }
    r->space = dev->o.profile == VBLK_STANDARD && c->in_bytes > 0;
    r->status_gpa = c->status_gpa;
    r->status_ptr = vblk__whole(dev, c->status_gpa, 1, true);
    if (dev->o.memory.map ? !r->status_ptr
                          : !vblk__write(dev, c->status_gpa, NULL, 1)) {
        vblk__count(&q->counts.io_errors, 1);
        vblk__tell(dev, q, VBLK_EV_STATUS_UNWRITABLE, r->head, c->status_gpa,
                   0);
        return false;
    }
    return true;
}

// Only the first `bytes` of the list are to be looked up; there are more.
static void vblk__keep(vblk__chain *c, uint32_t bytes) {
    unsigned i = c->first;
    for (; c->d[i].n < bytes; i++) {
        bytes -= c->d[i].n;
    }
    c->d[i].n = bytes;
    c->count = i + 1;
}

// Fill in `r` from its header and the rest of its chain, or say why not.
static vblk__why vblk__parse(vblk_dev *dev, vblk_request *r, vblk__chain *c) {
    uint8_t header[VBLK__HEADER_BYTES];
    if (c->code) {
        return vblk__because(c->code, c->code == VBLK_EV_CHAIN_LONG
                                          ? dev->o.seg_max + 2
                                          : 0, 0);
    }
    vblk_event_code code = vblk__cut_header(dev, c, header);
    if (code) {
        uint64_t a = code == VBLK_EV_HEADER_UNREADABLE ? c->d[c->first].gpa
                                                       : c->out_bytes;
        return vblk__because(code, a, 0);
    }
    uint64_t sector = vblk__get64(header + 8);
    uint32_t type = vblk__get32(header);
    r->type = type & ~VBLK__T_BARRIER;
    const struct vblk__kind *k = vblk__kind_of(dev, r->type);
    if (!k) {
        return vblk__because(VBLK_EV_TYPE_UNKNOWN, type, 0);
    }
    if (type != r->type && dev->o.profile == VBLK_STRICT) { // P9
        return vblk__because(VBLK_EV_TYPE_BARRIER, type, 0);
    }
    vblk__why why = vblk__check(dev, c, k, sector);
    if (why.code || k->data == VBLK__NO_DATA) {
        r->offset = r->bytes = r->segs = 0;
        r->direct = true;
        return why;
    }
    r->offset = k->sectors ? sector * VBLK_SECTOR : 0;
    r->bytes = c->in_bytes + c->out_bytes;
    if (!k->sectors && r->bytes > VBLK_ID_BYTES) {
        r->bytes = VBLK_ID_BYTES;
        vblk__keep(c, VBLK_ID_BYTES);
    }
    return vblk__map_data(dev, r, c);
}

// Until a request of `bytes` fits both limits.
static uint64_t vblk__wait_for(const vblk_dev *dev, uint64_t bytes,
                               uint64_t now_ns) {
    uint64_t a = vblk_bucket_wait(&dev->ops, 1, now_ns);
    uint64_t b = vblk_bucket_wait(&dev->bytes, bytes, now_ns);
    return a > b ? a : b;
}

// Whether `r` fits the limits now; both are looked at before either is
// charged. If not, its chain goes back to the head of the queue. The queue that
// stalls first goes first: until its request fits, nothing of another queue
// passes, or small requests there could keep a large one waiting for ever.
static bool vblk__admit(vblk_dev *dev, vblk_queue *q, const vblk_request *r,
                        uint64_t now_ns, uint64_t *wait_ns) {
    if (!dev->ops.rate && (!dev->bytes.rate || r->bytes == 0)) {
        return true; // costs nothing, so it waits for nobody
    }
    vblk_bucket_refill(&dev->ops, now_ns);
    vblk_bucket_refill(&dev->bytes, now_ns);
    const vblk_queue *turn = dev->turn ? &dev->queue[dev->turn - 1] : q;
    uint64_t cost = turn == q ? r->bytes : turn->stalled_bytes;
    *wait_ns = vblk__wait_for(dev, cost, now_ns);
    if (*wait_ns > 0 || turn != q) {
        dev->turn = 1 + (unsigned)vblk__index(dev, turn);
        q->stalled_bytes = r->bytes;
        q->avail_next--;
        q->stalled_ns = q->stalled ? q->stalled_ns : now_ns;
        q->stalled = true;
        vblk__count(&q->counts.throttled, 1);
        VBLK__STORE(&q->counts.currently_throttled, 1);
        return false;
    }
    vblk_bucket_take(&dev->ops, 1);
    vblk_bucket_take(&dev->bytes, r->bytes);
    return true;
}

// Take one chain. REQUEST: it is in `r`. MORE: it was answered here. STALLED:
// it is back in the ring.
static vblk_state vblk__serve(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                              uint64_t now_ns, uint64_t *wait_ns,
                              uint32_t *budget) {
    vblk__chain c;
    if (q->under_way >= q->size) {
        vblk__poison(dev, q, VBLK_EV_QUEUE_OVERRUN, q->under_way, 0);
        return VBLK_BROKEN;
    }
    if (!vblk__take(dev, q, &r->head)) {
        return VBLK_BROKEN;
    }
    r->queue = (uint16_t)vblk__index(dev, q);
    r->epoch = q->epoch;
    r->backing = VBLK__LOAD(&dev->backing); // it may grow meanwhile
    bool open = vblk__open_chain(dev, q, r, &c);
    uint32_t length = c.descs / 512; // 0, but for a very long one (P5)
    *budget -= length < *budget ? length : *budget;
    if (!open) {
        return VBLK_MORE;
    }
    vblk__why why = vblk__parse(dev, r, &c);
    if (why.code) {
        bool unknown = why.code == VBLK_EV_TYPE_UNKNOWN ||
                       why.code == VBLK_EV_TYPE_BARRIER;
        vblk__tell(dev, q, why.code, r->head, why.a, why.b);
        vblk__finish(dev, q, r, unknown ? VBLK_S_UNSUPP : VBLK_S_IOERR,
                     vblk__only_status(r));
        return VBLK_MORE;
    }
    r->durable = r->type == VBLK_T_OUT && dev->write_through;
    // V10, P4: nothing to do, so nothing to pay.
    bool idle = r->type == VBLK_T_FLUSH ? dev->o.read_only : r->bytes == 0;
    if (!idle && !vblk__admit(dev, q, r, now_ns, wait_ns)) {
        return VBLK_STALLED;
    }
    if (r->type == VBLK_T_GET_ID) {
        vblk__get_id(dev, q, r, c.in_bytes);
        return VBLK_MORE;
    }
    q->under_way++;
    if (idle) {
        vblk_complete(dev, r, 0);
        return VBLK_MORE;
    }
    return VBLK_REQUEST;
}

// The next request, past all that is answered on the way. Each chain takes one
// off `budget`, and a very long one more.
static vblk_outcome vblk__pull(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                               uint64_t now_ns, uint32_t *budget) {
    vblk_outcome out = {VBLK_EMPTY, 0};
    for (;;) {
        out.state = vblk__peek(dev, q);
        if (out.state == VBLK_EMPTY && vblk__notify_on(dev, q)) {
            out.state = vblk__peek(dev, q);
        }
        if (out.state != VBLK_MORE) {
            return out;
        }
        if (*budget == 0 || VBLK__LOAD(&dev->yield)) {
            vblk__notify_on(dev, q);
            return out;
        }
        --*budget;
        vblk__notify_off(dev, q);
        out.state = vblk__serve(dev, q, r, now_ns, &out.wait_ns, budget);
        if (out.state == VBLK_STALLED) {
            vblk__notify_on(dev, q);
        } else if (q->stalled) {
            vblk__end_stall(dev, q, now_ns);
        }
        if (out.state != VBLK_MORE) {
            return out;
        }
    }
}

static unsigned vblk__queue_count(const vblk_dev *dev) {
    bool negotiated = vblk__has_status(dev, VBLK_STATUS_FEATURES_OK);
    return negotiated && !(vblk_accepted(dev) & VBLK_F_MQ) ? 1 : dev->o.queues;
}

// The queue if it may be drained now, else NULL and the reason.
static vblk_queue *vblk__live(vblk_dev *dev, int queue, vblk_outcome *why) {
    why->state = VBLK_EMPTY;
    why->wait_ns = 0;
    if (!(vblk_status(dev) & VBLK_STATUS_DRIVER_OK) ||
        queue < 0 || (unsigned)queue >= vblk__queue_count(dev)) {
        return NULL;
    }
    vblk_queue *q = &dev->queue[queue];
    if (!VBLK__LOAD(&q->ready)) {
        return NULL;
    }
    if (!dev->o.memory.read) {
        bool said = VBLK__LOAD(&dev->no_memory_said);
        if (!said && VBLK__CAS(&dev->no_memory_said, said, true)) {
            vblk__tell(dev, q, VBLK_EV_NO_MEMORY, 0, 0, 0);
        }
        return NULL;
    }
    if (q->poisoned || (!q->resolved && !vblk__resolve(dev, q))) {
        vblk__publish(dev, q); // what was completed before it broke
        why->state = VBLK_BROKEN;
        return NULL;
    }
    return q;
}

// The end of a round: completions out, and what that did to the queue.
static vblk_outcome vblk__settle(vblk_dev *dev, vblk_queue *q,
                                 vblk_outcome out) {
    vblk_outcome broken = {VBLK_BROKEN, 0};
    vblk__publish(dev, q);
    return q->poisoned ? broken : out;
}

VBLKDEF vblk_outcome vblk_next(vblk_dev *dev, int queue, uint64_t now_ns,
                               vblk_request *req) {
    vblk_outcome out;
    VBLK_ASSERT(queue >= VBLK_NO_QUEUE && queue < (int)dev->o.queues);
    vblk_queue *q = vblk__live(dev, queue, &out);
    if (q) {
        uint32_t budget = q->size;
        out = vblk__pull(dev, q, req, now_ns, &budget);
        if (out.state != VBLK_REQUEST) {
            out = vblk__settle(dev, q, out);
        }
    }
    return out;
}

VBLKDEF void vblk_publish(vblk_dev *dev, int queue) {
    VBLK_ASSERT(queue >= 0 && (unsigned)queue < dev->o.queues);
    vblk__publish(dev, &dev->queue[queue]);
}

static vblk_outcome vblk__drain_one(vblk_dev *dev, int queue,
                                    uint64_t now_ns) {
    vblk_outcome out;
    vblk_queue *q = vblk__live(dev, queue, &out);
    if (q) {
        vblk_request req;
        uint32_t budget = q->size;
        while ((out = vblk__pull(dev, q, &req, now_ns, &budget)).state ==
               VBLK_REQUEST) {
            vblk_execute(dev, &req);
        }
        out = vblk__settle(dev, q, out);
    }
    return out;
}

VBLKDEF vblk_outcome vblk_drain(vblk_dev *dev, int queue, uint64_t now_ns) {
    static const uint8_t urgency[] = {0, 0, 2, 3, 1}; // by vblk_state
    vblk_outcome most = {VBLK_EMPTY, 0};
    VBLK_ASSERT(queue >= VBLK_ALL_QUEUES && queue < (int)dev->o.queues);
    if (queue != VBLK_ALL_QUEUES) {
        return vblk__drain_one(dev, queue, now_ns);
    }
    unsigned first = dev->turn ? dev->turn - 1 : 0;
    for (unsigned i = 0; i < dev->o.queues; i++) {
        int turn = (int)((first + i) % dev->o.queues);
        vblk_outcome out = vblk__drain_one(dev, turn, now_ns);
        most = urgency[out.state] > urgency[most.state] ? out : most;
    }
    if (most.state == VBLK_STALLED) { // whose turn it is may have changed
        const vblk_queue *q = &dev->queue[dev->turn - 1];
        most.wait_ns = vblk__wait_for(dev, q->stalled_bytes, now_ns);
    }
    return most;
}


// ---- Device: features, status, reset ----------------------------------------

// Stop a queue, so that it can start from position 0. What is under way goes
// stale.
static void vblk__stop_queue(vblk_dev *dev, vblk_queue *q) {
    vblk__end_stall(dev, q, 0);
    VBLK__STORE(&q->ready, false);
    q->epoch++;
    VBLK_MEMSET(&q->resolved, 0, offsetof(vblk_queue, counts) -
                                     offsetof(vblk_queue, resolved));
}

// The same, and forget what the driver said of it.
static void vblk__forget_queue(vblk_dev *dev, vblk_queue *q) {
    vblk__stop_queue(dev, q);
    q->poisoned = false;
    q->size = 0;
    q->desc_gpa = q->avail_gpa = q->used_gpa = 0;
}

// The level line falls with InterruptStatus.
VBLKDEF void vblk_interrupt_ack(vblk_dev *dev, uint32_t bits) {
    vblk__change_state(dev, ~VBLK__INTERRUPT(bits & 0xff), 0);
}

// Back to where the device was after power-on, but for `status`.
static void vblk__reset(vblk_dev *dev, uint32_t status) {
    for (unsigned i = 0; i < dev->o.queues; i++) {
        vblk__forget_queue(dev, &dev->queue[i]);
    }
    VBLK__STORE(&dev->accepted, 0);
    dev->event_idx = dev->indirect = dev->write_through = false;
    VBLK__STORE(&dev->no_memory_said, false);
    dev->legacy_said = false;
    VBLK__STORE(&dev->device_features_sel, 0);
    VBLK__STORE(&dev->driver_features_sel, 0);
    VBLK__STORE(&dev->queue_sel, 0);
    VBLK__STORE(&dev->generation, dev->generation + 1);
    vblk__change_state(dev, 0, status);
}

VBLKDEF uint64_t vblk_features(const vblk_dev *dev) {
    return dev->offered;
}

VBLKDEF uint64_t vblk_accepted(const vblk_dev *dev) {
    return VBLK__LOAD(&dev->accepted);
}

VBLKDEF void vblk_accept(vblk_dev *dev, uint64_t features) {
    uint32_t status = vblk_status(dev);
    if (status & VBLK_STATUS_DRIVER && !(status & VBLK_STATUS_FEATURES_OK)) {
        VBLK__STORE(&dev->accepted, features);
    } else { // M5
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_REG_FEATURES_WINDOW, 0, status,
                  features);
    }
}

VBLKDEF uint32_t vblk_status(const vblk_dev *dev) {
    return VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__STATUS;
}

// The bits of Status that a driver sets [2.1].
#define VBLK__DRIVERS_BITS                                                     \
    (VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER | VBLK_STATUS_DRIVER_OK |    \
     VBLK_STATUS_FEATURES_OK | VBLK_STATUS_FAILED)

// What stands against FEATURES_OK (F3).
static vblk_event_code vblk__check_features(const vblk_dev *dev) {
    if (dev->o.profile == VBLK_STRICT &&
        !(dev->accepted & VBLK_F_VERSION_1)) { // P10
        return VBLK_EV_FEATURES_VERSION;
    }
    if (dev->accepted & ~dev->offered) {
        return VBLK_EV_FEATURES_UNOFFERED;
    }
    return VBLK_EV_NONE;
}

// What stands against one more bit over `old` (F2, F3, P2).
static vblk_event_code vblk__check_step(const vblk_dev *dev, uint32_t old,
                                        uint32_t bit) {
    const uint32_t driver = VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER;
    bool standard = dev->o.profile == VBLK_STANDARD;
    uint32_t base = old | (standard ? VBLK_STATUS_ACKNOWLEDGE : 0);
    bool in_turn = false;
    switch (bit) {
    case VBLK_STATUS_ACKNOWLEDGE: in_turn = old == 0; break;
    case VBLK_STATUS_DRIVER:
        if (old == 0 && !standard) {
            return VBLK_EV_STATUS_NO_ACK;
        }
        in_turn = base == VBLK_STATUS_ACKNOWLEDGE;
        break;
    case VBLK_STATUS_FEATURES_OK:
        if (base == driver) {
            return vblk__check_features(dev);
        }
        break;
    case VBLK_STATUS_DRIVER_OK:
        in_turn = base == (driver | VBLK_STATUS_FEATURES_OK);
        break;
    default: in_turn = true; // FAILED
    }
    return in_turn ? VBLK_EV_NONE : VBLK_EV_STATUS_ORDER;
}

// What stands against a Status that goes from `old` to `value` (F2 to F7).
static vblk_event_code vblk__check_status(const vblk_dev *dev, uint32_t old,
                                          uint32_t value) {
    static const uint8_t steps[] = {
        VBLK_STATUS_ACKNOWLEDGE, VBLK_STATUS_DRIVER, VBLK_STATUS_FEATURES_OK,
        VBLK_STATUS_DRIVER_OK, VBLK_STATUS_FAILED};
    uint32_t add = value & ~old;
    vblk_event_code code = VBLK_EV_NONE;
    if (add == VBLK_STATUS_FAILED && !(old & ~value)) {
        return VBLK_EV_NONE;
    }
    if (old & VBLK_STATUS_NEEDS_RESET) {
        return VBLK_EV_STATUS_NEEDS_RESET;
    }
    if (old & ~value) {
        return VBLK_EV_STATUS_CLEARS;
    }
    if (add & ~VBLK__DRIVERS_BITS ||
        (dev->o.profile == VBLK_STRICT && add & (add - 1))) {
        return VBLK_EV_STATUS_BITS;
    }
    for (unsigned i = 0; i < sizeof steps && !code; i++) {
        if (add & steps[i]) {
            code = vblk__check_step(dev, old, steps[i]);
            old |= steps[i];
        }
    }
    return code;
}

VBLKDEF int vblk_set_status(vblk_dev *dev, uint32_t written) {
    if (written == 0) {
        vblk__reset(dev, 0);
        return VBLK_NO_QUEUE;
    }
    // A drainer may add NEEDS_RESET or an interrupt meanwhile: look again.
    uint32_t state = VBLK__LOAD(&dev->state);
    for (int tries = 0; tries < 100; tries++) {
        uint32_t old = state & VBLK__STATUS;
        uint32_t value = dev->o.profile == VBLK_STRICT
                             ? written
                             : old | (written & VBLK__DRIVERS_BITS); // P2
        uint32_t add = value & ~old;
        if (value == old) { // F4
            break;
        }
        vblk_event_code code = vblk__check_status(dev, old, value);
        if (code) {
            bool features = code == VBLK_EV_FEATURES_VERSION ||
                            code == VBLK_EV_FEATURES_UNOFFERED;
            vblk__say(dev, VBLK_NO_QUEUE, code, 0,
                      features ? dev->accepted : old,
                      features ? dev->offered : written);
            return VBLK_NO_QUEUE;
        }
        if (add & VBLK_STATUS_FEATURES_OK) {
            dev->event_idx = dev->accepted & VBLK_F_EVENT_IDX;
            dev->indirect = dev->accepted & VBLK_F_INDIRECT_DESC;
            dev->write_through =
                dev->offered & ~dev->accepted & VBLK_F_FLUSH; // X4
        }
        if (VBLK__CAS(&dev->state, state, (state & ~VBLK__STATUS) | value)) {
            if (add & VBLK_STATUS_FAILED) {
                vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_STATUS_FAILED, 0, old,
                          written);
            }
            return add & VBLK_STATUS_DRIVER_OK ? VBLK_ALL_QUEUES
                                               : VBLK_NO_QUEUE;
        }
    }
    return VBLK_NO_QUEUE;
}


// ---- Registers: offsets to device calls -------------------------------------

VBLKDEF void vblk_read_config(const vblk_dev *dev, uint64_t offset, void *dst,
                              size_t n) {
    uint8_t b[VBLK__CONFIG_BYTES] = {0}; // [5.2.4]
    vblk__put(b, dev->o.capacity, 8);
    vblk__put(b + 8, dev->offered & VBLK_F_SIZE_MAX ? dev->o.size_max : 0, 4);
    vblk__put(b + 12, dev->offered & VBLK_F_SEG_MAX ? dev->o.seg_max : 0, 4);
    vblk__put(b + 20, dev->offered & VBLK_F_BLK_SIZE ? VBLK_SECTOR : 0, 4);
    vblk__put(b + 34, dev->offered & VBLK_F_MQ ? dev->o.queues : 0, 2);
    for (size_t i = 0; i < n; i++) {
        bool there = offset < sizeof b && i < sizeof b - offset;
        ((uint8_t *)dst)[i] = there ? b[offset + i] : 0;
    }
}

static const vblk_queue *vblk__selected(const vblk_dev *dev) {
    uint32_t sel = VBLK__LOAD(&dev->queue_sel);
    return sel < vblk__queue_count(dev) ? &dev->queue[sel] : NULL;
}

static uint32_t vblk__window(uint64_t features, uint32_t sel) {
    return sel < 2 ? (uint32_t)(features >> 32 * sel) : 0;
}

VBLKDEF uint64_t vblk_mmio_read(const vblk_dev *dev, uint64_t offset,
                                unsigned bytes) {
    const vblk_queue *q = vblk__selected(dev);
    if (bytes == 0 || bytes > 8) {
        return UINT64_MAX;
    }
    if (offset >= VBLK_REG_CONFIG) {
        uint8_t b[8] = {0};
        vblk_read_config(dev, offset - VBLK_REG_CONFIG, b, bytes);
        return vblk__get64(b);
    }
    if (bytes != 4) { // M2
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_REG_WIDTH, 0, offset, bytes);
        return UINT64_MAX >> 8 * (8 - bytes);
    }
    switch (offset) {
    case VBLK_REG_MAGIC_VALUE:       return 0x74726976;
    case VBLK_REG_VERSION:           return 2;
    case VBLK_REG_DEVICE_ID:         return 2;
    case VBLK_REG_VENDOR_ID:         return dev->o.vendor_id;
    case VBLK_REG_DEVICE_FEATURES:
        return vblk__window(dev->offered,
                            VBLK__LOAD(&dev->device_features_sel));
    case VBLK_REG_QUEUE_NUM_MAX:     return q ? dev->o.queue_size : 0;
    case VBLK_REG_QUEUE_READY:       return q ? VBLK__LOAD(&q->ready) : 0;
    case VBLK_REG_INTERRUPT_STATUS:
        return (VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__INTERRUPTS) >> 8;
    case VBLK_REG_STATUS:            return vblk_status(dev);
    case VBLK_REG_SHM_LEN_LOW:
    case VBLK_REG_SHM_LEN_HIGH:
    case VBLK_REG_SHM_BASE_LOW:
    case VBLK_REG_SHM_BASE_HIGH:     return UINT32_MAX; // no region [2.10]
    case VBLK_REG_CONFIG_GENERATION: return VBLK__LOAD(&dev->generation);
    default:                         return 0;
    }
}

static void vblk__write_features(vblk_dev *dev, uint32_t value) {
    uint32_t sel = dev->driver_features_sel;
    if (sel < 2) {
        uint64_t other = dev->accepted & ~((uint64_t)UINT32_MAX << 32 * sel);
        vblk_accept(dev, other | (uint64_t)value << 32 * sel);
    }
}

// The address that a register of `q` holds half of, with that half changed.
static uint64_t *vblk__half(vblk_queue *q, uint64_t offset, uint32_t value,
                            uint64_t *changed) {
    unsigned shift = offset & 4 ? 32 : 0;
    uint64_t *address = offset < VBLK_REG_QUEUE_DRIVER_LOW   ? &q->desc_gpa
                        : offset < VBLK_REG_QUEUE_DEVICE_LOW ? &q->avail_gpa
                                                             : &q->used_gpa;
    *changed = (*address & ~((uint64_t)UINT32_MAX << shift)) |
               (uint64_t)value << shift;
    return address;
}

// Linux clears QueueReady after its reset; that is no mistake.
static bool vblk__would_change(vblk_queue *q, uint64_t offset,
                               uint32_t value) {
    uint64_t address;
    switch (offset) {
    case VBLK_REG_QUEUE_NUM:   return value != q->size;
    case VBLK_REG_QUEUE_READY: return (value == 1) != q->ready;
    default: return *vblk__half(q, offset, value, &address) != address;
    }
}

// What stands against a write to a register of `q` (M7, P8).
static vblk_event_code vblk__check_window(const vblk_dev *dev,
                                          const vblk_queue *q,
                                          uint64_t offset, uint32_t value) {
    uint32_t status = vblk_status(dev);
    uint32_t from = dev->o.profile == VBLK_STRICT ? VBLK_STATUS_FEATURES_OK
                                                  : VBLK_STATUS_DRIVER; // P13
    if (!(status & from)) {
        return VBLK_EV_REG_QUEUE_WINDOW;
    }
    if (!(status & VBLK_STATUS_DRIVER_OK)) {
        return VBLK_EV_NONE;
    }
    if (offset == VBLK_REG_QUEUE_READY) {
        return dev->o.profile == VBLK_STANDARD ? VBLK_EV_NONE
               : value == 0                    ? VBLK_EV_REG_QUEUE_FROZEN
                                               : VBLK_EV_REG_QUEUE_WINDOW;
    }
    return dev->o.profile == VBLK_STANDARD && !q->ready
               ? VBLK_EV_NONE
               : VBLK_EV_REG_QUEUE_WINDOW;
}

static bool vblk__valid_size(const vblk_dev *dev, uint32_t size) {
    return size > 0 && size <= dev->o.queue_size && !(size & (size - 1));
}

static int vblk__write_queue(vblk_dev *dev, uint64_t offset, uint32_t value) {
    if (!vblk__selected(dev)) {
        return VBLK_NO_QUEUE;
    }
    vblk_queue *q = &dev->queue[dev->queue_sel];
    vblk_event_code code = vblk__check_window(dev, q, offset, value);
    if (code) {
        if (vblk__would_change(q, offset, value)) {
            vblk__tell(dev, q, code, 0, offset, value);
        }
        return VBLK_NO_QUEUE;
    }
    switch (offset) {
    case VBLK_REG_QUEUE_NUM:
        if (vblk__valid_size(dev, value)) {
            q->size = value;
        } else if (value > 0 || q->ready) {
            vblk__tell(dev, q, VBLK_EV_REG_QUEUE_SIZE, 0, offset, value);
        }
        break;
    case VBLK_REG_QUEUE_READY:
        if (vblk__has_status(dev, VBLK_STATUS_DRIVER_OK)) {
            if (value == 1 && !q->ready) {
                VBLK__STORE(&q->ready, true);
                return vblk__index(dev, q);
            }
            if (value != 1) {
                unsigned turn = dev->turn;
                vblk__stop_queue(dev, q);
                return dev->turn && dev->turn != turn ? VBLK_ALL_QUEUES
                                                      : VBLK_NO_QUEUE;
            }
        } else {
            VBLK__STORE(&q->ready, value == 1);
        }
        break;
    default: {
        uint64_t changed;
        uint64_t *address = vblk__half(q, offset, value, &changed);
        *address = changed;
        break;
    }
    }
    return VBLK_NO_QUEUE;
}

// Of version 1 [4.2.4], which is told from nothing at all.
#define VBLK__REG_GUEST_PAGE_SIZE 0x028u
#define VBLK__REG_QUEUE_ALIGN     0x03cu
#define VBLK__REG_QUEUE_PFN       0x040u

static int vblk__write_notify(vblk_dev *dev, uint32_t queue) {
    uint32_t status = vblk_status(dev);
    if (queue >= vblk__queue_count(dev)) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_NOTIFY_NO_QUEUE, 0, queue, 0);
    } else if (!(status & VBLK_STATUS_DRIVER_OK)) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_NOTIFY_EARLY, 0, queue, status);
    } else if (!dev->queue[queue].ready) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_NOTIFY_NOT_READY, 0, queue, 0);
    } else {
        return (int)queue;
    }
    return VBLK_NO_QUEUE;
}

VBLKDEF int vblk_mmio_write(vblk_dev *dev, uint64_t offset, unsigned bytes,
                            uint64_t value) {
    uint32_t v = (uint32_t)value;
    if (offset >= VBLK_REG_CONFIG) {
        return VBLK_NO_QUEUE;
    }
    if (bytes != 4) { // M2
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_REG_WIDTH, 0, offset, bytes);
        return VBLK_NO_QUEUE;
    }
    switch (offset) {
    case VBLK_REG_DEVICE_FEATURES_SEL:
        VBLK__STORE(&dev->device_features_sel, v);
        break;
    case VBLK_REG_DRIVER_FEATURES_SEL:
        VBLK__STORE(&dev->driver_features_sel, v);
        break;
    case VBLK_REG_QUEUE_SEL:       VBLK__STORE(&dev->queue_sel, v); break;
    case VBLK_REG_DRIVER_FEATURES: vblk__write_features(dev, v);    break;
    case VBLK_REG_INTERRUPT_ACK:   vblk_interrupt_ack(dev, v);      break;
    case VBLK_REG_QUEUE_NOTIFY:    return vblk__write_notify(dev, v);
    case VBLK_REG_STATUS:          return vblk_set_status(dev, v);
    case VBLK_REG_QUEUE_NUM:
    case VBLK_REG_QUEUE_READY:
    case VBLK_REG_QUEUE_DESC_LOW:
    case VBLK_REG_QUEUE_DESC_HIGH:
    case VBLK_REG_QUEUE_DRIVER_LOW:
    case VBLK_REG_QUEUE_DRIVER_HIGH:
    case VBLK_REG_QUEUE_DEVICE_LOW:
    case VBLK_REG_QUEUE_DEVICE_HIGH:
        return vblk__write_queue(dev, offset, v);
    case VBLK__REG_GUEST_PAGE_SIZE:
    case VBLK__REG_QUEUE_ALIGN:
    case VBLK__REG_QUEUE_PFN:
        if (!dev->legacy_said) {
            dev->legacy_said = true;
            vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_REG_LEGACY, 0, offset, v);
        }
        break;
    default:
        break;
    }
    return VBLK_NO_QUEUE;
}

VBLKDEF int vblk_queue_start(vblk_dev *dev, int queue, const vblk_ring *ring) {
    if (queue < 0 || (unsigned)queue >= vblk__queue_count(dev) ||
        !(vblk_status(dev) & VBLK_STATUS_FEATURES_OK)) {
        return VBLK_NO_QUEUE;
    }
    vblk_queue *q = &dev->queue[queue];
    if (q->ready || !vblk__valid_size(dev, ring->size)) {
        return VBLK_NO_QUEUE;
    }
    q->size = ring->size;
    q->desc_gpa = ring->desc;
    q->avail_gpa = ring->avail;
    q->used_gpa = ring->used;
    q->avail_next = q->avail_seen = ring->position;
    // Where there is no memory yet, the first drain takes it.
    q->adopt_used = q->used_gpa % 4 ||
                    !vblk__load16(dev, NULL, q->used_gpa, 2, &q->used_next);
    q->used_shown = q->used_decided = q->used_next;
    VBLK__STORE(&q->ready, true);
    return queue;
}

VBLKDEF uint16_t vblk_queue_stop(vblk_dev *dev, int queue) {
    VBLK_ASSERT(queue >= 0 && (unsigned)queue < dev->o.queues);
    vblk_queue *q = &dev->queue[queue];
    uint16_t position = q->avail_next;
    vblk__publish(dev, q); // what is completed is not lost
    vblk__forget_queue(dev, q);
    return position;
}

VBLKDEF bool vblk_interrupt_line(const vblk_dev *dev) {
    return (VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__LINE) != 0;
}

VBLKDEF void vblk_needs_reset(vblk_dev *dev) {
    vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_HOST_RESET, 0, 0, 0);
    vblk__ask_reset(dev);
}


// ---- Set-up and queries -----------------------------------------------------

static bool vblk__check_limit(uint64_t rate, uint64_t burst) {
    return (burst == 0 || (rate > 0 && burst >= rate)) && rate <= INT64_MAX &&
           burst <= INT64_MAX;
}

static int vblk__check_limits(const vblk_limits *l) {
    return vblk__check_limit(l->iops, l->iops_burst) &&
                   vblk__check_limit(l->bps, l->bps_burst)
               ? VBLK_OK
               : VBLK_ERR_LIMITS;
}

static bool vblk__is_memory(const vblk_memory *m) {
    return !m->read == !m->write && (m->read || !m->map);
}

static uint32_t vblk__queue_size(const vblk_options *o) {
    return o->queue_size ? o->queue_size : VBLK_QUEUE_SIZE;
}

static uint32_t vblk__seg_max(const vblk_options *o) {
    uint32_t size = vblk__queue_size(o);
    uint32_t fits = size > 3 ? size - 2 : 1;
    return o->seg_max ? o->seg_max
           : fits < VBLK_MAX_SEGS ? fits
                                  : VBLK_MAX_SEGS;
}

static int vblk__check_options(const vblk_options *o) {
    const uint64_t may_be_off = VBLK_F_SIZE_MAX | VBLK_F_SEG_MAX |
                                VBLK_F_BLK_SIZE | VBLK_F_INDIRECT_DESC |
                                VBLK_F_EVENT_IDX;
    if (!vblk__is_memory(&o->memory)) {
        return VBLK_ERR_MEMORY;
    }
    if (!o->backend.read) {
        return VBLK_ERR_BACKEND;
    }
    if ((!o->capacity && !o->backend.size) ||
        o->capacity > INT64_MAX / VBLK_SECTOR) {
        return VBLK_ERR_CAPACITY;
    }
    if ((unsigned)o->cache > VBLK_CACHE_UNSAFE) {
        return VBLK_ERR_CACHE;
    }
    if ((unsigned)o->profile > VBLK_STANDARD) {
        return VBLK_ERR_PROFILE;
    }
    if (o->queues > VBLK_MAX_QUEUES) {
        return VBLK_ERR_QUEUES;
    }
    if (o->queue_size > 32768 || o->queue_size & (o->queue_size - 1)) {
        return VBLK_ERR_QUEUE_SIZE;
    }
    // Without INDIRECT_DESC a queue of less than 3 has no request at all; with
    // it drivers count on seg_max + 2 entries all the same.
    bool indirect = !(o->features_off & VBLK_F_INDIRECT_DESC);
    uint32_t entries = vblk__queue_size(o);
    if (o->seg_max > VBLK_MAX_SEGS ||
        (vblk__seg_max(o) + 2 > entries && (!indirect || entries > 2))) {
        return VBLK_ERR_SEG_MAX;
    }
    if (o->size_max && o->size_max < 4096) {
        return VBLK_ERR_SIZE_MAX;
    }
    if (o->features_off & ~may_be_off) {
        return VBLK_ERR_FEATURES;
    }
    return vblk__check_limits(&o->limits);
}

static uint64_t vblk__offer(const vblk_options *o) {
    uint64_t f = VBLK_F_VERSION_1 | VBLK_F_BLK_SIZE | VBLK_F_SEG_MAX |
                 VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC;
    f |= o->read_only ? VBLK_F_RO : 0;
    f |= o->queues > 1 ? VBLK_F_MQ : 0;
    if (o->profile == VBLK_STANDARD && !o->size_max) {
        f &= ~VBLK_F_SIZE_MAX; // P12
    }
    // Nothing to flush on a read-only disk, so it can be offered (V10).
    f |= o->cache == VBLK_CACHE_WRITEBACK && (o->backend.flush || o->read_only)
             ? VBLK_F_FLUSH
             : 0;
    return f & ~o->features_off;
}

static void vblk__set_bursts(vblk_limits *l) {
    l->iops_burst = l->iops_burst ? l->iops_burst : l->iops;
    l->bps_burst = l->bps_burst ? l->bps_burst : l->bps;
}

static void vblk__set_defaults(vblk_options *o) {
    vblk__set_bursts(&o->limits);
    o->read_only = o->read_only || o->backend.read_only || !o->backend.write;
    o->queues = o->queues ? o->queues : 1;
    o->seg_max = vblk__seg_max(o);
    o->queue_size = vblk__queue_size(o);
    if (o->profile == VBLK_STRICT && !o->size_max) {
        o->size_max = 1u << 20;
    }
    if (o->profile == VBLK_STANDARD && !o->vendor_id) {
        o->vendor_id = 0x554d4551; // P11
    }
}

// Each device begins elsewhere: a request of what was here before is stale.
static uint64_t vblk__first_epoch(void) {
    static uint32_t made; // atomic
    uint32_t old = VBLK__LOAD(&made);
    while (!VBLK__CAS(&made, old, old + 1)) {
    }
    return (uint64_t)old << 32;
}

VBLKDEF int vblk_init(vblk_dev *dev, const vblk_options *o) {
    VBLK_ASSERT(dev && o);
    int err = vblk__check_options(o);
    uint64_t bytes = 0;
    uint64_t capacity = o->capacity;
    if (err) {
        return err;
    }
    if (o->backend.size) {
        bytes = o->backend.size(o->backend.user);
    }
    if (!capacity) {
        capacity = bytes / VBLK_SECTOR;
        if (bytes > INT64_MAX) {
            return VBLK_ERR_CAPACITY;
        }
    }
    VBLK_MEMSET(dev, 0, sizeof *dev);
    dev->o = *o;
    dev->o.capacity = capacity;
    dev->backing = o->backend.size ? bytes : capacity * VBLK_SECTOR;
    vblk__set_defaults(&dev->o);
    dev->offered = vblk__offer(&dev->o);
    vblk_bucket_init(&dev->ops, dev->o.limits.iops, dev->o.limits.iops_burst);
    vblk_bucket_init(&dev->bytes, dev->o.limits.bps, dev->o.limits.bps_burst);
    for (unsigned i = 0; i < dev->o.queues; i++) {
        dev->queue[i].epoch = vblk__first_epoch();
    }
    for (unsigned i = 0; o->id && i < VBLK_ID_BYTES && o->id[i]; i++) {
        dev->id[i] = (uint8_t)o->id[i];
    }
    dev->o.id = NULL; // copied; the caller's may go
    if (o->backend.size && capacity > bytes / VBLK_SECTOR) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_CAPACITY_LARGE, 0, bytes,
                  capacity * VBLK_SECTOR);
    }
    if (!o->capacity && capacity > 0 && bytes % VBLK_SECTOR) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_CAPACITY_ROUNDED, 0,
                  bytes % VBLK_SECTOR, 0);
    }
    if (capacity == 0) {
        vblk__say(dev, VBLK_NO_QUEUE, VBLK_EV_CAPACITY_ZERO, 0, bytes, 0);
    }
    return VBLK_OK;
}

VBLKDEF int vblk_set_limits(vblk_dev *dev, const vblk_limits *limits,
                            uint64_t now_ns) {
    vblk_limits l = *limits;
    if (vblk__check_limits(&l)) {
        return VBLK_ERR_LIMITS;
    }
    vblk__set_bursts(&l);
    dev->o.limits = l;
    vblk_bucket_change(&dev->ops, l.iops, l.iops_burst, now_ns);
    vblk_bucket_change(&dev->bytes, l.bps, l.bps_burst, now_ns);
    // Only a limited device has a turn: without limits its queues may be
    // drained by several threads, and none of them could pass it on.
    for (unsigned i = 0; !l.iops && !l.bps && i < dev->o.queues; i++) {
        if (dev->queue[i].stalled) {
            vblk__end_stall(dev, &dev->queue[i], now_ns);
        }
    }
    return VBLK_OK;
}

VBLKDEF int vblk_set_memory(vblk_dev *dev, vblk_memory memory) {
    if (!vblk__is_memory(&memory)) {
        return VBLK_ERR_MEMORY;
    }
    dev->o.memory = memory;
    for (unsigned i = 0; i < dev->o.queues; i++) {
        vblk_queue *q = &dev->queue[i];
        VBLK_ASSERT(q->under_way == 0);
        q->resolved = false;
        q->desc = q->avail = q->used = NULL;
    }
    return VBLK_OK;
}

VBLKDEF vblk_counts vblk_counters(const vblk_dev *dev) {
    vblk_counts sum = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (unsigned i = 0; i < dev->o.queues; i++) {
        const vblk_counts *c = &dev->queue[i].counts;
        sum.reads += VBLK__LOAD(&c->reads);
        sum.writes += VBLK__LOAD(&c->writes);
        sum.flushes += VBLK__LOAD(&c->flushes);
        sum.bytes_read += VBLK__LOAD(&c->bytes_read);
        sum.bytes_written += VBLK__LOAD(&c->bytes_written);
        sum.io_errors += VBLK__LOAD(&c->io_errors);
        sum.throttled += VBLK__LOAD(&c->throttled);
        sum.currently_throttled += VBLK__LOAD(&c->currently_throttled);
        sum.throttled_ns += VBLK__LOAD(&c->throttled_ns);
        sum.invalid_avail_idx += VBLK__LOAD(&c->invalid_avail_idx);
    }
    return sum;
}

VBLKDEF const char *vblk_strerror(int err) {
    switch (err) {
#define VBLK_X(name, value, text) case VBLK_##name: return text;
    VBLK_ERRORS(VBLK_X)
#undef VBLK_X
    default: return "unknown error code";
    }
}

VBLKDEF const char *vblk_event_text(vblk_event_code code) {
    switch ((int)code) {
#define VBLK_X(name, text) case VBLK_EV_##name: return text;
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    default: return "unknown event code";
    }
}


// ---- Memory and memory disk -------------------------------------------------

VBLKDEF vblk_memory vblk_ram_memory(const vblk_ram *ram) {
    for (unsigned i = 0; i < ram->regions; i++) {
        VBLK_ASSERT((size_t)ram->region[i].bytes == ram->region[i].bytes);
    }
    vblk_memory memory = {vblk__ram_read, vblk__ram_write, vblk__ram_map,
                          NULL};
    memory.user = (void *)(uintptr_t)ram;
    return memory;
}

// How many of the segments' bytes the disk has from `offset` on.
static int64_t vblk__memdisk_copy(vblk_memdisk *d, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs,
                                  bool in) {
    uint64_t left = offset < d->bytes ? d->bytes - offset : 0;
    uint8_t *p = (uint8_t *)d->data + (d->bytes - left);
    int64_t done = 0;
    for (unsigned i = 0; i < segs && left > 0; i++) {
        size_t n = seg[i].n < left ? seg[i].n : (size_t)left;
        VBLK_MEMCPY(in ? seg[i].ptr : p, in ? p : seg[i].ptr, n);
        p += n;
        left -= n;
        done += (int64_t)n;
    }
    return done;
}

static int64_t vblk__memdisk_read(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    return vblk__memdisk_copy((vblk_memdisk *)user, offset, seg, segs, true);
}

static int64_t vblk__memdisk_write(void *user, uint64_t offset,
                                   const vblk_seg *seg, unsigned segs) {
    vblk_memdisk *d = (vblk_memdisk *)user;
    return d->read_only ? -1
                        : vblk__memdisk_copy(d, offset, seg, segs, false);
}

static int vblk__memdisk_flush(void *user) {
    (void)user;
    return 0;
}

static uint64_t vblk__memdisk_size(void *user) {
    return ((vblk_memdisk *)user)->bytes;
}

VBLKDEF vblk_backend vblk_memdisk_backend(vblk_memdisk *disk) {
    vblk_backend b = {vblk__memdisk_read, vblk__memdisk_write,
                      vblk__memdisk_flush, vblk__memdisk_size,
                      disk->read_only, NULL};
    b.user = disk;
    return b;
}

#endif // VBLK_IMPLEMENTATION


#if defined(VBLK_IMPLEMENTATION_FILES) && !defined(VBLK_FILES_IMPLEMENTED)
#define VBLK_FILES_IMPLEMENTED
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// If this fails: include vblk.h before any other header in this unit, or
// compile with -D_FILE_OFFSET_BITS=64.
typedef char vblk__offsets_have_64_bits[sizeof(off_t) == 8 ? 1 : -1];

// What systems differ in: calls over several segments, where there are any;
// what makes writes durable; and what a disk is, beside a file.
#if (defined(__linux__) && defined(_GNU_SOURCE)) ||                            \
    ((defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__)) &&  \
     !defined(_POSIX_C_SOURCE))
#define VBLK__VECTORS
#include <sys/uio.h>
#endif
#if defined(__APPLE__) && defined(F_FULLFSYNC)
#define VBLK__SYNC(fd) fcntl(fd, F_FULLFSYNC)
#elif defined(__APPLE__)
#define VBLK__SYNC(fd) fsync(fd)
#else
#define VBLK__SYNC(fd) fdatasync(fd)
#endif
#if defined(__linux__)
#define VBLK__IS_DISK(mode) S_ISBLK(mode)
#else
#define VBLK__IS_DISK(mode) (S_ISBLK(mode) || S_ISCHR(mode))
#endif


// ---- Files ------------------------------------------------------------------

// An errno that stands against `fd` as a disk, or 0.
static int vblk__file_check(int fd, bool read_only) {
    struct stat st;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fstat(fd, &st)) {
        return errno;
    }
    if ((flags & O_ACCMODE) != O_RDWR &&
        ((flags & O_ACCMODE) != O_RDONLY || !read_only)) {
        return EACCES;
    }
    if (flags & O_APPEND && !read_only) {
        return EINVAL; // would write elsewhere than it is told
    }
    return S_ISREG(st.st_mode) || VBLK__IS_DISK(st.st_mode) ? 0
           : S_ISDIR(st.st_mode)                            ? EISDIR
                                                            : ENOTBLK;
}

VBLKDEF int vblk_file_from(vblk_file *file, int fd, bool read_only) {
    int err = vblk__file_check(fd, read_only);
    off_t end = err ? -1 : lseek(fd, 0, SEEK_END);
    err = !err && end < 0 ? errno : err;
    err = err ? err : pthread_mutex_init(&file->mutex, NULL);
    if (err) {
        errno = err;
        return VBLK_ERR_FILE;
    }
    file->fd = fd;
    file->read_only = read_only;
    file->flush_error = 0;
    file->end = (uint64_t)end;
    return VBLK_OK;
}

VBLKDEF int vblk_file_open(vblk_file *file, const char *path, bool read_only) {
    int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (fd < 0) {
        return VBLK_ERR_FILE;
    }
    int err = vblk_file_from(file, fd, read_only);
    if (err) {
        int saved = errno;
        close(fd);
        errno = saved;
    }
    return err;
}

VBLKDEF void vblk_file_close(vblk_file *file) {
    pthread_mutex_destroy(&file->mutex);
    close(file->fd);
    file->fd = -1;
}

// Several segments in one call, where the system has one and the array holds
// them; the first ones otherwise.
static ssize_t vblk__file_vector(int fd, off_t offset, const vblk_seg *seg,
                                 unsigned segs, bool in) {
#ifdef VBLK__VECTORS
    struct iovec iov[VBLK_MAX_SEGS + 2 + VBLK__SPLITS];
    unsigned most = sizeof iov / sizeof iov[0];
#ifdef IOV_MAX
    most = most < IOV_MAX ? most : IOV_MAX;
#endif
    segs = segs < most ? segs : most;
    for (unsigned i = 0; i < segs; i++) {
        iov[i].iov_base = seg[i].ptr;
        iov[i].iov_len = seg[i].n;
    }
    if (segs > 1) { // a single one is cheaper without a vector
        return in ? preadv(fd, iov, (int)segs, offset)
                  : pwritev(fd, iov, (int)segs, offset);
    }
#endif
    (void)segs;
    return in ? pread(fd, seg->ptr, seg->n, offset)
              : pwrite(fd, seg->ptr, seg->n, offset);
}

// One system call, repeated while interrupted; partial transfers are the
// caller's to continue.
static int64_t vblk__file_move(vblk_file *f, uint64_t offset,
                               const vblk_seg *seg, unsigned segs, bool in) {
    ssize_t n;
    do {
        n = vblk__file_vector(f->fd, (off_t)offset, seg, segs, in);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return -errno;
    }
    vblk__raise_to(&f->end, n > 0 ? offset + (uint64_t)n : 0);
    return n;
}

// The backing became shorter than it was: writes are lost, for good.
static int vblk__file_lost(vblk_file *f) {
    pthread_mutex_lock(&f->mutex);
    f->flush_error = f->flush_error ? f->flush_error : EIO;
    pthread_mutex_unlock(&f->mutex);
    return -EIO;
}

static int64_t vblk__file_read(void *user, uint64_t offset,
                               const vblk_seg *seg, unsigned segs) {
    vblk_file *f = (vblk_file *)user;
    uint64_t end = VBLK__LOAD(&f->end); // before: it may grow meanwhile
    int64_t n = vblk__file_move(f, offset, seg, segs, true);
    return n == 0 && offset < end ? vblk__file_lost(f) : n;
}

static int64_t vblk__file_write(void *user, uint64_t offset,
                                const vblk_seg *seg, unsigned segs) {
    vblk_file *f = (vblk_file *)user;
    return f->read_only ? -EROFS
                        : vblk__file_move(f, offset, seg, segs, false);
}

static off_t vblk__file_end(vblk_file *f) {
    off_t end;
    do {
        end = lseek(f->fd, 0, SEEK_END);
    } while (end < 0 && errno == EINTR);
    vblk__raise_to(&f->end, end < 0 ? 0 : (uint64_t)end);
    return end;
}

static uint64_t vblk__file_size(void *user) {
    off_t end = vblk__file_end((vblk_file *)user);
    return end < 0 ? 0 : (uint64_t)end;
}

// One at a time: the kernel tells of a failure once, to one caller.
static int vblk__file_flush(void *user) {
    vblk_file *f = (vblk_file *)user;
    uint64_t was = VBLK__LOAD(&f->end); // before: it may grow meanwhile
    int err;
    pthread_mutex_lock(&f->mutex);
    do {
        err = VBLK__SYNC(f->fd) ? errno : 0;
    } while (err == EINTR);
    if (!err && (uint64_t)vblk__file_end(f) < was) { // -1 is beyond any
        err = EIO;
    }
    f->flush_error = err ? err : f->flush_error;
    err = f->flush_error;
    pthread_mutex_unlock(&f->mutex);
    return -err;
}

VBLKDEF vblk_backend vblk_file_backend(vblk_file *file) {
    vblk_backend b = {vblk__file_read, vblk__file_write, vblk__file_flush,
                      vblk__file_size, file->read_only, NULL};
    b.user = file;
    return b;
}


// ---- Lock -------------------------------------------------------------------

VBLKDEF int vblk_locked_init(vblk_locked *locked, vblk_backend inner) {
    int err = pthread_mutex_init(&locked->mutex, NULL);
    locked->inner = inner;
    errno = err ? err : errno;
    return err ? VBLK_ERR_LOCK : VBLK_OK;
}

VBLKDEF void vblk_locked_end(vblk_locked *locked) {
    pthread_mutex_destroy(&locked->mutex);
}

static int64_t vblk__locked_read(void *user, uint64_t offset,
                                 const vblk_seg *seg, unsigned segs) {
    vblk_locked *l = (vblk_locked *)user;
    pthread_mutex_lock(&l->mutex);
    int64_t n = l->inner.read(l->inner.user, offset, seg, segs);
    pthread_mutex_unlock(&l->mutex);
    return n;
}

static int64_t vblk__locked_write(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    vblk_locked *l = (vblk_locked *)user;
    pthread_mutex_lock(&l->mutex);
    int64_t n = l->inner.write(l->inner.user, offset, seg, segs);
    pthread_mutex_unlock(&l->mutex);
    return n;
}

static int vblk__locked_flush(void *user) {
    vblk_locked *l = (vblk_locked *)user;
    pthread_mutex_lock(&l->mutex);
    int err = l->inner.flush(l->inner.user);
    pthread_mutex_unlock(&l->mutex);
    return err;
}

static uint64_t vblk__locked_size(void *user) {
    vblk_locked *l = (vblk_locked *)user;
    pthread_mutex_lock(&l->mutex);
    uint64_t bytes = l->inner.size(l->inner.user);
    pthread_mutex_unlock(&l->mutex);
    return bytes;
}

VBLKDEF vblk_backend vblk_locked_backend(vblk_locked *locked) {
    const vblk_backend *inner = &locked->inner;
    vblk_backend b = {vblk__locked_read, NULL, NULL, NULL, inner->read_only,
                      NULL};
    b.write = inner->write ? vblk__locked_write : NULL;
    b.flush = inner->flush ? vblk__locked_flush : NULL;
    b.size = inner->size ? vblk__locked_size : NULL;
    b.user = locked;
    return b;
}


// ---- Blocking limiter -------------------------------------------------------

static uint64_t vblk__clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * VBLK__SECOND + (uint64_t)t.tv_nsec;
}

static void vblk__sleep(uint64_t ns) {
    struct timespec t;
    t.tv_sec = (time_t)(ns / VBLK__SECOND);
    t.tv_nsec = (long)(ns % VBLK__SECOND);
    while (nanosleep(&t, &t) && errno == EINTR) {
    }
}

static uint64_t vblk__steady(uint64_t rate, uint64_t burst) {
    return burst ? burst : rate < 10 ? 1 : rate / 10;
}

VBLKDEF int vblk_limiter_init(vblk_limiter *limiter, vblk_backend inner,
                              const vblk_limits *limits) {
    vblk_limits l = *limits;
    uint64_t tenth = l.bps / 10;
    if ((l.iops_burst && !l.iops) || (l.bps_burst && !l.bps) ||
        (l.iops | l.iops_burst | l.bps | l.bps_burst) > INT64_MAX) {
        return VBLK_ERR_LIMITS;
    }
    VBLK_MEMSET(limiter, 0, sizeof *limiter);
    int err = pthread_mutex_init(&limiter->mutex, NULL);
    errno = err ? err : errno;
    limiter->inner = inner;
    limiter->now = vblk__clock;
    limiter->sleep = vblk__sleep;
    // Whole pages suit direct I/O.
    limiter->share = !l.bps                ? UINT64_MAX
                     : tenth < VBLK_SECTOR ? VBLK_SECTOR
                     : tenth < 4096        ? tenth - tenth % VBLK_SECTOR
                                           : tenth - tenth % 4096;
    vblk_bucket_init(&limiter->ops, l.iops,
                     vblk__steady(l.iops, l.iops_burst));
    vblk_bucket_init(&limiter->bytes, l.bps,
                     vblk__steady(l.bps, l.bps_burst));
    return err ? VBLK_ERR_LOCK : VBLK_OK;
}

VBLKDEF void vblk_limiter_end(vblk_limiter *limiter) {
    pthread_mutex_destroy(&limiter->mutex);
}

// Take `n` tokens, which may be yet to come; until when, from now.
static uint64_t vblk__promise(vblk_bucket *b, uint64_t n, uint64_t now_ns) {
    vblk_bucket_refill(b, now_ns);
    vblk_bucket_take(b, n);
    // More than the bucket holds passes at the end of the debt.
    return n > 0 ? vblk_bucket_wait(b, UINT64_MAX, now_ns) : 0;
}

// Pay and wait for it. The lock makes the order of arrival.
static void vblk__limiter_pay(vblk_limiter *l, uint64_t ops, uint64_t bytes) {
    pthread_mutex_lock(&l->mutex);
    uint64_t now = l->ops.rate || l->bytes.rate ? l->now() : 0;
    uint64_t a = vblk__promise(&l->ops, ops, now);
    uint64_t b = vblk__promise(&l->bytes, bytes, now);
    pthread_mutex_unlock(&l->mutex);
    if (a > 0 || b > 0) {
        l->sleep(a > b ? a : b);
    }
}

// Whether a call at `offset` goes on with a request that was cut there, and
// how many bytes that has paid for.
static bool vblk__limiter_goes_on(vblk_limiter *l, uint64_t offset,
                                  uint64_t *paid) {
    const unsigned room = sizeof l->rest / sizeof l->rest[0];
    bool found = false;
    *paid = 0;
    pthread_mutex_lock(&l->mutex);
    for (unsigned i = 0; i < room && i < l->rests && !found; i++) {
        found = l->rest[i].at == offset;
        if (found) {
            *paid = l->rest[i].paid;
            l->rest[i].at = UINT64_MAX;
        }
    }
    pthread_mutex_unlock(&l->mutex);
    return found;
}

static void vblk__limiter_cut(vblk_limiter *l, uint64_t at, uint64_t paid) {
    const unsigned room = sizeof l->rest / sizeof l->rest[0];
    pthread_mutex_lock(&l->mutex);
    l->rest[l->rests % room].at = at;
    l->rest[l->rests % room].paid = paid;
    l->rests++;
    pthread_mutex_unlock(&l->mutex);
}

static int64_t vblk__limiter_move(vblk_limiter *l, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs,
                                  bool in) {
    vblk_seg part[VBLK_MAX_SEGS + 2 + VBLK__SPLITS];
    const unsigned room = sizeof part / sizeof part[0];
    uint64_t paid, n = 0;
    bool goes_on = vblk__limiter_goes_on(l, offset, &paid);
    uint64_t most = paid ? paid : l->share;
    unsigned parts = 0;
    while (parts < segs && parts < room && n < most) {
        part[parts] = seg[parts];
        if (part[parts].n > most - n) {
            part[parts].n = (size_t)(most - n);
        }
        n += part[parts++].n;
    }
    bool cut = parts < segs || part[parts - 1].n < seg[parts - 1].n;
    if (!paid) {
        vblk__limiter_pay(l, !goes_on, n);
        paid = n;
    }
    int64_t moved = in ? l->inner.read(l->inner.user, offset, part, parts)
                       : l->inner.write(l->inner.user, offset, part, parts);
    if (moved > 0 && (cut || (uint64_t)moved < n)) {
        vblk__limiter_cut(l, offset + (uint64_t)moved,
                          paid - (uint64_t)moved);
    }
    return moved;
}

static int64_t vblk__limiter_read(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    return vblk__limiter_move((vblk_limiter *)user, offset, seg, segs, true);
}

static int64_t vblk__limiter_write(void *user, uint64_t offset,
                                   const vblk_seg *seg, unsigned segs) {
    return vblk__limiter_move((vblk_limiter *)user, offset, seg, segs, false);
}

static int vblk__limiter_flush(void *user) {
    vblk_limiter *l = (vblk_limiter *)user;
    vblk__limiter_pay(l, 1, 0);
    return l->inner.flush(l->inner.user);
}

static uint64_t vblk__limiter_size(void *user) {
    vblk_limiter *l = (vblk_limiter *)user;
    return l->inner.size(l->inner.user);
}

VBLKDEF vblk_backend vblk_limiter_backend(vblk_limiter *limiter) {
    const vblk_backend *inner = &limiter->inner;
    vblk_backend b = {vblk__limiter_read, NULL, NULL, NULL, inner->read_only,
                      NULL};
    b.write = inner->write ? vblk__limiter_write : NULL;
    b.flush = inner->flush ? vblk__limiter_flush : NULL;
    b.size = inner->size ? vblk__limiter_size : NULL;
    b.user = limiter;
    return b;
}


#endif // VBLK_IMPLEMENTATION_FILES


#if defined(VBLK_IMPLEMENTATION_THREADED) && !defined(VBLK_THREADS_IMPLEMENTED)
#define VBLK_THREADS_IMPLEMENTED
#include <poll.h>
#include <sched.h>
#ifndef CPU_SETSIZE
#error "vblk.h: the worker needs _GNU_SOURCE: include vblk.h before any other \
header in this unit, or compile with -D_GNU_SOURCE"
#endif
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>


// ---- Worker: policy ---------------------------------------------------------

#define VBLK__MAX_WAIT VBLK__SECOND // the timer is set to no more

// Outside a callback the thread is busy for microseconds, or, without a
// processor to run on, for some milliseconds.
#define VBLK__AT_WORK_MS 100

// Tokens of the descriptors in the epoll set.
enum { VBLK__STOP, VBLK__KICK, VBLK__TIMER, VBLK__PAUSE, VBLK__TOKENS };

// What an event means: its token, or VBLK__TOKENS for one that is not ours.
// Errors and hang-ups count as the event itself: a drain too many is harmless,
// one too few is not.
static int vblk__meaning(uint64_t token) {
    return token < VBLK__TOKENS ? (int)token : VBLK__TOKENS;
}

// What a drain's outcome means: look at the events and drain again, or wait
// for one; and the timer's setting, 0 for none.
typedef struct vblk__plan {
    bool     again;
    uint64_t timer_ns;
} vblk__plan;

// A wait of 0 would disarm the timer: drain again at once, but only once.
static vblk__plan vblk__plan_after(vblk_outcome out, bool again_already) {
    vblk__plan plan = {false, 0};
    if (out.state == VBLK_MORE) {
        plan.again = true;
    } else if (out.state == VBLK_STALLED && out.wait_ns == 0) {
        plan.again = !again_already;
        plan.timer_ns = again_already ? 1 : 0;
    } else if (out.state == VBLK_STALLED) {
        plan.timer_ns = out.wait_ns < VBLK__MAX_WAIT ? out.wait_ns
                                                     : VBLK__MAX_WAIT;
    }
    return plan;
}


// ---- Worker: the thread's own -----------------------------------------------

// Where the thread is. AWAY: in a callback of the host, which may take
// forever; WORKING may take as long, on a page of guest memory.
//
//     thread      WORKING <-> AWAY, WORKING -> ENDED
//     the rest    AWAY, WORKING -> LEFT when the bound is over
//     thread      LEFT -> GONE, under `parking`: whoever finds it so frees
//                 this; or the thread itself, if `orphaned` was set before
enum { VBLK__WORKING, VBLK__AWAY, VBLK__ENDED, VBLK__LEFT, VBLK__GONE };

struct vblk__thread {
    uint32_t     state;   // atomic
    uint32_t     stop;    // atomic: leave at the next opportunity
    uint32_t     logging; // atomic: away in the log
    bool         stuck;   // left while WORKING: the device is in its hands
    bool         told;    // under `parking`: somebody waits for released()
    bool         inside;  // the thread's own: it is in a callback
    struct vblk__thread *next;
    pthread_t    id;
    vblk_worker *w;
    vblk_backend inner;
    jmp_buf      leave;
};

// The thread that is running, or is in released(); NULL in all others.
static __thread struct vblk__thread *vblk__self, *vblk__releasing;

static bool vblk__move_state(struct vblk__thread *t, uint32_t from,
                             uint32_t to) {
    return __atomic_compare_exchange_n(&t->state, &from, to, false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

// Around every callback of the host that the thread makes. The thread leaves
// by a jump if it was left behind, when the device is not its own any more, or
// if it is to stop: what it was at is thrown away by the reset that follows.
static void vblk__away(struct vblk__thread *t) {
    if (!vblk__move_state(t, VBLK__WORKING, VBLK__AWAY)) {
        longjmp(t->leave, 1);
    }
    t->inside = true;
}

static void vblk__back(struct vblk__thread *t) {
    t->inside = false;
    if (!vblk__move_state(t, VBLK__AWAY, VBLK__WORKING) ||
        __atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
        longjmp(t->leave, 1);
    }
}

// For callbacks that other threads make too, and the thread of another device
// from inside its backend. NULL if this is not the thread of `w` at work; else
// it is for vblk__return().
static struct vblk__thread *vblk__leave_for(const vblk_worker *w) {
    struct vblk__thread *t = vblk__self;
    if (!t || t->w != w || t->inside) {
        return NULL;
    }
    vblk__away(t);
    return t;
}

static void vblk__return(struct vblk__thread *t) {
    if (t) {
        vblk__back(t);
    }
}

static int64_t vblk__guarded_read(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    struct vblk__thread *t = (struct vblk__thread *)user;
    vblk__away(t);
    int64_t n = t->inner.read(t->inner.user, offset, seg, segs);
    vblk__back(t);
    return n;
}

static int64_t vblk__guarded_write(void *user, uint64_t offset,
                                   const vblk_seg *seg, unsigned segs) {
    struct vblk__thread *t = (struct vblk__thread *)user;
    vblk__away(t);
    int64_t n = t->inner.write(t->inner.user, offset, seg, segs);
    vblk__back(t);
    return n;
}

static int vblk__guarded_flush(void *user) {
    struct vblk__thread *t = (struct vblk__thread *)user;
    vblk__away(t);
    int err = t->inner.flush(t->inner.user);
    vblk__back(t);
    return err;
}


// ---- Worker: log, descriptors, interrupt ------------------------------------

// A hostile guest can make events at will: the default printer lets some lines
// a second through and counts the rest. `left_out` are those before this one.
static bool vblk__may_print(vblk_worker *w, uint64_t *left_out) {
    pthread_mutex_lock(&w->logging);
    vblk_bucket_refill(&w->lines, vblk__clock());
    bool may = vblk_bucket_can_take(&w->lines, 1);
    vblk_bucket_take(&w->lines, may);
    *left_out = w->left_out;
    w->left_out = may ? 0 : w->left_out + 1;
    pthread_mutex_unlock(&w->logging);
    return may;
}

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void vblk__log(vblk_worker *w, vblk_level level, const char *format,
                      ...) {
    char line[320];
    uint64_t left_out = 0;
    va_list args;
    int n = snprintf(line, sizeof line, "vblk%d: ", w->number);
    va_start(args, format);
    vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    va_end(args);
    if (!w->wo.log && !vblk__may_print(w, &left_out)) {
        return;
    }
    // No lock is held from here on: a log may block like any callback.
    struct vblk__thread *t = vblk__leave_for(w);
    if (t) {
        __atomic_store_n(&t->logging, 1, __ATOMIC_RELEASE);
    }
    if (w->wo.log) {
        w->wo.log(w->wo.user, level, line);
    } else if (left_out) {
        fprintf(stderr, "(%llu lines left out)\n%s\n",
                (unsigned long long)left_out, line);
    } else {
        fprintf(stderr, "%s\n", line);
    }
    if (t) {
        __atomic_store_n(&t->logging, 0, __ATOMIC_RELEASE);
    }
    vblk__return(t);
}

static vblk_level vblk__level(vblk_event_code code) {
    switch ((int)code) {
    case VBLK_EV_CAPACITY_ZERO:
    case VBLK_EV_READ_FAILED:
    case VBLK_EV_WRITE_FAILED:
    case VBLK_EV_WRITE_STUCK:
    case VBLK_EV_FLUSH_FAILED:   return VBLK_LEVEL_ERROR;
    case VBLK_EV_CAPACITY_LARGE:
    case VBLK_EV_HOST_RESET:
    case VBLK_EV_NO_MEMORY:      return VBLK_LEVEL_NOTE;
    default:                     return VBLK_LEVEL_WARNING;
    }
}

static void vblk__worker_event(void *user, const vblk_event *e) {
    vblk_worker *w = (vblk_worker *)user;
    if (w->o.event) {
        struct vblk__thread *t = vblk__leave_for(w);
        w->o.event(w->o.user, e);
        vblk__return(t);
    } else if (e->queue == VBLK_NO_QUEUE) {
        vblk__log(w, vblk__level(e->code), "%s [%#llx, %#llx]",
                  vblk_event_text(e->code), (unsigned long long)e->a,
                  (unsigned long long)e->b);
    } else {
        vblk__log(w, vblk__level(e->code),
                  "queue %d, head %u: %s [%#llx, %#llx]", e->queue,
                  (unsigned)e->head, vblk_event_text(e->code),
                  (unsigned long long)e->a, (unsigned long long)e->b);
    }
}

// Add 1 to an eventfd. A full counter is as good; other failures are not to be
// had with a descriptor that is open and does not block.
static void vblk__signal(int fd) {
    const uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n;
}

// Take what an eventfd or timerfd holds, neither of which blocks. False if the
// descriptor is broken.
static bool vblk__drain_fd(int fd) {
    uint64_t count;
    return read(fd, &count, sizeof count) >= 0 || errno == EAGAIN;
}

static void vblk__worker_interrupt(void *user, int queue, bool fire) {
    vblk_worker *w = (vblk_worker *)user;
    struct vblk__thread *t = vblk__leave_for(w);
    if (fire) {
        vblk__signal(w->irq_fd);
    }
    if (w->o.interrupt) {
        w->o.interrupt(w->o.user, queue, fire);
    }
    vblk__return(t);
}

// To a moment on the clock; one that has passed fires at once.
static bool vblk__set_timer(vblk_worker *w, uint64_t ns) {
    struct itimerspec t;
    t.it_interval.tv_sec = 0;
    t.it_interval.tv_nsec = 0;
    t.it_value.tv_sec = (time_t)(ns / VBLK__SECOND);
    t.it_value.tv_nsec = (long)(ns % VBLK__SECOND);
    return timerfd_settime(w->timer_fd, TFD_TIMER_ABSTIME, &t, NULL) == 0;
}


// ---- Worker: the thread -----------------------------------------------------

// With `parking` held: the thread rests, or there is none. Release: whoever
// sees it sees all that the thread wrote.
static void vblk__now_parked(vblk_worker *w) {
    __atomic_store_n(&w->parked, 1, __ATOMIC_RELEASE);
    if (w->pause && !w->parked_told && vblk_worker_paused(w)) {
        w->parked_told = true;
        if (w->parked_fd >= 0) {
            vblk__signal(w->parked_fd);
        }
    }
    pthread_cond_broadcast(&w->changed);
}

static void vblk__at_rest(vblk_worker *w) {
    pthread_mutex_lock(&w->parking);
    vblk__now_parked(w);
    pthread_mutex_unlock(&w->parking);
}

// Rest as long as the host or the library asks for it.
static void vblk__rest(vblk_worker *w, struct vblk__thread *t) {
    cpu_set_t set;
    pthread_mutex_lock(&w->parking);
    while ((w->pause || w->hold) &&
           !__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
        vblk__now_parked(w);
        pthread_cond_wait(&w->changed, &w->parking);
    }
    if (!__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(&w->parked, 0, __ATOMIC_RELEASE);
        VBLK__STORE(&w->dev.yield, 0);
    }
    bool move = !w->placed;
    w->placed = true;
    memcpy(&set, w->cpu_set, sizeof set);
    pthread_mutex_unlock(&w->parking);
    if (move && sched_setaffinity(0, sizeof set, &set)) {
        vblk__log(w, VBLK_LEVEL_WARNING, "cannot run on the given cpus (errno "
                  "%d); going on where the kernel likes", errno);
    }
}

// Wait for events and tell which came. False: epoll or a descriptor is broken.
static bool vblk__wait(vblk_worker *w, bool dont, bool *came) {
    const int fds[VBLK__TOKENS] = {w->stop_fd, w->kick_fd, w->timer_fd,
                                   w->pause_fd};
    struct epoll_event events[VBLK__TOKENS];
    int n = epoll_wait(w->epoll_fd, events, VBLK__TOKENS, dont ? 0 : -1);
    for (int i = 0; i < VBLK__TOKENS; i++) {
        came[i] = false;
    }
    if (n < 0) {
        return errno == EINTR;
    }
    for (int i = 0; i < n; i++) {
        int token = vblk__meaning(events[i].data.u64);
        if (events[i].events & ~(uint32_t)EPOLLIN) {
            vblk__log(w, VBLK_LEVEL_ERROR, "descriptor %d: events %#x", token,
                      (unsigned)events[i].events);
        }
        if (token == VBLK__TOKENS) {
            vblk__log(w, VBLK_LEVEL_ERROR,
                      "an event of no descriptor of ours is skipped");
            continue;
        }
        came[token] = true;
        if (!vblk__drain_fd(fds[token])) {
            return false;
        }
    }
    return true;
}

// A kick while a queue is stalled, and its timer set: the others are looked at,
// so that what costs nothing waits for nobody. What comes faster than that is
// a kick again.
static void vblk__drain_others(vblk_worker *w, uint64_t now_ns) {
    for (unsigned i = 0; i < w->dev.o.queues; i++) {
        if (!w->dev.queue[i].stalled &&
            vblk__drain_one(&w->dev, (int)i, now_ns).state == VBLK_MORE) {
            vblk_worker_kick(w);
        }
    }
}

static void vblk__serve_until_stopped(vblk_worker *w, struct vblk__thread *t) {
    bool came[VBLK__TOKENS];
    bool stalled = false; // the timer is set, and kicks can wait for it
    bool again = true;    // the first time for what waits already (Q10)
    bool retried = false;
    for (;;) {
        vblk__rest(w, t);
        if (!vblk__wait(w, again, came)) {
            vblk__log(w, VBLK_LEVEL_ERROR, "waiting for events failed (errno "
                      "%d): the device needs a reset", errno);
            vblk_needs_reset(&w->dev);
            return;
        }
        if (__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
            return;
        }
        if (came[VBLK__TIMER]) {
            stalled = false;
            again = true;
        }
        again = again || (came[VBLK__KICK] && !stalled);
        bool limited = w->dev.ops.rate || w->dev.bytes.rate;
        uint64_t now = limited ? vblk__clock() : 0;
        if (came[VBLK__KICK] && stalled && came[VBLK__PAUSE]) {
            vblk_worker_kick(w); // for after the rest
        } else if (came[VBLK__KICK] && stalled) {
            vblk__drain_others(w, now);
        }
        if (came[VBLK__PAUSE] || !again) {
            continue;
        }
        // All: the kick may have come by the descriptor alone.
        vblk_outcome out = vblk_drain(&w->dev, VBLK_ALL_QUEUES, now);
        vblk__plan plan = vblk__plan_after(out, retried);
        retried = plan.again && out.state == VBLK_STALLED;
        again = plan.again;
        stalled = plan.timer_ns > 0;
        if (stalled && !vblk__set_timer(w, now + plan.timer_ns)) {
            vblk__log(w, VBLK_LEVEL_ERROR, "the timer cannot be set (errno "
                      "%d): the device needs a reset", errno);
            vblk_needs_reset(&w->dev);
            return;
        }
    }
}

static void vblk__dispose(vblk_worker *w) {
    const int fds[] = {w->epoll_fd, w->stop_fd, w->timer_fd, w->pause_fd,
                       w->done_fd,  w->irq_fd,  w->kick_fd};
    for (unsigned i = 0; i < w->dev.o.queues; i++) {
        vblk__end_stall(&w->dev, &w->dev.queue[i], 0); // T5
    }
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->registers);
    pthread_mutex_destroy(&w->parking);
    pthread_mutex_destroy(&w->logging);
}

// Back, after it was left behind: first the state that released() speaks of.
static void vblk__come_back(struct vblk__thread *t) {
    vblk_worker *w = t->w;
    void (*released)(void *) = w->wo.released;
    void *user = w->wo.user;
    pthread_mutex_lock(&w->parking);
    bool orphaned = w->orphaned;
    bool told = t->told;
    __atomic_store_n(&t->state, VBLK__GONE, __ATOMIC_RELEASE);
    __atomic_store_n(&w->left, 0, __ATOMIC_RELEASE);
    if (!orphaned) {
        vblk__now_parked(w);
    }
    pthread_mutex_unlock(&w->parking);
    if (orphaned) {
        vblk__dispose(w);
        free(t);
    } else {
        vblk__releasing = t;
    }
    if (told && released) {
        released(user);
    }
}

static void *vblk__thread_main(void *arg) {
    struct vblk__thread *t = (struct vblk__thread *)arg;
    vblk_worker *w = t->w;
    char name[16];
    vblk__self = t;
    if (setjmp(t->leave) == 0) {
        snprintf(name, sizeof name, "vblk%d", w->number);
        prctl(PR_SET_NAME, name);
        vblk__serve_until_stopped(w, t);
    }
    vblk__self = NULL;
    if (vblk__move_state(t, VBLK__WORKING, VBLK__ENDED)) {
        vblk__at_rest(w);
        vblk__signal(w->done_fd); // the stopper joins, then frees t
    } else {
        vblk__come_back(t);
    }
    return NULL;
}


// ---- Worker: start, stop, pause ---------------------------------------------

static uint64_t vblk__deadline(unsigned ms, struct timespec *at) {
    uint64_t ns = vblk__clock() + (uint64_t)ms * 1000000;
    at->tv_sec = (time_t)(ns / VBLK__SECOND);
    at->tv_nsec = (long)(ns % VBLK__SECOND);
    return ns;
}

// A thread with the signals of its own faults alone: a handler for the rest
// belongs to others, and the caller's mask is an accident.
static int vblk__create(struct vblk__thread *t) {
    static const int own[] = {SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP};
    sigset_t others, before;
    sigfillset(&others);
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) {
        sigdelset(&others, own[i]);
    }
    pthread_sigmask(SIG_SETMASK, &others, &before);
    int err = pthread_create(&t->id, NULL, vblk__thread_main, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return err;
}

static void vblk__start(vblk_worker *w) {
    struct vblk__thread *t =
        (struct vblk__thread *)calloc(1, sizeof *t);
    int err = ENOMEM;
    if (t) {
        t->w = w;
        t->inner = w->o.backend;
        w->dev.o.backend.user = t;
        vblk__drain_fd(w->stop_fd);
        vblk__drain_fd(w->done_fd);
        pthread_mutex_lock(&w->parking);
        w->placed = false;
        // A pause that was asked for before holds from the first moment on.
        __atomic_store_n(&w->parked, w->pause, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&w->parking);
        err = vblk__create(t);
    }
    if (err) {
        free(t);
        vblk__at_rest(w);
        vblk__log(w, VBLK_LEVEL_ERROR, "the thread cannot be started (error "
                  "%d): the device needs a reset", err);
        vblk_needs_reset(&w->dev);
        return;
    }
    w->thread = t;
}

// Whether the thread says within `ms` that it has ended.
static bool vblk__ends_within(vblk_worker *w, unsigned ms) {
    struct timespec at;
    uint64_t deadline = vblk__deadline(ms, &at);
    for (;;) {
        struct pollfd p = {w->done_fd, POLLIN, 0};
        uint64_t now = vblk__clock();
        uint64_t left = now < deadline ? deadline - now : 0;
        int n = poll(&p, 1, (int)((left + 999999) / 1000000));
        if (n >= 0 || errno != EINTR) {
            return n > 0;
        }
    }
}

// The bound is over. True: the thread is left behind, in a callback of the host
// or, as it does not come out of the device's own code either, within that.
static bool vblk__leave_behind(vblk_worker *w, struct vblk__thread *t) {
    for (unsigned ms = 0; ms < VBLK__AT_WORK_MS; ms++) {
        if (vblk__move_state(t, VBLK__AWAY, VBLK__LEFT)) {
            return true;
        }
        if (vblk__ends_within(w, 1)) {
            return false;
        }
    }
    t->stuck = vblk__move_state(t, VBLK__WORKING, VBLK__LEFT);
    return t->stuck || vblk__move_state(t, VBLK__AWAY, VBLK__LEFT);
}

// Stop and join the thread, or leave it behind.
static void vblk__stop(vblk_worker *w) {
    struct vblk__thread *t = w->thread;
    if (!t) {
        return;
    }
    w->thread = NULL;
    pthread_mutex_lock(&w->parking);
    __atomic_store_n(&t->stop, 1, __ATOMIC_RELEASE);
    VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    vblk__signal(w->stop_fd);
    vblk__signal(w->pause_fd); // wakes it too
    if (vblk__ends_within(w, w->wo.stop_ms) || !vblk__leave_behind(w, t)) {
        vblk__at_rest(w);
        pthread_join(t->id, NULL);
        free(t);
        return;
    }
    // A log that the thread is stuck in would stop this one too.
    bool log = !__atomic_load_n(&t->logging, __ATOMIC_ACQUIRE);
    pthread_mutex_lock(&w->parking);
    VBLK__STORE(&w->dev.yield, VBLK__HALT);
    // It may be back already.
    bool gone = __atomic_load_n(&t->state, __ATOMIC_ACQUIRE) == VBLK__GONE;
    __atomic_store_n(&w->left, !gone, __ATOMIC_RELEASE);
    t->told = !gone;
    vblk__now_parked(w);
    pthread_mutex_unlock(&w->parking);
    w->left_behind = t;
    if (log) {
        vblk__log(w, VBLK_LEVEL_ERROR, "the %s within %u ms: the thread is "
                  "left behind, the device needs a reset once it has ended",
                  t->stuck ? "device got no page of guest memory"
                           : "backend did not return", w->wo.stop_ms);
    }
}

// With `registers` held: whether no thread is left behind. One that is back
// may still be in released(), and is not waited for.
static bool vblk__collect(vblk_worker *w) {
    struct vblk__thread *t = w->left_behind;
    if (t && __atomic_load_n(&t->state, __ATOMIC_ACQUIRE) == VBLK__GONE) {
        t->next = w->returned;
        w->returned = t;
        w->left_behind = NULL;
    }
    for (struct vblk__thread **p = &w->returned; *p;) {
        t = *p;
        if (t == vblk__releasing || pthread_tryjoin_np(t->id, NULL)) {
            p = &t->next;
        } else {
            *p = t->next;
            free(t);
        }
    }
    return !w->left_behind;
}

// With `registers` held.
static bool vblk__worker_reset(vblk_worker *w) {
    vblk__stop(w);
    if (vblk__collect(w)) {
        vblk__reset(&w->dev, 0);
    } else if (!w->left_behind->stuck) {
        vblk__reset(&w->dev, VBLK_STATUS_NEEDS_RESET);
    } else { // the queues are in its hands
        vblk__change_state(&w->dev, 0, VBLK_STATUS_NEEDS_RESET);
    }
    vblk__drain_fd(w->irq_fd);
    vblk__drain_fd(w->kick_fd);
    vblk__drain_fd(w->pause_fd);
    return !w->left_behind;
}

// Bring the thread to rest for the library's own purposes; on true, `parking`
// is held until vblk__let_go(). With `registers` held.
static bool vblk__hold_still(vblk_worker *w) {
    struct timespec at;
    if (__atomic_load_n(&w->left, __ATOMIC_ACQUIRE)) {
        return false; // its system call may still move data
    }
    vblk__deadline(w->wo.stop_ms, &at);
    pthread_mutex_lock(&w->parking);
    w->hold = true;
    VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    vblk__signal(w->pause_fd);
    while (!w->parked && pthread_cond_timedwait(&w->changed, &w->parking,
                                                &at) != ETIMEDOUT) {
    }
    w->hold = false;
    if (!w->parked) {
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->parking);
        return false;
    }
    return true;
}

// Whatever was changed, the queues are looked at once more, stalled or not.
static void vblk__let_go(vblk_worker *w) {
    vblk__set_timer(w, 1);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
}

VBLKDEF bool vblk_worker_pause(vblk_worker *w, unsigned ms) {
    struct timespec at;
    vblk__deadline(ms, &at);
    pthread_mutex_lock(&w->parking);
    if (!w->pause) {
        w->pause = true;
        w->parked_told = false;
        if (w->parked) {
            vblk__now_parked(w);
        }
    }
    if (!__atomic_load_n(&w->left, __ATOMIC_ACQUIRE)) { // which is to HALT
        VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    }
    vblk__signal(w->pause_fd);
    while (w->pause && !w->parked &&
           pthread_cond_timedwait(&w->changed, &w->parking, &at) !=
               ETIMEDOUT) {
    }
    bool parked = w->pause && vblk_worker_paused(w);
    pthread_mutex_unlock(&w->parking);
    return parked;
}

VBLKDEF bool vblk_worker_resume(vblk_worker *w) {
    pthread_mutex_lock(&w->parking);
    bool was = w->pause;
    w->pause = false;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    return was;
}

VBLKDEF void vblk_worker_set_parked_fd(vblk_worker *w, int fd) {
    pthread_mutex_lock(&w->parking);
    w->parked_fd = fd;
    pthread_mutex_unlock(&w->parking);
}

VBLKDEF bool vblk_worker_paused(const vblk_worker *w) {
    return __atomic_load_n(&w->parked, __ATOMIC_ACQUIRE) &&
           !__atomic_load_n(&w->left, __ATOMIC_ACQUIRE);
}


// ---- Worker: what the host calls --------------------------------------------

VBLKDEF void vblk_worker_kick(vblk_worker *w) {
    vblk__signal(w->kick_fd);
}

// The register calls that are not instant: 0 to Status, and starting or
// stopping a live queue. With `registers` held.
static void vblk__worker_store(vblk_worker *w, uint64_t offset,
                               unsigned bytes, uint64_t value) {
    bool ready = offset == VBLK_REG_QUEUE_READY && bytes == 4 && w->thread &&
                 w->o.profile == VBLK_STANDARD;
    if (offset == VBLK_REG_STATUS && bytes == 4 && (uint32_t)value == 0) {
        vblk__worker_reset(w);
        return;
    }
    if (ready && !vblk__hold_still(w)) {
        vblk__log(w, VBLK_LEVEL_ERROR, "the backend did not return within %u "
                  "ms: a queue could not be started or stopped",
                  w->wo.stop_ms);
        vblk_needs_reset(&w->dev);
        return;
    }
    int queue = vblk_mmio_write(&w->dev, offset, bytes, value);
    if (ready) {
        vblk__let_go(w);
    } else if (queue == VBLK_ALL_QUEUES) {
        vblk__start(w);
    }
}

VBLKDEF void vblk_worker_mmio_write(vblk_worker *w, uint64_t offset,
                                    unsigned bytes, uint64_t value) {
    if (offset == VBLK_REG_QUEUE_NOTIFY && bytes == 4) {
        // The thread looks whether the queue is live.
        if ((uint32_t)value < w->dev.o.queues) {
            vblk_worker_kick(w);
        } else {
            vblk__say(&w->dev, VBLK_NO_QUEUE, VBLK_EV_NOTIFY_NO_QUEUE, 0,
                      (uint32_t)value, 0);
        }
    } else if (offset == VBLK_REG_INTERRUPT_ACK && bytes == 4) {
        vblk_interrupt_ack(&w->dev, (uint32_t)value);
    } else {
        pthread_mutex_lock(&w->registers);
        vblk__worker_store(w, offset, bytes, value);
        pthread_mutex_unlock(&w->registers);
    }
}

VBLKDEF bool vblk_worker_reset(vblk_worker *w) {
    pthread_mutex_lock(&w->registers);
    // From released(): the guest may have reset the device before.
    struct vblk__thread *t = vblk__releasing;
    bool late = t && t->w == w && t != w->left_behind;
    bool usable = late || vblk__worker_reset(w);
    pthread_mutex_unlock(&w->registers);
    return usable;
}

VBLKDEF int vblk_worker_set_memory(vblk_worker *w, vblk_memory memory) {
    pthread_mutex_lock(&w->registers);
    int err = vblk__hold_still(w) ? VBLK_OK : VBLK_ERR_BUSY;
    if (!err) {
        err = vblk_set_memory(&w->dev, memory);
        vblk__let_go(w);
    }
    pthread_mutex_unlock(&w->registers);
    return err;
}

VBLKDEF int vblk_worker_set_limits(vblk_worker *w, const vblk_limits *limits) {
    pthread_mutex_lock(&w->registers);
    int err = vblk__hold_still(w) ? VBLK_OK : VBLK_ERR_BUSY;
    if (!err) {
        err = vblk_set_limits(&w->dev, limits, vblk__clock());
        vblk__let_go(w);
    }
    pthread_mutex_unlock(&w->registers);
    return err;
}

VBLKDEF int vblk_worker_set_cpus(vblk_worker *w, const int *cpus,
                                 unsigned count) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (unsigned i = 0; i < count; i++) {
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE) {
            return VBLK_ERR_CPUS;
        }
        CPU_SET((unsigned)cpus[i], &set);
    }
    pthread_mutex_lock(&w->parking);
    memcpy(w->cpu_set, count ? (void *)&set : (void *)w->any_cpu, sizeof set);
    w->placed = false;
    vblk__signal(w->pause_fd); // the thread moves itself
    pthread_mutex_unlock(&w->parking);
    return VBLK_OK;
}

static int vblk__make_condition(pthread_cond_t *c) {
    pthread_condattr_t attr;
    int err = pthread_condattr_init(&attr);
    if (!err) {
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        err = pthread_cond_init(c, &attr);
        pthread_condattr_destroy(&attr);
    }
    return err;
}

static int vblk__make_locks(vblk_worker *w) {
    pthread_mutex_t *lock[] = {&w->registers, &w->parking, &w->logging};
    unsigned made = 0;
    int err = 0;
    while (!err && made < 3) {
        err = pthread_mutex_init(lock[made], NULL);
        made += !err;
    }
    err = err ? err : vblk__make_condition(&w->changed);
    while (err && made > 0) {
        pthread_mutex_destroy(lock[--made]);
    }
    return err;
}

static bool vblk__open_all(vblk_worker *w) {
    const int flags = EFD_NONBLOCK | EFD_CLOEXEC;
    w->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    w->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    w->stop_fd = eventfd(0, flags);
    w->pause_fd = eventfd(0, flags);
    w->kick_fd = eventfd(0, flags);
    w->done_fd = eventfd(0, flags);
    w->irq_fd = eventfd(0, flags);
    const int fds[VBLK__TOKENS] = {w->stop_fd, w->kick_fd, w->timer_fd,
                                   w->pause_fd};
    for (unsigned i = 0; i < VBLK__TOKENS; i++) {
        struct epoll_event event;
        if (w->epoll_fd < 0 || fds[i] < 0) {
            return false; // with the errno of the first that failed
        }
        memset(&event, 0, sizeof event);
        event.events = EPOLLIN;
        event.data.u64 = i;
        if (epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, fds[i], &event)) {
            return false;
        }
    }
    return w->done_fd >= 0 && w->irq_fd >= 0;
}

VBLKDEF int vblk_worker_init(vblk_worker *w, const vblk_options *o,
                             const vblk_worker_options *wo) {
    static int numbers;
    vblk_options mine = *o;
    memset(w, 0, sizeof *w);
    w->o = *o;
    if (wo) {
        w->wo = *wo;
    }
    w->wo.stop_ms = w->wo.stop_ms ? w->wo.stop_ms : 1000;
    if (w->wo.stop_ms > INT_MAX) {
        return VBLK_ERR_STOP_MS;
    }
    w->parked = 1;
    w->parked_fd = -1;
    w->number = __atomic_fetch_add(&numbers, 1, __ATOMIC_RELAXED);
    vblk_bucket_init(&w->lines, 10, 50);
    mine.event = vblk__worker_event;
    mine.interrupt = vblk__worker_interrupt;
    mine.user = w;
    cpu_set_t any;
    CPU_ZERO(&any);
    VBLK_ASSERT(sizeof any <= sizeof w->any_cpu);
    sched_getaffinity(0, sizeof any, &any);
    memcpy(w->any_cpu, &any, sizeof any);
    memcpy(w->cpu_set, &any, sizeof any);
    int err = vblk__make_locks(w);
    if (err) {
        errno = err;
        return VBLK_ERR_WORKER;
    }
    if (!vblk__open_all(w)) {
        int saved = errno;
        vblk__dispose(w);
        errno = saved;
        return VBLK_ERR_WORKER;
    }
    err = vblk_init(&w->dev, &mine);
    if (err) {
        vblk__dispose(w);
        return err;
    }
    vblk_backend *b = &w->dev.o.backend;
    b->read = vblk__guarded_read;
    b->write = b->write ? vblk__guarded_write : NULL;
    b->flush = b->flush ? vblk__guarded_flush : NULL;
    b->size = NULL; // asked once
    return VBLK_OK;
}

VBLKDEF bool vblk_worker_end(vblk_worker *w) {
    pthread_mutex_lock(&w->registers);
    vblk__stop(w);
    bool left = !vblk__collect(w);
    struct vblk__thread *t = w->returned;
    w->returned = NULL;
    pthread_mutex_lock(&w->parking);
    pthread_mutex_unlock(&w->registers);
    if (left && __atomic_load_n(&w->left, __ATOMIC_ACQUIRE)) {
        w->orphaned = true;
        pthread_detach(w->left_behind->id);
    } else if (left) { // it came back just now
        w->left_behind->next = t;
        t = w->left_behind;
        left = false;
    }
    pthread_mutex_unlock(&w->parking);
    while (t) { // released() is to return, unless this is called by it
        struct vblk__thread *next = t->next;
        if (t == vblk__releasing) {
            pthread_detach(t->id);
            vblk__releasing = NULL;
        } else {
            pthread_join(t->id, NULL);
        }
        free(t);
        t = next;
    }
    if (!left) {
        vblk__dispose(w);
    }
    return !left;
}

#endif // VBLK_IMPLEMENTATION_THREADED


/*
This software is available under two licenses; choose whichever you prefer.

------------------------------------------------------------------------------
ALTERNATIVE A - MIT License

Copyright (c) 2026 the vblk.h authors

Permission is hereby granted, free of charge, to any person obtaining a copy of
this software and associated documentation files (the "Software"), to deal in
the Software without restriction, including without limitation the rights to
use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
of the Software, and to permit persons to whom the Software is furnished to do
so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

------------------------------------------------------------------------------
ALTERNATIVE B - Public Domain (www.unlicense.org)

This is free and unencumbered software released into the public domain.

Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
software, either in source code form or as a compiled binary, for any purpose,
commercial or non-commercial, and by any means.

In jurisdictions that recognize copyright laws, the author or authors of this
software dedicate any and all copyright interest in the software to the public
domain. We make this dedication for the benefit of the public at large and to
the detriment of our heirs and successors. We intend this dedication to be an
overt act of relinquishment in perpetuity of all present and future rights to
this software under copyright law.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
