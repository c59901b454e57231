/*
    vblk.h - v0.2.0 - the device side of virtio-blk in one C99 header

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

    QUICK START

        static uint8_t ram[64 << 20];                 // guest memory at 0
        static uint8_t disk[1 << 20];

        static const vblk_region  region = {.bytes = sizeof ram, .host = ram};
        static const vblk_regions guest  = {.region = &region, .count = 1};
        static vblk_ramdisk       image  = {.data = disk, .bytes = sizeof disk};
        static vblk_dev           dev;

        static void interrupt(void *user, int queue, bool fire) {
            if (fire) inject_irq(user);
        }

        vblk_options o = {0};
        o.memory    = vblk_regions_memory(&guest);
        o.backend   = vblk_ramdisk_backend(&image);
        o.interrupt = interrupt;
        int err = vblk_init(&dev, &o);
        if (err) fprintf(stderr, "disk: %s\n", vblk_strerror(err));

    Where the guest loads from and stores to the 0x200-byte register window:

        value = vblk_mmio_read(&dev, offset, bytes);
        vblk_mmio_write(&dev, offset, bytes, value);

    And in the loop that runs the guest:

        next = vblk_poll(&dev, now());

    vblk_poll() does what is to be done and says when to call it next: at that
    time on your clock, or after a store, whichever comes first. Calling it
    too often is harmless. Tell the guest where the window is and which is its
    interrupt: by a "virtio,mmio" node in the device tree, by an "LNRO0005" in
    ACPI's tables, or, where Linux was built to take it, by its option
    virtio_mmio.device=. examples/demo.c is all this, with a driver.

    YOU PROVIDE

    Guest memory is a vblk_memory: read and write copy between guest-physical
    addresses and a buffer, and refuse what is not guest memory; where the
    host can reach guest memory by pointer there is map too: rings are looked
    up once then and data moves without a copy. vblk_regions_memory() has all
    three for plain RAM in one or several pieces.

    A backend is a vblk_backend: read, write, flush and size over scattered
    memory, and what is optional. vblk_ramdisk_backend() is one over an array;
    the POSIX part has files. What the guest is offered follows from it: no
    write, a read-only disk; no flush, no FLUSH. So set one of them to NULL
    for that, or replace it: a disk in a shared mapping gets a flush of yours
    that calls msync(). A slot without a disk needs no device: MagicValue
    0x74726976, Version 2 and all else 0 tell the driver.

    The interrupt function is called with true to fire: an edge (an irqfd, a
    message). For a level line ignore that, and set the line, under your own
    lock, to vblk_interrupt_line(): it is called whenever that may change.

    Options are one struct. Zero is the default in every field, so start from
    {0}, in C++ from {}, and name what differs. One queue is built into the
    device; for more, give an array of vblk_queue and its length.

    REQUEST LIFE

        driver's ring -> vblk_next() -> request -> you -> vblk_complete()
                      -> vblk_publish() -> used ring, interrupt

    vblk_next() takes a chain, validates it whole, and hands out a request:
    a byte range of the disk and the guest memory it goes to or comes from, or
    ranges. What the device can answer alone (a bad request, GET_ID) never
    shows. vblk_poll() and vblk_drain() are a loop around these three and the
    backend. Every chain that is taken ends in one way: completed once, dropped
    by rule V1, V2 or V17, NEEDS_RESET, or thrown away as its queue stops.

    TIME

    now_ns is any clock that does not go backwards, in nanoseconds, and never
    comes to VBLK_NEVER. Without a limit nothing looks at it: pass 0. With one,
    a request may have to wait: it stays in the ring, unseen by the guest, and
    nothing passes it; it goes at the time that was returned, and not a
    nanosecond earlier. The guest will not notify again for it, so the call is
    yours to make. Of several queues, the first to stall goes.

    OTHER HOSTS

    For a thread pool, or asynchronous I/O of your own:

        while ((slot = a_free_one()) &&
               vblk_next(dev, queue, now, &slot->req, slot->seg, ROOM)) {
            start(slot);
        }
        for each slot that has ended:
            vblk_complete(dev, &slot->req, slot->result);
        next = slot ? vblk_arm(dev, queue, now)  // the ring is empty
                    : (vblk_publish(dev, queue), VBLK_NEVER);

    Requests end in any order, and point to segments in an array of yours. The
    rest of a short transfer is yours to go on with. Of the backend only what
    there is counts then, and size. A request with `durable` set must be on
    stable storage before it is completed. Set to NULL what you do not do, such
    as discard. examples/pool.c says and does it all.

    options.quiesce is called when the driver resets the device or stops a
    queue, also where nothing is under way: what there is belongs to the guest
    again, so cancel it or wait it out there. What is cancelled needs no
    vblk_complete(), which throws away a request of an earlier session.

    For io_uring on Linux there is an engine, vblk_engine_poll() in place of
    vblk_poll(): hundreds of requests under way, on a vblk_file, and a backend
    where the file cannot. examples/serve, a vhost-user daemon, runs on it.

    For a thread per device, or one for each queue, vblk_worker_init() and what
    follows it (Linux); they have engines. A kick is then an eventfd and a vCPU
    never waits for the disk. Stopping is bounded whatever the backend does: a
    thread stuck in it is left behind and touches nothing afterwards. What its
    system call itself still moves is beyond anybody's reach; therefore Status
    shows DEVICE_NEEDS_RESET until it has ended, and released() says when
    backend and memory may go. Other callbacks than the backend, the interrupt
    and the event hook must not block. A worker serves an interpreter too, if
    the guest's fences are fences of the host, its stores to rings one access.

    On KVM kick_fd is the ioeventfd of QueueNotify, of four bytes, without a
    datamatch (each_queue: vblk_worker_kick_fd(), its number to match), irq_fd
    an irqfd, of an edge, where KVM has the interrupt controllers. For a level,
    give that a resample descriptor: KVM signals it when the guest has ended an
    interrupt; if vblk_interrupt_line() is true then, signal irq_fd again. Or
    set KVM_IRQ_LINE to vblk_interrupt_line() at options.interrupt, under a
    lock of yours, and have no irqfd. examples/kvm.c is a VMM, with level too.

    For threads of your own, one for each queue, options.notify wakes them, and
    they call vblk_drain() under a lock of their queue (or, with limits, of the
    device). quiesce() takes that lock, and whoever made the register call
    gives it back when that has returned; notify() may come in between, so it
    takes another. examples/queues.c does that.

    Two libraries of one program may each have the header to themselves, of any
    version: with VBLK_STATIC in each. Readers of C declarations take what is
    before the implementation, preprocessed, as examples/rig.py in Python does.

    THREADS

    The core starts none and takes no lock. Three kinds of call:

        registers   vblk_mmio_write, vblk_set_memory, vblk_set_status,
                    vblk_set_driver_features, vblk_queue_start,
                    vblk_queue_stop, vblk_resize
        draining    vblk_poll, vblk_drain, vblk_next, vblk_complete,
                    vblk_publish, vblk_arm, vblk_set_limits
        any time    vblk_mmio_read, vblk_notify, vblk_interrupt_ack,
                    vblk_write_config, vblk_needs_reset, all queries, and,
                    while their request is under way, vblk_get and vblk_put

    Register calls: one at a time for a device. Draining calls: one at a time
    for a queue; different queues may be drained by different threads, unless
    a limit is set: then one at a time for the device. vblk_poll() and
    vblk_set_limits() are of every queue. An engine's calls drain its queues,
    all from the thread that opened it; with a limit, engines share a lock.
    A worker's threads see to all this: its calls are free.

    With options.access_platform addresses mean what your memory functions make
    of them, say an IOMMU's. What map gave out must stay until the next
    vblk_set_memory(), so where mappings come and go leave map out: then each
    access asks, and one whose mapping was taken back is IOERR.

    A register call may overlap draining calls, except where it takes queues
    away: a Status of 0, QueueReset, QueueReady of 0 while live,
    vblk_queue_stop(). These call options.quiesce first, and from then on until
    they return the draining threads of that queue, or, of a reset or with a
    limit, of all, must be outside. So they must around vblk_set_memory().
    A vCPU's store to QueueNotify or InterruptACK may overlap anything, so do
    not take the lock of the register calls for it, or it waits for a reset.
    Distinct devices share nothing.

    Callbacks run inside the call that caused them, on its thread, several at
    once where several threads call. They must not call back into the same
    device, but for queries, vblk_notify(), vblk_interrupt_ack(), and
    vblk_complete() inside quiesce.

    ERRORS

    What can fail returns VBLK_OK, which is 0, or a negative VBLK_ERR_ code; a
    bool answers a question. The caller's mistakes fail vblk_init() with a code,
    and nothing was set up, and assert elsewhere. The backend's become the
    status byte the guest reads, a counter and an event; the guest's never
    assert: they are events and, by the rules below, a status byte, a dropped
    chain, or DEVICE_NEEDS_RESET. An event is a number, a level, a queue, a
    head, and some named fields; print vblk_event_line() of it at first.

    RULES

    What is refused is an event, whose sentence ends with its rule. V1 and V2,
    no end of the chain or no status byte to be found, drop it: it is not
    returned (standard: IOERR, or returned with length 0, P5); so does V17, a
    status byte outside guest memory, in any profile. V11, an unknown type, is
    UNSUPP. Q4, a ring that cannot be, is NEEDS_RESET. All else, V3 to V16 of
    the request and X2 to X5 of its data and the backend, is IOERR. Each but V11
    and Q4 counts one io_error; Q4 counts one broken_queues. Other letters are
    M registers, F features and status, B backends, W the host, Q3 a switch.

    PROFILES

    VBLK_STANDARD, the default, takes all that the standard lets a driver do,
    and what shipped drivers do. VBLK_STRICT refuses whatever Linux never
    sends; it protects nobody more. Standard differs in these points alone:

        P1  any framing: header first, status last, data between
        P2  DRIVER without ACKNOWLEDGE, steps at once, Status bits add up
        P3  size_max binds only a driver that accepted SIZE_MAX
        P4  empty IN or OUT, FLUSH with data; GET_ID copies what fits
        P5  what strict drops by V1 and V2 is IOERR where the chain has an
            end and a writable byte, else it is returned with length 0
        P6  the used length counts written bytes alone: 0 for a failed read
        P7  a suppressed interrupt leaves InterruptStatus alone
        P8  QueueReady may be cleared while live; the queue starts at 0
        P9  bit 31 of a request's type is ignored (SLOF)
        P10 FEATURES_OK without VERSION_1 (xv6); the layout stays modern
        P11 VendorID is 0x554d4551 by default (xv6 insists on it)
        P12 SIZE_MAX is offered only where options.size_max is set
        P13 queue registers count from DRIVER on (LK)

    Where strict refuses what standard would take, the event's text says so.

    HOSTILE GUESTS

    Every number from the guest is read once and checked before it is used.
    Whatever it writes, and whenever, the device touches only guest memory,
    through your functions, and the disk within its capacity, does bounded work
    per call, and goes on serving its other queues. But data may change while
    it is written out, as with any device that does not copy.

    LIMITS

    Split rings up to 32768 entries, indirect descriptors, EVENT_IDX, up to
    65535 queues, their reset, ACCESS_PLATFORM; all requests but those of zoned
    disks. Not done: packed rings, zoned disks, the legacy interface.

    A drain takes 5 KB of stack beside what your functions take, 8 KB without
    map; with VBLK_MAX_SEGS 16, VBLK_SCRATCH 512, no ranges, 1.3 and 1.9 KB.

    COMPILE-TIME OPTIONS

    None changes a type: units that only call may differ in all but these two.

        VBLK_STATIC            all functions static; with VBLK_IMPLEMENTATION
                               in each unit that uses them
        VBLKDEF                or your own linkage; default extern

    Where VBLK_IMPLEMENTATION is defined:

        VBLK_MAX_SEGS          largest seg_max; default 128
        VBLK_SCRATCH           bytes of stack that replace map; default 4096
        VBLK_MAX_RANGES        of a DISCARD and its like, default 64, 16 bytes
                               of stack each; 0: these requests are left out
        VBLK_SINGLE_THREADED   no atomics: one thread, guest included; for
                               compilers but gcc and clang. Without it some
                               32-bit targets need -latomic
        VBLK_ASSERT(x)         default assert
        VBLK_MEMCPY(d, s, n), VBLK_MEMSET(d, c, n)  default string.h; both

    A firmware image sets all of these and VBLK_STATIC, so that what it does
    not call is not compiled: without vblk_event_line() and vblk_strerror(), no
    sentence is. tests/image/device.c is one.

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
#define VBLK_VERSION_MINOR 2 // adds
#define VBLK_VERSION_PATCH 0 // repairs

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
#define VBLK_F_TOPOLOGY      (UINT64_C(1) << 10)
#define VBLK_F_CONFIG_WCE    (UINT64_C(1) << 11)
#define VBLK_F_MQ            (UINT64_C(1) << 12)
#define VBLK_F_DISCARD       (UINT64_C(1) << 13)
#define VBLK_F_WRITE_ZEROES  (UINT64_C(1) << 14)
#define VBLK_F_LIFETIME      (UINT64_C(1) << 15)
#define VBLK_F_SECURE_ERASE  (UINT64_C(1) << 16)
#define VBLK_F_INDIRECT_DESC (UINT64_C(1) << 28)
#define VBLK_F_EVENT_IDX     (UINT64_C(1) << 29)
#define VBLK_F_VERSION_1     (UINT64_C(1) << 32)
#define VBLK_F_ACCESS_PLATFORM (UINT64_C(1) << 33)
#define VBLK_F_RING_RESET    (UINT64_C(1) << 40)

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
#define VBLK_T_IN           0u
#define VBLK_T_OUT          1u
#define VBLK_T_FLUSH        4u
#define VBLK_T_GET_ID       8u
#define VBLK_T_GET_LIFETIME 10u
#define VBLK_T_DISCARD      11u
#define VBLK_T_WRITE_ZEROES 13u
#define VBLK_T_SECURE_ERASE 14u
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
#define VBLK_REG_QUEUE_RESET         0x0c0u
#define VBLK_REG_CONFIG_GENERATION   0x0fcu
#define VBLK_REG_CONFIG              0x100u // config space from here on

// ---- Errors and events -----------------------------------------------------
#define VBLK_ERRORS(X)                                                         \
    X(OK, 0, "no error")                                                       \
    X(ERR_LAYOUT, -1, "this unit and the one with the implementation see "     \
      "different versions of vblk.h, or lay out its structs differently")      \
    X(ERR_MEMORY, -2, "memory needs both read and write, or neither to be "    \
      "given later by vblk_set_memory()")                                      \
    X(ERR_BACKEND, -3, "backend.read is missing, or of its sizes block_size "  \
      "is no power of two from 512 to 65536, physical_size none from there to "\
      "65536, align_offset not below that, or one of the rest no multiple of " \
      "block_size or 65536 times as much")                                     \
    X(ERR_CAPACITY, -4, "capacity, in sectors of 512 bytes, is 2^63 bytes or " \
      "more, no whole blocks, or 0 and the backend has no size function")      \
    X(ERR_PROFILE, -5, "profile is none of the vblk_profile values")           \
    X(ERR_QUEUES, -6, "queues is more than 65535, or more than 1 without "     \
      "options.queue")                                                         \
    X(ERR_QUEUE_SIZE, -7, "queue_size is no power of two from 1 to 32768")     \
    X(ERR_SEG_MAX, -8, "seg_max is more than VBLK_MAX_SEGS or queue_size - 2; "\
      "without INDIRECT_DESC queue_size is 3 or more")                         \
    X(ERR_SIZE_MAX, -9, "size_max is below 4096 bytes: no Linux since 6.9 "    \
      "binds")                                                                 \
    X(ERR_FEATURES, -10, "features_off has a bit that follows from the "       \
      "options alone")                                                         \
    X(ERR_LIMITS, -11, "limits: a burst needs its rate, and is no smaller "    \
      "than one second's worth of it; neither may be 2^63 or more")            \
    X(ERR_FILE, -12, "the image is not to be had as a disk; errno says why")   \
    X(ERR_URING, -13, "io_uring is not to be had, errno says why; EOPNOTSUPP: "\
      "the backend is no vblk_file_backend(), or its file system can only "    \
      "wait")                                                                  \
    X(ERR_WORKER, -14, "no eventfd or memory is to be had; errno says why")    \
    X(ERR_CPUS, -15, "cpus names a processor that cpu_set_t does not hold")    \
    X(ERR_BUSY, -16, "requests are under way, or the thread did not come to "  \
      "rest in time: its backend is slow or stuck")                            \
    X(ERR_STOP_MS, -17, "stop_ms is more than INT_MAX milliseconds")           \
    X(ERR_STALE, -18, "the request is of an earlier driver session, or its "   \
      "queue broke: nothing was touched")                                      \
    X(ERR_REFUSED, -19, "guest memory refuses the access")                     \
    X(ERR_RING, -20, "the queue cannot start: it does not exist or runs, its " \
      "size is no power of two within queue_size, or FEATURES_OK is not set")  \
    X(ERR_HOOKS, -21, "notify and quiesce are a worker's own: leave them NULL")\
    X(ERR_RANGES, -22, "range_max is more than VBLK_MAX_RANGES or seg_max + "  \
      "2, or range_sectors more than 2^21 or no whole number of blocks")

typedef enum vblk_error {
#define VBLK_X(name, value, text) VBLK_##name = (value),
    VBLK_ERRORS(VBLK_X)
#undef VBLK_X
    VBLK_ERROR_LAST = -22
} vblk_error;

typedef enum vblk_level {
    VBLK_LEVEL_ERROR,   // the host is to act: its disk, its memory, a thread
    VBLK_LEVEL_WARNING, // the driver did what it may not
    VBLK_LEVEL_NOTE
} vblk_level;

// Name, number, level, the fields of the event that are set, and a sentence. A
// number is never given to another event.
#define VBLK_EVENTS(X)                                                         \
    /* set-up */                                                               \
    X(CAPACITY_LARGE, 1, NOTE, BYTES, AGAINST, "capacity, against, is beyond " \
      "the backend's bytes, which reads as zeroes; writes may extend it (X2)") \
    X(CAPACITY_ROUNDED, 2, WARNING, BYTES, NONE, "the backend's last bytes "   \
      "are no whole block and not on the disk (B4)")                           \
    X(CAPACITY_ZERO, 3, ERROR, BYTES, NONE, "the backend has less than a "     \
      "block: a disk of no sectors (B4)")                                      \
    /* registers: address is the offset in the window */                       \
    X(REG_WIDTH, 10, WARNING, ADDRESS, BYTES, "a register below 0x100 was "    \
      "accessed with another width than 4 (M2)")                               \
    X(REG_FEATURES_WINDOW, 11, WARNING, VALUE, AGAINST, "DriverFeatures "      \
      "before DRIVER or after FEATURES_OK is ignored; against: Status (M5)")   \
    X(REG_QUEUE_WINDOW, 12, WARNING, ADDRESS, VALUE, "a queue register before "\
      "FEATURES_OK or after DRIVER_OK is ignored; the standard profile: "      \
      "before DRIVER (M7, P13)")                                               \
    X(REG_QUEUE_FROZEN, 13, WARNING, ADDRESS, VALUE, "QueueReady cleared on a "\
      "live device is ignored; the standard profile stops the queue (M7, P8)") \
    X(REG_QUEUE_SIZE, 14, WARNING, ADDRESS, VALUE, "QueueNum is 0, over "      \
      "QueueNumMax or no power of two and is ignored (M7)")                    \
    X(NOTIFY_NO_QUEUE, 16, WARNING, INDEX, NONE, "QueueNotify of a queue that "\
      "does not exist (M10)")                                                  \
    X(NOTIFY_NOT_READY, 17, WARNING, INDEX, NONE, "QueueNotify of a queue "    \
      "that is not ready (M10)")                                               \
    X(NOTIFY_EARLY, 18, WARNING, INDEX, AGAINST, "QueueNotify before "         \
      "DRIVER_OK: nothing is served yet; against: Status (M10)")               \
    /* status: value was written, against is Status */                         \
    X(STATUS_CLEARS, 20, WARNING, VALUE, AGAINST, "a Status write that clears "\
      "a bit is refused: only 0 does, and resets; the standard profile adds "  \
      "what is new (F2, P2)")                                                  \
    X(STATUS_BITS, 21, WARNING, VALUE, AGAINST, "a Status write of two new "   \
      "bits or an unknown one is refused; the standard profile takes several " \
      "and masks the unknown (F2, P2)")                                        \
    X(STATUS_ORDER, 22, WARNING, VALUE, AGAINST, "Status out of the order "    \
      "ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK is refused (F2)")           \
    X(STATUS_NO_ACK, 23, WARNING, VALUE, AGAINST, "DRIVER without ACKNOWLEDGE "\
      "is refused; the standard profile takes it (F2, P2)")                    \
    X(STATUS_NEEDS_RESET, 24, WARNING, VALUE, AGAINST, "the device needs a "   \
      "reset: no Status but 0 is taken (F7)")                                  \
    X(STATUS_FAILED, 25, WARNING, VALUE, AGAINST, "the driver gave up on the " \
      "device (F5)")                                                           \
    /* value was accepted, against is what was offered */                      \
    X(FEATURES_VERSION, 26, WARNING, VALUE, AGAINST, "FEATURES_OK is refused: "\
      "VERSION_1 was not accepted; the standard profile does not ask (F3, "    \
      "P10)")                                                                  \
    X(FEATURES_UNOFFERED, 27, WARNING, VALUE, AGAINST, "FEATURES_OK is "       \
      "refused: more was accepted than is offered (F3)")                       \
    X(FEATURES_PLATFORM, 28, WARNING, VALUE, AGAINST, "FEATURES_OK is "        \
      "refused: without ACCESS_PLATFORM the driver's addresses are wrong (F3)")\
    /* a queue is broken */                                                    \
    X(RING_SIZE, 30, WARNING, NONE, NONE, "started without a QueueNum (Q4)")   \
    X(RING_PLACE, 31, WARNING, ADDRESS, NONE, "a ring wraps the address "      \
      "space, or is misaligned: descriptors 16, driver area 2, device area 4 " \
      "(Q4)")                                                                  \
    X(AVAIL_UNREADABLE, 32, WARNING, ADDRESS, NONE, "the available ring is "   \
      "not in guest memory (Q4)")                                              \
    X(AVAIL_JUMP, 33, WARNING, INDEX, AGAINST, "avail.idx is more than the "   \
      "queue size ahead of, against (Q4)")                                     \
    X(HEAD_RANGE, 34, WARNING, INDEX, NONE, "a head in the available ring is " \
      "not below the queue size (Q4)")                                         \
    X(QUEUE_OVERRUN, 35, WARNING, INDEX, NONE, "more chains are under way "    \
      "than the queue has entries (Q4)")                                       \
    X(USED_UNWRITABLE, 36, WARNING, ADDRESS, NONE, "the used ring is not in "  \
      "guest memory or read-only (Q4)")                                        \
    X(NOTIFY_SWITCH, 37, WARNING, ADDRESS, NONE, "the used ring cannot be "    \
      "written: notifications stay off (Q3)")                                  \
    /* a chain is dropped (standard: see P5) */                                \
    X(CHAIN_LONG, 40, WARNING, AGAINST, NONE, "a chain of more than seg_max + "\
      "2 descriptors, or than its table has: it loops; against: how many (V1)")\
    X(CHAIN_NEXT, 41, WARNING, INDEX, AGAINST, "a descriptor index outside "   \
      "its table; against: its entries (V1)")                                  \
    X(CHAIN_UNREADABLE, 42, WARNING, ADDRESS, NONE, "a descriptor or table is "\
      "not in guest memory (V1)")                                              \
    X(INDIRECT_OFF, 43, WARNING, BYTES, NONE, "an indirect descriptor; "       \
      "INDIRECT_DESC was not accepted (V1)")                                   \
    X(INDIRECT_NESTED, 44, WARNING, BYTES, NONE, "an indirect descriptor in "  \
      "an indirect table (V1)")                                                \
    X(INDIRECT_NEXT, 45, WARNING, BYTES, NONE, "an indirect descriptor with "  \
      "NEXT (V1)")                                                             \
    X(INDIRECT_SIZE, 46, WARNING, BYTES, NONE, "an indirect table of no "      \
      "positive multiple of 16 bytes (V1)")                                    \
    X(CHAIN_ORDER, 47, WARNING, NONE, NONE, "readable after writable (V2)")    \
    X(STATUS_MISSING, 48, WARNING, NONE, NONE, "no writable status byte (V2)") \
    X(STATUS_FRAMING, 49, WARNING, NONE, NONE, "the last of several "          \
      "descriptors is not the status; the standard profile takes the last "    \
      "writable byte (V2, P1)")                                                \
    X(STATUS_WRAPS, 50, WARNING, ADDRESS, NONE, "the status descriptor wraps " \
      "the address space (V2)")                                                \
    X(STATUS_UNWRITABLE, 51, WARNING, ADDRESS, NONE, "the status byte is not " \
      "in guest memory, or read-only: the chain is not returned (V17)")        \
    /* a request is refused */                                                 \
    X(HEADER_SHORT, 60, WARNING, BYTES, NONE, "header below 16 bytes (V3)")    \
    X(HEADER_FRAMING, 61, WARNING, BYTES, NONE, "the first descriptor does "   \
      "not hold the header; the standard profile takes the first 16 readable " \
      "bytes (V3, P1)")                                                        \
    X(HEADER_UNREADABLE, 62, WARNING, ADDRESS, NONE, "the header is not in "   \
      "guest memory (V4)")                                                     \
    X(TYPE_UNKNOWN, 63, WARNING, VALUE, NONE, "a request type that is unknown "\
      "or not offered (V11)")                                                  \
    X(TYPE_BARRIER, 64, WARNING, VALUE, NONE, "a request type with bit 31, "   \
      "BARRIER, never offered; the standard profile ignores it (V11, P9)")     \
    X(SEGMENT_LONG, 65, WARNING, BYTES, AGAINST, "a data descriptor longer "   \
      "than size_max, against (V5)")                                           \
    X(SEGMENT_LONG_STRICT, 66, WARNING, BYTES, AGAINST, "a data descriptor "   \
      "longer than size_max, against; the standard profile takes it without "  \
      "SIZE_MAX (V5, P3)")                                                     \
    X(DATA_DIRECTION, 67, WARNING, VALUE, NONE, "data in the wrong direction " \
      "for the type (V12)")                                                    \
    X(DATA_MISSING, 68, WARNING, VALUE, NONE, "no data, which the type needs; "\
      "the standard profile lets it pass (V6, P4)")                            \
    X(DATA_UNWANTED, 69, WARNING, BYTES, NONE, "a FLUSH with data; the "       \
      "standard profile ignores it (V7, P4)")                                  \
    X(DATA_RAGGED, 70, WARNING, BYTES, NONE, "data of no multiple of 512 "     \
      "bytes (V8)")                                                            \
    X(DATA_LONG, 71, WARNING, BYTES, NONE, "4 GiB or more: a used length "     \
      "cannot tell it (V13)")                                                  \
    X(DATA_UNMAPPED, 72, WARNING, ADDRESS, BYTES, "data is not in guest "      \
      "memory, or read-only but read to (X5)")                                 \
    X(READ_ONLY, 73, WARNING, SECTOR, NONE, "write to a read-only disk (V9)")  \
    X(OUT_OF_RANGE, 74, WARNING, SECTOR, BYTES, "beyond the disk's end (V13)") \
    X(ID_SHORT, 75, WARNING, BYTES, NONE, "GET_ID without 20 bytes in its "    \
      "first buffer, or GET_LIFETIME without 6; the standard profile copies "  \
      "what fits (V16, P4)")                                                   \
    X(BLOCK_RAGGED, 76, WARNING, SECTOR, BYTES, "no whole blocks of "          \
      "block_size, which BLK_SIZE tells (V19)")                                \
    X(RANGES_COUNT, 77, WARNING, BYTES, AGAINST, "ranges of no positive "      \
      "multiple of 16 bytes, or of more than, against (V20)")                  \
    X(RANGE_FLAGS, 78, WARNING, VALUE, NONE, "a range with an unknown flag, "  \
      "or UNMAP where it may not stand (V21)")                                 \
    X(RANGE_LONG, 79, WARNING, BYTES, AGAINST, "a range longer than "          \
      "range_sectors, against (V20)")                                          \
    /* the backend */                                                          \
    X(READ_SHORT, 80, WARNING, SECTOR, BYTES, "a read got less than asked, "   \
      "before the backing's end; bytes: what is missing (X2)")                 \
    X(READ_FAILED, 81, ERROR, SECTOR, ERROR, "backend failed to read (X3)")    \
    X(WRITE_FAILED, 82, ERROR, SECTOR, ERROR, "backend failed to write (X3)")  \
    X(WRITE_STUCK, 83, ERROR, SECTOR, BYTES, "the backend stopped in a write; "\
      "bytes: what is left (X3)")                                              \
    X(FLUSH_FAILED, 84, ERROR, SECTOR, ERROR, "the backend failed to make "    \
      "durable what is before the sector, or of a FLUSH all (X3)")             \
    X(DISCARD_FAILED, 85, ERROR, SECTOR, ERROR, "the backend failed to "       \
      "discard, zero or erase a range (X3)")                                   \
    /* the host */                                                             \
    X(NO_MEMORY, 90, NOTE, NONE, NONE, "a queue has work but no guest memory " \
      "yet: it waits for vblk_set_memory() (W9)")                              \
    X(HOST_RESET, 91, NOTE, NONE, NONE, "the host asked for a reset")          \
    X(NOT_QUIET, 93, ERROR, NONE, NONE, "a queue stops, but what is under way "\
      "does not end in time: the device needs a reset (P8)")                   \
    /* a worker */                                                             \
    X(WORKER_LEFT, 100, ERROR, AGAINST, NONE, "the backend, or another "       \
      "callback, did not return within stop_ms, against: the thread is left "  \
      "behind until it ends, then the device is reset (W7)")                   \
    X(WORKER_STUCK, 101, ERROR, AGAINST, NONE, "no page of guest memory came " \
      "within stop_ms, against: the thread is left behind until it ends, then "\
      "the device is reset (W7)")                                              \
    X(WORKER_START, 102, ERROR, ERROR, NONE, "the thread cannot be started: "  \
      "the device needs a reset")                                              \
    X(WORKER_WAIT, 103, ERROR, ERROR, NONE, "kick_fd is broken, or no memory: "\
      "the device needs a reset (W4)")                                         \
    X(WORKER_CPUS, 107, WARNING, ERROR, NONE, "the cpus are not to be had: "   \
      "the kernel chooses (W6)")                                               \
    /* an engine */                                                            \
    X(URING_OFF, 110, NOTE, ERROR, NONE, "io_uring is not to be had: one "     \
      "request after another")

typedef enum vblk_event_code {
    VBLK_EV_NONE,
#define VBLK_X(name, number, level, a, b, text) VBLK_EV_##name = (number),
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    VBLK_EV_END // one more than the last
} vblk_event_code;

#define VBLK_NO_QUEUE   (-1)
#define VBLK_ALL_QUEUES (-2)
#define VBLK_NO_HEAD    (-1)

