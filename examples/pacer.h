// A backend whose calls wait until they fit a rate: for several devices on one
// image, or a host without a timer. The calling thread sleeps, so the device's
// own limits are better where they will do.
//
//     static pacer p;
//     pacer_init(&p, vblk_file_backend(&file), &limits);
//     options.backend = pacer_backend(&p);
//
// A call takes its share, at most a tenth of a second's bytes, in the order of
// arrival, sleeps until that has come, and moves as much: large requests come
// again for the rest, behind those that arrived meanwhile. So none waits for
// ever, and a thread can be stopped between two shares. Include vblk.h first.
#ifndef PACER_H
#define PACER_H

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#define PACER_SEGS 128u // of a share

typedef struct pacer {
    vblk_backend    inner;
    uint64_t        most;       // bytes, most of a call; whole sectors
    vblk_bucket     ops, bytes; // in debt for what is promised and to come
    struct {
        uint64_t at;            // where a request goes on that was cut
        uint64_t paid;          // bytes, of its share and not yet moved
    } rest[16];
    unsigned        rests;      // remembered so far, the old ones overwritten
    pthread_mutex_t mutex;
    uint64_t (*now)(void);      // nanoseconds, CLOCK_MONOTONIC
    void (*sleep)(uint64_t ns);
} pacer;

#define PACER_SECOND UINT64_C(1000000000)
#define PACER_RESTS  (sizeof((pacer *)0)->rest / sizeof((pacer *)0)->rest[0])

static inline uint64_t pacer_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * PACER_SECOND + (uint64_t)t.tv_nsec;
}

static inline void pacer_sleep(uint64_t ns) {
    struct timespec t;
    t.tv_sec = (time_t)(ns / PACER_SECOND);
    t.tv_nsec = (long)(ns % PACER_SECOND);
    while (nanosleep(&t, &t) && errno == EINTR) {
    }
}

// Take `n` tokens, which may be yet to come; until when, from now.
static inline uint64_t pacer_promise(vblk_bucket *b, uint64_t n,
                                     uint64_t now_ns) {
    vblk_bucket_refill(b, now_ns);
    vblk_bucket_take(b, n);
    // More than the bucket holds passes at the end of the debt.
    return n > 0 ? vblk_bucket_wait(b, UINT64_MAX, now_ns) : 0;
}

// Pay and wait for it. The lock makes the order of arrival.
static inline void pacer_pay(pacer *p, uint64_t ops, uint64_t bytes) {
    pthread_mutex_lock(&p->mutex);
    uint64_t now = p->ops.rate || p->bytes.rate ? p->now() : 0;
    uint64_t a = pacer_promise(&p->ops, ops, now);
    uint64_t b = pacer_promise(&p->bytes, bytes, now);
    pthread_mutex_unlock(&p->mutex);
    if (a > 0 || b > 0) {
        p->sleep(a > b ? a : b);
    }
}

// Whether a call at `offset` goes on with a request that was cut there, and
// how many bytes that has paid for.
static inline bool pacer_goes_on(pacer *p, uint64_t offset, uint64_t *paid) {
    bool found = false;
    *paid = 0;
    pthread_mutex_lock(&p->mutex);
    for (unsigned i = 0; i < PACER_RESTS && i < p->rests && !found; i++) {
        found = p->rest[i].at == offset;
        if (found) {
            *paid = p->rest[i].paid;
            p->rest[i].at = UINT64_MAX;
        }
    }
    pthread_mutex_unlock(&p->mutex);
    return found;
}

static inline void pacer_cut(pacer *p, uint64_t at, uint64_t paid) {
    pthread_mutex_lock(&p->mutex);
    p->rest[p->rests % PACER_RESTS].at = at;
    p->rest[p->rests % PACER_RESTS].paid = paid;
    p->rests++;
    pthread_mutex_unlock(&p->mutex);
}