// Which of the numbers are set, the list above says; the rest are 0.
typedef struct vblk_event {
    vblk_event_code code;
    vblk_level      level;
    int             queue;   // VBLK_NO_QUEUE: the device
    int             head;    // of the chain; VBLK_NO_HEAD: none
    uint64_t        address; // guest-physical, or a register's offset
    uint64_t        bytes;
    uint64_t        sector;
    uint64_t        index;   // of a queue, a descriptor, an entry
    uint64_t        value;   // as the driver wrote it
    uint64_t        against; // what it was held against, as the sentence says
    int64_t         error;   // the backend's or the system's, above 0
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
// and says an error, also to flush. Where several threads drain, several call.
typedef struct vblk_backend {
    int64_t (*read)(void *user, uint64_t offset, const vblk_seg *seg,
                    unsigned segs);
    int64_t (*write)(void *user, uint64_t offset, const vblk_seg *seg,
                     unsigned segs); // NULL: a read-only disk
    // Make every completed write durable; 0 or a negative error number. After
    // a failure, 0 may only come again once nothing is lost: fsync() itself
    // forgets. NULL: a guest that may write is not offered FLUSH.
    int (*flush)(void *user);
    uint64_t (*size)(void *user); // bytes; NULL if options.capacity is set
    // Of a range of whole blocks; 0 or a negative error number. What is there
    // is not needed any more. It reads as zeroes from now on, and only with
    // `unmap` its space may be given back. Nobody can have it back: secure
    // erase. NULL, or without write: not offered.
    int (*discard)(void *user, uint64_t offset, uint64_t bytes, bool unmap);
    int (*write_zeroes)(void *user, uint64_t offset, uint64_t bytes,
                        bool unmap);
    int (*secure_erase)(void *user, uint64_t offset, uint64_t bytes,
                        bool unmap);
    bool     unmaps;     // write_zeroes gives space back with `unmap`
    const uint16_t *lifetime; // pre_eol_info and two estimates [5.2.6], which
                              // the host may change; NULL: there are none
    void    *user;       // first argument of each
    // Bytes. What is no whole number of blocks is refused. The rest are hints
    // for the driver, TOPOLOGY; 0: none.
    uint32_t block_size;    // logical; default 512
    uint32_t physical_size; // a range is best a multiple; default block_size
    uint32_t align_offset, min_io, opt_io;
} vblk_backend;

// What is done for a request: a call of the backend, or none. Private.
typedef enum vblk__does {
    VBLK__DO_READ, VBLK__DO_WRITE, VBLK__DO_FLUSH, VBLK__DO_DISCARD,
    VBLK__DO_ZEROES, VBLK__DO_ERASE, VBLK__DO_ANSWER
} vblk__does;

typedef enum vblk_profile { VBLK_STANDARD, VBLK_STRICT } vblk_profile;

// What the guest may use in the long run. A request costs an operation and the
// bytes of its data; one that is refused or empty, or a FLUSH of a read-only
// disk, costs nothing. A rate of 0 is no limit. A burst is how much can be
// saved up while idle: a second's worth, its default, to 2^63 - 1. Of ranges,
// each costs an operation, and those of WRITE_ZEROES their bytes.
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
    vblk_profile profile;    // default standard
    unsigned     queues;     // default 1; more offer MQ
    struct vblk_queue *queue; // array of `queues`, which must outlive the
                             // device; NULL: the one that is built in
    uint32_t     queue_size; // power of two, 1 to 32768; default 256
    uint32_t     seg_max;    // data segments in a request; default queue_size
                             // - 2, at least 1 and at most VBLK_MAX_SEGS
    uint32_t     size_max;   // bytes in a segment, at least 4096; default no
                             // limit; strict: 1 MiB
    uint32_t     range_max;  // in a DISCARD or the like; default as many as
                             // VBLK_MAX_RANGES and seg_max + 2 allow
    uint32_t     range_sectors; // in each; default 65536, 32 MiB
    uint32_t     vendor_id;  // default 0x554d4551, QEMU's; strict: 0
    bool         access_platform; // addresses are not physical; see THREADS
    uint64_t     features_off; // of those offered, bits not to offer
    vblk_limits  limits;       // default none
    // Fire (true), because of `queue` or, if VBLK_NO_QUEUE, of configuration or
    // status. Or: InterruptStatus went to 0 (false). NULL: poll it.
    void (*interrupt)(void *user, int queue, bool fire);
    void (*event)(void *user, const vblk_event *event); // NULL: silent
    // `queue`, or VBLK_ALL_QUEUES, has work: wake its thread, which is to call
    // vblk_drain() or vblk_next(). NULL: vblk_poll() finds it.
    void (*notify)(void *user, int queue);
    // The driver, or vblk_queue_stop(), takes `queue` or VBLK_ALL_QUEUES away:
    // bring the threads that drain it outside, and end what is under way. Of
    // one queue it is to be completed, with an error if need be, and
    // vblk_complete() may be called from here; of all it may be cancelled. 0:
    // nothing of it touches the queue or moves data any more. Else the device
    // shows DEVICE_NEEDS_RESET, begins nothing, and the next reset asks again.
    // NULL: nothing is ever under way between two calls of yours.
    int (*quiesce)(void *user, int queue);
    // For a host that outlives a crash: chain `head` of `queue` was taken; or,
    // with VBLK_NO_HEAD, what was returned is in the used ring. May be NULL.
    void (*track)(void *user, int queue, int head);
    void *user; // first argument of these five
} vblk_options;

// ---- Types you hold --------------------------------------------------------
#define VBLK_NEVER UINT64_MAX // as a time to call again: until notified

// A validated request. Read-only to the host. A copy has the same segments.
typedef struct vblk_request {
    uint32_t  type;    // VBLK_T_, but for those that only ask
    uint16_t  queue, head;
    bool      durable; // must be so before it is completed; FLUSH: false
    bool      direct;  // every segment has a pointer
    unsigned  segs;    // or ranges: vblk_range_of()
    vblk_seg *seg;     // in the array that vblk_next() was given
    uint64_t  offset;  // of an IN or OUT, in bytes from the start of the disk
    uint64_t  bytes;   // in all segments, which is what an IN or OUT moves
    // Private.
    const struct vblk__kind *kind; // the row of its type
    uint8_t  *status_ptr;
    uint64_t  status_gpa;
    uint64_t  epoch;
    uint64_t  backing; // how far it was known to reach
    uint64_t  space;   // written before the status byte, or that does not count
} vblk_request;

#if defined(__GNUC__)
#define VBLK__ATOMIC64 __attribute__((aligned(8))) // also on 32-bit machines
#else
#define VBLK__ATOMIC64
#endif

typedef struct VBLK__ATOMIC64 vblk_counts {
    uint64_t reads, writes, flushes; // completed with success, as these
    uint64_t discards, write_zeroes, secure_erases;
    uint64_t bytes_read;             // from the backing, padding not counted
    uint64_t bytes_written, io_errors;
    uint64_t throttled;              // requests that had to wait
    uint64_t currently_throttled;    // queues that wait now
    uint64_t throttled_ns;           // time waited, added when one passes
    uint64_t broken_queues;          // times a queue broke (Q4)
} vblk_counts;

// A token bucket, exact integer arithmetic. See vblk_bucket_ functions.
typedef struct vblk_bucket {
    uint64_t rate;     // tokens a second; 0: no limit
    uint64_t burst;    // tokens it holds at most
    int64_t  tokens;   // below 0: a debt that later requests wait out
    uint64_t fraction; // of a token, in 10^-9
    uint64_t last_ns;  // when tokens and fraction were right
} vblk_bucket;

// What a running queue has, afresh when it starts. Free-running. Private.
typedef struct vblk_run {
    bool     resolved;     // the pointers below are up to date
    bool     notify_off, switch_failed; // NO_NOTIFY is set in the used ring
    bool     armed;        // notifications are on for avail_next
    bool     adopt_used;   // take the used position from the ring first
    bool     stalled;      // the request at the head waits for a limit
    uint16_t avail_next, avail_seen; // next entry to take; idx as last read
    uint16_t used_shown;   // used.idx as last stored
    uint32_t used_next;    // next entry to fill; used.idx is the lower half
    uint32_t used_decided; // the same, at the last decision to interrupt
    uint32_t under_way;    // handed out, not completed
    uint8_t *desc, *avail, *used; // NULL: through the accessors
    const struct vblk_region *near[3]; // where the last lookups ended
    uint64_t stalled_ns;   // when the stall began
    uint64_t stalled_bytes, stalled_ops; // what the request costs
    const uint16_t *again; // heads in place of those before `again_end`
    uint16_t agains, again_end;
} vblk_run;

// A virtqueue. Private.
typedef struct vblk_queue {
    vblk_run run;       // the drainer's, as long as the queue is ready
    bool     broken;    // atomic; until a reset
    // Register calls, before the queue is ready.
    bool     ready;     // atomic
    bool     due;       // atomic: vblk_poll() is to look
    uint16_t number;    // in dev->queue
    uint32_t size;
    uint64_t epoch VBLK__ATOMIC64; // atomic; changes when requests go stale
    vblk_counts counts; // any thread reads, the drainer adds
    uint64_t desc_gpa, avail_gpa, used_gpa;
#if UINTPTR_MAX > UINT32_MAX
    uint8_t  apart[56]; // what a drainer changes shares no cache line with
#endif                  // what the next queue's does
} vblk_queue;

// A device. Private. Must not move while a backend or the guest uses it.
typedef struct vblk_dev {
    // From vblk_init() on.
    vblk_memory  memory;
    vblk_backend backend;
    void (*interrupt)(void *user, int queue, bool fire);
    void (*event)(void *user, const vblk_event *event);
    void (*notify)(void *user, int queue);
    int (*quiesce)(void *user, int queue);
    void (*track)(void *user, int queue, int head);
    void        *user;
    vblk_queue  *queue;
    uint32_t     queues;
    uint32_t     queue_size, seg_max, size_max, vendor_id;
    uint32_t     range_max, range_sectors, part_of_block; // bits of a sector
    uint64_t     offered;
    uint8_t      id[VBLK_ID_BYTES];
    bool         strict;
    // The driver's session.
    bool         event_idx, indirect; // from FEATURES_OK on
    bool         write_through;       // the same; atomic
    bool         no_memory_said;
    // All drainers: what is small.
    bool         limited;  // one of the buckets has a rate
    bool         waits;    // a queue is stalled, and it is the turn of `turn`
    uint16_t     turn;     // the queue that stalled first
    // The driver's session: registers.
    uint64_t     accepted VBLK__ATOMIC64;
    uint32_t     device_features_sel, driver_features_sel, queue_sel;
    uint32_t     generation;
    // All drainers.
    uint64_t     backing VBLK__ATOMIC64; // atomic; bytes known to be there
    uint64_t     disk VBLK__ATOMIC64; // atomic; sectors, and in the upper 10
                                      // bits how often that changed
    vblk_bucket  ops, bytes;
    uint64_t     again_ns; // vblk_poll(): when a stalled queue may go on
    // Atomics: set by any thread.
    uint32_t     due;   // a queue is
    uint32_t     yield; // 0, VBLK__YIELD or VBLK__HALT
    uint32_t     waiting; // engines, for the limits
    uint32_t     state; // Status, InterruptStatus and VBLK__LINE in one
    vblk_queue   built_in;
} vblk_dev;

// ---- Set-up ----------------------------------------------------------------
#define VBLK_VERSION                                                           \
    (VBLK_VERSION_MAJOR * 10000 + VBLK_VERSION_MINOR * 100 +                   \
     VBLK_VERSION_PATCH)

// Bring `dev` to the state a device has after power-on, again if need be: a
// request of before is stale then. `o` is copied; what it points to must stay.
// VBLK_OK, or the VBLK_ERR_ of the first field at fault, with `dev` untouched.
// There is nothing to undo at the end: the device owns nothing.
//
//     int vblk_init(vblk_dev *dev, const vblk_options *o);
#define vblk_init(dev, o)                                                      \
    vblk_init_checked(dev, o, VBLK_VERSION, sizeof(vblk_dev))
VBLKDEF int vblk_init_checked(vblk_dev *dev, const vblk_options *o,
                              int version, size_t bytes);

// Give the device its guest memory, or another: pointers into the old one are
// forgotten, ring positions stay, and all queues are looked at again. No
// draining call may be under way. VBLK_OK; or VBLK_ERR_MEMORY or VBLK_ERR_BUSY,
// requests are under way, and nothing changed.
VBLKDEF int vblk_set_memory(vblk_dev *dev, vblk_memory memory);

// A sentence for a VBLK_ERR_ code.
VBLKDEF const char *vblk_strerror(int err);

// `event` as one line of text, without a newline, into `buf` of `n` bytes, cut
// to fit: queue, head, the sentence, the fields that are set. Returns `buf`.
VBLKDEF const char *vblk_event_line(const vblk_event *event, char *buf,
                                    size_t n);

// ---- Registers [4.2.2] -----------------------------------------------------
// What the guest loads from `bytes` bytes (1 to 8) at `offset` of the register
// window, as a little-endian number. Any offset and width is safe. Any thread.
VBLKDEF uint64_t vblk_mmio_read(const vblk_dev *dev, uint64_t offset,
                                unsigned bytes);

// The guest stored `value` there. Any value at any offset is safe. Queues that
// have work now are remembered for vblk_poll(), and told to notify().
VBLKDEF void vblk_mmio_write(vblk_dev *dev, uint64_t offset, unsigned bytes,
                             uint64_t value);

// The interrupt line: high from firing until InterruptStatus is 0. Any thread.
VBLKDEF bool vblk_interrupt_line(const vblk_dev *dev);

// Clear bits of InterruptStatus, as a write to InterruptACK does. Any thread.
VBLKDEF void vblk_interrupt_ack(vblk_dev *dev, uint32_t bits);

// Ask the driver for a reset: Status shows DEVICE_NEEDS_RESET and, while the
// device is live, the configuration interrupt fires [2.1.2]. For a host that
// lost its disk. Any thread.
VBLKDEF void vblk_needs_reset(vblk_dev *dev);

// The disk has another size from here on: so many sectors, or what the backend
// says if 0. The driver is interrupted [5.2.6.2], and never sees half of it. An
// image grows before this; it is cut with nothing under way, before this too.
// VBLK_OK; VBLK_ERR_CAPACITY, and nothing changed. Thread: as register calls.
VBLKDEF int vblk_resize(vblk_dev *dev, uint64_t sectors);

// ---- Requests --------------------------------------------------------------
// Do what waits in the queues that were notified, or whose limit allows it by
// now: take requests, call the backend, complete, publish, and interrupt the
// guest at most once for each queue. Returns when to call next: `now_ns` if
// there is more, as one call takes at most as many requests as a queue has
// entries; the moment at which a limit lets the next one pass; VBLK_NEVER if
// nothing is to be done until the guest stores to a register. Calling too early
// is harmless. Thread: the drainer of all queues.
VBLKDEF uint64_t vblk_poll(vblk_dev *dev, uint64_t now_ns);

// The same for one queue, notified or not. Thread: the queue's drainer.
VBLKDEF uint64_t vblk_drain(vblk_dev *dev, unsigned queue, uint64_t now_ns);

// Take the next request of `queue` into `req`, its segments into `seg`, an
// array of `room`: at least vblk_seg_max() + 2, and more where regions of guest
// memory meet inside of buffers. False: there is none now, or a limit holds it
// up: vblk_arm() says when to look again. From here on the driver does not
// notify. Thread: the queue's drainer.
VBLKDEF bool vblk_next(vblk_dev *dev, unsigned queue, uint64_t now_ns,
                       vblk_request *req, vblk_seg *seg, unsigned room);

// `req` has ended with `result`, as of read(2): the bytes that were moved, all
// for a success, 0 for a FLUSH; or a negative error number, for the event. An
// IN that is short is filled with zeroes if it came to where the backing ends,
// as it was made or written; whatever else is short is an error. Only a short
// one needs its segments still. VBLK_OK, or VBLK_ERR_STALE. The guest sees the
// completion after vblk_publish() or vblk_arm(). Thread: the queue's drainer.
VBLKDEF int vblk_complete(vblk_dev *dev, const vblk_request *req,
                          int64_t result);

// Show completions of `queue` to the guest and interrupt it if it asked for
// that [2.7.7.2, 2.7.8.2]. Thread: the queue's drainer.
VBLKDEF void vblk_publish(vblk_dev *dev, unsigned queue);

// Before you wait for anything else than what is under way: publish, have the
// driver notify from here on, and look once more. Returns when to call
// vblk_next() again, as vblk_poll() does. Thread: the queue's drainer.
VBLKDEF uint64_t vblk_arm(vblk_dev *dev, unsigned queue, uint64_t now_ns);

// Copy `n` bytes at byte `at` of the request's data from guest memory, or to
// it. VBLK_OK, VBLK_ERR_REFUSED or VBLK_ERR_STALE. For any request; needed
// where it is not `direct`. Any thread, while the request is under way.
VBLKDEF int vblk_get(vblk_dev *dev, const vblk_request *req, uint64_t at,
                     void *dst, size_t n);
VBLKDEF int vblk_put(vblk_dev *dev, const vblk_request *req, uint64_t at,
                     const void *src, size_t n);

// Range `i` of a DISCARD, WRITE_ZEROES or SECURE_ERASE, in bytes of the disk.
// To complete, all of them are to have succeeded, and the result is 0.
typedef struct vblk_range {
    uint64_t offset, bytes;
    bool     unmap;
} vblk_range;

VBLKDEF vblk_range vblk_range_of(const vblk_request *req, unsigned i);

// `queue`, or VBLK_ALL_QUEUES, has work: what QueueNotify does, for another
// transport. Any thread.
VBLKDEF void vblk_notify(vblk_dev *dev, int queue);

// Change the limits while the device runs. Debts and savings stay, savings up
// to the new burst; a bucket that had no limit starts full. All queues are
// looked at again. VBLK_OK or VBLK_ERR_LIMITS, in which case nothing changed.
// Thread: as a draining call of every queue.
VBLKDEF int vblk_set_limits(vblk_dev *dev, const vblk_limits *limits,
                            uint64_t now_ns);

// The counters, summed over all queues. They survive resets. Each is exact;
// together they are no snapshot while a queue is drained. Any thread.
VBLKDEF vblk_counts vblk_counters(const vblk_dev *dev);

// Most data segments in a request: options.seg_max or its default. Any thread.
VBLKDEF unsigned vblk_seg_max(const vblk_dev *dev);

// Whether `queue` broke (Q4) and needs a reset. Any thread.
VBLKDEF bool vblk_queue_broken(const vblk_dev *dev, unsigned queue);

// ---- Other transports: what PCI and vhost-user hosts need instead ----------
// What the device offers, and what the driver accepted. Any thread.
VBLKDEF uint64_t vblk_device_features(const vblk_dev *dev);
VBLKDEF uint64_t vblk_driver_features(const vblk_dev *dev);

// What the driver accepts, all 64 bits. Counts from DRIVER to FEATURES_OK.
VBLKDEF void vblk_set_driver_features(vblk_dev *dev, uint64_t features);

// Status [2.1]. A write goes by the rules of the profile; read it back to see
// whether it was taken.
VBLKDEF uint32_t vblk_status(const vblk_dev *dev);
VBLKDEF void vblk_set_status(vblk_dev *dev, uint32_t status);

// Copy `n` bytes of config space from byte `offset` on; past its end, zeroes.
// The driver's stores there: one counts, `writeback` [5.2.5]. Any thread.
VBLKDEF void vblk_read_config(const vblk_dev *dev, uint64_t offset, void *dst,
                              size_t n);
VBLKDEF void vblk_write_config(vblk_dev *dev, uint64_t offset, const void *src,
                               size_t n);

// A virtqueue to start: size and guest addresses as the driver gave them, and
// the position in the available ring to go on from, 0 for a new one.
typedef struct vblk_ring {
    uint32_t size;
    uint64_t desc, avail, used;
    uint16_t position;
    uint16_t agains;       // chains before it that were taken, not returned:
    const uint16_t *again; // their heads, taken first; stays
} vblk_ring;

// Start `queue`, at any time after FEATURES_OK, in any profile. The position
// in the used ring is taken from that ring. What waits there is looked at as
// if notified. VBLK_OK or VBLK_ERR_RING. Thread: as register calls.
VBLKDEF int vblk_queue_start(vblk_dev *dev, unsigned queue,
                             const vblk_ring *ring);

// Stop it, after quiesce(). VBLK_OK: `ring` starts it again where it was. Or
// VBLK_ERR_BUSY: quiesce() could not, and nothing changed. Without quiesce(),
// what is under way is lost. A PCI host's queue_reset is this, if the queue is
// not broken. Thread: as register calls; the queue's drainer must be outside.
VBLKDEF int vblk_queue_stop(vblk_dev *dev, unsigned queue, vblk_ring *ring);

// ---- Token bucket ----------------------------------------------------------
// Pure functions. Any number below 2^63 is safe, and so is a clock that stands
// still or goes back: no token is gained then. A bucket starts full. `n` tokens
// pass if they are there, or if the bucket can never hold them and is not in
// debt: then it goes into debt. A change goes by the rules of
// vblk_set_limits(); a refill credits the time that has passed, to the fraction
// of a token; after it can_take tells whether `n` pass, take takes them, which
// must have been allowed, and wait says in how many nanoseconds, rounded up.
VBLKDEF void vblk_bucket_init(vblk_bucket *b, uint64_t rate, uint64_t burst);
VBLKDEF void vblk_bucket_change(vblk_bucket *b, uint64_t rate, uint64_t burst,
                                uint64_t now_ns);
VBLKDEF void vblk_bucket_refill(vblk_bucket *b, uint64_t now_ns);
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

// Regions in any order; sorted by address they are searched faster. They must
// not overlap, which is not checked. More may be put behind the last, in place,
// as the device keeps pointers to them; else there is vblk_set_memory().
typedef struct vblk_regions {
    const vblk_region *region;
    unsigned           count;
} vblk_regions;

// Accessors, map included, over `regions`, which must outlive them.
VBLKDEF vblk_memory vblk_regions_memory(const vblk_regions *regions);

// A disk in an array. A shared mapping would not be made durable by flush. Safe
// from several threads as memory is: a guest that has two requests on the same
// sectors at once races with itself.
typedef struct vblk_ramdisk {
    void    *data;
    uint64_t bytes;
} vblk_ramdisk;

VBLKDEF vblk_backend vblk_ramdisk_backend(vblk_ramdisk *disk);

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

// ---- Files (POSIX) ---------------------------------------------------------
// An image file or a block device by positioned I/O and fdatasync(). Safe from
// several threads. What was there once and is not any more, because the file
// was cut or the device has gone, is an error (EIO), for each flush from then
// on too; what never was there reads as zeroes.
typedef struct vblk_file {
    int             fd;
    bool            read_only;
    uint32_t        block, align; // of O_DIRECT, else 0: offsets and lengths
                                  // are multiples of it, and addresses
    int             flush_error; // after one failed fdatasync, all fail: the
                                 // kernel forgets which pages are not written
    uint64_t end VBLK__ATOMIC64; // atomic; so long it was, at its longest
    pthread_mutex_t mutex;       // of flush_error
} vblk_file;

#define VBLK_FILE_READ_ONLY 1u
#define VBLK_FILE_DIRECT    2u // Linux: O_DIRECT, around the page cache; copies
                               // what is not aligned, by 36 KiB of stack. The
                               // backend's block_size is what it needs

// Open `path`. VBLK_OK or VBLK_ERR_FILE, with errno set; EOPNOTSUPP: no
// O_DIRECT. vblk_file_close() after the device's last use.
VBLKDEF int vblk_file_open(vblk_file *file, const char *path, unsigned flags);

// The same for a descriptor that is open, such as a memfd or one that another
// process passed; vblk_file_close() closes it. On failure it stays yours.
// It may have O_DIRECT. errno may be EACCES: not open for reading, or, unless
// `read_only`, for writing; EINVAL: O_APPEND; EISDIR; ENOTBLK: what is no disk.
VBLKDEF int vblk_file_from(vblk_file *file, int fd, bool read_only);
VBLKDEF void vblk_file_close(vblk_file *file);
VBLKDEF vblk_backend vblk_file_backend(vblk_file *file);

#ifdef __cplusplus
}
#endif
#endif // VBLK_FILES

#if defined(VBLK_THREADED) && !defined(VBLK_THREADED_H)
#define VBLK_THREADED_H
#ifdef __cplusplus
extern "C" {
#endif
// ---- Engine (Linux) --------------------------------------------------------
// Serves a device in place of vblk_poll(), with up to 250 requests under way,
// which end in any order. Of a vblk_file_backend(), io_uring does what the file
// does without waiting, reads of most, and each FLUSH; the backend does the
// rest, and all of any other. What must be durable is collected under one
// fdatasync(). Before it says that there is nothing to do it looks on for a
// while. All its calls are made by one thread, for io_uring knows no other:
// options.quiesce is to have that thread call vblk_engine_quiesce(), and waits.
typedef struct vblk_engine {
    uint64_t look_on_ns;   // for new requests, with none under way; 50,000
    pthread_mutex_t *lock; // NULL; of all engines of a device with limits
    // Private from here.
    vblk_dev    *dev;
    unsigned     first, end, at; // its queues
    bool         locked, had_lock;
    vblk_file   *file;     // that io_uring works on, or NULL
    uint64_t   (*now)(void);
    uint64_t     busy_ns;  // when there was something to do last
    uint32_t     under_way, in_kernel; // requests; calls of io_uring for them
    bool         polling, woken;  // `fd` of vblk_engine_wait(), by io_uring
    bool         dropping;        // what ends is forgotten
    bool         reads, writes;   // io_uring does them
    uint32_t     free, to_sync, in_sync; // lists of slots
    uint64_t     sync_end, bytes; // of the file, before it was synced; moving
    struct vblk__slot *slot;
    vblk_seg    *seg;      // of all slots, then of the one that is taken
    // io_uring. Of what `tail` counts, `queued` is not handed over.
    int          ring_fd, sync_fd; // or -1; the second is the file's, to hear
                                   // of failures
    uint32_t     tail, queued, iovs;
    uint32_t    *sq_tail, *sq_flags, *cq_head, *cq_tail;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
    struct iovec *iov;     // of what is queued
    void        *rings;
    size_t       rings_bytes;
} vblk_engine;

// For `queue`, or VBLK_ALL_QUEUES. VBLK_OK; VBLK_ERR_URING, with errno set:
// io_uring is not to be had, and the backend does all, as it does if `uring` is
// not set; or VBLK_ERR_WORKER: no memory, nothing opened. A lock of yours on
// the file, by its descriptor (flock, F_OFD_SETLK), lasts as long as what
// io_uring has under way, also if the process is killed; one of the process
// (F_SETLK) falls when an engine is closed.
VBLKDEF int vblk_engine_open(vblk_engine *e, vblk_dev *dev, int queue,
                             bool uring);

// What waits in the queues is begun, what has ended is completed, for some
// milliseconds at most. Returns when to call again, by CLOCK_MONOTONIC: 0, at
// once, or as vblk_poll() does; and when the driver notifies or something ends.
VBLKDEF uint64_t vblk_engine_poll(vblk_engine *e);

// Sleep until then: until something has ended, `fd` is readable, always the
// same one, or the time has come. Whether it is `fd`, which may be an epoll
// descriptor of all else that the thread waits for.
VBLKDEF bool vblk_engine_wait(vblk_engine *e, int fd, uint64_t until_ns);

// Begin nothing, and wait for what is under way, up to `ms`. It is completed;
// or, with VBLK_ALL_QUEUES, as options.quiesce is told it for a reset, it is
// cancelled, and forgotten. VBLK_OK: the kernel has no pointer into guest
// memory any more. VBLK_ERR_BUSY: it has, and what ends later touches no queue
// that was reset. Also before vblk_set_memory(), with 0 for the queue.
VBLKDEF int vblk_engine_quiesce(vblk_engine *e, int queue, unsigned ms);

// After it was quiesced; VBLK_ERR_BUSY if not: nothing is freed then.
VBLKDEF int vblk_engine_close(vblk_engine *e);

// ---- Worker (Linux) --------------------------------------------------------
typedef struct vblk_worker_options {
    unsigned stop_ms;    // of a stop, reset, pause; default 1000, most INT_MAX
    bool     no_uring;   // else its engine does what it can by io_uring
    bool     each_queue; // has a thread of its own
    unsigned look_on_us; // for new requests, before a thread sleeps; default 50
    const int *cpus;     // to run on, `cpu_count` numbers; NULL: on those that
    unsigned cpu_count;  // the caller of vblk_worker_init() runs on
    // All that were left behind, as a call of yours was told, have ended: all
    // they used is out of their hands, and the device has been reset. From here
    // any call of the worker may be made, unless vblk_worker_close() has begun,
    // which waits for this to return. The last of them; may be NULL.
    void (*released)(void *user);
    void *user; // its argument
} vblk_worker_options;

// A device and a thread to serve it, or one for each queue. Must not move.
typedef struct vblk_worker {
    int      irq_fd;  // eventfd, signalled to interrupt; good as a KVM irqfd
    int      kick_fd; // eventfd that wakes it; good as a KVM ioeventfd
    int      number;  // "vblk3" is the thread's name; no two are the same
    // Private from here.
    vblk_dev            dev;
    vblk_backend        backend; // the host's, as the rest of these
    void (*interrupt)(void *user, int queue, bool fire);
    void (*event)(void *user, const vblk_event *event);
    void               *user;
    vblk_worker_options wo;
    int                *kick_fds;     // of each thread
    unsigned            threads;
    pthread_mutex_t     registers;    // one register call at a time
    struct vblk__thread *thread;      // under `registers`, as all lists of them
    struct vblk__thread *left_behind;
    struct vblk__thread *returned;    // not joined yet
    bool                held;         // the same; vblk__hold_still() holds
    bool                refused;      // the same; it could not
    bool                orphaned;     // the same; the last left behind disposes
    unsigned char       cpu_set[128]; // a cpu_set_t
    pthread_mutex_t     limits;       // a turn of a thread's, where there are
    // Under `parking`. `awake` and `left` are also read without.
    pthread_mutex_t     parking;
    pthread_cond_t      changed;
    bool                pause, hold; // the host asks, the library asks
    uint32_t            running;     // threads that have not ended
    uint32_t            uring_told;  // atomic; it is not to be had
    uint32_t            awake;       // atomic; those that do not rest
    uint32_t            left;        // atomic; those left behind that live
} vblk_worker;

// Make a device from `o`, as vblk_init() does, and what a thread needs, which
// starts when the driver says DRIVER_OK, and again after each reset.
// o->interrupt is called beside irq_fd. It and o->event are called by the
// thread and by those that make register calls, several at once; hold no lock
// that they take around vblk_worker_ calls. The thread blocks all signals but
// those of its faults. `wo` may be NULL. VBLK_OK or a code.
//
//     int vblk_worker_init(vblk_worker *w, const vblk_options *o,
//                          const vblk_worker_options *wo);
#define vblk_worker_init(w, o, wo)                                             \
    vblk_worker_init_checked(w, o, wo, VBLK_VERSION, sizeof(vblk_worker))
VBLKDEF int vblk_worker_init_checked(vblk_worker *w, const vblk_options *o,
                                     const vblk_worker_options *wo,
                                     int version, size_t bytes);

// Stop the thread and free all. VBLK_OK; or VBLK_ERR_BUSY: it is stuck, in the
// backend or on a page of guest memory that does not come, and was left behind
// after stop_ms. It touches no ring, no guest memory of its own accord, no
// interrupt, and frees all when it comes back. Until released() is called, and
// without that for good, `w`, what the callbacks and their `user` need, the
// backend above all, and guest memory must stay.
VBLKDEF int vblk_worker_close(vblk_worker *w);

// The device, for queries: vblk_mmio_read(), vblk_interrupt_line(),
// vblk_counters(), vblk_status() and all others that any thread may make.
VBLKDEF const vblk_dev *vblk_worker_dev(const vblk_worker *w);

// The eventfd of the thread that serves `queue`. Any thread.
VBLKDEF int vblk_worker_kick_fd(const vblk_worker *w, unsigned queue);

// The guest stored `value` in the register window: kicks, starts, stops and
// resets as needed. QueueNotify and InterruptACK never wait. A Status of 0 (and
// QueueReset, or QueueReady of 0 while live) waits up to stop_ms for threads,
// other register calls for those. VBLK_OK; or VBLK_ERR_BUSY: one is stuck, or
// still is, and Status reads DEVICE_NEEDS_RESET, then 0. Any thread.
VBLKDEF int vblk_worker_mmio_write(vblk_worker *w, uint64_t offset,
                                   unsigned bytes, uint64_t value);

// vblk_needs_reset(); wake the threads, harmless at any time. Any thread.
VBLKDEF void vblk_worker_needs_reset(vblk_worker *w);
VBLKDEF void vblk_worker_kick(vblk_worker *w);

// Ask the thread to finish what it has under way and rest, and wait for that up
// to `ms`. VBLK_OK: it rests, or is not started; all its writes are visible, it
// touches nothing until vblk_worker_resume(). VBLK_ERR_BUSY: it rests later, as
// vblk_worker_paused() tells; or, at once, one that was left behind has not
// ended. No kick is lost, and a pause outlasts a reset. Any thread.
VBLKDEF int vblk_worker_pause(vblk_worker *w, unsigned ms);

// End a pause, if there is one; whether all threads are at rest now: paused, or
// not started, and none is left behind. Any thread.
VBLKDEF void vblk_worker_resume(vblk_worker *w);
VBLKDEF bool vblk_worker_paused(const vblk_worker *w);

// vblk_resize(), for whose shrinking you pause; vblk_set_memory() and
// vblk_set_limits(), with the thread at rest, or VBLK_ERR_BUSY. Any thread.
VBLKDEF int vblk_worker_resize(vblk_worker *w, uint64_t sectors);
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
#if defined(VBLK_IMPLEMENTATION_THREADED) && !defined(__GNUC__)
#error "vblk.h: the worker needs gcc or clang; the rest does not"
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
#ifndef VBLK_MAX_SEGS
#define VBLK_MAX_SEGS 128
#endif
#ifndef VBLK_SCRATCH
#define VBLK_SCRATCH 4096
#endif
#ifndef VBLK_MAX_RANGES
#define VBLK_MAX_RANGES 64
#endif
#if VBLK_MAX_SEGS < 1 || VBLK_MAX_SEGS > 32768 || VBLK_MAX_RANGES > 4096
#error "vblk.h: VBLK_MAX_SEGS is 1 to 32768, VBLK_MAX_RANGES 4096 at most"
#endif
#if VBLK_SCRATCH < 512 || VBLK_SCRATCH % 512 != 0
#error "vblk.h: VBLK_SCRATCH must be a multiple of 512"
#endif

// Segments on the stack of a drain, header and status among them. What these
// two leave free is for descriptors that cross host regions, which take one for
// each; with more crossings than that the request goes without pointers.
#define VBLK__SEGS (VBLK_MAX_SEGS + 2)

// Status, InterruptStatus, the counters and the ring indices are shared with
// threads, the guest's among them, that are running. The orders:
//
//     LOAD, STORE   relaxed: a single word that nothing else is read by
//     LOAD_ACQUIRE  Status, QueueReady, InterruptStatus, the line: with them
//                   comes what was set up or completed; STORE_RELEASE before
//     ACQUIRE, RELEASE  an index: what it covers is read after, written before
//     OR, CAS       both, for what they announce and take over
//     FENCE         full: one side's store before its load of the other's
#if defined(__GNUC__) || defined(__clang__)
typedef uint16_t __attribute__((may_alias)) vblk__shared16; // in guest memory
#else
typedef uint16_t vblk__shared16;
#endif
#if defined(VBLK_SINGLE_THREADED)
#define VBLK__GET(p, order)    (*(p))
#define VBLK__SET(p, v, order) ((void)(*(p) = (v)))
#define VBLK__WORD             volatile vblk__shared16
#define VBLK__OR(p, v)         ((void)(*(p) |= (v)))
#define VBLK__CAS(p, old, new) (*(p) = (new), (void)(old), true)
#define VBLK__FENCE()          ((void)0)
#define VBLK__ONCE()           ((void)0)
#elif defined(__GNUC__) || defined(__clang__)
#define VBLK__relaxed __ATOMIC_RELAXED
#define VBLK__acquire __ATOMIC_ACQUIRE
#define VBLK__release __ATOMIC_RELEASE
#define VBLK__GET(p, order)    __atomic_load_n(p, VBLK__##order)
#define VBLK__SET(p, v, order) __atomic_store_n(p, v, VBLK__##order)
#define VBLK__WORD             vblk__shared16
#define VBLK__OR(p, v) ((void)__atomic_fetch_or(p, v, __ATOMIC_ACQ_REL))
#define VBLK__CAS(p, old, new)                                                 \
    __atomic_compare_exchange_n(p, &(old), new, false, __ATOMIC_ACQ_REL,       \
                                __ATOMIC_ACQUIRE)
#define VBLK__FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
// What was copied from the guest before this is not fetched again.
#define VBLK__ONCE() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#else
#error "vblk.h: VBLK_SINGLE_THREADED, or a compiler with gcc's atomics"
#endif
#define VBLK__LOAD(p)             VBLK__GET(p, relaxed)
#define VBLK__STORE(p, v)         VBLK__SET(p, v, relaxed)
#define VBLK__LOAD_ACQUIRE(p)     VBLK__GET(p, acquire)
#define VBLK__STORE_RELEASE(p, v) VBLK__SET(p, v, release)
#define VBLK__ACQUIRE(p)                                                       \
    VBLK__GET((const VBLK__WORD *)(const void *)(p), acquire)
#define VBLK__RELEASE(p, v) VBLK__SET((VBLK__WORD *)(void *)(p), v, release)

// In the common request's path each call costs; what is not common is out of
// line. For size neither matters.
#if defined(__GNUC__) && !defined(__OPTIMIZE_SIZE__)
#define VBLK__FLAT static inline __attribute__((always_inline))
#define VBLK__RARE static __attribute__((cold))
#else
#define VBLK__FLAT static inline
#define VBLK__RARE static
#endif
// What takes much stack, which is not to be the stack of whoever calls it.
#if defined(__GNUC__)
#define VBLK__APART static __attribute__((noinline))
#else
#define VBLK__APART static
#endif

// ---- Wire: little-endian loads and stores, layouts --------------------------
#define VBLK__DESC_NEXT     1u
#define VBLK__DESC_WRITE    2u
#define VBLK__DESC_INDIRECT 4u
#define VBLK__DESC_BYTES    16u
#define VBLK__USED_BYTES    8u
#define VBLK__HEADER_BYTES  16u
#define VBLK__RANGE_BYTES   16u
#define VBLK__CONFIG_BYTES  72u
#define VBLK__WRITEBACK     32u // in it
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

static inline void vblk__put_le(uint8_t *p, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        p[i] = (uint8_t)value;
        value >>= 8;
    }
}