static inline int64_t pacer_move(pacer *p, bool in, uint64_t offset,
                                 const vblk_seg *seg, unsigned segs) {
    vblk_seg share[PACER_SEGS];
    unsigned shares = 0;
    uint64_t paid, n = 0;
    bool     goes_on = pacer_goes_on(p, offset, &paid);
    uint64_t most = paid ? paid : p->most;
    while (shares < segs && shares < PACER_SEGS && n < most) {
        vblk_seg *last = &share[shares];
        *last = seg[shares++];
        last->n = last->n < most - n ? last->n : (size_t)(most - n);
        n += last->n;
    }
    bool cut = shares < segs || share[shares - 1].n < seg[shares - 1].n;
    if (!paid) {
        pacer_pay(p, !goes_on, n);
        paid = n;
    }
    const vblk_backend *b = &p->inner;
    int64_t moved = in ? b->read(b->user, offset, share, shares)
                       : b->write(b->user, offset, share, shares);
    if (moved > 0 && (cut || (uint64_t)moved < n)) {
        pacer_cut(p, offset + (uint64_t)moved, paid - (uint64_t)moved);
    }
    return moved;
}

static inline int64_t pacer_read(void *user, uint64_t offset,
                                 const vblk_seg *seg, unsigned segs) {
    return pacer_move((pacer *)user, true, offset, seg, segs);
}

static inline int64_t pacer_write(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    return pacer_move((pacer *)user, false, offset, seg, segs);
}

static inline int pacer_flush(void *user) {
    const vblk_backend *b = &((pacer *)user)->inner;
    pacer_pay((pacer *)user, 1, 0);
    return b->flush(b->user);
}

static inline uint64_t pacer_size(void *user) {
    const vblk_backend *b = &((pacer *)user)->inner;
    return b->size(b->user);
}

static inline uint64_t pacer_steady(uint64_t rate, uint64_t burst) {
    return burst ? burst : rate < 10 ? 1 : rate / 10;
}

// A rate of 0 is no limit. A burst of 0 is steady: a tenth of a second's
// worth; unlike a device's it may be less than a second's. A call is one
// operation. VBLK_OK or VBLK_ERR_LIMITS. pacer_close() after the last use. Safe
// from several threads if `inner` is.
static inline int pacer_init(pacer *p, vblk_backend inner,
                             const vblk_limits *limits) {
    const vblk_limits l = *limits;
    uint64_t          tenth = l.bps / 10;
    if ((l.iops_burst && !l.iops) || (l.bps_burst && !l.bps) ||
        (l.iops | l.iops_burst | l.bps | l.bps_burst) > INT64_MAX) {
        return VBLK_ERR_LIMITS;
    }
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->mutex, NULL);
    p->inner = inner;
    p->now = pacer_clock;
    p->sleep = pacer_sleep;
    // Whole pages suit direct I/O.
    p->most = !l.bps                ? UINT64_MAX
               : tenth < VBLK_SECTOR ? VBLK_SECTOR
               : tenth < 4096        ? tenth - tenth % VBLK_SECTOR
                                     : tenth - tenth % 4096;
    vblk_bucket_init(&p->ops, l.iops, pacer_steady(l.iops, l.iops_burst));
    vblk_bucket_init(&p->bytes, l.bps, pacer_steady(l.bps, l.bps_burst));
    return VBLK_OK;
}

static inline void pacer_close(pacer *p) {
    pthread_mutex_destroy(&p->mutex);
}

// What the inner backend has of these the outer has. A guest is offered nothing
// that would not be paced.
static inline vblk_backend pacer_backend(pacer *p) {
    vblk_backend b = p->inner;
    b.read = pacer_read;
    b.write = b.write ? pacer_write : NULL;
    b.flush = b.flush ? pacer_flush : NULL;
    b.size = b.size ? pacer_size : NULL;
    b.discard = b.write_zeroes = b.secure_erase = NULL;
    b.user = p;
    return b;
}

#endif // PACER_H