// Words as they lie in memory, little-endian, from and to the host's.
static inline uint16_t vblk__le16(uint16_t value) {
    uint8_t b[2];
    VBLK_MEMCPY(b, &value, 2);
    return vblk__get16(b);
}

static inline uint32_t vblk__le32(uint32_t value) {
    uint8_t b[4];
    VBLK_MEMCPY(b, &value, 4);
    return vblk__get32(b);
}

// `n` bytes at `gpa`, more than 0, go on at address 0.
static inline bool vblk__wraps(uint64_t gpa, uint64_t n) {
    return gpa > 0 - n;
}

// ---- Memory: where addresses become pointers --------------------------------
static void *vblk__regions_map(void *user, uint64_t gpa, uint64_t *n,
                               bool writable);

// A pointer to all of [gpa, gpa + n) if it lies in `r`, or NULL.
static inline uint8_t *vblk__in_region(const vblk_region *r, uint64_t gpa,
                                       uint64_t n, bool writable) {
    uint64_t at = gpa - r->gpa;
    return at < r->bytes && n <= r->bytes - at && !(writable && r->read_only)
               ? (uint8_t *)r->host + at
               : NULL;
}

static uint8_t *vblk__part_of(const vblk_region *r, uint64_t gpa, uint64_t *n,
                              bool writable) {
    uint64_t at = gpa - r->gpa;
    if (at >= r->bytes) return NULL;
    *n = *n < r->bytes - at ? *n : r->bytes - at;
    return vblk__in_region(r, gpa, *n, writable);
}

static const vblk_region vblk__no_region = {0, 0, NULL, false};

// The region that holds `gpa`, or one of no bytes: by halves, as if the table
// was sorted, and else one by one.
static const vblk_region *vblk__find_region(const vblk_regions *all,
                                            uint64_t gpa) {
    const vblk_region *r = all->region, *end = r + all->count;
    for (size_t n = all->count, half; n > 1; n -= half) {
        half = n / 2;
        const vblk_region *middle = r + half;
        r = gpa >= middle->gpa ? middle : r;
    }
    if (r != end && gpa - r->gpa < r->bytes) return r;
    for (r = all->region; r != end; r++) {
        if (gpa - r->gpa < r->bytes) return r;
    }
    return &vblk__no_region;
}

// Buffers of a kind lie together: where the last of them was, the next is
// looked for first. Foreign maps are asked each time.
enum { VBLK__TABLES, VBLK__ENDS, VBLK__DATA }; // ends: headers, status bytes

static uint8_t *vblk__look_up(vblk_dev *dev, const vblk_region **near,
                              uint64_t gpa, uint64_t *n, bool writable) {
    const vblk_memory *m = &dev->memory;
    if (m->map != vblk__regions_map) {
        return (uint8_t *)m->map(m->user, gpa, n, writable);
    }
    *near = vblk__find_region((const vblk_regions *)m->user, gpa);
    return vblk__part_of(*near, gpa, n, writable);
}

// A pointer to all of [gpa, gpa + n), or NULL.
static inline uint8_t *vblk__whole(vblk_dev *dev, const vblk_region **near,
                                   uint64_t gpa, size_t n, bool writable) {
    uint8_t *p = vblk__in_region(*near, gpa, n, writable);
    if (p || !dev->memory.map) return p;
    uint64_t run = n;
    p = vblk__look_up(dev, near, gpa, &run, writable);
    return run == n ? p : NULL; // more would break its word
}

static bool vblk__read(vblk_dev *dev, uint64_t gpa, void *dst, size_t n) {
    const vblk_memory *m = &dev->memory;
    return m->read && m->read(m->user, gpa, dst, n) == 0;
}

static bool vblk__write(vblk_dev *dev, uint64_t gpa, const void *src,
                        size_t n) {
    const vblk_memory *m = &dev->memory;
    return m->write && m->write(m->user, gpa, src, n) == 0;
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
        if (!vblk__read(dev, gpa + at, &le, 2)) return false;
        VBLK__FENCE();
    }
    *value = vblk__le16(le);
    return true;
}

static inline bool vblk__store16(vblk_dev *dev, uint8_t *ptr, uint64_t gpa,
                                 uint64_t at, uint16_t value) {
    uint16_t le = vblk__le16(value);
    if (vblk__halted(dev)) return true;
    if (ptr) {
        VBLK__RELEASE(ptr + at, le);
        return true;
    }
    VBLK__FENCE();
    return vblk__write(dev, gpa + at, &le, 2);
}

static void *vblk__regions_map(void *user, uint64_t gpa, uint64_t *n,
                               bool writable) {
    const vblk_regions *all = (const vblk_regions *)user;
    return vblk__part_of(vblk__find_region(all, gpa), gpa, n, writable);
}

static bool vblk__is_word(const uint8_t *p, uint64_t n) {
    return n == 2 && ((uintptr_t)p & 1) == 0;
}

static void vblk__copy_piece(uint8_t *p, uint8_t *host, uint64_t n, bool in) {
    uint16_t word;
    if (!vblk__is_word(p, n)) {
        VBLK_MEMCPY(in ? host : p, in ? p : host, (size_t)n);
    } else if (in) {
        word = VBLK__ACQUIRE(p);
        VBLK_MEMCPY(host, &word, 2);
    } else {
        VBLK_MEMCPY(&word, host, 2);
        VBLK__RELEASE(p, word);
    }
}

// Between guest memory and the host, which is written to only with `in`. Across
// regions it is looked up to its end before a byte moves.
static int vblk__regions_across(void *user, bool in, uint64_t gpa,
                                uint8_t *host, uint64_t n) {
    for (int moves = 0; moves <= (host != NULL); moves++) {
        uint64_t run;
        for (uint64_t done = 0; done < n; done += run) {
            run = n - done;
            uint8_t *p = (uint8_t *)vblk__regions_map(user, gpa + done, &run,
                                                      !in);
            if (!p) return -1;
            if (moves) vblk__copy_piece(p, host + done, run, in);
        }
    }
    return 0;
}

static inline int vblk__regions_copy(void *user, bool in, uint64_t gpa,
                                     uint8_t *host, uint64_t n) {
    const vblk_region *r = vblk__find_region((const vblk_regions *)user, gpa);
    uint8_t *p = vblk__in_region(r, gpa, n, !in);
    if (!p) return vblk__regions_across(user, in, gpa, host, n);
    if (host) vblk__copy_piece(p, host, n, in);
    return 0;
}

static int vblk__regions_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    return vblk__regions_copy(user, true, gpa, (uint8_t *)dst, n);
}

static int vblk__regions_write(void *user, uint64_t gpa, const void *src,
                               uint64_t n) {
    return vblk__regions_copy(user, false, gpa, (uint8_t *)(uintptr_t)src, n);
}

// ---- Device: state, events, interrupts, notifications ----------------------
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

VBLKDEF uint32_t vblk_status(const vblk_dev *dev) {
    return VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__STATUS;
}

VBLKDEF uint64_t vblk_driver_features(const vblk_dev *dev) {
    return VBLK__LOAD(&dev->accepted);
}

static unsigned vblk__queue_count(const vblk_dev *dev) {
    bool negotiated = vblk__has_status(dev, VBLK_STATUS_FEATURES_OK);
    return negotiated && !(vblk_driver_features(dev) & VBLK_F_MQ)
               ? 1
               : dev->queues;
}

// Which fields of an event its two numbers are, and its level. From `address`
// on they stand in this order.
enum {
    VBLK__IS_NONE, VBLK__IS_ADDRESS, VBLK__IS_BYTES, VBLK__IS_SECTOR,
    VBLK__IS_INDEX, VBLK__IS_VALUE, VBLK__IS_AGAINST, VBLK__IS_ERROR
};

static const struct vblk__event_shape {
    uint8_t code, level : 2, a : 3, b : 3;
} vblk__event_rows[] = {
#define VBLK_X(name, number, level, a, b, text)                                \
    {number, VBLK_LEVEL_##level, VBLK__IS_##a, VBLK__IS_##b},
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    {VBLK_EV_NONE, VBLK_LEVEL_NOTE, VBLK__IS_NONE, VBLK__IS_NONE}
};

static const struct vblk__event_shape *vblk__event_row(vblk_event_code code) {
    const struct vblk__event_shape *row = vblk__event_rows;
    while (row->code != (unsigned)code && row->code != VBLK_EV_NONE) row++;
    return row;
}

static uint64_t *vblk__field(vblk_event *e, unsigned field) {
    uint8_t *first = (uint8_t *)e + offsetof(vblk_event, address);
    return (uint64_t *)(void *)first + (field - VBLK__IS_ADDRESS);
}

VBLK__RARE void vblk__emit(const vblk_dev *dev, int queue, int head,
                           vblk_event_code code, uint64_t a, uint64_t b) {
    if (dev->event) {
        const struct vblk__event_shape *row = vblk__event_row(code);
        vblk_event e;
        VBLK_MEMSET(&e, 0, sizeof e);
        e.code = code;
        e.level = (vblk_level)row->level;
        e.queue = queue;
        e.head = head;
        if (row->a) *vblk__field(&e, row->a) = a;
        if (row->b) *vblk__field(&e, row->b) = b;
        dev->event(dev->user, &e);
    }
}

#define vblk__say(dev, code, a, b)                                             \
    vblk__emit(dev, VBLK_NO_QUEUE, VBLK_NO_HEAD, code, a, b)
#define vblk__say_queue(dev, q, code, a, b)                                    \
    vblk__emit(dev, (q)->number, VBLK_NO_HEAD, code, a, b)
#define vblk__say_request(dev, r, code, a, b)                                  \
    vblk__emit(dev, (r)->queue, (r)->head, code, a, b)

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
    if ((VBLK__LOAD(&dev->state) & set) != set) VBLK__OR(&dev->state, set);
    if (fire && dev->interrupt) dev->interrupt(dev->user, queue, true);
}

// Bits of Status, if any, and, on a live device, the configuration interrupt,
// in one step after what they announce. Written in any case: a driver that
// acknowledges an earlier one just now looks at the configuration after that.
static void vblk__announce(vblk_dev *dev, uint32_t status) {
    uint32_t old = VBLK__LOAD(&dev->state), set;
    do {
        set = status;
        if (old & VBLK_STATUS_DRIVER_OK) {
            set |= VBLK__INTERRUPT(VBLK_INTERRUPT_CONFIG) | VBLK__LINE;
        }
    } while (!VBLK__CAS(&dev->state, old, old | set));
    if (set & VBLK__LINE && dev->interrupt) {
        dev->interrupt(dev->user, VBLK_NO_QUEUE, true);
    }
}

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
        dev->interrupt) {
        dev->interrupt(dev->user, VBLK_NO_QUEUE, false);
    }
}

static void vblk__set_due(vblk_dev *dev, vblk_queue *q) {
    VBLK__STORE_RELEASE(&q->due, true);
    VBLK__OR(&dev->due, 1u);
}

VBLKDEF void vblk_notify(vblk_dev *dev, int queue) {
    VBLK_ASSERT(queue == VBLK_ALL_QUEUES ||
                (queue >= 0 && (unsigned)queue < dev->queues));
    if (queue == VBLK_ALL_QUEUES) {
        vblk_queue *q = dev->queue, *const end = q + dev->queues;
        for (; q != end; q++) VBLK__STORE_RELEASE(&q->due, true);
        VBLK__OR(&dev->due, 1u);
    } else if ((unsigned)queue < dev->queues) {
        vblk__set_due(dev, &dev->queue[queue]);
    }
    if (dev->notify) dev->notify(dev->user, queue);
}

// ---- Bucket: integers in, integers out -------------------------------------
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
#if UINTPTR_MAX > UINT32_MAX // else a library would do it
    if (w.hi == 0) {
        *remainder = w.lo % d;
        return w.lo / d;
    }
#endif
    if (w.hi >= d) return UINT64_MAX;
    for (int bit = 0; bit < 64; bit++) { // w.hi < d: the quotient fits
        bool carry = w.hi >> 63;
        w.hi = w.hi << 1 | w.lo >> 63;
        w.lo <<= 1;
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
    if (now_ns <= b->last_ns) return;
    if (b->rate == 0) {
        b->last_ns = now_ns;
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
    if (vblk_bucket_can_take(b, n)) return 0;
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

// ---- Limits: who must wait, and until when ---------------------------------
// Those of a batch come at one time: all but the first find it done.
static inline void vblk__refill(vblk_dev *dev, uint64_t now_ns) {
    if (now_ns > dev->ops.last_ns) vblk_bucket_refill(&dev->ops, now_ns);
    if (now_ns > dev->bytes.last_ns) vblk_bucket_refill(&dev->bytes, now_ns);
}

// `q` had its turn, or gives it up: it goes to the next queue that waits.
static void vblk__end_turn(vblk_dev *dev, const vblk_queue *q) {
    unsigned me = q->number;
    if (dev->waits && dev->turn == me) {
        dev->waits = false;
        dev->again_ns = 0;
        for (unsigned i = 1; i < dev->queues && !dev->waits; i++) {
            unsigned next = (me + i) % dev->queues;
            dev->waits = dev->queue[next].run.stalled;
            dev->turn = (uint16_t)next;
        }
        if (dev->waits) vblk_notify(dev, dev->turn);
    }
}

static void vblk__forget_stall(vblk_dev *dev, vblk_queue *q) {
    vblk__end_turn(dev, q);
    q->run.stalled = false;
    VBLK__STORE(&q->counts.currently_throttled, 0);
}

VBLK__RARE void vblk__end_stall(vblk_dev *dev, vblk_queue *q, uint64_t now_ns) {
    vblk__forget_stall(dev, q);
    if (now_ns > q->run.stalled_ns) {
        vblk__count(&q->counts.throttled_ns, now_ns - q->run.stalled_ns);
    }
}

static void vblk__stall(vblk_dev *dev, vblk_queue *q, uint64_t ops,
                        uint64_t bytes, uint64_t now_ns) {
    if (!dev->waits) {
        dev->waits = true;
        dev->turn = q->number;
        dev->again_ns = 0;
    }
    q->run.stalled_ops = ops;
    q->run.stalled_bytes = bytes;
    if (!q->run.stalled) {
        q->run.stalled = true;
        q->run.stalled_ns = now_ns;
        vblk__count(&q->counts.throttled, 1);
        VBLK__STORE(&q->counts.currently_throttled, 1);
    }
}

// Whether a request that costs so much fits the limits now; both are looked at
// before either is charged. The queue that stalls first goes first: until its
// request fits, nothing of another queue passes, or small requests there could
// keep a large one waiting for ever.
static bool vblk__admit(vblk_dev *dev, vblk_queue *q, uint64_t ops,
                        uint64_t bytes, uint64_t now_ns) {
    if (!dev->ops.rate && bytes == 0) {
        return true; // costs nothing, so it waits for nobody
    }
    vblk__refill(dev, now_ns);
    bool its_turn = !dev->waits || dev->turn == q->number;
    if (!its_turn || !vblk_bucket_can_take(&dev->ops, ops) ||
        !vblk_bucket_can_take(&dev->bytes, bytes)) {
        vblk__stall(dev, q, ops, bytes, now_ns);
        return false;
    }
    vblk_bucket_take(&dev->ops, ops);
    vblk_bucket_take(&dev->bytes, bytes);
    return true;
}

static uint64_t vblk__turn_comes(vblk_dev *dev, uint64_t now_ns) {
    const vblk_queue *q = &dev->queue[dev->turn];
    vblk__refill(dev, now_ns);
    uint64_t a = vblk_bucket_wait(&dev->ops, q->run.stalled_ops, now_ns);
    uint64_t b = vblk_bucket_wait(&dev->bytes, q->run.stalled_bytes, now_ns);
    uint64_t wait = a > b ? a : b;
    return wait < VBLK_NEVER - now_ns ? now_ns + wait : VBLK_NEVER - 1;
}

// ---- Queue: take a chain, give it back, publish, switch notifications ------
// Offsets in the rings [2.7.6, 2.7.8].
static uint64_t vblk__avail_bytes(const vblk_queue *q) {
    return 6 + 2 * (uint64_t)q->size;
}

static uint64_t vblk__used_bytes(const vblk_queue *q) {
    return 6 + VBLK__USED_BYTES * (uint64_t)q->size;
}

// What is under way in a broken queue goes stale, though it still moves data
// until the host has ended it. Its stall ends: no other queue waits for it.
VBLK__RARE void vblk__poison(vblk_dev *dev, vblk_queue *q, vblk_event_code code,
                             uint64_t a, uint64_t b) {
    if (q->broken) return;
    VBLK__STORE(&q->broken, true);
    VBLK__STORE(&q->epoch, q->epoch + 1);
    q->run.avail_seen = q->run.avail_next; // there is nothing to take
    vblk__forget_stall(dev, q);
    vblk__count(&q->counts.broken_queues, 1);
    vblk__say_queue(dev, q, code, a, b);
    vblk__announce(dev, VBLK_STATUS_NEEDS_RESET);
}

// One of the three areas of a queue: where it is, or that it cannot be there.
// One without a pointer, be it outside guest memory or across a seam of it, is
// left to the accessors; so is one whose words are no single accesses.
static bool vblk__find_area(vblk_dev *dev, vblk_queue *q, uint8_t **ptr,
                            uint64_t gpa, uint64_t n, unsigned align) {
    if (gpa & (align - 1) || vblk__wraps(gpa, n)) {
        vblk__poison(dev, q, VBLK_EV_RING_PLACE, gpa, 0);
        return false;
    }
    *ptr = vblk__whole(dev, &q->run.near[VBLK__TABLES], gpa, (size_t)n,
                       ptr == &q->run.used);
    if ((uintptr_t)*ptr & 1 && ptr != &q->run.desc) *ptr = NULL;
    return true;
}

static bool vblk__adopt_used(vblk_dev *dev, vblk_queue *q) {
    uint16_t idx = 0;
    bool ok = q->used_gpa % 4 == 0 &&
              vblk__load16(dev, q->run.used, q->used_gpa, 2, &idx);
    q->run.used_next = q->run.used_decided = q->run.used_shown = idx;
    q->run.adopt_used = !ok;
    return ok;
}

// Look at a queue first since DRIVER_OK, or since the memory changed.
static bool vblk__resolve(vblk_dev *dev, vblk_queue *q) {
    if (q->size == 0) {
        vblk__poison(dev, q, VBLK_EV_RING_SIZE, 0, 0);
        return false;
    }
    q->run.near[VBLK__TABLES] = q->run.near[VBLK__ENDS] =
        q->run.near[VBLK__DATA] = &vblk__no_region;
    if (!vblk__find_area(dev, q, &q->run.desc, q->desc_gpa,
                         VBLK__DESC_BYTES * (uint64_t)q->size, 16) ||
        !vblk__find_area(dev, q, &q->run.avail, q->avail_gpa,
                         vblk__avail_bytes(q), 2) ||
        !vblk__find_area(dev, q, &q->run.used, q->used_gpa,
                         vblk__used_bytes(q), 4)) {
        return false;
    }
    q->run.resolved = true;
    q->run.notify_off = true; // whatever the driver left there [2.7.10.2]
    if (q->run.adopt_used && !vblk__adopt_used(dev, q)) {
        vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + 2, 0);
        return false;
    }
    return true;
}

typedef enum vblk__state {
    VBLK__EMPTY,
    VBLK__REQUEST, // one was handed out
    VBLK__STALLED, // a limit holds up the request at the head
    VBLK__MORE,    // there is an entry in the ring
    VBLK__BROKEN
} vblk__state;

// The available ring is out of reach or holds what cannot be. Not told once the
// drain is to halt: the driver may have the ring in hand again.
VBLK__RARE vblk__state vblk__lost(vblk_dev *dev, vblk_queue *q,
                                  vblk_event_code code, uint64_t a,
                                  uint64_t b) {
    if (vblk__halted(dev)) return VBLK__EMPTY;
    vblk__poison(dev, q, code, a, b);
    return VBLK__BROKEN;
}

// What came since avail.idx was last read: EMPTY, MORE or BROKEN.
VBLK__FLAT vblk__state vblk__peek(vblk_dev *dev, vblk_queue *q) {
    uint16_t idx, next = q->run.avail_next;
    if (q->broken) return VBLK__BROKEN;
    if (vblk__halted(dev)) return VBLK__EMPTY;
    if (!vblk__load16(dev, q->run.avail, q->avail_gpa, 2, &idx)) {
        return vblk__lost(dev, q, VBLK_EV_AVAIL_UNREADABLE, q->avail_gpa, 0);
    }
    if (idx == next) return VBLK__EMPTY;
    if ((uint16_t)(idx - next) > q->size) {
        return vblk__lost(dev, q, VBLK_EV_AVAIL_JUMP, idx, next);
    }
    q->run.avail_seen = idx;
    q->run.armed = false;
    return VBLK__MORE;
}

// Notifications off: a hint, so a failure does not matter. With EVENT_IDX
// they are off by themselves once avail_event is passed [2.7.10].
static void vblk__notify_off(vblk_dev *dev, vblk_queue *q) {
    if (!dev->event_idx && !q->run.notify_off) {
        vblk__store16(dev, q->run.used, q->used_gpa, 0, VBLK__NO_NOTIFY);
        q->run.notify_off = true;
    }
}

VBLK__FLAT void vblk__show(vblk_dev *dev, vblk_queue *q) {
    uint16_t idx = (uint16_t)q->run.used_next;
    if (idx != q->run.used_shown) {
        q->run.used_shown = idx;
        if (!vblk__store16(dev, q->run.used, q->used_gpa, 2, idx)) {
            vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + 2, 0);
        } else if (dev->track) {
            dev->track(dev->user, q->number, VBLK_NO_HEAD);
        }
    }
}

// Notifications on for whatever comes after avail_seen. Then look at avail.idx
// again: either the driver sees the switch, or the device sees its entry.
VBLK__FLAT bool vblk__notify_on(vblk_dev *dev, vblk_queue *q) {
    bool ok = true;
    if (q->run.notify_off) {
        ok = vblk__store16(dev, q->run.used, q->used_gpa, 0, 0);
        q->run.notify_off = !ok;
    }
    if (ok && dev->event_idx) {
        ok = vblk__store16(dev, q->run.used, q->used_gpa,
                           vblk__used_bytes(q) - 2, q->run.avail_seen);
    }
    if (!ok && !q->run.switch_failed) {
        vblk__say_queue(dev, q, VBLK_EV_NOTIFY_SWITCH, q->used_gpa, 0);
    }
    q->run.switch_failed = !ok;
    VBLK__FENCE();
    return ok;
}

// One that an earlier device had taken.
VBLK__RARE bool vblk__take_again(vblk_queue *q, uint16_t *head) {
    uint16_t left = (uint16_t)(q->run.again_end - q->run.avail_next);
    if (left > 0) *head = q->run.again[q->run.agains - left];
    else q->run.agains = 0;
    return left > 0;
}

static bool vblk__take(vblk_dev *dev, vblk_queue *q, uint16_t *head) {
    uint64_t at = 4 + 2 * (uint64_t)(q->run.avail_next & (q->size - 1));
    bool again = q->run.agains > 0 && vblk__take_again(q, head);
    if (!again && !vblk__load16(dev, q->run.avail, q->avail_gpa, at, head)) {
        vblk__lost(dev, q, VBLK_EV_AVAIL_UNREADABLE, q->avail_gpa + at, 0);
        return false;
    }
    if (*head >= q->size) {
        vblk__lost(dev, q, VBLK_EV_HEAD_RANGE, *head, 0);
        return false;
    }
    q->run.avail_next++;
    if (dev->track) dev->track(dev->user, q->number, *head);
    return true;
}

VBLK__FLAT bool vblk__give_back(vblk_dev *dev, vblk_queue *q, uint16_t head,
                                uint32_t written) {
    uint64_t at = 4 + VBLK__USED_BYTES *
                          (uint64_t)(q->run.used_next & (q->size - 1));
    const uint32_t element[2] = {vblk__le32(head), vblk__le32(written)};
    if (vblk__halted(dev)) return false;
    if (q->run.used) {
        VBLK_MEMCPY(q->run.used + at, element, sizeof element);
    } else if (!vblk__write(dev, q->used_gpa + at, element, sizeof element)) {
        vblk__poison(dev, q, VBLK_EV_USED_UNWRITABLE, q->used_gpa + at, 0);
        return false;
    }
    q->run.used_next++;
    return true;
}

// Whether the indices from `old` up to but not including `now` hold `event`.
static inline bool vblk__crosses(uint16_t event, uint16_t now, uint16_t old) {
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

// Whether the driver asked for an interrupt since used.idx was `old`
// [2.7.7.2]; yes when it cannot be read.
VBLK__FLAT bool vblk__wanted(vblk_dev *dev, vblk_queue *q, uint32_t old) {
    uint16_t word;
    if (dev->event_idx) {
        return q->run.used_next - old > UINT16_MAX || // past any event
               !vblk__load16(dev, q->run.avail, q->avail_gpa,
                             vblk__avail_bytes(q) - 2, &word) ||
               vblk__crosses(word, q->run.used_shown, (uint16_t)old);
    }
    return !vblk__load16(dev, q->run.avail, q->avail_gpa, 0, &word) ||
           !(word & VBLK__NO_INTERRUPT);
}

VBLK__FLAT void vblk__publish_queue(vblk_dev *dev, vblk_queue *q) {
    uint32_t old = q->run.used_decided;
    if ((uint16_t)q->run.used_next != q->run.used_shown) {
        vblk__show(dev, q);
        // Either the driver sees the new index when it switches interrupts
        // on, or the device sees the switch.
        VBLK__FENCE();
    }
    if (q->run.used_next == old || vblk__halted(dev)) return;
    q->run.used_decided = q->run.used_next;
    bool fire = vblk__wanted(dev, q, old) || q->run.switch_failed;
    if ((fire || dev->strict) && !vblk__halted(dev)) { // P7, W8
        vblk__raise(dev, q->number, fire);
    }
}

// ---- Chain: descriptors to a list ------------------------------------------
#define VBLK__MAX_WALK 32768u // entries of the largest queue

// A chain as it was read, each descriptor once; the empty ones not listed.
typedef struct vblk__chain {
    const vblk_region **near; // the queue's
    vblk_seg *list, *end; // what is left of it, in an array of the caller's
    vblk_seg *full;       // the end of that, at least seg_max + 2 on
    vblk_seg *last;       // the last writable one, or NULL
    unsigned descs;       // read so far, the empty ones too
    unsigned empty;       // which of these was the last empty one, from 1 on
    bool     empty_first; // the first is
    bool     mixed;       // a readable one after a writable one ...
    bool     in_first;    // ... and no other readable one before
    vblk_event_code spoilt; // it has an end, and is refused all the same (P5)
    // Why it is refused, as the event says it, and what the status byte tells.
    vblk_event_code code;
    uint64_t why_a, why_b;
    uint8_t  status;
    uint64_t out_bytes;  // in all readable ones
    uint64_t in_bytes;   // in all writable ones
} vblk__chain;

VBLK__RARE bool vblk__refuse(vblk__chain *c, vblk_event_code code, uint64_t a,
                             uint64_t b) {
    c->code = code;
    c->why_a = a;
    c->why_b = b;
    return false;
}

typedef struct vblk__table {
    uint8_t *ptr; // or NULL
    uint64_t gpa;
    uint32_t entries;
    unsigned before; // descriptors of the chain that are in another table
    bool     indirect;
} vblk__table;

// Go from `t` to the indirect table at `gpa` [2.7.5.3].
static bool vblk__enter(vblk_dev *dev, vblk__chain *c, vblk__table *t,
                        uint64_t gpa, uint32_t n, unsigned flags) {
    if (!dev->indirect) return vblk__refuse(c, VBLK_EV_INDIRECT_OFF, n, 0);
    if (t->indirect) return vblk__refuse(c, VBLK_EV_INDIRECT_NESTED, n, 0);
    if (flags & VBLK__DESC_NEXT) {
        return vblk__refuse(c, VBLK_EV_INDIRECT_NEXT, n, 0);
    }
    if (n == 0 || n % VBLK__DESC_BYTES) {
        return vblk__refuse(c, VBLK_EV_INDIRECT_SIZE, n, 0);
    }
    if (vblk__wraps(gpa, n)) {
        return vblk__refuse(c, VBLK_EV_CHAIN_UNREADABLE, gpa, 0);
    }
    t->ptr = vblk__whole(dev, &c->near[VBLK__TABLES], gpa, n, false);
    t->gpa = gpa;
    t->entries = n / VBLK__DESC_BYTES;
    t->before = c->descs;
    t->indirect = true;
    return true;
}

// How many descriptors the chain may have before somebody looks: each entry of
// a table once, and `most` in all.
static unsigned vblk__stop_at(const vblk__table *t, unsigned most) {
    return most - t->before < t->entries ? most : t->before + t->entries;
}

// The chain is as long as it may be. In the standard profile the end of one
// that is too long is looked for, as far as any queue could hold it.
VBLK__RARE bool vblk__too_long(const vblk_dev *dev, vblk__chain *c,
                               const vblk__table *t, unsigned limit) {
    bool is_long = c->descs >= limit;
    if (is_long) c->spoilt = VBLK_EV_CHAIN_LONG;
    return (dev->strict || c->descs >= vblk__stop_at(t, VBLK__MAX_WALK)) &&
           !vblk__refuse(c, VBLK_EV_CHAIN_LONG, is_long ? limit : t->entries,
                         0);
}

// Until `limit` more are read: what is in the list will not be used, so it
// begins again, behind the last writable one.
VBLK__RARE unsigned vblk__look_on(vblk__chain *c, const vblk__table *t,
                                  unsigned limit) {
    c->end = c->list;
    if (c->last) {
        *c->end = *c->last;
        c->last = c->end++;
    }
    unsigned most = vblk__stop_at(t, VBLK__MAX_WALK);
    return most - c->descs < limit - 1 ? most : c->descs + limit - 1;
}

// A readable descriptor behind a writable one; `first`: the first readable one.
VBLK__RARE void vblk__mix(const vblk_dev *dev, vblk__chain *c, bool first) {
    c->in_first = c->in_first || first;
    c->mixed = true;
    if (!dev->strict && !c->spoilt) c->spoilt = VBLK_EV_CHAIN_ORDER;
}

// Follow the chain from `head`: at most seg_max + 2 descriptors, and at most
// as many of a table as it has, whatever the guest writes there meanwhile.
static bool vblk__walk(vblk_dev *dev, const vblk_queue *q, uint16_t head,
                       vblk__chain *c) {
    vblk__table t = {q->run.desc, q->desc_gpa, q->size, 0, false};
    const unsigned limit = dev->seg_max + 2;
    unsigned stop = vblk__stop_at(&t, limit);
    vblk_seg *end = c->list;
    uint64_t in = 0, out = 0;
    uint32_t i = head, n, flags;
    do {
        uint8_t copy[VBLK__DESC_BYTES];
        const uint8_t *d = copy;
        uint64_t at = VBLK__DESC_BYTES * (uint64_t)i;
        if (i >= t.entries) {
            return vblk__refuse(c, VBLK_EV_CHAIN_NEXT, i, t.entries);
        }
        if (c->descs == stop) {
            if (vblk__too_long(dev, c, &t, limit)) return false;
            stop = vblk__look_on(c, &t, limit);
            end = c->end;
        }
        if (t.ptr) {
            d = t.ptr + at;
        } else if (!vblk__read(dev, t.gpa + at, copy, sizeof copy)) {
            return vblk__refuse(c, VBLK_EV_CHAIN_UNREADABLE, t.gpa + at, 0);
        }
        uint64_t gpa = vblk__get64(d);
        n = vblk__get32(d + 8);
        flags = vblk__get16(d + 12);
        i = vblk__get16(d + 14);
        VBLK__ONCE();
        end->gpa = gpa; // if it stays
        if (flags & VBLK__DESC_INDIRECT) {
            if (!vblk__enter(dev, c, &t, gpa, n, flags)) return false;
            stop = c->descs < limit ? vblk__stop_at(&t, limit) : c->descs;
            flags = VBLK__DESC_NEXT;
            i = 0;
            continue;
        }
        c->descs++;
        if (n == 0) {
            c->empty_first = c->empty_first || c->descs == 1;
            c->empty = c->descs;
            continue;
        }
        if (flags & VBLK__DESC_WRITE) {
            in += n;
            c->last = end;
        } else {
            if (in > 0) vblk__mix(dev, c, out == 0);
            out += n;
        }
        end++->n = n;
    } while (flags & VBLK__DESC_NEXT);
    c->in_bytes = in;
    c->out_bytes = out;
    c->end = end;
    return true;
}

// Find the status byte and take its descriptor off the list (V2, P1).
static bool vblk__cut_status(const vblk_dev *dev, vblk_request *r,
                             vblk__chain *c) {
    vblk_seg *last = c->last;
    if (!last) return vblk__refuse(c, VBLK_EV_STATUS_MISSING, 0, 0);
    if (dev->strict && (last != c->end - 1 || c->empty == c->descs ||
                        c->descs < 2)) { // it is not alone in the last of all
        return vblk__refuse(c, c->mixed ? VBLK_EV_CHAIN_ORDER
                                        : VBLK_EV_STATUS_FRAMING, 0, 0);
    }
    if (vblk__wraps(last->gpa, last->n)) {
        return vblk__refuse(c, VBLK_EV_STATUS_WRAPS, last->gpa, 0);
    }
    r->status_gpa = last->gpa + (last->n - 1);
    if (c->spoilt) {
        c->in_bytes--;
        return true;
    }
    size_t cut = dev->strict ? last->n : 1; // V15
    c->in_bytes -= cut;
    if (last->n == cut) {
        c->end--;
    } else {
        last->n -= cut;
    }
    return true;
}

static inline void vblk__cut(vblk__chain *c, size_t n) {
    c->out_bytes -= n;
    if (c->list->n == n) {
        c->list++;
    } else {
        c->list->gpa += n;
        c->list->n -= n;
    }
}

VBLK__RARE bool vblk__gather_header(vblk_dev *dev, vblk__chain *c,
                                    uint8_t *header) {
    for (size_t got = 0, n; got < VBLK__HEADER_BYTES; got += n) {
        const vblk_seg *d = c->list;
        n = VBLK__HEADER_BYTES - got;
        n = d->n < n ? d->n : n;
        if (vblk__wraps(d->gpa, d->n) ||
            !vblk__read(dev, d->gpa, header + got, n)) {
            return vblk__refuse(c, VBLK_EV_HEADER_UNREADABLE, d->gpa, 0);
        }
        vblk__cut(c, dev->strict ? d->n : n);
    }
    return true;
}

// Take the header's bytes off the list (V3, V4, P1). Where they are, which may
// be `copy`, and is to be read once; or NULL.
static const uint8_t *vblk__cut_header(vblk_dev *dev, vblk__chain *c,
                                       uint8_t *copy) {
    const vblk_seg *d = c->list;
    if (c->out_bytes < VBLK__HEADER_BYTES) {
        vblk__refuse(c, VBLK_EV_HEADER_SHORT, c->out_bytes, 0);
        return NULL;
    }
    if (dev->strict && (c->empty_first || c->in_first ||
                        d->n < VBLK__HEADER_BYTES)) {
        vblk__refuse(c, c->mixed ? VBLK_EV_HEADER_SHORT
                                 : VBLK_EV_HEADER_FRAMING, c->out_bytes, 0);
        return NULL;
    }
    const uint8_t *p = NULL;
    if (d->n >= VBLK__HEADER_BYTES && !vblk__wraps(d->gpa, d->n)) {
        p = vblk__whole(dev, &c->near[VBLK__ENDS], d->gpa, VBLK__HEADER_BYTES,
                        false);
    }
    if (!p) return vblk__gather_header(dev, c, copy) ? copy : NULL;
    vblk__cut(c, dev->strict ? d->n : VBLK__HEADER_BYTES);
    return p;
}

// ---- Request: list to validated request ------------------------------------
// Of the type: an order among requests, which old drivers ask for unasked.
#define VBLK__T_BARRIER 0x80000000u

enum { VBLK__NO_DATA, VBLK__DATA_IN, VBLK__DATA_OUT };

// What the data is: nothing, ranges of the disk; or, and these become segments,
// as many sectors of the disk, an answer.
typedef enum vblk__shape {
    VBLK__NOTHING, VBLK__RANGES, VBLK__SECTORS, VBLK__ID, VBLK__LIFETIME
} vblk__shape;

// The request types, by number. Nothing else compares them: a new one is a row
// here, a case for its shape in vblk__fit() and vblk__run(), with a member of
// vblk_backend that vblk__worker_backend() wraps; then the feature
// (vblk__offer), events, counter, rules, and the model in tests/model.c.
static const struct vblk__kind {
    uint64_t feature; // to be offered; that the driver took it is not asked
    uint8_t  data;    // its direction; what goes out changes the disk
    uint8_t  shape;
    uint8_t  does;
    uint8_t  failed;  // the event of a backend that fails
    uint8_t  cut;     // of one that ended before its data did; NONE: none can
    uint8_t  counter; // of successes, which number in vblk_counts
    uint8_t  bytes;   // what they moved, the same; or `counter`: nothing
} vblk__kinds[] = {
#define VBLK__COUNTER(member) offsetof(vblk_counts, member) / sizeof(uint64_t)
#define VBLK__UNKNOWN {UINT64_MAX, 0, 0, 0, 0, 0, 0, 0}
    {0, VBLK__DATA_IN, VBLK__SECTORS, VBLK__DO_READ, VBLK_EV_READ_FAILED,
     VBLK_EV_READ_SHORT, VBLK__COUNTER(reads), VBLK__COUNTER(bytes_read)},
    {0, VBLK__DATA_OUT, VBLK__SECTORS, VBLK__DO_WRITE, VBLK_EV_WRITE_FAILED,
     VBLK_EV_WRITE_STUCK, VBLK__COUNTER(writes), VBLK__COUNTER(bytes_written)},
    VBLK__UNKNOWN, VBLK__UNKNOWN,
    {VBLK_F_FLUSH, VBLK__NO_DATA, VBLK__NOTHING, VBLK__DO_FLUSH,
     VBLK_EV_FLUSH_FAILED, 0, VBLK__COUNTER(flushes), VBLK__COUNTER(flushes)},
    VBLK__UNKNOWN, VBLK__UNKNOWN, VBLK__UNKNOWN,
    {0, VBLK__DATA_IN, VBLK__ID, VBLK__DO_ANSWER, 0, 0, 0, 0}, // not counted
    VBLK__UNKNOWN,
    {VBLK_F_LIFETIME, VBLK__DATA_IN, VBLK__LIFETIME, VBLK__DO_ANSWER, 0, 0, 0,
     0}, // nor is this
    {VBLK_F_DISCARD, VBLK__DATA_OUT, VBLK__RANGES, VBLK__DO_DISCARD,
     VBLK_EV_DISCARD_FAILED, 0, VBLK__COUNTER(discards),
     VBLK__COUNTER(discards)},
    VBLK__UNKNOWN,
    {VBLK_F_WRITE_ZEROES, VBLK__DATA_OUT, VBLK__RANGES, VBLK__DO_ZEROES,
     VBLK_EV_DISCARD_FAILED, 0, VBLK__COUNTER(write_zeroes),
     VBLK__COUNTER(write_zeroes)},
    {VBLK_F_SECURE_ERASE, VBLK__DATA_OUT, VBLK__RANGES, VBLK__DO_ERASE,
     VBLK_EV_DISCARD_FAILED, 0, VBLK__COUNTER(secure_erases),
     VBLK__COUNTER(secure_erases)},
#undef VBLK__UNKNOWN
#undef VBLK__COUNTER
};

#define VBLK__KINDS (sizeof vblk__kinds / sizeof vblk__kinds[0])

static bool vblk__find_kind(const vblk_dev *dev, vblk_request *r,
                            uint32_t type) {
    r->type = type;
    r->kind = &vblk__kinds[type < VBLK__KINDS ? type : 2];
    return !(r->kind->feature & ~dev->offered);
}

static bool vblk__check_sizes(const vblk_dev *dev, vblk__chain *c) {
    bool binds = (dev->accepted & VBLK_F_SIZE_MAX) != 0;
    bool offered = (dev->offered & VBLK_F_SIZE_MAX) != 0;
    if (!binds && (!offered || !dev->strict)) { // P3
        return true;
    }
    for (const vblk_seg *d = c->list; d != c->end; d++) {
        if (d->n > dev->size_max) {
            return vblk__refuse(c, binds ? VBLK_EV_SEGMENT_LONG
                                         : VBLK_EV_SEGMENT_LONG_STRICT,
                                d->n, dev->size_max);
        }
    }
    return true;
}

static void vblk__keep(vblk__chain *c, uint32_t bytes) {
    vblk_seg *d = c->list;
    for (; d->n < bytes; d++) bytes -= (uint32_t)d->n;
    d->n = bytes;
    c->end = d + 1;
}

#define VBLK__CAPACITY (UINT64_MAX >> 10) // of dev->disk

static inline uint64_t vblk__capacity(const vblk_dev *dev) {
    return VBLK__LOAD(&dev->disk) & VBLK__CAPACITY;
}

// Whether they lie on the disk, in whole blocks (V13, V19).
VBLK__FLAT bool vblk__on_disk(const vblk_dev *dev, vblk__chain *c,
                              uint64_t sector, uint64_t sectors) {
    const uint64_t capacity = vblk__capacity(dev);
    if (sector > capacity || sectors > capacity - sector) {
        return vblk__refuse(c, VBLK_EV_OUT_OF_RANGE, sector,
                            sectors * VBLK_SECTOR);
    }
    return !((sector | sectors) & dev->part_of_block) ||
           vblk__refuse(c, VBLK_EV_BLOCK_RAGGED, sector, sectors * VBLK_SECTOR);
}

// As many sectors of the disk, from `sector` on (V7 to V9, V13, V19).
static bool vblk__fit_sectors(const vblk_dev *dev, vblk__chain *c,
                              vblk_request *r, uint64_t sector) {
    bool out = r->kind->data == VBLK__DATA_OUT;
    if (r->bytes % VBLK_SECTOR) {
        return vblk__refuse(c, VBLK_EV_DATA_RAGGED, r->bytes, 0);
    }
    if (out && !dev->backend.write) {
        return vblk__refuse(c, VBLK_EV_READ_ONLY, sector, 0);
    }
    if (!vblk__on_disk(dev, c, sector, r->bytes / VBLK_SECTOR)) return false;
    if (r->bytes >= UINT32_MAX) {
        return vblk__refuse(c, VBLK_EV_DATA_LONG, r->bytes, 0);
    }
    r->offset = sector * VBLK_SECTOR;
    return true;
}

static bool vblk__fit_answer(const vblk_dev *dev, vblk__chain *c,
                             vblk_request *r, uint32_t n) {
    if (dev->strict && c->list->n < n) {
        return vblk__refuse(c, VBLK_EV_ID_SHORT, c->list->n, 0);
    }
    if (r->bytes > n) {
        r->bytes = n;
        vblk__keep(c, n);
    }
    return true;
}

static bool vblk__gather(vblk_dev *dev, vblk__chain *c, uint8_t *to) {
    for (const vblk_seg *d = c->list; d != c->end; to += d++->n) {
        if (vblk__wraps(d->gpa, d->n) || !vblk__read(dev, d->gpa, to, d->n)) {
            return vblk__refuse(c, VBLK_EV_DATA_UNMAPPED, d->gpa, d->n);
        }
    }
    return true;
}

// Ranges, read once and checked all before one is executed (V20, V21). They
// become the segments: `gpa` is the offset, `n` the bytes and, in bit 0, UNMAP.
VBLK__APART bool vblk__fit_ranges(vblk_dev *dev, vblk__chain *c,
                                  vblk_request *r) {
    uint8_t ranges[(VBLK_MAX_RANGES + 1) * VBLK__RANGE_BYTES];
    const uint64_t bytes = r->bytes;
    const uint32_t known = r->kind->does == VBLK__DO_ZEROES; // UNMAP
    uint64_t most = dev->range_max * (uint64_t)VBLK__RANGE_BYTES;
    if (bytes == 0 || bytes % VBLK__RANGE_BYTES || bytes > most) {
        return vblk__refuse(c, VBLK_EV_RANGES_COUNT, bytes, most);
    }
    if (!vblk__gather(dev, c, ranges)) return false;
    r->seg = c->full - (dev->seg_max + 2);
    for (const uint8_t *p = ranges; p < ranges + bytes;
         p += VBLK__RANGE_BYTES) {
        uint64_t sector = vblk__get64(p);
        uint32_t sectors = vblk__get32(p + 8), flags = vblk__get32(p + 12);
        if (flags & ~known) {
            c->status = VBLK_S_UNSUPP;
            return vblk__refuse(c, VBLK_EV_RANGE_FLAGS, flags, 0);
        }
        if (sectors > dev->range_sectors) {
            return vblk__refuse(c, VBLK_EV_RANGE_LONG,
                                (uint64_t)sectors * VBLK_SECTOR,
                                (uint64_t)dev->range_sectors * VBLK_SECTOR);
        }
        if (!vblk__on_disk(dev, c, sector, sectors)) return false;
        if (sectors == 0) continue;
        vblk_seg *s = &r->seg[r->segs++];
        s->ptr = NULL;
        s->gpa = sector * VBLK_SECTOR;
        s->n = sectors * (size_t)VBLK_SECTOR | flags;
    }
    r->bytes = 0;
    r->offset = r->segs ? r->seg->gpa : 0;
    return true;
}

VBLKDEF vblk_range vblk_range_of(const vblk_request *req, unsigned i) {
    size_t n = req->seg[i].n;
    vblk_range range = {req->seg[i].gpa, n & ~(size_t)1, (n & 1) != 0};
    return range;
}

// V5 to V9, V12, V13, V16, in the order of a reader's questions: is it the
// right data, is there enough, may it, is it on the disk. What of it is the
// request's goes into `r`.
static bool vblk__fit(vblk_dev *dev, vblk__chain *c, vblk_request *r,
                      uint64_t sector) {
    const struct vblk__kind *k = r->kind;
    uint64_t bytes = c->in_bytes + c->out_bytes;
    r->offset = r->bytes = 0;
    if (k->data == VBLK__NO_DATA) {
        return !dev->strict || bytes == 0 ||
               vblk__refuse(c, VBLK_EV_DATA_UNWANTED, bytes, 0);
    }
    if (!vblk__check_sizes(dev, c)) return false;
    if ((c->out_bytes > 0 && k->data == VBLK__DATA_IN) ||
        (c->in_bytes > 0 && k->data == VBLK__DATA_OUT)) {
        return vblk__refuse(c, VBLK_EV_DATA_DIRECTION, r->type, 0);
    }
    if (dev->strict && bytes == 0) {
        return vblk__refuse(c, VBLK_EV_DATA_MISSING, r->type, 0);
    }
    r->bytes = bytes;
    if (k->shape == VBLK__SECTORS) return vblk__fit_sectors(dev, c, r, sector);
    if (k->shape != VBLK__RANGES) {
        return vblk__fit_answer(dev, c, r,
                                k->shape == VBLK__ID ? VBLK_ID_BYTES : 6);
    }
    vblk__chain own = *c; // so that `c`, of all others, can be in registers
    bool fits = VBLK_MAX_RANGES && vblk__fit_ranges(dev, &own, r);
    *c = own;
    return fits;
}

static void vblk__add_seg(vblk_request *r, uint8_t *ptr, uint64_t gpa,
                          uint64_t n) {
    vblk_seg *s = &r->seg[r->segs++];
    s->ptr = ptr;
    s->n = (size_t)n;
    s->gpa = gpa;
    r->direct = r->direct && ptr;
}

// The list goes to the end of its array, so that there is room for pieces.
static void vblk__make_room(vblk__chain *c) {
    vblk_seg *to = c->full;
    for (const vblk_seg *d = c->end; d != c->list; ) *--to = *--d;
    c->list = to;
    c->end = c->full;
}

// `d`, which was taken off the list, to a segment for each host region it lies
// in, as long as they do not reach the list.
static bool vblk__map_pieces(vblk_dev *dev, vblk_request *r, vblk__chain *c,
                             vblk_seg d, bool in) {
    const unsigned start = r->segs;
    const vblk_seg whole = d;
    bool fits = true;
    if (c->end != c->full) vblk__make_room(c);
    for (uint64_t run; d.n > 0; d.gpa += run, d.n -= (size_t)run) {
        run = d.n;
        uint8_t *p = vblk__look_up(dev, &c->near[VBLK__DATA], d.gpa, &run, in);
        if (!p || run == 0 || run > d.n) { // or a map that breaks its word
            return false;
        }
        fits = fits && r->seg + r->segs < c->list;
        if (fits) vblk__add_seg(r, p, d.gpa, run);
    }
    if (!fits) { // too many pieces: the accessors can do it
        r->segs = start;
        vblk__add_seg(r, NULL, whole.gpa, whole.n);
    }
    return true;
}

// One of the list to one segment or more; without map, to one that the
// accessors reach, and nothing moves.
static bool vblk__map_desc(vblk_dev *dev, vblk_request *r, vblk__chain *c,
                           vblk_seg d, bool in) {
    uint8_t *p = vblk__whole(dev, &c->near[VBLK__DATA], d.gpa, d.n, in);
    if (!p && dev->memory.map) return vblk__map_pieces(dev, r, c, d, in);
    vblk__add_seg(r, p, d.gpa, d.n);
    return p    ? true
           : in ? vblk__write(dev, d.gpa, NULL, d.n)
                : vblk__read(dev, d.gpa, NULL, d.n);
}

static bool vblk__map_rest(vblk_dev *dev, vblk_request *r, vblk__chain *c,
                           bool in) {
    while (c->list != c->end) {
        vblk_seg d = *c->list++; // its segment may take its place
        if (vblk__wraps(d.gpa, d.n) || !vblk__map_desc(dev, r, c, d, in)) {
            return vblk__refuse(c, VBLK_EV_DATA_UNMAPPED, d.gpa, d.n);
        }
    }
    return true;
}

// All of the list is guest memory before the backend is asked (X5). It becomes
// the segments where it stands.
static bool vblk__map_data(vblk_dev *dev, vblk_request *r, vblk__chain *c,
                           bool in) {
    const vblk_region *near = c->near[VBLK__DATA];
    vblk_seg *d = c->list;
    for (; d != c->end; d++) {
        d->ptr = vblk__in_region(near, d->gpa, d->n, in);
        if (!d->ptr) break;
    }
    r->segs = (unsigned)(d - c->list);
    c->list = d;
    return d == c->end || vblk__map_rest(dev, r, c, in);
}

// Fill in `r` from its header and the rest of its chain, or say why not.
static bool vblk__parse(vblk_dev *dev, vblk_request *r, vblk__chain *c) {
    uint8_t copy[VBLK__HEADER_BYTES];
    if (c->spoilt) {
        bool is_long = c->spoilt == VBLK_EV_CHAIN_LONG;
        return vblk__refuse(c, c->spoilt, is_long ? dev->seg_max + 2 : 0, 0);
    }
    const uint8_t *header = vblk__cut_header(dev, c, copy);
    if (!header) return false;
    uint64_t sector = vblk__get64(header + 8);
    uint32_t type = vblk__get32(header);
    VBLK__ONCE();
    bool     barrier = (type & VBLK__T_BARRIER) != 0;
    bool     known = vblk__find_kind(dev, r, type & ~VBLK__T_BARRIER);
    if (!known || (barrier && dev->strict)) { // P9
        vblk__refuse(c, known ? VBLK_EV_TYPE_BARRIER : VBLK_EV_TYPE_UNKNOWN,
                     type, 0);
        c->status = VBLK_S_UNSUPP;
        return false;
    }
    r->seg = c->list;
    r->segs = 0;
    r->direct = true;
    if (!vblk__fit(dev, c, r, sector)) return false;
    uint8_t data = r->kind->data;
    r->durable = data == VBLK__DATA_OUT && VBLK__LOAD(&dev->write_through);
    return r->kind->shape < VBLK__SECTORS ||
           vblk__map_data(dev, r, c, data == VBLK__DATA_IN);
}

// ---- Copies: between guest memory and the host -----------------------------
// A place in the data of a request: so far into a segment.
typedef struct vblk__place {
    unsigned seg;
    size_t   at;
} vblk__place;

static vblk__place vblk__find(const vblk_request *r, uint64_t at) {
    vblk__place p = {0, 0};
    while (p.seg < r->segs && at >= r->seg[p.seg].n) at -= r->seg[p.seg++].n;
    p.at = (size_t)at;
    return p;
}

// What there is of one segment at `p`, but at most `n` bytes; and past it.
static vblk_seg vblk__piece(const vblk_request *r, vblk__place *p, uint64_t n) {
    vblk_seg s = r->seg[p->seg];
    s.ptr = s.ptr ? s.ptr + p->at : NULL;
    s.gpa += p->at;
    s.n -= p->at;
    if (s.n > n) {
        s.n = (size_t)n;
        p->at += s.n;
    } else {
        p->at = 0;
        p->seg++;
    }
    return s;
}

static bool vblk__stale(const vblk_dev *dev, const vblk_queue *q,
                        const vblk_request *r) {
    return VBLK__LOAD(&q->epoch) != r->epoch || vblk__halted(dev);
}

// Guest memory refuses `s`, the piece before `p`, which it had agreed to (X5).
VBLK__RARE int vblk__refused(vblk_dev *dev, const vblk_request *r, vblk_seg s,
                             vblk__place p) {
    const vblk_seg *whole = &r->seg[p.at ? p.seg : p.seg - 1];
    vblk__say_request(dev, r, VBLK_EV_DATA_UNMAPPED, s.gpa,
                      whole->gpa + whole->n - s.gpa);
    return VBLK_ERR_REFUSED;
}

// From `at` on, which moves along. `host` is written to only with `in`, from
// the guest. A reset that came meanwhile is told.
static int vblk__copy(vblk_dev *dev, const vblk_request *r, vblk__place *at,
                      uint8_t *host, size_t n, bool in) {
    const vblk_queue *q = &dev->queue[r->queue];
    while (!vblk__stale(dev, q, r)) {
        if (n == 0) return VBLK_OK;
        bool is_data = at->seg < r->segs && r->kind->shape != VBLK__RANGES;
        VBLK_ASSERT(is_data); // else beyond the request's bytes
        if (!is_data) return VBLK_ERR_REFUSED;
        vblk_seg s = vblk__piece(r, at, n);
        if (s.ptr) {
            VBLK_MEMCPY(in ? host : s.ptr, in ? s.ptr : host, s.n);
        } else if (in ? !vblk__read(dev, s.gpa, host, s.n)
                      : !vblk__write(dev, s.gpa, host, s.n)) {
            return vblk__refused(dev, r, s, *at);
        }
        host += s.n;
        n -= s.n;
    }
    return VBLK_ERR_STALE;
}

VBLKDEF int vblk_get(vblk_dev *dev, const vblk_request *req, uint64_t at,
                     void *dst, size_t n) {
    vblk__place p = vblk__find(req, at);
    return vblk__copy(dev, req, &p, (uint8_t *)dst, n, true);
}

VBLKDEF int vblk_put(vblk_dev *dev, const vblk_request *req, uint64_t at,
                     const void *src, size_t n) {
    vblk__place p = vblk__find(req, at);
    return vblk__copy(dev, req, &p, (uint8_t *)(uintptr_t)src, n, false);
}

// ---- Serve: the chain at the head ------------------------------------------
// The chain of `r` is done, `data` bytes were written: status byte, then used
// element [2.7.8.2]. Counts an error. False: the status byte has gone.
VBLK__FLAT bool vblk__return_chain(vblk_dev *dev, vblk_queue *q,
                                   const vblk_request *r, uint8_t status,
                                   uint32_t data) {
    bool told = true;
    if (r->status_ptr) {
        *r->status_ptr = status;
    } else {
        told = vblk__write(dev, r->status_gpa, &status, 1);
    }
    if (!told || status == VBLK_S_IOERR) vblk__count(&q->counts.io_errors, 1);
    if (told) {
        // The status byte counts if nothing before it was left out (P6).
        uint32_t all = data >= r->space;
        vblk__give_back(dev, q, r->head, data + all);
    } else { // V17
        vblk__say_request(dev, r, VBLK_EV_STATUS_UNWRITABLE, r->status_gpa, 0);
    }
    return told;
}

static bool vblk__return_early(vblk_dev *dev, vblk_queue *q,
                               const vblk_request *r, uint8_t status,
                               uint32_t data) {
    return !vblk__halted(dev) && vblk__return_chain(dev, q, r, status, data);
}

VBLK__FLAT void vblk__count_success(vblk_queue *q, const struct vblk__kind *k,
                                    uint64_t bytes) {
    uint64_t *counts = (uint64_t *)(void *)&q->counts;
    vblk__count(&counts[k->counter], 1);
    if (k->bytes != k->counter) vblk__count(&counts[k->bytes], bytes);
}

static bool vblk__place_status(vblk_dev *dev, vblk_request *r, vblk__chain *c) {
    r->space = dev->strict ? 0 : c->in_bytes;
    r->status_ptr = vblk__whole(dev, &c->near[VBLK__ENDS], r->status_gpa, 1,
                                true);
    bool there = dev->memory.map
                     ? r->status_ptr != NULL
                     : vblk__write(dev, r->status_gpa, NULL, 1);
    return there ||
           vblk__refuse(c, VBLK_EV_STATUS_UNWRITABLE, r->status_gpa, 0);
}

// What needs neither tokens nor backend: an empty transfer (P4), and a FLUSH
// of what cannot be written (V10).
static bool vblk__is_idle(const vblk_dev *dev, const vblk_request *r) {
    return r->kind->does == VBLK__DO_FLUSH ? !dev->backend.write
                                           : r->segs == 0;
}

// What a request may cost: an operation and its bytes; or those of each range.
static bool vblk__may_pass(vblk_dev *dev, vblk_queue *q, const vblk_request *r,
                           uint64_t now_ns) {
    uint64_t ops = 1, bytes = r->bytes;
    if (!dev->limited) return true;
    if (r->kind->shape == VBLK__RANGES) {
        ops = r->segs;
        for (unsigned i = 0; i < r->segs && r->kind->does == VBLK__DO_ZEROES;
             i++) {
            bytes += vblk_range_of(r, i).bytes;
        }
    }
    return vblk__admit(dev, q, ops, bytes, now_ns);
}

// Three numbers; those that the standard reserves are unknown instead, 0.
static void vblk__put_lifetime(const vblk_dev *dev, uint8_t *to) {
    for (int i = 0; i < 3; i++) {
        uint16_t n = VBLK__LOAD(&dev->backend.lifetime[i]);
        vblk__put_le(to + 2 * i, n <= (i ? 11 : 3) ? n : 0, 2);
    }
}

static void vblk__answer(vblk_dev *dev, vblk_queue *q, const vblk_request *r) {
    const struct vblk__kind *k = r->kind;
    uint8_t lifetime[6], *what = dev->id;
    if (k->shape == VBLK__LIFETIME) {
        vblk__put_lifetime(dev, lifetime);
        what = lifetime;
    }
    if (k->does != VBLK__DO_ANSWER) { // idle
        if (vblk__return_early(dev, q, r, VBLK_S_OK, 0)) {
            vblk__count_success(q, k, 0);
        }
    } else if (vblk_put(dev, r, 0, what, (size_t)r->bytes)) {
        vblk__return_early(dev, q, r, VBLK_S_IOERR, 0);
    } else {
        vblk__return_early(dev, q, r, VBLK_S_OK, (uint32_t)r->bytes);
    }
}

// A chain to a request, or to its end. STALLED: it waits at the head.
static vblk__state vblk__judge(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                               vblk__chain *c, uint64_t now_ns) {
    if (!vblk__walk(dev, q, r->head, c) || !vblk__cut_status(dev, r, c)) {
        vblk__say_request(dev, r, c->code, c->why_a, c->why_b);
        vblk__count(&q->counts.io_errors, 1);
        if (!dev->strict) vblk__give_back(dev, q, r->head, 0); // P5
        return VBLK__MORE;
    }
    if (!vblk__place_status(dev, r, c)) {
        vblk__count(&q->counts.io_errors, 1);
        vblk__say_request(dev, r, c->code, c->why_a, c->why_b);
        return VBLK__MORE;
    }
    if (!vblk__parse(dev, r, c)) {
        vblk__say_request(dev, r, c->code, c->why_a, c->why_b);
        vblk__return_early(dev, q, r, c->status, 0);
        return VBLK__MORE;
    }
    bool idle = vblk__is_idle(dev, r);
    if (!idle && !vblk__may_pass(dev, q, r, now_ns)) {
        q->run.avail_next--;
        return VBLK__STALLED;
    }
    if (idle || r->kind->does == VBLK__DO_ANSWER) {
        vblk__answer(dev, q, r);
        return VBLK__MORE;
    }
    q->run.under_way++;
    return VBLK__REQUEST;
}

// Take one chain. REQUEST: it is in `r`, with its segments in the array from
// `seg` up to `full`, which is seg_max + 2 long or longer. MORE: it was
// answered here. STALLED: it is back in the ring.
static vblk__state vblk__serve(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                               vblk_seg *seg, vblk_seg *full,
                               uint64_t now_ns, uint32_t *budget) {
    vblk__chain c;
    if (q->run.under_way >= q->size) {
        vblk__poison(dev, q, VBLK_EV_QUEUE_OVERRUN, q->run.under_way, 0);
        return VBLK__BROKEN;
    }
    if (!vblk__take(dev, q, &r->head)) return VBLK__BROKEN;
    r->queue = q->number;
    r->epoch = q->epoch;
    r->backing = VBLK__LOAD(&dev->backing); // it may grow meanwhile
    c.list = seg;
    c.full = full;
    c.near = q->run.near;
    c.last = NULL;
    c.descs = c.empty = 0;
    c.empty_first = c.in_first = c.mixed = false;
    c.spoilt = c.code = VBLK_EV_NONE;
    c.why_a = c.why_b = 0;
    c.status = VBLK_S_IOERR;
    vblk__state state = vblk__judge(dev, q, r, &c, now_ns);
    if (c.descs >= 512) { // P5
        uint32_t length = c.descs / 512;
        *budget -= length < *budget ? length : *budget;
    }
    return state;
}

// ---- Complete: a request has ended -----------------------------------------
// From byte `at` on, the data reads as zeroes (X2).
VBLK__RARE bool vblk__pad(vblk_dev *dev, const vblk_request *r, uint64_t at) {
    static const uint8_t zeroes[64] = {0};
    vblk__place p = vblk__find(r, at);
    while (p.seg < r->segs) {
        uint64_t most = r->seg[p.seg].ptr ? 1u << 20 : sizeof zeroes;
        vblk_seg s = vblk__piece(r, &p, most);
        if (vblk__halted(dev)) { // looked at now and then
            return false;
        }
        if (s.ptr) {
            VBLK_MEMSET(s.ptr, 0, s.n);
        } else if (!vblk__write(dev, s.gpa, zeroes, s.n)) {
            vblk__refused(dev, r, s, p);
            return false;
        }
    }
    return !vblk__halted(dev);
}

typedef struct vblk__progress {
    uint64_t        bytes;
    vblk_event_code code;  // NONE, or what stands against a success
    int64_t         error; // the backend's
} vblk__progress;

#define VBLK__TOLD VBLK_EV_END

// `r` did not come to its end: the event of that, with the sector, or padding.
// True: it is a success all the same.
VBLK__RARE bool vblk__fell_short(vblk_dev *dev, const vblk_request *r,
                                 vblk__progress done) {
    const struct vblk__kind *k = r->kind;
    if (!done.code && k->does != VBLK__DO_READ) {
        done.code = (vblk_event_code)k->cut;
    }
    if (!done.code) return vblk__pad(dev, r, done.bytes);
    if (done.code != VBLK__TOLD) {
        vblk__say_request(dev, r, done.code,
                          (r->offset + done.bytes) / VBLK_SECTOR,
                          done.error ? 0 - (uint64_t)done.error
                                     : r->bytes - done.bytes);
    }
    return false;
}

// `r` has come as far as `done`: status, used element, counters.
VBLK__FLAT int vblk__end_request(vblk_dev *dev, vblk_queue *q,
                                 const vblk_request *r, vblk__progress done) {
    if (vblk__stale(dev, q, r)) {
        bool of_broken = q->broken && r->epoch + 1 == q->epoch;
        if (of_broken && q->run.under_way > 0) q->run.under_way--;
        return VBLK_ERR_STALE;
    }
    VBLK_ASSERT(q->run.under_way > 0); // else it was completed before
    if (q->run.under_way == 0) return VBLK_ERR_STALE;
    q->run.under_way--;
    const struct vblk__kind *k = r->kind;
    if ((done.code || done.bytes < r->bytes) &&
        !vblk__fell_short(dev, r, done)) {
        vblk__return_early(dev, q, r, VBLK_S_IOERR, 0);
        return VBLK_OK;
    }
    if (vblk__return_chain(dev, q, r, VBLK_S_OK,
                           k->data == VBLK__DATA_IN ? (uint32_t)r->bytes : 0)) {
        vblk__count_success(q, k, done.bytes);
    }
    if (k->does == VBLK__DO_WRITE) {
        vblk__raise_to(&dev->backing, r->offset + r->bytes);
    }
    return VBLK_OK;
}

VBLK__FLAT vblk__progress vblk__came_to(const vblk_request *req,
                                        int64_t result) {
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    const struct vblk__kind *k = req->kind;
    VBLK_ASSERT(result < 0 || (uint64_t)result <= req->bytes);
    if (result < 0) {
        done.error = result;
        done.code = (vblk_event_code)k->failed;
    } else {
        done.bytes = (uint64_t)result < req->bytes ? (uint64_t)result
                                                   : req->bytes;
    }
    if (!done.code && done.bytes < req->bytes && k->does == VBLK__DO_READ &&
        req->offset + done.bytes < req->backing) {
        done.code = (vblk_event_code)k->cut;
    }
    return done;
}

VBLKDEF int vblk_complete(vblk_dev *dev, const vblk_request *req,
                          int64_t result) {
    return vblk__end_request(dev, &dev->queue[req->queue], req,
                             vblk__came_to(req, result));
}

// ---- Execute: a request by the backend -------------------------------------
static inline int64_t vblk__transfer(const vblk_dev *dev,
                                     const struct vblk__kind *k,
                                     uint64_t offset, const vblk_seg *seg,
                                     unsigned segs) {
    const vblk_backend *b = &dev->backend;
    return k->does == VBLK__DO_READ ? b->read(b->user, offset, seg, segs)
                                    : b->write(b->user, offset, seg, segs);
}

// The backend answered `n` instead of `bytes`: call it until all is moved,
// nothing moves, or it fails. What is left of a segment is a call of its own.
static vblk__progress vblk__move_on(vblk_dev *dev, const struct vblk__kind *k,
                                    uint64_t offset, const vblk_seg *seg,
                                    unsigned segs, uint64_t bytes, int64_t n) {
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    uint64_t at = 0; // into the segment
    while (n > 0) {
        uint64_t left = bytes - done.bytes;
        VBLK_ASSERT((uint64_t)n <= left);
        done.bytes += (uint64_t)n < left ? (uint64_t)n : left;
        if (done.bytes == bytes || vblk__halted(dev)) break;
        for (at += (uint64_t)n; at >= seg->n; segs--) at -= seg++->n;
        vblk_seg rest = {seg->ptr + at, seg->n - (size_t)at, seg->gpa + at};
        n = vblk__transfer(dev, k, offset + done.bytes, at ? &rest : seg,
                           at ? 1 : segs);
    }
    if (n < 0) {
        done.code = (vblk_event_code)k->failed;
        done.error = n;
    }
    return done;
}

VBLK__FLAT vblk__progress vblk__move(vblk_dev *dev, const struct vblk__kind *k,
                                     uint64_t offset, const vblk_seg *seg,
                                     unsigned segs, uint64_t bytes) {
    vblk__progress done = {bytes, VBLK_EV_NONE, 0};
    int64_t n = vblk__transfer(dev, k, offset, seg, segs);
    return n >= 0 && (uint64_t)n == bytes
               ? done
               : vblk__move_on(dev, k, offset, seg, segs, bytes, n);
}

VBLK__APART vblk__progress vblk__move_copied(vblk_dev *dev,
                                             const vblk_request *r) {
    uint8_t scratch[VBLK_SCRATCH];
    const struct vblk__kind *k = r->kind;
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    vblk__place at = {0, 0};
    while (done.bytes < r->bytes && !done.code) {
        uint64_t n = r->bytes - done.bytes;
        n = n < sizeof scratch ? n : sizeof scratch;
        vblk_seg s = {scratch, (size_t)n, 0};
        if (k->data == VBLK__DATA_OUT &&
            vblk__copy(dev, r, &at, scratch, (size_t)n, true)) {
            done.code = VBLK__TOLD;
            break;
        }
        vblk__progress got = vblk__move(dev, k, r->offset + done.bytes, &s,
                                        1, n);
        if (k->data == VBLK__DATA_IN &&
            vblk__copy(dev, r, &at, scratch, (size_t)got.bytes, false)) {
            got.code = VBLK__TOLD;
        }
        bool ends = got.bytes < n;
        got.bytes += done.bytes;
        done = got;
        if (ends) break;
    }
    return done;
}

// One range after the other. What fails is told with its place.
VBLK__RARE vblk__progress vblk__run_ranges(const vblk_dev *dev,
                                           const vblk_request *r) {
    const vblk_backend *b = &dev->backend;
    int (*call)(void *user, uint64_t offset, uint64_t bytes, bool unmap) =
        r->kind->does == VBLK__DO_DISCARD  ? b->discard
        : r->kind->does == VBLK__DO_ZEROES ? b->write_zeroes
                                           : b->secure_erase;
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    for (unsigned i = 0; i < r->segs && !done.error && !vblk__halted(dev);
         i++) {
        vblk_range range = vblk_range_of(r, i);
        done.error = call(b->user, range.offset, range.bytes, range.unmap);
        done.bytes = done.error ? range.offset - r->offset : 0;
    }
    done.code = done.error ? (vblk_event_code)r->kind->failed : VBLK_EV_NONE;
    return done;
}

// What `r` asks for, but to be durable. A read that moves nothing has come to
// the end: unlike a host, the backend knows where that is.
VBLK__FLAT vblk__progress vblk__run(vblk_dev *dev, const vblk_request *r) {
    const vblk__progress done = {0, VBLK_EV_NONE, 0};
    const struct vblk__kind *k = r->kind;
    if (k->shape == VBLK__SECTORS && r->direct) {
        return vblk__move(dev, k, r->offset, r->seg, r->segs, r->bytes);
    }
    return k->shape == VBLK__SECTORS  ? vblk__move_copied(dev, r)
           : k->shape == VBLK__RANGES ? vblk__run_ranges(dev, r)
                                      : done;
}

// Whether `r` wants to be durable now: a FLUSH, a write that went well.
static inline bool vblk__wants_flush(const vblk_request *r,
                                     vblk__progress done) {
    return r->kind->does == VBLK__DO_FLUSH ||
           (r->durable && !done.code && done.bytes == r->bytes);
}

VBLK__FLAT void vblk__execute(vblk_dev *dev, vblk_queue *q,
                              const vblk_request *r) {
    vblk__progress done = vblk__run(dev, r);
    if (vblk__wants_flush(r, done)) {
        done.error = dev->backend.flush(dev->backend.user);
        done.code = done.error ? VBLK_EV_FLUSH_FAILED : VBLK_EV_NONE;
    }
    vblk__end_request(dev, q, r, done);
}

// ---- Next, publish, drain, poll --------------------------------------------
VBLKDEF void vblk_publish(vblk_dev *dev, unsigned queue) {
    VBLK_ASSERT(queue < dev->queues);
    vblk__publish_queue(dev, &dev->queue[queue]);
}

// The next request, past all that is answered on the way and, with `here`, past
// all that can be done. Each chain takes one off `budget`, and a very long one
// more. MORE: the budget is spent, or the thread is wanted elsewhere.
static vblk__state vblk__work(vblk_dev *dev, vblk_queue *q, vblk_request *r,
                              vblk_seg *seg, vblk_seg *full, uint64_t now_ns,
                              uint32_t *budget, bool here) {
    for (;;) {
        vblk__state state = VBLK__MORE;
        if (q->run.avail_next == q->run.avail_seen) state = vblk__peek(dev, q);
        if (state != VBLK__MORE || *budget == 0 || VBLK__LOAD(&dev->yield)) {
            return state;
        }
        --*budget;
        vblk__notify_off(dev, q);
        state = vblk__serve(dev, q, r, seg, full, now_ns, budget);
        if (state != VBLK__STALLED && q->run.stalled) {
            vblk__end_stall(dev, q, now_ns);
        }
        if (state == VBLK__REQUEST && vblk__halted(dev)) { // R4
            return VBLK__MORE;
        }
        if (state == VBLK__REQUEST && here) {
            vblk__execute(dev, q, r);
        } else if (state != VBLK__MORE) {
            return state;
        }
    }
}

// The queue if it may be drained, else NULL, and what it completed is shown.
VBLK__FLAT vblk_queue *vblk__prepare(vblk_dev *dev, unsigned queue) {
    if (!(vblk_status(dev) & VBLK_STATUS_DRIVER_OK) ||
        queue >= vblk__queue_count(dev)) {
        return NULL;
    }
    vblk_queue *q = &dev->queue[queue];
    if (!VBLK__LOAD_ACQUIRE(&q->ready)) return NULL;
    if (!dev->memory.read) {
        bool said = VBLK__LOAD(&dev->no_memory_said);
        if (!said && VBLK__CAS(&dev->no_memory_said, said, true)) {
            vblk__say_queue(dev, q, VBLK_EV_NO_MEMORY, 0, 0);
        }
        return NULL;
    }
    if (q->broken || (!q->run.resolved && !vblk__resolve(dev, q))) {
        vblk_publish(dev, queue);
        return NULL;
    }
    return q;
}

VBLKDEF bool vblk_next(vblk_dev *dev, unsigned queue, uint64_t now_ns,
                       vblk_request *req, vblk_seg *seg, unsigned room) {
    VBLK_ASSERT(queue < dev->queues);
    VBLK_ASSERT(room >= dev->seg_max + 2);
    vblk_queue *q = vblk__prepare(dev, queue);
    if (!q || room < dev->seg_max + 2) return false;
    uint32_t budget = q->size;
    return vblk__work(dev, q, req, seg, seg + room, now_ns, &budget, false) ==
           VBLK__REQUEST;
}

// A queue that waits for another's turn is notified when its own comes. For
// hosts that do not hear it, it looks once in a while.
#define VBLK__LOOK_AGAIN UINT64_C(1000000)

static uint64_t vblk__again(vblk_dev *dev, const vblk_queue *q,
                            vblk__state state, uint64_t now_ns) {
    if (state == VBLK__MORE) return now_ns;
    if (state != VBLK__STALLED) return VBLK_NEVER;
    uint64_t at = vblk__turn_comes(dev, now_ns);
    bool     its_turn = dev->turn == q->number;
    if (its_turn || at - now_ns >= VBLK__LOOK_AGAIN ||
        now_ns >= VBLK_NEVER - VBLK__LOOK_AGAIN) {
        return at;
    }
    return now_ns + VBLK__LOOK_AGAIN;
}

// Before the thread turns away from `q`: completions out, notifications on, and
// one more look. A request that waits for a limit is no news.
VBLK__FLAT vblk__state vblk__arm_queue(vblk_dev *dev, vblk_queue *q) {
    bool on = false;
    if (!q->broken) {
        vblk__show(dev, q); // one barrier will do for it and the switch
        on = vblk__notify_on(dev, q);
    }
    if (q->broken) return VBLK__BROKEN;
    if (q->run.stalled) return VBLK__STALLED;
    q->run.armed = on; // unless there is more
    return on ? vblk__peek(dev, q) : VBLK__EMPTY;
}

// Something came since the queue was armed, or is to be published: of many that
// are notified at once, few have any.
VBLK__FLAT bool vblk__has_news(vblk_dev *dev, const vblk_queue *q) {
    uint16_t idx;
    return !q->run.armed || q->run.used_next != q->run.used_decided ||
           !vblk__load16(dev, q->run.avail, q->avail_gpa, 2, &idx) ||
           idx != q->run.avail_next;
}

VBLKDEF uint64_t vblk_arm(vblk_dev *dev, unsigned queue, uint64_t now_ns) {
    VBLK_ASSERT(queue < dev->queues);
    vblk_queue *q = vblk__prepare(dev, queue);
    if (!q) return VBLK_NEVER;
    vblk__state state = vblk__arm_queue(dev, q);
    vblk__publish_queue(dev, q);
    return vblk__again(dev, q, q->broken ? VBLK__BROKEN : state, now_ns);
}

VBLK__FLAT vblk__state vblk__drain_queue(vblk_dev *dev, unsigned queue,
                                     uint64_t now_ns) {
    vblk_queue *q = vblk__prepare(dev, queue);
    VBLK_ASSERT(dev->seg_max <= VBLK_MAX_SEGS); // of another static unit
    if (!q || dev->seg_max > VBLK_MAX_SEGS) return VBLK__EMPTY;
    vblk_seg seg[VBLK__SEGS];
    vblk_request r;
    uint32_t budget = q->size;
    vblk__state state;
    do {
        (void)vblk__work(dev, q, &r, seg, seg + VBLK__SEGS, now_ns, &budget,
                         true);
        state = vblk__arm_queue(dev, q);
    } while (state == VBLK__MORE && budget > 0 && !VBLK__LOAD(&dev->yield));
    vblk__publish_queue(dev, q);
    return q->broken ? VBLK__BROKEN : state;
}

VBLKDEF uint64_t vblk_drain(vblk_dev *dev, unsigned queue, uint64_t now_ns) {
    VBLK_ASSERT(queue < dev->queues);
    vblk__state state = vblk__drain_queue(dev, queue, now_ns);
    return vblk__again(dev, &dev->queue[queue], state, now_ns);
}

static uint64_t vblk__next_turn(vblk_dev *dev, uint64_t now_ns) {
    bool live = vblk_status(dev) & VBLK_STATUS_DRIVER_OK && dev->memory.read;
    return live && dev->waits ? vblk__turn_comes(dev, now_ns) : VBLK_NEVER;
}

VBLKDEF uint64_t vblk_poll(vblk_dev *dev, uint64_t now_ns) {
    uint32_t due = VBLK__LOAD(&dev->due);
    bool timed = now_ns >= dev->again_ns;
    bool more = false;
    if (due) {
        (void)VBLK__CAS(&dev->due, due, 0);
    } else if (!timed) {
        return dev->again_ns;
    }
    vblk_queue *q = dev->queue + (dev->waits ? dev->turn : 0);
    vblk_queue *const end = dev->queue + dev->queues;
    for (unsigned left = dev->queues; left > 0; left--) {
        bool look = VBLK__LOAD(&q->due);
        look = look && VBLK__CAS(&q->due, look, false);
        // A stall ends by time alone.
        if (q->run.stalled ? timed : look && vblk__has_news(dev, q)) {
            if (vblk__drain_queue(dev, q->number, now_ns) == VBLK__MORE) {
                vblk__set_due(dev, q);
                more = true;
            }
        }
        q = q + 1 == end ? dev->queue : q + 1;
    }
    dev->again_ns = vblk__next_turn(dev, now_ns);
    return more ? now_ns : dev->again_ns;
}

// ---- Device: features, status, reset ---------------------------------------
// Stop a queue, so that it can start anew. What is under way goes stale.
static void vblk__stop_queue(vblk_dev *dev, vblk_queue *q) {
    vblk__forget_stall(dev, q);
    VBLK__STORE(&q->ready, false);
    VBLK__STORE(&q->epoch, q->epoch + 1);
    VBLK_MEMSET(&q->run, 0, sizeof q->run);
}

static void vblk__forget_queue(vblk_dev *dev, vblk_queue *q) {
    vblk__stop_queue(dev, q);
    VBLK__STORE(&q->broken, false);
    q->size = 0;
    q->desc_gpa = q->avail_gpa = q->used_gpa = 0;
}

VBLKDEF void vblk_interrupt_ack(vblk_dev *dev, uint32_t bits) {
    vblk__change_state(dev, ~VBLK__INTERRUPT(bits & 0xff), 0);
}

// Back to where the device was after power-on. No thread drains a queue.
static void vblk__reset_device(vblk_dev *dev) {
    dev->waits = false; // the turn goes to nobody
    dev->again_ns = VBLK_NEVER;
    for (unsigned i = 0; i < dev->queues; i++) {
        vblk__forget_queue(dev, &dev->queue[i]);
    }
    VBLK__STORE(&dev->accepted, 0);
    dev->event_idx = dev->indirect = false;
    VBLK__STORE(&dev->write_through, false);
    VBLK__STORE(&dev->no_memory_said, false);
    VBLK__STORE(&dev->device_features_sel, 0);
    VBLK__STORE(&dev->driver_features_sel, 0);
    VBLK__STORE(&dev->queue_sel, 0);
    VBLK__STORE(&dev->generation, dev->generation + 1);
    VBLK__STORE(&dev->yield, 0);
    vblk__change_state(dev, 0, 0);
}

// Whether the host says that nothing of `queue`, or of all, is under way. A
// drain that it waits for ends after its request.
static bool vblk__quiet(vblk_dev *dev, int queue) {
    if (!dev->quiesce) return true;
    uint32_t yield = VBLK__LOAD(&dev->yield);
    if (yield == 0) VBLK__STORE(&dev->yield, VBLK__YIELD);
    bool quiet = dev->quiesce(dev->user, queue) == 0;
    if (yield == 0 && queue != VBLK_ALL_QUEUES) VBLK__STORE(&dev->yield, 0);
    return quiet;
}

// What Status of 0 does. If the host cannot let go, its threads are told to
// write nothing more, and the queues stay in their hands.
static void vblk__driver_resets(vblk_dev *dev) {
    if (vblk__quiet(dev, VBLK_ALL_QUEUES)) {
        vblk__reset_device(dev);
    } else {
        VBLK__STORE(&dev->yield, VBLK__HALT);
        vblk__change_state(dev, 0, VBLK_STATUS_NEEDS_RESET);
    }
}

VBLKDEF uint64_t vblk_device_features(const vblk_dev *dev) {
    return dev->offered;
}

VBLKDEF void vblk_set_driver_features(vblk_dev *dev, uint64_t features) {
    uint32_t status = vblk_status(dev);
    if (status & VBLK_STATUS_DRIVER && !(status & VBLK_STATUS_FEATURES_OK)) {
        VBLK__STORE(&dev->accepted, features);
    } else { // M5
        vblk__say(dev, VBLK_EV_REG_FEATURES_WINDOW, features, status);
    }
}

#define VBLK__DRIVERS_BITS                                                     \
    (VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER | VBLK_STATUS_DRIVER_OK |    \
     VBLK_STATUS_FEATURES_OK | VBLK_STATUS_FAILED)

static vblk_event_code vblk__check_features(const vblk_dev *dev) {
    if (dev->strict && !(dev->accepted & VBLK_F_VERSION_1)) { // P10
        return VBLK_EV_FEATURES_VERSION;
    }
    if (dev->accepted & ~dev->offered) return VBLK_EV_FEATURES_UNOFFERED;
    return dev->offered & ~dev->accepted & VBLK_F_ACCESS_PLATFORM
               ? VBLK_EV_FEATURES_PLATFORM
               : VBLK_EV_NONE;
}

// What stands against a Status that goes from `old` to `value` (F2 to F7, P2).
static vblk_event_code vblk__check_status(const vblk_dev *dev, uint32_t old,
                                          uint32_t value) {
    static const uint8_t steps[] = {
        VBLK_STATUS_ACKNOWLEDGE, VBLK_STATUS_DRIVER, VBLK_STATUS_FEATURES_OK,
        VBLK_STATUS_DRIVER_OK}; // each after all before it
    uint32_t add = value & ~old, before = 0;
    if (add == VBLK_STATUS_FAILED && !(old & ~value)) return VBLK_EV_NONE;
    if (old & VBLK_STATUS_NEEDS_RESET) return VBLK_EV_STATUS_NEEDS_RESET;
    if (old & ~value) return VBLK_EV_STATUS_CLEARS;
    if (add & ~VBLK__DRIVERS_BITS || (dev->strict && add & (add - 1))) {
        return VBLK_EV_STATUS_BITS;
    }
    if (dev->strict && old == 0 && add == VBLK_STATUS_DRIVER) {
        return VBLK_EV_STATUS_NO_ACK;
    }
    for (unsigned i = 0; i < sizeof steps; before |= steps[i++]) {
        bool implied = !dev->strict && before; // ACKNOWLEDGE
        if (!(add & steps[i])) continue;
        if ((old | (implied ? VBLK_STATUS_ACKNOWLEDGE : 0)) != before) {
            return VBLK_EV_STATUS_ORDER;
        }
        if (steps[i] == VBLK_STATUS_FEATURES_OK && vblk__check_features(dev)) {
            return vblk__check_features(dev);
        }
        old |= steps[i];
    }
    return VBLK_EV_NONE;
}

VBLKDEF void vblk_set_status(vblk_dev *dev, uint32_t written) {
    if (written == 0) {
        vblk__driver_resets(dev);
        return;
    }
    // A drainer may add NEEDS_RESET or an interrupt meanwhile: look again.
    uint32_t state = VBLK__LOAD(&dev->state);
    for (int tries = 0; tries < 100; tries++) {
        uint32_t old = state & VBLK__STATUS;
        uint32_t value = dev->strict
                             ? written
                             : old | (written & VBLK__DRIVERS_BITS); // P2
        uint32_t add = value & ~old;
        if (value == old) return; // F4
        vblk_event_code code = vblk__check_status(dev, old, value);
        if (code) {
            bool features = code >= VBLK_EV_FEATURES_VERSION; // and after it
            vblk__say(dev, code, features ? dev->accepted : written,
                      features ? dev->offered : old);
            return;
        }
        if (add & VBLK_STATUS_FEATURES_OK) {
            dev->event_idx = dev->accepted & VBLK_F_EVENT_IDX;
            dev->indirect = dev->accepted & VBLK_F_INDIRECT_DESC;
            VBLK__STORE(&dev->write_through, // X4
                        (dev->offered & ~dev->accepted & VBLK_F_FLUSH) != 0);
        }
        if (VBLK__CAS(&dev->state, state, (state & ~VBLK__STATUS) | value)) {
            if (add & VBLK_STATUS_FAILED) {
                vblk__say(dev, VBLK_EV_STATUS_FAILED, written, old);
            }
            if (add & VBLK_STATUS_DRIVER_OK) { // Q10
                vblk_notify(dev, VBLK_ALL_QUEUES);
            }
            return;
        }
    }
}

// ---- Registers: offsets to device calls -------------------------------------
static unsigned vblk__log2(uint32_t n) {
    unsigned log = 0;
    while (n >>= 1) log++;
    return log;
}

VBLKDEF void vblk_read_config(const vblk_dev *dev, uint64_t offset, void *dst,
                              size_t n) {
    const vblk_backend *k = &dev->backend;
    const uint64_t offered = dev->offered;
    const uint32_t align = k->physical_size / VBLK_SECTOR;
    const uint32_t block = k->block_size;
    const struct {
        uint64_t feature; // without which it is 0
        uint8_t  at, bytes;
        uint64_t value;
    } fields[] = { // [5.2.4]
        {VBLK_F_VERSION_1, 0, 8, vblk__capacity(dev)},
        {VBLK_F_SIZE_MAX, 8, 4, dev->size_max},
        {VBLK_F_SEG_MAX, 12, 4, dev->seg_max},
        {VBLK_F_BLK_SIZE, 20, 4, block},
        {VBLK_F_TOPOLOGY, 24, 1, vblk__log2(k->physical_size / block)},
        {VBLK_F_TOPOLOGY, 25, 1, k->align_offset / block},
        {VBLK_F_TOPOLOGY, 26, 2, k->min_io / block},
        {VBLK_F_TOPOLOGY, 28, 4, k->opt_io / block},
        {VBLK_F_CONFIG_WCE, VBLK__WRITEBACK, 1,
         !VBLK__LOAD(&dev->write_through)},
        {VBLK_F_MQ, 34, 2, dev->queues},
        {VBLK_F_DISCARD, 36, 4, dev->range_sectors},
        {VBLK_F_DISCARD, 40, 4, dev->range_max},
        {VBLK_F_DISCARD, 44, 4, align},
        {VBLK_F_WRITE_ZEROES, 48, 4, dev->range_sectors},
        {VBLK_F_WRITE_ZEROES, 52, 4, dev->range_max},
        {VBLK_F_WRITE_ZEROES, 56, 1, k->unmaps},
        {VBLK_F_SECURE_ERASE, 60, 4, dev->range_sectors},
        {VBLK_F_SECURE_ERASE, 64, 4, dev->range_max},
        {VBLK_F_SECURE_ERASE, 68, 4, align}};
    uint8_t b[VBLK__CONFIG_BYTES] = {0};
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (offered & fields[i].feature) {
            vblk__put_le(b + fields[i].at, fields[i].value, fields[i].bytes);
        }
    }
    for (size_t i = 0; i < n; i++) {
        bool there = offset < sizeof b && i < sizeof b - offset;
        ((uint8_t *)dst)[i] = there ? b[offset + i] : 0;
    }
}

VBLKDEF void vblk_write_config(vblk_dev *dev, uint64_t offset, const void *src,
                               size_t n) {
    if (VBLK__LOAD(&dev->accepted) & VBLK_F_CONFIG_WCE &&
        vblk__has_status(dev, VBLK_STATUS_FEATURES_OK) &&
        offset <= VBLK__WRITEBACK && n > VBLK__WRITEBACK - offset) {
        VBLK__STORE(&dev->write_through,
                    !((const uint8_t *)src)[VBLK__WRITEBACK - offset]);
    }
}

static const vblk_queue *vblk__selected(const vblk_dev *dev) {
    uint32_t sel = VBLK__LOAD(&dev->queue_sel);
    return sel < vblk__queue_count(dev) ? &dev->queue[sel] : NULL;
}

static uint32_t vblk__window(uint64_t features, uint32_t sel) {
    return sel == 0   ? (uint32_t)features
           : sel == 1 ? (uint32_t)(features >> 32)
                      : 0;
}

VBLKDEF uint64_t vblk_mmio_read(const vblk_dev *dev, uint64_t offset,
                                unsigned bytes) {
    const vblk_queue *q = vblk__selected(dev);
    if (bytes == 0 || bytes > 8) return UINT64_MAX;
    uint8_t b[8] = {0};
    if (offset >= VBLK_REG_CONFIG) {
        vblk_read_config(dev, offset - VBLK_REG_CONFIG, b, bytes);
        return vblk__get64(b);
    }
    if (bytes != 4) { // M2
        vblk__say(dev, VBLK_EV_REG_WIDTH, offset, bytes);
        VBLK_MEMSET(b, 0xff, bytes);
        return vblk__get64(b);
    }
    switch (offset) {
    case VBLK_REG_MAGIC_VALUE:       return 0x74726976;
    case VBLK_REG_VERSION:           return 2;
    case VBLK_REG_DEVICE_ID:         return 2;
    case VBLK_REG_VENDOR_ID:         return dev->vendor_id;
    case VBLK_REG_DEVICE_FEATURES:
        return vblk__window(dev->offered,
                            VBLK__LOAD(&dev->device_features_sel));
    case VBLK_REG_QUEUE_NUM_MAX:     return q ? dev->queue_size : 0;
    case VBLK_REG_QUEUE_READY:       return q ? VBLK__LOAD(&q->ready) : 0;
    case VBLK_REG_INTERRUPT_STATUS:
        return (VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__INTERRUPTS) >> 8;
    case VBLK_REG_STATUS:            return vblk_status(dev);
    case VBLK_REG_SHM_LEN_LOW: case VBLK_REG_SHM_LEN_HIGH: // no region [2.10]
    case VBLK_REG_SHM_BASE_LOW: case VBLK_REG_SHM_BASE_HIGH: return UINT32_MAX;
    case VBLK_REG_CONFIG_GENERATION: // of one word with the capacity
        return VBLK__LOAD(&dev->generation) +
               (uint32_t)(VBLK__LOAD(&dev->disk) / (VBLK__CAPACITY + 1));
    default:                         return 0;
    }
}

static uint64_t vblk__with_half(uint64_t number, bool high, uint32_t half) {
    return high ? (uint32_t)number | (uint64_t)half << 32
                : (number >> 32) << 32 | half;
}

static void vblk__write_features(vblk_dev *dev, uint32_t value) {
    uint32_t sel = dev->driver_features_sel;
    if (sel < 2) {
        vblk_set_driver_features(
            dev, vblk__with_half(dev->accepted, sel == 1, value));
    }
}

static uint64_t *vblk__half(vblk_queue *q, uint64_t offset, uint32_t value,
                            uint64_t *changed) {
    uint64_t *address = offset < VBLK_REG_QUEUE_DRIVER_LOW   ? &q->desc_gpa
                        : offset < VBLK_REG_QUEUE_DEVICE_LOW ? &q->avail_gpa
                                                             : &q->used_gpa;
    *changed = vblk__with_half(*address, offset & 4, value);
    return address;
}

// Linux clears QueueReady after its reset; that is no mistake.
static bool vblk__would_change(vblk_queue *q, uint64_t offset, uint32_t value) {
    uint64_t address;
    switch (offset) {
    case VBLK_REG_QUEUE_NUM:   return value != q->size;
    case VBLK_REG_QUEUE_READY: return (value == 1) != q->ready;
    default: return *vblk__half(q, offset, value, &address) != address;
    }
}

// What stands against a write to a register of `q` (M7, M13, P8).
static vblk_event_code vblk__check_window(const vblk_dev *dev,
                                          const vblk_queue *q,
                                          uint64_t offset, uint32_t value) {
    uint32_t status = vblk_status(dev);
    uint32_t from = dev->strict ? VBLK_STATUS_FEATURES_OK
                                                  : VBLK_STATUS_DRIVER; // P13
    if (!(status & from)) return VBLK_EV_REG_QUEUE_WINDOW;
    if (!(status & VBLK_STATUS_DRIVER_OK)) return VBLK_EV_NONE;
    if (offset == VBLK_REG_QUEUE_READY && value != 1) {
        return dev->strict ? VBLK_EV_REG_QUEUE_FROZEN : VBLK_EV_NONE;
    }
    bool may = !dev->strict || dev->accepted & VBLK_F_RING_RESET;
    return may && !q->ready ? VBLK_EV_NONE : VBLK_EV_REG_QUEUE_WINDOW;
}

static bool vblk__valid_size(const vblk_dev *dev, uint32_t size) {
    return size > 0 && size <= dev->queue_size && !(size & (size - 1));
}

static bool vblk__stops(vblk_dev *dev, vblk_queue *q) {
    if (!q->ready || vblk__quiet(dev, q->number)) return true;
    vblk__say_queue(dev, q, VBLK_EV_NOT_QUIET, 0, 0);
    vblk__announce(dev, VBLK_STATUS_NEEDS_RESET);
    return false;
}

// P8: on a live device, after the window was checked.
static void vblk__write_live_ready(vblk_dev *dev, vblk_queue *q,
                                   uint32_t value) {
    if (value == 1 && !q->ready) {
        VBLK__STORE_RELEASE(&q->ready, true);
        vblk_notify(dev, q->number);
    } else if (value != 1 && q->ready && vblk__stops(dev, q)) {
        vblk__stop_queue(dev, q);
    }
}

// M13: done at once, so that it never reads 1 [2.6.1].
static void vblk__write_queue_reset(vblk_dev *dev, uint32_t value) {
    bool resets = dev->accepted & VBLK_F_RING_RESET &&
                  vblk__has_status(dev, VBLK_STATUS_DRIVER_OK);
    if (value != 1 || !resets || !vblk__selected(dev)) return;
    vblk_queue *q = &dev->queue[dev->queue_sel];
    bool broken = VBLK__LOAD(&q->broken); // until the device is reset
    if (!vblk__stops(dev, q)) return;
    vblk__forget_queue(dev, q);
    VBLK__STORE(&q->broken, broken);
}

static void vblk__write_queue(vblk_dev *dev, uint64_t offset, uint32_t value) {
    if (!vblk__selected(dev)) return;
    vblk_queue *q = &dev->queue[dev->queue_sel];
    vblk_event_code code = vblk__check_window(dev, q, offset, value);
    if (code) {
        if (vblk__would_change(q, offset, value)) {
            vblk__say_queue(dev, q, code, offset, value);
        }
        return;
    }
    uint64_t *address, changed;
    switch (offset) {
    case VBLK_REG_QUEUE_NUM:
        if (vblk__valid_size(dev, value)) {
            q->size = value;
        } else if (value > 0 || q->ready) {
            vblk__say_queue(dev, q, VBLK_EV_REG_QUEUE_SIZE, offset, value);
        }
        break;
    case VBLK_REG_QUEUE_READY:
        if (vblk__has_status(dev, VBLK_STATUS_DRIVER_OK)) {
            vblk__write_live_ready(dev, q, value);
        } else {
            VBLK__STORE(&q->ready, value == 1);
        }
        break;
    default:
        address = vblk__half(q, offset, value, &changed);
        *address = changed;
        break;
    }
}

static void vblk__write_notify(vblk_dev *dev, uint32_t queue) {
    uint32_t status = vblk_status(dev);
    if (queue >= vblk__queue_count(dev)) {
        vblk__say(dev, VBLK_EV_NOTIFY_NO_QUEUE, queue, 0);
    } else if (!(status & VBLK_STATUS_DRIVER_OK)) {
        vblk__say(dev, VBLK_EV_NOTIFY_EARLY, queue, status);
    } else if (!VBLK__LOAD(&dev->queue[queue].ready)) {
        vblk__say(dev, VBLK_EV_NOTIFY_NOT_READY, queue, 0);
    } else {
        vblk_notify(dev, (int)queue);
    }
}

VBLKDEF void vblk_mmio_write(vblk_dev *dev, uint64_t offset, unsigned bytes,
                             uint64_t value) {
    uint32_t v = (uint32_t)value;
    if (offset >= VBLK_REG_CONFIG) {
        uint8_t b[8];
        vblk__put_le(b, value, 8);
        vblk_write_config(dev, offset - VBLK_REG_CONFIG, b,
                          bytes <= 8 ? bytes : 0);
        return;
    }
    if (bytes != 4) { // M2
        vblk__say(dev, VBLK_EV_REG_WIDTH, offset, bytes);
        return;
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
    case VBLK_REG_QUEUE_NOTIFY:    vblk__write_notify(dev, v);      break;
    case VBLK_REG_STATUS:          vblk_set_status(dev, v);         break;
    case VBLK_REG_QUEUE_RESET:     vblk__write_queue_reset(dev, v); break;
    case VBLK_REG_QUEUE_NUM: case VBLK_REG_QUEUE_READY:
    case VBLK_REG_QUEUE_DESC_LOW: case VBLK_REG_QUEUE_DESC_HIGH:
    case VBLK_REG_QUEUE_DRIVER_LOW: case VBLK_REG_QUEUE_DRIVER_HIGH:
    case VBLK_REG_QUEUE_DEVICE_LOW: case VBLK_REG_QUEUE_DEVICE_HIGH:
        vblk__write_queue(dev, offset, v);
        break;
    default: break;
    }
}

VBLKDEF int vblk_queue_start(vblk_dev *dev, unsigned queue,
                             const vblk_ring *ring) {
    if (queue >= vblk__queue_count(dev) ||
        !(vblk_status(dev) & VBLK_STATUS_FEATURES_OK)) {
        return VBLK_ERR_RING;
    }
    vblk_queue *q = &dev->queue[queue];
    if (q->ready || !vblk__valid_size(dev, ring->size)) return VBLK_ERR_RING;
    if (ring->agains > ring->size) return VBLK_ERR_RING;
    q->size = ring->size;
    q->desc_gpa = ring->desc;
    q->avail_gpa = ring->avail;
    q->used_gpa = ring->used;
    q->run.again = ring->again;
    q->run.agains = ring->agains;
    q->run.again_end = ring->position;
    q->run.avail_next = q->run.avail_seen =
        (uint16_t)(ring->position - ring->agains);
    (void)vblk__adopt_used(dev, q); // or, without memory, the first drain does
    VBLK__STORE_RELEASE(&q->ready, true);
    vblk_notify(dev, (int)queue);
    return VBLK_OK;
}

VBLKDEF int vblk_queue_stop(vblk_dev *dev, unsigned queue, vblk_ring *ring) {
    VBLK_ASSERT(queue < dev->queues);
    vblk_queue *q = &dev->queue[queue];
    if (!vblk__quiet(dev, (int)queue)) return VBLK_ERR_BUSY;
    ring->size = q->size;
    ring->desc = q->desc_gpa;
    ring->avail = q->avail_gpa;
    ring->used = q->used_gpa;
    ring->position = q->run.agains ? q->run.again_end : q->run.avail_next;
    ring->agains = (uint16_t)(ring->position - q->run.avail_next);
    ring->again = q->run.again;
    if (ring->agains > 0) ring->again += q->run.agains - ring->agains;
    vblk_publish(dev, queue); // what is completed is not lost
    vblk__forget_queue(dev, q);
    return VBLK_OK;
}

VBLKDEF bool vblk_interrupt_line(const vblk_dev *dev) {
    return (VBLK__LOAD_ACQUIRE(&dev->state) & VBLK__LINE) != 0;
}

VBLKDEF void vblk_needs_reset(vblk_dev *dev) {
    vblk__say(dev, VBLK_EV_HOST_RESET, 0, 0);
    vblk__announce(dev, VBLK_STATUS_NEEDS_RESET);
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
    return o->queue_size ? o->queue_size : 256;
}

static uint32_t vblk__segs_of(const vblk_options *o) {
    uint32_t size = vblk__queue_size(o);
    uint32_t fits = size > 3 ? size - 2 : 1;
    return o->seg_max ? o->seg_max
           : fits < VBLK_MAX_SEGS ? fits
                                  : VBLK_MAX_SEGS;
}

static uint32_t vblk__most_ranges(const vblk_options *o) {
    uint32_t room = vblk__segs_of(o) + 2; // they become segments
    return room > VBLK_MAX_RANGES ? VBLK_MAX_RANGES : room;
}

static uint32_t vblk__block_of(const vblk_backend *b) {
    return b->block_size ? b->block_size : VBLK_SECTOR;
}

static uint32_t vblk__physical_of(const vblk_backend *b) {
    return b->physical_size ? b->physical_size : vblk__block_of(b);
}

static bool vblk__check_blocks(const vblk_backend *b) {
    uint32_t block = vblk__block_of(b), physical = vblk__physical_of(b);
    return !(block & (block - 1)) && block >= VBLK_SECTOR &&
           !(physical & (physical - 1)) && physical >= block &&
           physical <= 65536 && b->align_offset < physical &&
           !((b->align_offset | b->min_io | b->opt_io) & (block - 1)) &&
           b->min_io / block <= UINT16_MAX;
}

static int vblk__check_options(const vblk_options *o) {
    const uint64_t may_be_off =
        VBLK_F_SIZE_MAX | VBLK_F_SEG_MAX | VBLK_F_BLK_SIZE | VBLK_F_TOPOLOGY |
        VBLK_F_DISCARD | VBLK_F_WRITE_ZEROES | VBLK_F_LIFETIME |
        VBLK_F_SECURE_ERASE | VBLK_F_INDIRECT_DESC | VBLK_F_EVENT_IDX;
    if (!vblk__is_memory(&o->memory)) return VBLK_ERR_MEMORY;
    if (!o->backend.read || !vblk__check_blocks(&o->backend)) {
        return VBLK_ERR_BACKEND;
    }
    if ((unsigned)o->profile > VBLK_STRICT) return VBLK_ERR_PROFILE;
    if (o->queues > 65535 || (o->queues > 1 && !o->queue)) {
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
        (vblk__segs_of(o) + 2 > entries && (!indirect || entries > 2))) {
        return VBLK_ERR_SEG_MAX;
    }
    if (o->size_max && o->size_max < 4096) return VBLK_ERR_SIZE_MAX;
    if (o->range_max > vblk__most_ranges(o) ||
        o->range_sectors > 1u << 21 ||
        o->range_sectors % (vblk__block_of(&o->backend) / VBLK_SECTOR)) {
        return VBLK_ERR_RANGES;
    }
    if (o->features_off & ~may_be_off) return VBLK_ERR_FEATURES;
    return vblk__check_limits(&o->limits);
}

// The sectors, as many as the backend says if 0, and the bytes that there are.
static int vblk__measure(const vblk_backend *b, uint64_t *capacity,
                         uint64_t *bytes) {
    const uint32_t block = vblk__block_of(b);
    if (*capacity > INT64_MAX / VBLK_SECTOR || (!*capacity && !b->size) ||
        *capacity & (block / VBLK_SECTOR - 1)) {
        return VBLK_ERR_CAPACITY;
    }
    *bytes = b->size ? b->size(b->user) : *capacity * VBLK_SECTOR;
    if (!*capacity && *bytes > INT64_MAX) return VBLK_ERR_CAPACITY;
    uint64_t whole = *bytes - (*bytes & (block - 1));
    *capacity = *capacity ? *capacity : whole / VBLK_SECTOR;
    return VBLK_OK;
}

static void vblk__say_capacity(const vblk_dev *dev, uint64_t asked,
                               uint64_t bytes) {
    uint64_t capacity = vblk__capacity(dev);
    if (capacity > bytes / VBLK_SECTOR) {
        vblk__say(dev, VBLK_EV_CAPACITY_LARGE, bytes, capacity * VBLK_SECTOR);
    }
    uint64_t rest = bytes & (dev->backend.block_size - 1);
    if (!asked && capacity > 0 && rest) {
        vblk__say(dev, VBLK_EV_CAPACITY_ROUNDED, rest, 0);
    }
    if (capacity == 0) vblk__say(dev, VBLK_EV_CAPACITY_ZERO, bytes, 0);
}

static uint64_t vblk__offer(const vblk_options *o) {
    uint64_t f = VBLK_F_VERSION_1 | VBLK_F_BLK_SIZE | VBLK_F_SEG_MAX |
                 VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC | VBLK_F_RING_RESET;
    const vblk_backend *b = &o->backend;
    f |= b->write ? 0 : VBLK_F_RO;
    f |= vblk__physical_of(b) > vblk__block_of(b) || b->align_offset ||
                 b->min_io || b->opt_io ? VBLK_F_TOPOLOGY : 0;
    f |= b->lifetime ? VBLK_F_LIFETIME : 0;
    if (VBLK_MAX_RANGES && b->write) {
        f |= b->discard ? VBLK_F_DISCARD : 0;
        f |= b->write_zeroes ? VBLK_F_WRITE_ZEROES : 0;
        f |= b->secure_erase ? VBLK_F_SECURE_ERASE : 0;
    }
    f |= o->access_platform ? VBLK_F_ACCESS_PLATFORM : 0;
    f |= o->queues > 1 ? VBLK_F_MQ : 0;
    f |= o->profile == VBLK_STRICT || o->size_max ? VBLK_F_SIZE_MAX : 0; // P12
    // Nothing to flush on a read-only disk, so it can be offered (V10).
    f |= o->backend.flush || !o->backend.write ? VBLK_F_FLUSH : 0;
    f |= o->backend.flush && o->backend.write ? VBLK_F_CONFIG_WCE : 0;
    return f & ~o->features_off;
}

static void vblk__set_bursts(vblk_limits *l) {
    l->iops_burst = l->iops_burst ? l->iops_burst : l->iops;
    l->bps_burst = l->bps_burst ? l->bps_burst : l->bps;
}

// Each device begins elsewhere: a request of what was here before is stale.
static uint64_t vblk__first_epoch(void) {
    static uint32_t made; // atomic
    uint32_t old = VBLK__LOAD(&made);
    while (!VBLK__CAS(&made, old, old + 1)) {
    }
    return (uint64_t)old << 32 | (uint32_t)(uintptr_t)&made; // not as another
}                                                            // static unit's

static void vblk__set_up(vblk_dev *dev, const vblk_options *o,
                         uint64_t capacity, uint64_t backing) {
    bool strict = o->profile == VBLK_STRICT;
    vblk_limits l = o->limits;
    VBLK_MEMSET(dev, 0, sizeof *dev);
    dev->memory = o->memory;
    dev->backend = o->backend;
    dev->backend.block_size = vblk__block_of(&o->backend);
    dev->backend.physical_size = vblk__physical_of(&o->backend);
    dev->interrupt = o->interrupt;
    dev->event = o->event;
    dev->notify = o->notify;
    dev->quiesce = o->quiesce;
    dev->track = o->track;
    dev->user = o->user;
    dev->disk = capacity;
    dev->backing = backing;
    dev->offered = vblk__offer(o);
    dev->part_of_block = dev->backend.block_size / VBLK_SECTOR - 1;
    dev->queues = o->queues ? o->queues : 1;
    dev->queue = o->queue ? o->queue : &dev->built_in;
    dev->queue_size = vblk__queue_size(o);
    dev->seg_max = vblk__segs_of(o);
    dev->size_max = o->size_max ? o->size_max : 1u << 20;
    dev->range_max = o->range_max ? o->range_max
                                  : vblk__most_ranges(o);
    dev->range_sectors = o->range_sectors ? o->range_sectors : 65536;
    dev->vendor_id = o->vendor_id || strict ? o->vendor_id : 0x554d4551; // P11
    dev->strict = strict;
    dev->again_ns = VBLK_NEVER;
    vblk__set_bursts(&l);
    vblk_bucket_init(&dev->ops, l.iops, l.iops_burst);
    vblk_bucket_init(&dev->bytes, l.bps, l.bps_burst);
    dev->limited = l.iops || l.bps;
    for (unsigned i = 0; i < dev->queues; i++) {
        VBLK_MEMSET(&dev->queue[i], 0, sizeof dev->queue[i]);
        dev->queue[i].epoch = vblk__first_epoch();
        dev->queue[i].number = (uint16_t)i;
    }
    for (unsigned i = 0; o->id && i < VBLK_ID_BYTES && o->id[i]; i++) {
        dev->id[i] = (uint8_t)o->id[i];
    }
}

VBLKDEF int vblk_init_checked(vblk_dev *dev, const vblk_options *o,
                              int version, size_t size) {
    VBLK_ASSERT(dev && o);
    if (version / 100 != VBLK_VERSION / 100 || size != sizeof *dev) {
        return VBLK_ERR_LAYOUT;
    }
    uint64_t capacity = o->capacity, bytes;
    int err = vblk__check_options(o);
    err = err ? err : vblk__measure(&o->backend, &capacity, &bytes);
    if (err) return err;
    vblk__set_up(dev, o, capacity, bytes);
    vblk__say_capacity(dev, o->capacity, bytes);
    return VBLK_OK;
}

VBLKDEF int vblk_resize(vblk_dev *dev, uint64_t sectors) {
    uint64_t capacity = sectors, bytes, was = VBLK__LOAD(&dev->disk);
    int err = vblk__measure(&dev->backend, &capacity, &bytes);
    if (err) return err;
    VBLK__STORE(&dev->backing, bytes);
    if (capacity == (was & VBLK__CAPACITY)) return VBLK_OK;
    VBLK__STORE(&dev->disk, capacity + (was & ~VBLK__CAPACITY) +
                                VBLK__CAPACITY + 1);
    vblk__announce(dev, 0);
    vblk__say_capacity(dev, sectors, bytes);
    return VBLK_OK;
}

VBLKDEF int vblk_set_limits(vblk_dev *dev, const vblk_limits *limits,
                            uint64_t now_ns) {
    vblk_limits l = *limits;
    if (vblk__check_limits(&l)) return VBLK_ERR_LIMITS;
    vblk__set_bursts(&l);
    vblk_bucket_change(&dev->ops, l.iops, l.iops_burst, now_ns);
    vblk_bucket_change(&dev->bytes, l.bps, l.bps_burst, now_ns);
    dev->limited = l.iops || l.bps;
    dev->again_ns = 0;
    // Only a limited device has a turn: without limits its queues may be
    // drained by several threads, and none of them could pass it on.
    dev->waits = dev->waits && dev->limited;
    for (unsigned i = 0; !dev->limited && i < dev->queues; i++) {
        if (dev->queue[i].run.stalled) {
            vblk__end_stall(dev, &dev->queue[i], now_ns);
        }
    }
    vblk_notify(dev, VBLK_ALL_QUEUES);
    return VBLK_OK;
}

VBLKDEF int vblk_set_memory(vblk_dev *dev, vblk_memory memory) {
    if (!vblk__is_memory(&memory)) return VBLK_ERR_MEMORY;
    for (unsigned i = 0; i < dev->queues; i++) {
        if (dev->queue[i].run.under_way > 0) return VBLK_ERR_BUSY;
    }
    dev->memory = memory;
    dev->again_ns = 0;
    for (unsigned i = 0; i < dev->queues; i++) {
        vblk_queue *q = &dev->queue[i];
        q->run.resolved = q->run.armed = false;
        q->run.desc = q->run.avail = q->run.used = NULL;
    }
    vblk_notify(dev, VBLK_ALL_QUEUES);
    return VBLK_OK;
}

VBLKDEF unsigned vblk_seg_max(const vblk_dev *dev) {
    return dev->seg_max;
}

VBLKDEF bool vblk_queue_broken(const vblk_dev *dev, unsigned queue) {
    VBLK_ASSERT(queue < dev->queues);
    return VBLK__LOAD(&dev->queue[queue].broken);
}

VBLKDEF vblk_counts vblk_counters(const vblk_dev *dev) {
    vblk_counts sum;
    uint64_t *to = (uint64_t *)(void *)&sum;
    VBLK_MEMSET(&sum, 0, sizeof sum);
    for (unsigned i = 0; i < dev->queues; i++) {
        const uint64_t *from =
            (const uint64_t *)(const void *)&dev->queue[i].counts;
        for (size_t n = 0; n < sizeof sum / sizeof *to; n++) {
            to[n] += VBLK__LOAD(&from[n]);
        }
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

static const char *vblk__event_text(vblk_event_code code) {
    switch ((int)code) {
#define VBLK_X(name, number, level, a, b, text)                                \
    case VBLK_EV_##name: return text;
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    default: return "unknown event code";
    }
}

typedef struct vblk__line {
    char  *at;
    size_t left; // the NUL at the end included
} vblk__line;

static void vblk__print(vblk__line *l, const char *text) {
    for (; *text && l->left > 1; text++, l->left--) *l->at++ = *text;
    if (l->left > 0) *l->at = 0;
}

static void vblk__print_number(vblk__line *l, const char *name, uint64_t n,
                               unsigned base) {
    char digits[24];
    unsigned i = sizeof digits - 1;
    digits[i] = 0;
    do {
        digits[--i] = "0123456789abcdef"[n % base];
        n /= base;
    } while (n > 0);
    vblk__print(l, name);
    vblk__print(l, base == 16 ? " 0x" : " ");
    vblk__print(l, &digits[i]);
}

static void vblk__print_field(vblk__line *l, const char *before,
                              const vblk_event *event, unsigned field) {
    static const char *const names[] = {
        "", "address", "bytes", "sector", "index", "value", "against", "error"};
    vblk_event e = *event;
    if (field != VBLK__IS_NONE) {
        bool hex = field == VBLK__IS_ADDRESS || field == VBLK__IS_VALUE ||
                   (field == VBLK__IS_AGAINST && e.value); // bits, if it has
        vblk__print(l, before);
        vblk__print_number(l, names[field], *vblk__field(&e, field),
                           hex ? 16 : 10);
    }
}

VBLKDEF const char *vblk_event_line(const vblk_event *event, char *buf,
                                    size_t n) {
    vblk__line l = {buf, n};
    const struct vblk__event_shape *row = vblk__event_row(event->code);
    vblk__print(&l, "");
    if (event->queue >= 0) {
        vblk__print_number(&l, "queue", (uint64_t)event->queue, 10);
        if (event->head >= 0) {
            vblk__print_number(&l, ", head", (uint64_t)event->head, 10);
        }
        vblk__print(&l, ": ");
    }
    vblk__print(&l, vblk__event_text(event->code));
    vblk__print_field(&l, " [", event, row->a);
    vblk__print_field(&l, ", ", event, row->b);
    vblk__print(&l, row->a == VBLK__IS_NONE ? "" : "]");
    return buf;
}

// ---- Memory and memory disk -------------------------------------------------
VBLKDEF vblk_memory vblk_regions_memory(const vblk_regions *regions) {
    for (unsigned i = 0; i < regions->count; i++) {
        VBLK_ASSERT((size_t)regions->region[i].bytes ==
                    regions->region[i].bytes);
    }
    vblk_memory memory;
    memory.read = vblk__regions_read;
    memory.write = vblk__regions_write;
    memory.map = vblk__regions_map;
    memory.user = (void *)(uintptr_t)regions;
    return memory;
}

static int64_t vblk__ramdisk_copy(void *user, bool in, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    vblk_ramdisk *d = (vblk_ramdisk *)user;
    const size_t all = offset < d->bytes ? (size_t)(d->bytes - offset) : 0;
    uint8_t *p = (uint8_t *)d->data + (d->bytes - all);
    size_t   left = all;
    for (; segs > 0 && left > 0; seg++, segs--) {
        size_t n = seg->n < left ? seg->n : left;
        VBLK_MEMCPY(in ? seg->ptr : p, in ? p : seg->ptr, n);
        p += n;
        left -= n;
    }
    return (int64_t)(all - left);
}

static int64_t vblk__ramdisk_read(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    return vblk__ramdisk_copy(user, true, offset, seg, segs);
}

static int64_t vblk__ramdisk_write(void *user, uint64_t offset,
                                   const vblk_seg *seg, unsigned segs) {
    return vblk__ramdisk_copy(user, false, offset, seg, segs);
}

static int vblk__ramdisk_flush(void *user) {
    (void)user;
    return 0;
}

static int vblk__ramdisk_zero(void *user, uint64_t offset, uint64_t bytes,
                              bool unmap) {
    vblk_ramdisk *d = (vblk_ramdisk *)user;
    uint64_t left = offset < d->bytes ? d->bytes - offset : 0;
    left = left < bytes ? left : bytes;
    if (left > 0) VBLK_MEMSET((uint8_t *)d->data + offset, 0, (size_t)left);
    (void)unmap;
    return 0;
}

static uint64_t vblk__ramdisk_size(void *user) {
    return ((vblk_ramdisk *)user)->bytes;
}

VBLKDEF vblk_backend vblk_ramdisk_backend(vblk_ramdisk *disk) {
    vblk_backend b;
    VBLK_MEMSET(&b, 0, sizeof b);
    b.read = vblk__ramdisk_read;
    b.write = vblk__ramdisk_write;
    b.flush = vblk__ramdisk_flush;
    b.size = vblk__ramdisk_size;
    b.discard = b.write_zeroes = vblk__ramdisk_zero;
    b.user = disk;
    return b;
}

#endif // VBLK_IMPLEMENTATION

#if defined(VBLK_IMPLEMENTATION_FILES) && !defined(VBLK_FILES_IMPLEMENTED)
#define VBLK_FILES_IMPLEMENTED
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef O_CLOEXEC
#error "vblk.h: files need POSIX 2008: include vblk.h before any other header \
in this unit, or compile with -D_GNU_SOURCE or -D_POSIX_C_SOURCE=200809L"
#endif

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
#if defined(O_DIRECT) && defined(STATX_TYPE)
#define VBLK__DIRECT
#endif
#define VBLK__IS_DISK(mode) S_ISBLK(mode)
#else
#define VBLK__IS_DISK(mode) (S_ISBLK(mode) || S_ISCHR(mode))
#endif

// ---- Files ------------------------------------------------------------------
#define VBLK__BOUNCE 32768u // bytes of stack

static void vblk__close(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static int vblk__file_check(int fd, bool read_only) {
    struct stat st;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fstat(fd, &st)) return errno;
    if ((flags & O_ACCMODE) != O_RDWR &&
        ((flags & O_ACCMODE) != O_RDONLY || !read_only)) {
        return EACCES;
    }
    if (flags & O_APPEND && !read_only) return EINVAL; // writes at the end
    return S_ISREG(st.st_mode) || VBLK__IS_DISK(st.st_mode) ? 0
           : S_ISDIR(st.st_mode)                            ? EISDIR
                                                            : ENOTBLK;
}

// What O_DIRECT asks for: by the file system, or what suits all. Blocks smaller
// than a page would share it with what goes through the cache. An errno, or 0.
static int vblk__file_align(vblk_file *f) {
    f->block = f->align = 0;
#ifdef VBLK__DIRECT
    uint32_t st[64] = {0}; // struct statx, which libc may know in part
    if (!(fcntl(f->fd, F_GETFL) & O_DIRECT)) return 0;
    f->block = f->align = 4096;
    if (statx(f->fd, "", AT_EMPTY_PATH, 0x2000, (struct statx *)(void *)st) ==
            0 && st[0] & 0x2000) { // STATX_DIOALIGN
        f->align = st[38];
        f->block = st[39] > VBLK_SECTOR && st[39] < 4096 ? 4096 : st[39];
    }
    return f->block >= VBLK_SECTOR && f->align > 0 &&
                   f->block <= VBLK__BOUNCE && f->block <= VBLK_SCRATCH
               ? 0 : EOPNOTSUPP;
#else
    return 0;
#endif
}

VBLKDEF int vblk_file_from(vblk_file *file, int fd, bool read_only) {
    int err = vblk__file_check(fd, read_only);
    off_t end = err ? -1 : lseek(fd, 0, SEEK_END);
    err = !err && end < 0 ? errno : err;
    file->fd = fd;
    err = err ? err : vblk__file_align(file);
    err = err ? err : pthread_mutex_init(&file->mutex, NULL);
    if (err) {
        errno = err;
        return VBLK_ERR_FILE;
    }
    file->read_only = read_only;
    file->flush_error = 0;
    file->end = (uint64_t)end;
    return VBLK_OK;
}

VBLKDEF int vblk_file_open(vblk_file *file, const char *path, unsigned flags) {
    bool read_only = flags & VBLK_FILE_READ_ONLY;
    int  how = (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC;
    if (flags & VBLK_FILE_DIRECT) {
#ifdef VBLK__DIRECT
        how |= O_DIRECT;
#else
        errno = EOPNOTSUPP;
        return VBLK_ERR_FILE;
#endif
    }
    int fd = open(path, how);
    if (fd < 0) return VBLK_ERR_FILE;
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
    vblk__close(&file->fd);
}

// Several segments in one call, where the system has one and the array holds
// them; the first ones otherwise.
static ssize_t vblk__file_vector(int fd, off_t offset, const vblk_seg *seg,
                                 unsigned segs, bool in) {
#ifdef VBLK__VECTORS
    struct iovec iov[VBLK__SEGS];
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

static bool vblk__file_fits(const vblk_file *f, uint64_t offset,
                            const vblk_seg *seg, unsigned segs) {
    uintptr_t address = 0;
    for (; f->block && segs > 0; seg++, segs--) {
        address |= (uintptr_t)seg->ptr;
        offset |= seg->n;
    }
    return !f->block || (offset % f->block == 0 && address % f->align == 0);
}

static ssize_t vblk__file_call(int fd, uint64_t offset, const vblk_seg *seg,
                               unsigned segs, bool in) {
    ssize_t n;
    do {
        n = vblk__file_vector(fd, (off_t)offset, seg, segs, in);
    } while (n < 0 && errno == EINTR);
    return n;
}

// Through memory that O_DIRECT likes, piece by piece. On the stack, as a fault
// of guest memory may end this by a jump.
static ssize_t vblk__file_bounce(vblk_file *f, uint64_t offset,
                                 const vblk_seg *seg, unsigned segs, bool in) {
    uint8_t  room[VBLK__BOUNCE + 4096];
    vblk_seg own = {room + (4096 - (uintptr_t)room % 4096), VBLK__BOUNCE, 0};
    uint64_t all = 0, done = 0;
    size_t   at = 0; // into the segment
    for (unsigned i = 0; i < segs; i++) all += seg[i].n;
    while (done < all) {
        own.n = all - done < VBLK__BOUNCE ? (size_t)(all - done) : VBLK__BOUNCE;
        ssize_t n = in ? vblk__file_call(f->fd, offset + done, &own, 1, true)
                       : (ssize_t)own.n;
        for (size_t k = 0, some; n > 0 && k < (size_t)n; k += some) {
            some = (size_t)n - k < seg->n - at ? (size_t)n - k : seg->n - at;
            memcpy(in ? seg->ptr + at : own.ptr + k,
                   in ? own.ptr + k : seg->ptr + at, some);
            at = at + some < seg->n ? at + some : 0;
            seg += at == 0;
        }
        if (!in) n = vblk__file_call(f->fd, offset + done, &own, 1, false);
        if (n < 0 && done == 0) return n;
        done += n > 0 ? (uint64_t)n : 0;
        if (n < (ssize_t)own.n) break;
    }
    return (ssize_t)done;
}

static int64_t vblk__file_move(vblk_file *f, uint64_t offset,
                               const vblk_seg *seg, unsigned segs, bool in) {
    ssize_t n = vblk__file_fits(f, offset, seg, segs)
                    ? vblk__file_call(f->fd, offset, seg, segs, in)
                    : vblk__file_bounce(f, offset, seg, segs, in);
    return n < 0 ? -errno : n;
}

// The backing became shorter than it was: writes are lost, for good.
static int vblk__file_lost(vblk_file *f) {
    pthread_mutex_lock(&f->mutex);
    f->flush_error = f->flush_error ? f->flush_error : EIO;
    pthread_mutex_unlock(&f->mutex);
    return -EIO;
}

// What a transfer of the file's came to, which was `end` long before.
static int64_t vblk__file_moved(vblk_file *f, bool in, uint64_t offset,
                                uint64_t end, int64_t n) {
    vblk__raise_to(&f->end, n > 0 ? offset + (uint64_t)n : 0);
    return in && n == 0 && offset < end ? vblk__file_lost(f) : n;
}

static int64_t vblk__file_read(void *user, uint64_t offset,
                               const vblk_seg *seg, unsigned segs) {
    vblk_file *f = (vblk_file *)user;
    uint64_t end = VBLK__LOAD(&f->end); // before: it may grow meanwhile
    return vblk__file_moved(f, true, offset, end,
                            vblk__file_move(f, offset, seg, segs, true));
}

static int64_t vblk__file_write(void *user, uint64_t offset,
                                const vblk_seg *seg, unsigned segs) {
    vblk_file *f = (vblk_file *)user;
    return vblk__file_moved(f, false, offset, 0,
                            vblk__file_move(f, offset, seg, segs, false));
}

static off_t vblk__file_end(vblk_file *f) {
    off_t end;
    do {
        end = lseek(f->fd, 0, SEEK_END);
    } while (end < 0 && errno == EINTR);
    return end;
}

// Asked where it may have another size, a smaller one too.
static uint64_t vblk__file_size(void *user) {
    vblk_file *f = (vblk_file *)user;
    off_t end = vblk__file_end(f);
    VBLK__STORE(&f->end, end < 0 ? 0 : (uint64_t)end);
    return VBLK__LOAD(&f->end);
}

// With the mutex held: what fdatasync() came to; the file was `end` long.
static int vblk__file_synced(vblk_file *f, uint64_t end, int err) {
    if (!err && (uint64_t)vblk__file_end(f) < end) { // -1 is beyond any
        err = EIO;
    }
    f->flush_error = err ? err : f->flush_error;
    return -f->flush_error;
}

// One at a time: the kernel tells of a failure once, to one caller.
static int vblk__file_flush(void *user) {
    vblk_file *f = (vblk_file *)user;
    uint64_t end = VBLK__LOAD(&f->end); // before: it may grow meanwhile
    int err;
    pthread_mutex_lock(&f->mutex);
    do {
        err = VBLK__SYNC(f->fd) ? errno : 0;
    } while (err == EINTR);
    err = vblk__file_synced(f, end, err);
    pthread_mutex_unlock(&f->mutex);
    return err;
}

#ifdef FALLOC_FL_PUNCH_HOLE
#ifndef FALLOC_FL_ZERO_RANGE // musl
#define FALLOC_FL_ZERO_RANGE 0x10
#endif
#define VBLK__PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define VBLK__ZERO  (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)

// 0, or an errno; EOPNOTSUPP: not to be had here.
static int vblk__file_clear(vblk_file *f, int mode, uint64_t offset,
                            uint64_t bytes) {
    int err;
    do {
        err = fallocate(f->fd, mode, (off_t)offset, (off_t)bytes) ? errno : 0;
    } while (err == EINTR);
    return err == ENOSYS || err == EINVAL ? EOPNOTSUPP : err;
}
#else
#define VBLK__PUNCH 0
#define vblk__file_clear(f, mode, offset, bytes)                               \
    ((void)(f), (void)(offset), (void)(bytes), EOPNOTSUPP)
#endif

static int vblk__file_discard(void *user, uint64_t offset, uint64_t bytes,
                              bool unmap) {
    vblk_file *f = (vblk_file *)user;
    int err = vblk__file_clear(f, VBLK__PUNCH, offset, bytes);
    (void)unmap;
    return err == EOPNOTSUPP ? 0 : -err;
}

// Where the file system has no such call, zeroes are written; not beyond the
// block that the file ends in: it reads so there, and is not to grow.
static int vblk__file_zero(void *user, uint64_t offset, uint64_t bytes,
                           bool unmap) {
    static uint8_t zeroes[65536];
    vblk_file *f = (vblk_file *)user;
    int err = unmap ? vblk__file_clear(f, VBLK__PUNCH, offset, bytes)
                    : EOPNOTSUPP;
    if (err == EOPNOTSUPP) err = vblk__file_clear(f, VBLK__ZERO, offset, bytes);
    if (err != EOPNOTSUPP) return -err;
    off_t end = vblk__file_end(f);
    if (end < 0) return -errno;
    uint64_t block = f->block ? f->block : 1;
    uint64_t stop = ((uint64_t)end + block - 1) / block * block;
    if (end > 0 && offset + bytes > stop) { // a disk may not know its end
        bytes = offset < stop ? stop - offset : 0;
    }
    while (bytes > 0) {
        size_t   most = bytes < sizeof zeroes ? (size_t)bytes : sizeof zeroes;
        vblk_seg seg = {zeroes, most, 0};
        int64_t  n = vblk__file_move(f, offset, &seg, 1, false);
        if (n <= 0) return n ? (int)n : -EIO;
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return 0;
}

static void vblk__file_blocks(const vblk_file *f, vblk_backend *b) {
    struct stat st;
    b->block_size = f->block;
    if (fstat(f->fd, &st) == 0 && S_ISREG(st.st_mode)) {
        uint32_t best = st.st_blksize <= 65536 ? (uint32_t)st.st_blksize : 4096;
        b->physical_size = best & (best - 1) || best < 4096 ? 4096 : best;
    }
    if (b->physical_size < b->block_size) b->physical_size = b->block_size;
}

VBLKDEF vblk_backend vblk_file_backend(vblk_file *file) {
    vblk_backend b;
    VBLK_MEMSET(&b, 0, sizeof b);
    b.read = vblk__file_read;
    b.flush = vblk__file_flush;
    b.size = vblk__file_size;
    b.user = file;
    vblk__file_blocks(file, &b);
    if (file->read_only) return b;
    b.write = vblk__file_write;
    b.write_zeroes = vblk__file_zero;
    b.discard = VBLK__PUNCH ? vblk__file_discard : NULL;
    b.unmaps = VBLK__PUNCH != 0;
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static uint64_t vblk__clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * VBLK__SECOND + (uint64_t)t.tv_nsec;
}

static struct timespec vblk__timespec(uint64_t ns) {
    struct timespec t;
    t.tv_sec = (time_t)(ns / VBLK__SECOND);
    t.tv_nsec = (long)(ns % VBLK__SECOND);
    return t;
}

// ---- Engine -----------------------------------------------------------------
// What a request is while it is under way: with a transfer in io_uring, or in a
// list of those that wait for the next fdatasync(), or for the one under way.
#define VBLK__NEAR_SEGS 4u

struct vblk__slot {
    vblk_request req;
    uint64_t     done; // bytes so far
    uint64_t     end;  // of the file when this call began
    uint32_t     next; // in its list
    vblk_seg     seg[VBLK__NEAR_SEGS]; // if they fit, else in e->seg
};

#define VBLK__ENTRIES    256u
#define VBLK__SLOTS      250u // the rest is for what is no transfer
#define VBLK__IOVECS     2048u
#define VBLK__MOST       64u  // requests, and bytes, to begin before those that
#define VBLK__MOST_BYTES 262144u // have ended are shown
#define VBLK__CALL_BYTES 4194304u // of one call: it may copy before it returns
#define VBLK__MOVING (16 * VBLK__CALL_BYTES)
#define VBLK__TURNS_NS   UINT64_C(2000000)
#define VBLK__NO_SLOT    UINT32_MAX // ends a list

#define VBLK__POLLED    UINT64_MAX // user_data of what is no transfer
#define VBLK__CANCELLED (UINT64_MAX - 1)
#define VBLK__SYNCED    (UINT64_MAX - 2)

#define VBLK__TAIL(e) __atomic_load_n((e)->cq_tail, __ATOMIC_ACQUIRE)

// Of <linux/io_uring.h>, which may be older than the kernel.
#define VBLK__SETUP_COOP   (1u << 8 | 1u << 9)
#define VBLK__SETUP_SINGLE (1u << 12 | 1u << 13 | 1u << 9)
#define VBLK__SQ_TASKRUN   (1u << 2)
#define VBLK__CANCEL_ALL   (1 << 0 | 1 << 2) // ALL, ANY: the poll too
#define VBLK__ENTER_FLAGS  (1u << 0 | 1u << 3) // GETEVENTS, EXT_ARG
#define VBLK__NEEDED       (1u << 0 | 1u << 8) // SINGLE_MMAP, EXT_ARG

// Hand over what is queued, and wait for `wait` to end, or for `ns`.
static long vblk__uring(vblk_engine *e, unsigned wait, uint64_t ns) {
    const uint64_t ts[] = {ns / VBLK__SECOND, ns % VBLK__SECOND};
    const uint64_t arg[] = {0, 0, (uintptr_t)ts}; // no signal mask
    __atomic_store_n(e->sq_tail, e->tail, __ATOMIC_RELEASE);
    long n = syscall(SYS_io_uring_enter, e->ring_fd, e->queued, wait,
                     VBLK__ENTER_FLAGS, arg, sizeof arg);
    e->queued -= n > 0 ? (uint32_t)n : 0;
    e->iovs = e->queued ? e->iovs : 0;
    return n;
}

// There are fewer requests than entries, so one is free.
static struct io_uring_sqe *vblk__entry(vblk_engine *e, unsigned op,
                                        uint64_t user_data) {
    struct io_uring_sqe *sqe = &e->sqe[e->tail++ % VBLK__ENTRIES];
    e->queued++;
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = (uint8_t)op;
    sqe->flags = IOSQE_FIXED_FILE; // fd 0: the first of vblk__open_ring()
    sqe->user_data = user_data;
    return sqe;
}

static void vblk__push(vblk_engine *e, uint32_t *list, struct vblk__slot *s) {
    s->next = *list;
    *list = (uint32_t)(s - e->slot);
}

static struct vblk__slot *vblk__pop(vblk_engine *e, uint32_t *list) {
    if (*list == VBLK__NO_SLOT) return NULL;
    struct vblk__slot *s = &e->slot[*list];
    *list = s->next;
    return s;
}

// First the slot is free, then guest memory is touched.
static void vblk__finish(vblk_engine *e, struct vblk__slot *s,
                         vblk__progress done) {
    vblk_dev *dev = e->dev;
    e->under_way--;
    e->bytes -= s->req.bytes;
    vblk__push(e, &e->free, s);
    if (e->dropping) return;
    vblk__end_request(dev, &dev->queue[s->req.queue], &s->req, done);
}

static void vblk__synced(vblk_engine *e, int err) {
    struct vblk__slot *s;
    while ((s = vblk__pop(e, &e->in_sync))) {
        vblk__progress done = {s->req.bytes, VBLK_EV_NONE, err};
        done.code = err ? VBLK_EV_FLUSH_FAILED : VBLK_EV_NONE;
        vblk__finish(e, s, done);
    }
}

// One at a time, as the kernel tells of a failure once.
static void vblk__sync(vblk_engine *e) {
    if (e->to_sync == VBLK__NO_SLOT || e->in_sync != VBLK__NO_SLOT) return;
    int err = e->file ? 0 : e->dev->backend.flush(e->dev->backend.user);
    e->in_sync = e->to_sync;
    e->to_sync = VBLK__NO_SLOT;
    if (e->file) {
        e->in_kernel++;
        e->sync_end = VBLK__LOAD(&e->file->end);
        struct io_uring_sqe *sqe = vblk__entry(e, IORING_OP_FSYNC,
                                               VBLK__SYNCED);
        sqe->fd = 1;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
    } else {
        vblk__synced(e, err);
    }
}

// Queue the rest of a transfer, or what there are vectors for. False: none.
static bool vblk__queue_move(vblk_engine *e, struct vblk__slot *s) {
    const vblk_request *r = &s->req;
    const bool in = r->kind->data == VBLK__DATA_IN;
    struct iovec *iov = &e->iov[e->iovs];
    unsigned most = VBLK__IOVECS - e->iovs, n = 0;
    vblk__place at = vblk__find(r, s->done);
    uint64_t left = VBLK__CALL_BYTES;
    for (; at.seg < r->segs && n < most && n < IOV_MAX && left > 0;
         left -= iov[n - 1].iov_len) {
        vblk_seg p = vblk__piece(r, &at, left);
        iov[n].iov_base = p.ptr;
        iov[n++].iov_len = p.n;
    }
    if (n == 0) return false;
    struct io_uring_sqe *sqe = vblk__entry(
        e, in ? IORING_OP_READV : IORING_OP_WRITEV, (uint64_t)(s - e->slot));
    e->in_kernel++;
    sqe->off = r->offset + s->done;
    sqe->addr = (uintptr_t)iov;
    sqe->len = n;
    if (n == 1) { // is cheaper without a vector
        sqe->opcode = in ? IORING_OP_READ : IORING_OP_WRITE;
        sqe->addr = (uintptr_t)iov->iov_base;
        sqe->len = (uint32_t)iov->iov_len;
    }
    e->iovs += n > 1 ? n : 0;
    s->end = VBLK__LOAD(&e->file->end);
    return true;
}

static void vblk__end_move(vblk_engine *e, struct vblk__slot *s,
                           vblk__progress done) {
    bool waits = vblk__wants_flush(&s->req, done);
    if (waits) vblk__push(e, &e->to_sync, s);
    if (!waits) vblk__finish(e, s, done);
}

static void vblk__moved(vblk_engine *e, struct vblk__slot *s, int64_t n) {
    const vblk_request *r = &s->req;
    n = vblk__file_moved(e->file, r->kind->data == VBLK__DATA_IN,
                         r->offset + s->done, s->end, n);
    s->done += n > 0 ? (uint64_t)n : 0;
    bool ours = !e->dropping &&
                !vblk__stale(e->dev, &e->dev->queue[r->queue], r);
    bool rest = ours && n > 0 && s->done < r->bytes;
    bool again = ours && (n == -EAGAIN || n == -EINTR);
    if (again || (rest && !vblk__queue_move(e, s))) {
        vblk__end_move(e, s, vblk__run(e->dev, r)); // all of it
    } else if (!rest) {
        vblk__end_move(e, s, vblk__came_to(r, n < 0 ? n : (int64_t)s->done));
    }
}

// What an fdatasync() came to; one that was not done tells nothing of the file.
static int vblk__heard(vblk_file *f, uint64_t end, int res) {
    if (res == -ECANCELED || res == -EINTR || res == -EAGAIN) return res;
    pthread_mutex_lock(&f->mutex);
    res = vblk__file_synced(f, end, -res);
    pthread_mutex_unlock(&f->mutex);
    return res;
}

// What io_uring has ended. Each is taken off before it is looked at: whoever
// catches the fault of a guest's page may jump out of here.
static bool vblk__reap(vblk_engine *e) {
    bool any = false;
    while (e->ring_fd >= 0 && *e->cq_head != VBLK__TAIL(e)) {
        uint32_t head = *e->cq_head;
        struct io_uring_cqe cqe = e->cqe[head % (2 * VBLK__ENTRIES)];
        __atomic_store_n(e->cq_head, head + 1, __ATOMIC_RELEASE);
        if (cqe.user_data == VBLK__POLLED) {
            e->polling = false;
            e->woken = true;
        }
        if (cqe.user_data >= VBLK__CANCELLED) continue;
        any = true;
        e->in_kernel--;
        if (cqe.user_data == VBLK__SYNCED) {
            vblk__synced(e, vblk__heard(e->file, e->sync_end, cqe.res));
        } else {
            vblk__moved(e, &e->slot[cqe.user_data], cqe.res);
        }
    }
    return any;
}

// Begin `r`. One that can be done here needs no slot.
static void vblk__begin(vblk_engine *e, const vblk_request *r) {
    vblk_dev *dev = e->dev;
    const vblk__does does = (vblk__does)r->kind->does;
    bool uring = r->direct && ((does == VBLK__DO_READ && e->reads) ||
                               (does == VBLK__DO_WRITE && e->writes)) &&
                 vblk__file_fits(e->file, r->offset, r->seg, r->segs);
    vblk__progress done = {0, VBLK_EV_NONE, 0};
    if (!uring) {
        done = vblk__run(dev, r);
        if (!vblk__wants_flush(r, done)) {
            vblk__end_request(dev, &dev->queue[r->queue], r, done);
            return;
        }
    }
    struct vblk__slot *s = vblk__pop(e, &e->free);
    size_t room = dev->seg_max + 2;
    e->under_way++;
    e->bytes += r->bytes;
    s->req = *r;
    s->done = done.bytes;
    s->req.seg = &e->seg[(size_t)(s - e->slot) * room];
    if (r->segs <= VBLK__NEAR_SEGS) s->req.seg = s->seg;
    memcpy(s->req.seg, r->seg, r->segs * sizeof *r->seg);
    if (!uring) {
        vblk__push(e, &e->to_sync, s);
    } else if (!vblk__queue_move(e, s)) {
        vblk__end_move(e, s, vblk__run(dev, &s->req));
    }
}

// The next `n` chains, of those in the ring: what the driver's processor wrote
// last comes to this one's cache. Nothing is believed: a head that cannot be is
// another's descriptor here.
static void vblk__prefetch(const vblk_queue *q, unsigned n) {
    const vblk_region *tables = q->run.near[VBLK__TABLES];
    const uint8_t *d[VBLK__MOST];
    if (!q->run.avail || !q->run.desc) return;
    for (unsigned i = 0; i < n; i++) {
        unsigned at = (q->run.avail_next + i) & (q->size - 1);
        unsigned head = vblk__get16(q->run.avail + 4 + 2 * at) & (q->size - 1);
        d[i] = q->run.desc + head * VBLK__DESC_BYTES;
        __builtin_prefetch(d[i]);
    }
    for (unsigned i = 0; i < n; i++) { // its table or header
        uint64_t gpa = vblk__get64(d[i]);
        __builtin_prefetch(vblk__in_region(tables, gpa, 48, false));
    }
}

// Begin half of what waits in `q`, so that driver and device work at the same
// time, and add its bytes. Whether there was any.
static bool vblk__begin_some(vblk_engine *e, vblk_queue *q, uint64_t now_ns,
                             uint64_t *bytes) {
    vblk_dev *dev = e->dev;
    vblk_request r;
    const unsigned room = dev->seg_max + 2;
    vblk_seg *seg = &e->seg[VBLK__SLOTS * room];
    if (!vblk__prepare(dev, q->number) || vblk__peek(dev, q) != VBLK__MORE) {
        return false;
    }
    const uint16_t from = q->run.avail_next;
    unsigned waits = (uint16_t)(q->run.avail_seen - from);
    unsigned most = waits < 16 ? 8 : waits < 128 ? waits / 2 : VBLK__MOST;
    vblk__prefetch(q, waits < most ? waits : most);
    while (most-- > 0 && *bytes < VBLK__MOST_BYTES &&
           e->free != VBLK__NO_SLOT &&
           vblk_next(dev, q->number, now_ns, &r, seg, room)) {
        *bytes += r.kind->shape == VBLK__RANGES ? VBLK__MOST_BYTES : r.bytes;
        vblk__begin(e, &r);
    }
    return q->run.avail_next != from;
}

static void vblk__publish_all(vblk_engine *e) {
    for (unsigned i = e->first; i < e->end; i++) {
        const vblk_run *run = &e->dev->queue[i].run;
        if (run->used_next != run->used_decided) vblk_publish(e->dev, i);
    }
}

// Take, begin, hand over, reap, show. Whether there was anything to do.
static bool vblk__turn(vblk_engine *e, uint64_t now_ns) {
    vblk_dev *dev = e->dev;
    bool any = vblk__reap(e);
    bool timed = dev->limited && now_ns >= dev->again_ns;
    bool live = vblk_status(dev) & VBLK_STATUS_DRIVER_OK && !vblk__halted(dev);
    uint64_t bytes = e->bytes < VBLK__MOVING ? 0 : VBLK__MOST_BYTES;
    for (unsigned n = e->end - e->first;
         live && n > 0 && bytes < VBLK__MOST_BYTES; n--) {
        e->at = e->at + 1 < e->end ? e->at + 1 : e->first; // each is the first
        vblk_queue *q = &dev->queue[e->at];
        if (q->run.stalled ? timed : vblk__has_news(dev, q)) {
            any = vblk__begin_some(e, q, now_ns, &bytes) || any;
        }
    }
    vblk__sync(e);
    if (e->queued ||
        (e->ring_fd >= 0 && VBLK__LOAD(e->sq_flags) & VBLK__SQ_TASKRUN)) {
        vblk__uring(e, 0, 0);
        any = vblk__reap(e) || any;
    }
    vblk__publish_all(e);
    if (dev->limited && live) dev->again_ns = vblk__next_turn(dev, now_ns);
    return any;
}

static uint64_t vblk__arm_all(vblk_engine *e, uint64_t now_ns) {
    uint64_t next = VBLK_NEVER;
    for (unsigned i = e->first; i < e->end; i++) {
        if (!e->dev->queue[i].run.armed) {
            uint64_t again = vblk_arm(e->dev, i, now_ns);
            next = again < next ? again : next;
        }
    }
    return next;
}

static bool vblk__try_limits(vblk_engine *e) {
    if (!e->lock || !e->dev->limited || e->locked) return true;
    e->locked = pthread_mutex_trylock(e->lock) == 0;
    return e->locked;
}

// Whoever had it last lets those that wait go first, and its holder may be in a
// slow backend. False: the thread is wanted elsewhere.
static bool vblk__lock_limits(vblk_engine *e) {
    const struct timespec a_while = {0, 100000};
    uint32_t *waiting = &e->dev->waiting;
    bool waits = e->had_lock && VBLK__LOAD(waiting) > 0, wanted = false;
    if (!waits && vblk__try_limits(e)) return true;
    __atomic_fetch_add(waiting, 1, __ATOMIC_RELAXED);
    while (!vblk__halted(e->dev) && !wanted &&
           (waits || !vblk__try_limits(e))) {
        nanosleep(&a_while, NULL);
        wanted = VBLK__LOAD(&e->dev->yield) == VBLK__YIELD;
        waits = false;
    }
    __atomic_fetch_sub(waiting, 1, __ATOMIC_RELAXED);
    return !wanted;
}

static void vblk__unlock_limits(vblk_engine *e) {
    if (e->locked) pthread_mutex_unlock(e->lock);
    e->had_lock = e->locked;
    e->locked = false;
}

VBLKDEF uint64_t vblk_engine_poll(vblk_engine *e) {
    const uint64_t start = e->now();
    uint64_t now = start, next = 0;
    bool any = true;
    while (any || next <= now) {
        if (!vblk__lock_limits(e)) return 0;
        any = vblk__turn(e, now);
        now = e->now();
        e->busy_ns = any ? now : e->busy_ns;
        bool over = now - start > VBLK__TURNS_NS ||
                    VBLK__LOAD(&e->dev->yield) == VBLK__YIELD;
        if (!any && (e->under_way || now - e->busy_ns >= e->look_on_ns)) {
            bool full = e->free == VBLK__NO_SLOT || e->bytes >= VBLK__MOVING;
            next = full ? VBLK_NEVER : vblk__arm_all(e, now);
        }
        vblk__unlock_limits(e);
        if (over) return 0;
    }
    return next;
}

VBLKDEF bool vblk_engine_wait(vblk_engine *e, int fd, uint64_t until_ns) {
    uint64_t now = e->now();
    uint64_t ns = until_ns > now ? until_ns - now : 0;
    if (e->ring_fd < 0) {
        struct pollfd p = {fd, POLLIN, 0};
        struct timespec t = vblk__timespec(ns < INT64_MAX ? ns : INT64_MAX);
        return ppoll(&p, 1, &t, NULL) > 0;
    }
    if (!e->polling) {
        struct io_uring_sqe *sqe =
            vblk__entry(e, IORING_OP_POLL_ADD, VBLK__POLLED);
        sqe->flags = 0;
        sqe->fd = fd;
        sqe->poll_events = POLLIN;
        e->polling = true;
    }
    if (*e->cq_head == VBLK__TAIL(e)) vblk__uring(e, ns > 0, ns);
    if (vblk__lock_limits(e)) vblk__reap(e);
    vblk__unlock_limits(e);
    bool woken = e->woken;
    e->woken = false;
    return woken;
}

// With nothing in the kernel's hands: all slots are free. A request that was
// left by a jump is in no list.
static void vblk__forget_all(vblk_engine *e) {
    e->free = e->to_sync = e->in_sync = VBLK__NO_SLOT;
    e->bytes = e->under_way = 0;
    for (unsigned i = 0; e->slot && i < VBLK__SLOTS; i++) {
        vblk__push(e, &e->free, &e->slot[i]);
    }
}

VBLKDEF int vblk_engine_quiesce(vblk_engine *e, int queue, unsigned ms) {
    vblk__unlock_limits(e); // of a turn that was left by a jump
    if (!e->under_way) return VBLK_OK; // nor was it opened, perhaps
    uint64_t now = e->now();
    const uint64_t until = now + (uint64_t)ms * 1000000;
    e->dropping = queue == VBLK_ALL_QUEUES;
    if (e->dropping && e->ring_fd >= 0) {
        vblk__entry(e, IORING_OP_ASYNC_CANCEL, VBLK__CANCELLED)
            ->rw_flags = VBLK__CANCEL_ALL; // cancel_flags
    }
    while ((e->dropping ? e->in_kernel : e->under_way) > 0) {
        if (!e->dropping && vblk__try_limits(e)) vblk__sync(e);
        vblk__unlock_limits(e);
        if (e->in_kernel) vblk__uring(e, 1, now < until ? until - now : 0);
        if (e->dropping || vblk__try_limits(e)) vblk__reap(e);
        if (!e->dropping && vblk__try_limits(e)) vblk__publish_all(e);
        vblk__unlock_limits(e);
        now = e->now();
        if (now >= until) break;
    }
    if (e->dropping && !e->in_kernel) vblk__forget_all(e);
    e->dropping = false;
    return e->under_way > 0 ? VBLK_ERR_BUSY : VBLK_OK;
}

// Whether the file does without waiting what it can do so. Nothing is moved:
// that memory may not be touched.
static bool vblk__never_waits(int fd, bool in) {
    void *p = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct iovec iov = {p, 4096};
    if (p == MAP_FAILED) return false;
    ssize_t n = in ? preadv2(fd, &iov, 1, 0, RWF_NOWAIT)
                   : pwritev2(fd, &iov, 1, 0, RWF_NOWAIT);
    bool never = n >= 0 || errno != EOPNOTSUPP;
    munmap(p, 4096);
    return never;
}

static void *vblk__map_ring(vblk_engine *e, size_t bytes, uint64_t offset) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_POPULATE, e->ring_fd, (off_t)offset);
    return p == MAP_FAILED ? NULL : p;
}

static bool vblk__map_rings(vblk_engine *e, const struct io_uring_params *p) {
    size_t bytes = p->cq_off.cqes + p->cq_entries * sizeof *e->cqe;
    size_t other = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
    e->rings_bytes = bytes > other ? bytes : other;
    uint8_t *rings = (uint8_t *)vblk__map_ring(e, e->rings_bytes,
                                               IORING_OFF_SQ_RING);
    e->rings = rings;
    e->sqe = (struct io_uring_sqe *)vblk__map_ring(
        e, VBLK__ENTRIES * sizeof *e->sqe, IORING_OFF_SQES);
    if (!rings || !e->sqe) return false;
    e->sq_tail = (uint32_t *)(void *)(rings + p->sq_off.tail);
    e->sq_flags = (uint32_t *)(void *)(rings + p->sq_off.flags);
    e->cq_head = (uint32_t *)(void *)(rings + p->cq_off.head);
    e->cq_tail = (uint32_t *)(void *)(rings + p->cq_off.tail);
    e->cqe = (struct io_uring_cqe *)(void *)(rings + p->cq_off.cqes);
    uint32_t *array = (uint32_t *)(void *)(rings + p->sq_off.array);
    for (uint32_t i = 0; i < VBLK__ENTRIES; i++) array[i] = i;
    return true;
}

// Another descriptor of the same file, with its own place among those that hear
// of failures.
static int vblk__file_again(int fd) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, (fcntl(fd, F_GETFL) & (O_ACCMODE | O_SYNC)) | O_CLOEXEC);
}

static bool vblk__open_ring(vblk_engine *e, vblk_file *f) {
    static const uint32_t flags[] = {VBLK__SETUP_SINGLE, VBLK__SETUP_COOP, 0};
    struct io_uring_params p;
    // A lock that the host has by f->fd outlives it: it lasts as long as what
    // the kernel has under way.
    const int fds[] = {f->fd, vblk__file_again(f->fd)};
    e->sync_fd = fds[1];
    if (e->sync_fd < 0) return false;
    e->reads = vblk__never_waits(f->fd, true);
    e->writes = !f->read_only && vblk__never_waits(f->fd, false);
    errno = EOPNOTSUPP;
    if (!e->reads && !e->writes) return false;
    for (unsigned i = 0; i < 3 && e->ring_fd < 0; i++) {
        memset(&p, 0, sizeof p);
        p.flags = flags[i];
        e->ring_fd = (int)syscall(SYS_io_uring_setup, VBLK__ENTRIES, &p);
    }
    if (e->ring_fd < 0) return false;
    errno = ENOSYS;
    e->file = f;
    return (p.features & VBLK__NEEDED) == VBLK__NEEDED &&
           vblk__map_rings(e, &p) &&
           syscall(SYS_io_uring_register, e->ring_fd, IORING_REGISTER_FILES,
                   fds, 2) == 0 && vblk__uring(e, 0, 0) == 0;
}

static void vblk__close_ring(vblk_engine *e) {
    int saved = errno;
    if (e->ring_fd >= 0) { // or the kernel lets go of them later
        syscall(SYS_io_uring_register, e->ring_fd, IORING_UNREGISTER_FILES,
                NULL, 0);
    }
    if (e->sqe) munmap(e->sqe, VBLK__ENTRIES * sizeof *e->sqe);
    if (e->rings) munmap(e->rings, e->rings_bytes);
    vblk__close(&e->ring_fd);
    vblk__close(&e->sync_fd);
    e->sqe = NULL;
    e->rings = NULL;
    e->file = NULL;
    e->reads = e->writes = false;
    errno = saved;
}

VBLKDEF int vblk_engine_close(vblk_engine *e) {
    if (e->under_way > 0) return VBLK_ERR_BUSY;
    vblk__close_ring(e);
    free(e->slot);
    free(e->seg);
    free(e->iov);
    return VBLK_OK;
}

// For `queue` or all; `b` is the host's backend. Is to be closed in any case.
static int vblk__open_engine(vblk_engine *e, vblk_dev *dev, int queue,
                             const vblk_backend *b, bool uring) {
    const size_t room = dev->seg_max + 2;
    bool is_file = b->read == vblk__file_read;
    memset(e, 0, sizeof *e);
    e->dev = dev;
    e->first = queue < 0 ? 0 : (unsigned)queue;
    e->end = queue < 0 ? dev->queues : e->first + 1;
    e->at = e->end - 1;
    e->now = vblk__clock;
    e->look_on_ns = 50000;
    e->ring_fd = e->sync_fd = -1;
    e->slot = (struct vblk__slot *)calloc(VBLK__SLOTS, sizeof *e->slot);
    e->seg = (vblk_seg *)calloc((VBLK__SLOTS + 1) * room, sizeof *e->seg);
    e->iov = (struct iovec *)calloc(VBLK__IOVECS, sizeof *e->iov);
    vblk__forget_all(e);
    if (!e->slot || !e->seg || !e->iov) return VBLK_ERR_WORKER;
    errno = EOPNOTSUPP;
    if (uring && !(is_file && vblk__open_ring(e, (vblk_file *)b->user))) {
        vblk__close_ring(e);
        return VBLK_ERR_URING;
    }
    return VBLK_OK;
}

VBLKDEF int vblk_engine_open(vblk_engine *e, vblk_dev *dev, int queue,
                             bool uring) {
    int err = vblk__open_engine(e, dev, queue, &dev->backend, uring);
    if (err == VBLK_ERR_WORKER) vblk_engine_close(e);
    return err;
}

// ---- Worker: how it works ---------------------------------------------------
// A device, threads that serve it from DRIVER_OK to the next reset, each with
// an engine, and a host that stores to registers, pauses and changes things at
// any time. Nothing that the host calls waits for them longer than stop_ms.
//
//     WORKING -- a callback begins --> AWAY -- and returns --> WORKING
//     WORKING -- stop --> ENDED, joined by the stopper
//     AWAY, or WORKING for a page that does not come -- stop, and the time is
//         over --> LEFT: the stopper goes on, the device is halted and shows
//         DEVICE_NEEDS_RESET -- the callback returns --> GONE: the last one has
//         reset the device and calls released(), and is joined by whoever
//         comes next; or, if the worker was closed, has freed all
//
// A thread makes each step but LEFT, which the stopper makes, both by
// compare-and-swap: whoever comes second knows. A thread that comes out of a
// callback and finds that it was LEFT, or is to stop, leaves by a jump to
// vblk__thread_main(): what it was at is thrown away by the reset. There it
// waits for what io_uring has under way, which is like a callback.
//
// Locks, in the order in which they are taken: `registers`, one register call
// at a time, and who is who; `limits`, a thread's turn, where threads share
// them; `parking`, whether the threads are to rest, and do. A thread takes
// `parking` to rest, and `registers` when it is LEFT no more; it holds
// neither while it serves. dev.yield ends its turn early: YIELD after the
// request it is at, HALT without another word to the guest.

// Outside a callback the thread is busy for microseconds, or, without a
// processor to run on, for some milliseconds.
#define VBLK__AT_WORK_MS 100

enum { VBLK__WORKING, VBLK__AWAY, VBLK__ENDED, VBLK__LEFT, VBLK__GONE };

struct vblk__thread {
    uint32_t     state;    // atomic
    uint32_t     stop;     // atomic: leave at the next opportunity
    uint32_t     speaking; // atomic: away with an event
    bool         inside;   // the thread's own: it is in a callback
    bool         resting;  // under `parking`: it is not counted as awake
    unsigned     number;
    struct vblk__thread *next;
    pthread_t    id;
    vblk_worker *w;
    vblk_engine  engine;
    jmp_buf      leave;
};

static __thread struct vblk__thread *vblk__self;

static bool vblk__move_state(struct vblk__thread *t, uint32_t from,
                             uint32_t to) {
    return __atomic_compare_exchange_n(&t->state, &from, to, false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

// Around every callback of the host. Other threads make them too, and so does
// the thread of another device from inside its backend: nothing to do for them,
// and NULL. Both jump.
static struct vblk__thread *vblk__before_callback(const vblk_worker *w) {
    struct vblk__thread *t = vblk__self;
    if (!t || t->w != w || t->inside) return NULL;
    if (!vblk__move_state(t, VBLK__WORKING, VBLK__AWAY)) longjmp(t->leave, 1);
    t->inside = true;
    return t;
}

static void vblk__after_callback(struct vblk__thread *t) {
    if (!t) return;
    t->inside = false;
    if (!vblk__move_state(t, VBLK__AWAY, VBLK__WORKING) ||
        __atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
        longjmp(t->leave, 1);
    }
}

#define VBLK__CALL(type, member, parameters, arguments)                        \
    static type vblk__worker_##member parameters {                             \
        vblk_worker *w = (vblk_worker *)user;                                  \
        struct vblk__thread *t = vblk__before_callback(w);                     \
        type result = w->backend.member arguments;                             \
        vblk__after_callback(t);                                               \
        return result;                                                         \
    }
#define VBLK__SEGMENTS (void *user, uint64_t offset, const vblk_seg *seg,      \
                        unsigned segs)
#define VBLK__RANGE (void *user, uint64_t offset, uint64_t bytes, bool unmap)
VBLK__CALL(int64_t, read, VBLK__SEGMENTS, (w->backend.user, offset, seg, segs))
VBLK__CALL(int64_t, write, VBLK__SEGMENTS, (w->backend.user, offset, seg, segs))
VBLK__CALL(int, flush, (void *user), (w->backend.user))
VBLK__CALL(int, discard, VBLK__RANGE, (w->backend.user, offset, bytes, unmap))
VBLK__CALL(int, write_zeroes, VBLK__RANGE,
           (w->backend.user, offset, bytes, unmap))
VBLK__CALL(int, secure_erase, VBLK__RANGE,
           (w->backend.user, offset, bytes, unmap))

static uint64_t vblk__worker_size(void *user) {
    const vblk_backend *b = &((vblk_worker *)user)->backend;
    return b->size(b->user);
}

// What the host's backend has, with calls that a thread can be left behind in.
static vblk_backend vblk__worker_backend(vblk_worker *w) {
    vblk_backend b = w->backend;
    b.read = b.read ? vblk__worker_read : NULL;
    b.write = b.write ? vblk__worker_write : NULL;
    b.flush = b.flush ? vblk__worker_flush : NULL;
    b.size = b.size ? vblk__worker_size : NULL;
    b.discard = b.discard ? vblk__worker_discard : NULL;
    b.write_zeroes = b.write_zeroes ? vblk__worker_write_zeroes : NULL;
    b.secure_erase = b.secure_erase ? vblk__worker_secure_erase : NULL;
    b.user = w;
    return b;
}

// ---- Worker: events, descriptors, interrupt ---------------------------------
static void vblk__worker_event(void *user, const vblk_event *e) {
    vblk_worker *w = (vblk_worker *)user;
    struct vblk__thread *t = vblk__before_callback(w);
    if (t) __atomic_store_n(&t->speaking, 1, __ATOMIC_RELEASE);
    w->event(w->user, e);
    if (t) __atomic_store_n(&t->speaking, 0, __ATOMIC_RELEASE);
    vblk__after_callback(t);
}

// Add 1 to an eventfd that does not block; a full one is as good.
static void vblk__signal(int fd) {
    const uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n;
}

static bool vblk__drain_fd(int fd) {
    uint64_t count;
    return read(fd, &count, sizeof count) >= 0 || errno == EAGAIN;
}

static void vblk__worker_interrupt(void *user, int queue, bool fire) {
    vblk_worker *w = (vblk_worker *)user;
    struct vblk__thread *t = vblk__before_callback(w);
    if (fire) vblk__signal(w->irq_fd);
    if (w->interrupt) w->interrupt(w->user, queue, fire);
    vblk__after_callback(t);
}

VBLKDEF int vblk_worker_kick_fd(const vblk_worker *w, unsigned queue) {
    return w->kick_fds[queue < w->threads ? queue : 0];
}

VBLKDEF void vblk_worker_kick(vblk_worker *w) {
    for (unsigned i = 0; i < w->threads; i++) vblk__signal(w->kick_fds[i]);
}

// ---- Worker: the thread -----------------------------------------------------
VBLKDEF bool vblk_worker_paused(const vblk_worker *w) {
    return !__atomic_load_n(&w->awake, __ATOMIC_ACQUIRE) &&
           !__atomic_load_n(&w->left, __ATOMIC_ACQUIRE);
}

// With `parking` held. Whoever sees none awake sees all that they wrote.
static void vblk__set_resting(struct vblk__thread *t, bool yes) {
    if (t->resting != yes) {
        t->resting = yes;
        __atomic_fetch_add(&t->w->awake, yes ? UINT32_MAX : 1,
                           __ATOMIC_ACQ_REL);
    }
}

// Rest as long as the host or the library asks for it, with nothing under way.
// False: it is to stop.
static bool vblk__rest_while_asked(vblk_worker *w, struct vblk__thread *t) {
    pthread_mutex_lock(&w->parking);
    while ((w->pause || w->hold) &&
           !__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) {
        if (t->engine.under_way > 0) {
            pthread_mutex_unlock(&w->parking);
            vblk__sync(&t->engine);
            struct vblk__thread *away = vblk__before_callback(w);
            if (t->engine.in_kernel) vblk__uring(&t->engine, 1, VBLK__SECOND);
            vblk__after_callback(away);
            vblk__reap(&t->engine);
            vblk__publish_all(&t->engine);
            pthread_mutex_lock(&w->parking);
            continue;
        }
        vblk__set_resting(t, true);
        pthread_cond_broadcast(&w->changed);
        pthread_cond_wait(&w->changed, &w->parking);
    }
    bool go_on = !__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE);
    if (go_on) {
        vblk__set_resting(t, false);
        VBLK__STORE(&w->dev.yield, 0);
    }
    pthread_mutex_unlock(&w->parking);
    return go_on;
}

static void vblk__give_up(vblk_worker *w, vblk_event_code code, int err) {
    vblk__say(&w->dev, code, (uint64_t)err, 0);
    vblk__announce(&w->dev, VBLK_STATUS_NEEDS_RESET);
}

static void vblk__serve_until_stopped(vblk_worker *w, struct vblk__thread *t) {
    int queue = w->threads > 1 ? (int)t->number : VBLK_ALL_QUEUES;
    int kick_fd = w->kick_fds[t->number];
    int err = vblk__open_engine(&t->engine, &w->dev, queue, &w->backend,
                                !w->wo.no_uring);
    if (err == VBLK_ERR_WORKER) {
        vblk__give_up(w, VBLK_EV_WORKER_WAIT, ENOMEM);
        return;
    }
    if (err == VBLK_ERR_URING && errno != EOPNOTSUPP &&
        !__atomic_exchange_n(&w->uring_told, 1, __ATOMIC_RELAXED)) {
        vblk__say(&w->dev, VBLK_EV_URING_OFF, (uint64_t)errno, 0);
    }
    t->engine.lock = w->threads > 1 ? &w->limits : NULL;
    t->engine.look_on_ns = w->wo.look_on_us * UINT64_C(1000);
    while (vblk__rest_while_asked(w, t)) {
        uint64_t next = vblk_engine_poll(&t->engine);
        if (__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE)) return;
        if (next > 0 && vblk_engine_wait(&t->engine, kick_fd, next) &&
            !vblk__drain_fd(kick_fd)) {
            vblk__give_up(w, VBLK_EV_WORKER_WAIT, errno);
            return;
        }
    }
}

static void vblk__free_worker(vblk_worker *w) {
    for (unsigned i = 0; i < w->dev.queues; i++) {
        vblk__forget_stall(&w->dev, &w->dev.queue[i]); // T5
    }
    for (unsigned i = 0; i < w->threads; i++) vblk__close(&w->kick_fds[i]);
    vblk__close(&w->irq_fd);
    free(w->kick_fds);
}

// Back, after it was left behind. The last one makes the reset that left it
// whole, then tells released().
static void vblk__come_back(struct vblk__thread *t) {
    vblk_worker *w = t->w;
    void (*released)(void *) = w->wo.released;
    void *user = w->wo.user;
    pthread_mutex_lock(&w->registers);
    bool orphaned = w->orphaned;
    bool last = __atomic_load_n(&w->left, __ATOMIC_ACQUIRE) == 1;
    if (last && !orphaned) vblk__reset_device(&w->dev);
    pthread_mutex_lock(&w->parking);
    __atomic_store_n(&t->state, VBLK__GONE, __ATOMIC_RELEASE);
    __atomic_fetch_sub(&w->left, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    pthread_mutex_unlock(&w->registers);
    if (orphaned) free(t);
    if (orphaned && last) vblk__free_worker(w);
    if (released && last) released(user);
}

static void *vblk__thread_main(void *arg) {
    struct vblk__thread *t = (struct vblk__thread *)arg;
    vblk_worker *w = t->w;
    char name[16];
    vblk__self = t;
    if (setjmp(t->leave) == 0) {
        snprintf(name, sizeof name, "vblk%d", w->number);
        prctl(PR_SET_NAME, name);
        if (sched_setaffinity(0, sizeof(cpu_set_t),
                              (cpu_set_t *)(void *)w->cpu_set)) {
            vblk__say(&w->dev, VBLK_EV_WORKER_CPUS, (uint64_t)errno, 0);
        }
        vblk__serve_until_stopped(w, t);
    }
    t->inside = true;
    if (t->engine.in_kernel) vblk__move_state(t, VBLK__WORKING, VBLK__AWAY);
    while (vblk_engine_quiesce(&t->engine, VBLK_ALL_QUEUES, 1000)) continue;
    vblk_engine_close(&t->engine);
    vblk__self = NULL;
    pthread_mutex_lock(&w->parking);
    vblk__set_resting(t, true);
    w->running--;
    bool ended = vblk__move_state(t, VBLK__AWAY, VBLK__ENDED) ||
                 vblk__move_state(t, VBLK__WORKING, VBLK__ENDED);
    // Who hears of it joins, and then frees t.
    if (ended) pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    if (!ended) vblk__come_back(t);
    return NULL;
}

// ---- Worker: start, stop, pause ---------------------------------------------
static struct timespec vblk__deadline(unsigned ms) {
    return vblk__timespec(vblk__clock() + (uint64_t)ms * 1000000);
}

// A thread with the signals of its own faults alone: a handler for the rest
// belongs to others, and the caller's mask is an accident.
static int vblk__create_thread(struct vblk__thread *t) {
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

static bool vblk__start_thread(vblk_worker *w, unsigned number) {
    struct vblk__thread *t = (struct vblk__thread *)calloc(1, sizeof *t);
    int err = ENOMEM;
    pthread_mutex_lock(&w->parking); // which the thread takes first
    if (t) {
        t->w = w;
        t->number = number;
        t->resting = true;
        err = vblk__create_thread(t);
    }
    if (!err) { // a pause that was asked for holds from the first moment on
        w->running++;
        vblk__set_resting(t, w->pause);
        t->next = w->thread;
        w->thread = t;
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    if (!err) return true;
    free(t);
    vblk__give_up(w, VBLK_EV_WORKER_START, err);
    return false;
}

// All queues have work: the driver said DRIVER_OK, which starts the threads, or
// limits or memory are others. With `registers` held, but for one queue.
static void vblk__worker_notify(void *user, int queue) {
    vblk_worker *w = (vblk_worker *)user;
    uint32_t     live = vblk_status(&w->dev) &
                    (VBLK_STATUS_DRIVER_OK | VBLK_STATUS_NEEDS_RESET);
    if (queue != VBLK_ALL_QUEUES) {
        vblk__signal(vblk_worker_kick_fd(w, (unsigned)queue));
        return;
    }
    vblk_worker_kick(w);
    unsigned i = w->thread || live != VBLK_STATUS_DRIVER_OK ? w->threads : 0;
    while (i < w->threads && vblk__start_thread(w, i)) i++;
}

static bool vblk__end_within(vblk_worker *w, unsigned ms) {
    struct timespec at = vblk__deadline(ms);
    pthread_mutex_lock(&w->parking);
    while (w->running > 0 && pthread_cond_timedwait(&w->changed, &w->parking,
                                                    &at) != ETIMEDOUT) {
    }
    bool ended = w->running == 0;
    pthread_mutex_unlock(&w->parking);
    return ended;
}

// The bound is over. How the thread was left behind: in a callback of the host
// or, as it does not come out of the device's own code either, within that.
// NONE: it has ended after all.
static vblk_event_code vblk__leave_behind(vblk_worker *w,
                                          struct vblk__thread *t,
                                          unsigned *ms) {
    for (; *ms < VBLK__AT_WORK_MS; ++*ms) { // for all threads together
        if (vblk__move_state(t, VBLK__AWAY, VBLK__LEFT)) {
            return VBLK_EV_WORKER_LEFT;
        }
        if (vblk__end_within(w, 1)) return VBLK_EV_NONE;
    }
    return vblk__move_state(t, VBLK__WORKING, VBLK__LEFT) ? VBLK_EV_WORKER_STUCK
           : vblk__move_state(t, VBLK__AWAY, VBLK__LEFT)  ? VBLK_EV_WORKER_LEFT
                                                          : VBLK_EV_NONE;
}

static void vblk__end_thread(vblk_worker *w, struct vblk__thread *t,
                             unsigned *ms) {
    uint32_t state = __atomic_load_n(&t->state, __ATOMIC_ACQUIRE);
    vblk_event_code how =
        state == VBLK__ENDED ? VBLK_EV_NONE : vblk__leave_behind(w, t, ms);
    if (!how) {
        pthread_join(t->id, NULL);
        free(t);
        return;
    }
    // An event that the thread is stuck with would stop this one too.
    bool speak = !__atomic_load_n(&t->speaking, __ATOMIC_ACQUIRE);
    pthread_mutex_lock(&w->parking);
    VBLK__STORE(&w->dev.yield, VBLK__HALT);
    __atomic_fetch_add(&w->left, 1, __ATOMIC_RELEASE);
    vblk__set_resting(t, true);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    t->next = w->left_behind; // which needs `registers` to come back
    w->left_behind = t;
    if (speak) vblk__say(&w->dev, how, w->wo.stop_ms, 0);
}

static void vblk__stop_threads(vblk_worker *w) {
    struct vblk__thread *t = w->thread, *next;
    unsigned ms = 0;
    if (!t) return;
    w->thread = NULL;
    pthread_mutex_lock(&w->parking);
    for (next = t; next; next = next->next) {
        __atomic_store_n(&next->stop, 1, __ATOMIC_RELEASE);
    }
    VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
    vblk_worker_kick(w);
    vblk__end_within(w, w->wo.stop_ms);
    for (; t; t = next) {
        next = t->next;
        vblk__end_thread(w, t, &ms);
    }
}

// With `registers` held: whether no thread is left behind. One that is back
// may still be in released(), and is not waited for.
static bool vblk__join_returned(vblk_worker *w) {
    struct vblk__thread *t;
    for (struct vblk__thread **p = &w->left_behind; (t = *p);) {
        if (__atomic_load_n(&t->state, __ATOMIC_ACQUIRE) == VBLK__GONE) {
            *p = t->next;
            t->next = w->returned;
            w->returned = t;
        } else {
            p = &t->next;
        }
    }
    for (struct vblk__thread **p = &w->returned; (t = *p);) {
        if (pthread_equal(t->id, pthread_self()) ||
            pthread_tryjoin_np(t->id, NULL)) {
            p = &t->next;
        } else {
            *p = t->next;
            free(t);
        }
    }
    return !w->left_behind;
}

static void vblk__let_go(vblk_worker *w) {
    pthread_mutex_lock(&w->parking);
    w->hold = false;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
}

// With `registers` held: the threads are to rest for a change of the library's,
// until vblk__let_go(). False: one does not in time.
static bool vblk__hold_still(vblk_worker *w) {
    struct timespec at = vblk__deadline(w->wo.stop_ms);
    if (__atomic_load_n(&w->left, __ATOMIC_ACQUIRE)) {
        return false; // its system call may still move data
    }
    pthread_mutex_lock(&w->parking);
    w->hold = true;
    VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    vblk_worker_kick(w);
    while (w->awake && pthread_cond_timedwait(&w->changed, &w->parking, &at) !=
                           ETIMEDOUT) {
    }
    bool still = !w->awake;
    pthread_mutex_unlock(&w->parking);
    if (!still) vblk__let_go(w);
    return still;
}

// The device takes a queue away, or all. With `registers` held.
static int vblk__worker_quiesce(void *user, int queue) {
    vblk_worker *w = (vblk_worker *)user;
    if (queue != VBLK_ALL_QUEUES) {
        w->held = w->thread && vblk__hold_still(w);
        w->refused = w->thread && !w->held;
        return w->refused ? -1 : 0;
    }
    vblk__stop_threads(w);
    bool quiet = vblk__join_returned(w);
    vblk__drain_fd(w->irq_fd);
    for (unsigned i = 0; i < w->threads; i++) vblk__drain_fd(w->kick_fds[i]);
    return quiet ? 0 : -1;
}

VBLKDEF int vblk_worker_pause(vblk_worker *w, unsigned ms) {
    struct timespec at = vblk__deadline(ms);
    pthread_mutex_lock(&w->parking);
    w->pause = true;
    if (!__atomic_load_n(&w->left, __ATOMIC_ACQUIRE)) { // which is to HALT
        VBLK__STORE(&w->dev.yield, VBLK__YIELD);
    }
    vblk_worker_kick(w);
    while (w->pause && w->awake &&
           pthread_cond_timedwait(&w->changed, &w->parking, &at) != ETIMEDOUT) {
    }
    bool parked = w->pause && vblk_worker_paused(w);
    pthread_mutex_unlock(&w->parking);
    return parked ? VBLK_OK : VBLK_ERR_BUSY;
}

VBLKDEF void vblk_worker_resume(vblk_worker *w) {
    pthread_mutex_lock(&w->parking);
    w->pause = false;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->parking);
}

// ---- Worker: what the host calls --------------------------------------------
VBLKDEF const vblk_dev *vblk_worker_dev(const vblk_worker *w) {
    return &w->dev;
}

VBLKDEF void vblk_worker_needs_reset(vblk_worker *w) {
    vblk_needs_reset(&w->dev);
}

VBLKDEF int vblk_worker_mmio_write(vblk_worker *w, uint64_t offset,
                                   unsigned bytes, uint64_t value) {
    bool waits = offset != VBLK_REG_QUEUE_NOTIFY &&
                 offset != VBLK_REG_INTERRUPT_ACK;
    if (!waits || bytes != 4) {
        vblk_mmio_write(&w->dev, offset, bytes, value);
        return VBLK_OK;
    }
    pthread_mutex_lock(&w->registers);
    w->refused = false;
    vblk_mmio_write(&w->dev, offset, bytes, value);
    if (w->held) {
        w->held = false;
        vblk__let_go(w);
    }
    bool busy = w->refused || (w->left_behind && !vblk__join_returned(w));
    pthread_mutex_unlock(&w->registers);
    return busy ? VBLK_ERR_BUSY : VBLK_OK;
}

VBLKDEF int vblk_worker_resize(vblk_worker *w, uint64_t sectors) {
    pthread_mutex_lock(&w->registers);
    int err = vblk_resize(&w->dev, sectors);
    pthread_mutex_unlock(&w->registers);
    return err;
}

static int vblk__change(vblk_worker *w, const vblk_memory *memory,
                        const vblk_limits *limits) {
    pthread_mutex_lock(&w->registers);
    int err = vblk__hold_still(w) ? VBLK_OK : VBLK_ERR_BUSY;
    if (!err) {
        err = memory ? vblk_set_memory(&w->dev, *memory)
                     : vblk_set_limits(&w->dev, limits, vblk__clock());
        vblk__let_go(w);
    }
    pthread_mutex_unlock(&w->registers);
    return err;
}

VBLKDEF int vblk_worker_set_memory(vblk_worker *w, vblk_memory memory) {
    return vblk__change(w, &memory, NULL);
}

VBLKDEF int vblk_worker_set_limits(vblk_worker *w, const vblk_limits *limits) {
    return vblk__change(w, NULL, limits);
}

static bool vblk__choose_cpus(vblk_worker *w) {
    cpu_set_t set;
    CPU_ZERO(&set);
    VBLK_ASSERT(sizeof set <= sizeof w->cpu_set);
    if (!w->wo.cpus) sched_getaffinity(0, sizeof set, &set);
    for (unsigned i = 0; w->wo.cpus && i < w->wo.cpu_count; i++) {
        int cpu = w->wo.cpus[i];
        if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
        CPU_SET((unsigned)cpu, &set);
    }
    memcpy(w->cpu_set, &set, sizeof set);
    return true;
}

static void vblk__make_locks(vblk_worker *w) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &attr);
    pthread_mutex_init(&w->registers, NULL);
    pthread_mutex_init(&w->limits, NULL);
    pthread_mutex_init(&w->parking, NULL);
}

static bool vblk__open_all(vblk_worker *w) {
    const int flags = EFD_NONBLOCK | EFD_CLOEXEC;
    bool ok = true;
    w->kick_fds = (int *)calloc(w->threads, sizeof *w->kick_fds);
    w->threads = w->kick_fds ? w->threads : 0;
    for (unsigned i = 0; i < w->threads; i++) {
        w->kick_fds[i] = ok ? eventfd(0, flags) : -1;
        ok = w->kick_fds[i] >= 0;
    }
    w->irq_fd = ok ? eventfd(0, flags) : -1;
    w->kick_fd = w->threads ? w->kick_fds[0] : -1;
    return w->kick_fds && w->irq_fd >= 0; // with the errno of the first
}

VBLKDEF int vblk_worker_init_checked(vblk_worker *w, const vblk_options *o,
                                     const vblk_worker_options *wo,
                                     int version, size_t bytes) {
    static int numbers;
    if (version / 100 != VBLK_VERSION / 100 || bytes != sizeof *w) {
        return VBLK_ERR_LAYOUT;
    }
    if (o->notify || o->quiesce) return VBLK_ERR_HOOKS;
    if (wo && wo->stop_ms > INT_MAX) return VBLK_ERR_STOP_MS;
    memset(w, 0, sizeof *w);
    if (wo) w->wo = *wo;
    w->wo.stop_ms = w->wo.stop_ms ? w->wo.stop_ms : 1000;
    w->wo.look_on_us = w->wo.look_on_us ? w->wo.look_on_us : 50;
    w->threads = w->wo.each_queue && o->queues ? o->queues : 1;
    w->backend = o->backend;
    w->interrupt = o->interrupt;
    w->event = o->event;
    w->user = o->user;
    w->number = __atomic_fetch_add(&numbers, 1, __ATOMIC_RELAXED);
    vblk_options mine = *o;
    mine.backend = vblk__worker_backend(w);
    mine.event = o->event ? vblk__worker_event : NULL;
    mine.interrupt = vblk__worker_interrupt;
    mine.notify = vblk__worker_notify;
    mine.quiesce = vblk__worker_quiesce;
    mine.user = w;
    if (!vblk__choose_cpus(w)) return VBLK_ERR_CPUS;
    vblk__make_locks(w);
    if (!vblk__open_all(w)) {
        int saved = errno;
        vblk__free_worker(w);
        errno = saved;
        return VBLK_ERR_WORKER;
    }
    int err = vblk_init(&w->dev, &mine);
    if (err) vblk__free_worker(w);
    return err;
}

VBLKDEF int vblk_worker_close(vblk_worker *w) {
    pthread_mutex_lock(&w->registers);
    vblk__stop_threads(w);
    bool left = !vblk__join_returned(w);
    struct vblk__thread *t = w->left_behind;
    w->orphaned = left; // they dispose of all when they come back
    for (; t; t = t->next) pthread_detach(t->id);
    t = w->returned;
    w->returned = NULL;
    pthread_mutex_unlock(&w->registers);
    while (t) { // released() is to return, unless this is called by it
        struct vblk__thread *next = t->next;
        if (pthread_equal(t->id, pthread_self())) {
            pthread_detach(t->id);
        } else {
            pthread_join(t->id, NULL);
        }
        free(t);
        t = next;
    }
    if (!left) vblk__free_worker(w);
    return left ? VBLK_ERR_BUSY : VBLK_OK;
}

#endif // VBLK_IMPLEMENTATION_THREADED

// SPDX-License-Identifier: MIT OR Unlicense
// Copyright (c) 2026 the vblk.h authors. Take the MIT License or the Unlicense,
// whichever you prefer; both texts are in LICENSE, at opensource.org and at
// unlicense.org, and this notice stands for them in copies of the file.
