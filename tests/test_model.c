// The device against the model: a driver that does anything at random, and
// after each step everything that can be seen of both is compared.
//
//     VBLK_SOAK=1000 vblk_test model_
//
// runs a thousand times as long, 0.1 a tenth. A mismatch prints the seed
// (-s SEED repeats it), the session and step it happened in, and what the step
// was.
#define _FILE_OFFSET_BITS 64
#define VBLK_THREADED
#include "model.h"

#include "uring.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SESSIONS = 36, STEPS = 220, MOST_PARTS = 160, SLOTS = 24 };

// A request in the hands of the host, and what the model has of it.
typedef struct held {
    bool          used;
    vblk_request  req;
    vblk_seg      seg[MAX_SEGS + 2 + 16];
    model_request want;
} held;

typedef struct range {
    uint64_t gpa, last;
} range;

// What the driver knows of a queue, and where its rings lie.
typedef struct rings {
    uint32_t size;
    uint64_t desc, avail, used;
    uint16_t idx;  // avail.idx as last written
    uint16_t slot; // next free descriptor, more or less
    // What is offered and not returned, by head; unless that cannot be known.
    uint16_t owed[256], done; // up to which used.idx
    bool     muddled;
} rings;

static model m;

static struct {
    model_disk    disk; // the device's, as m.disk is the model's
    model_effects effects;
    uint64_t      most; // bytes a backend call moves at most
    bool          out_of_bounds;

    rings    ring[MODEL_QUEUES];
    range    taken[4096]; // memory in use: rings, then buffers
    unsigned takens, fixed;
    bool     throttled, async;
    // The model cannot follow: memory refuses, or changes in a call.
    bool     wild;
    bool     forged;    // anything may lie anywhere
    bool     struck;    // the ambush happened
    bool     told;      // the driver was told to notify then
    unsigned victim;    // the queue whose driver strikes
    bool     busy;      // what is under way cannot be ended
    bool     engine;    // the host is one
    bool     engines;   // or becomes one at times
    range    writable[4096]; // what the device may write, but for used rings
    unsigned writables;
    held     slot[SLOTS];
    vblk_memory memory;
    uint64_t now, wait; // what the last stall said
    uint64_t session, step, requests;
    uint32_t generation, moves; // as last compared: the device's, the model's
    unsigned fired, lowered;
    bool     line;
    char     said[3000];
    size_t   said_bytes;
    unsigned differs;
} d;


// ---- Words ----------------------------------------------------------------

static void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(d.said + d.said_bytes, sizeof d.said - d.said_bytes,
                      format, args);
    va_end(args);
    if (n > 0) {
        d.said_bytes += (size_t)n;
    }
    if (d.said_bytes >= sizeof d.said) {
        d.said_bytes = sizeof d.said - 1;
    }
}

static void complain(const char *what, uint64_t where, uint64_t want,
                     uint64_t got) {
    if (d.differs++) {
        printf("    also: %s %#" PRIx64 ": model %#" PRIx64
               ", device %#" PRIx64 "\n", what, where, want, got);
        return;
    }
    char text[sizeof d.said + 400];
    snprintf(text, sizeof text,
             "seed %" PRIu64 ", session %" PRIu64 ", step %" PRIu64
             ": %s %#" PRIx64 ": model %#" PRIx64 ", device %#" PRIx64
             "\n    %s, %s, features %#" PRIx64 ", seg_max %u, size_max %u\n"
             "    step:%s",
             test_seed, d.session, d.step, what, where, want, got,
             m.standard ? "standard" : "strict",
             g.mapped ? "with map" : "without map", m.accepted, m.seg_max,
             m.size_max, d.said);
    test_fail(__FILE__, __LINE__, text);
    for (unsigned i = 0; i < m.queues; i++) {
        const model_queue *q = &m.queue[i];
        printf("    queue %u: size %u, %sready%s, desc %#" PRIx64
               ", avail %#" PRIx64 ", used %#" PRIx64 ", next %u, done %u\n",
               i, q->size, q->ready ? "" : "not ",
               q->poisoned ? ", broken" : "", q->desc, q->avail, q->used,
               q->next, q->done);
    }
}

static void differ(const char *what, uint64_t where, uint64_t want,
                   uint64_t got) {
    if (!d.wild) {
        complain(what, where, want, got);
    }
}

static void rule(bool holds, const char *text, uint64_t where) {
    if (!holds) {
        complain(text, where, 1, 0);
    }
}

// Never, when there are no more choices to be had.
static bool one_in(uint32_t n) {
    return test_below(n) == n - 1;
}


// ---- The device's disk ----------------------------------------------------

static int64_t move(uint64_t offset, const vblk_seg *seg, unsigned segs,
                    bool in) {
    uint64_t total = 0, done = 0;
    for (unsigned i = 0; i < segs; i++) {
        total += seg[i].n;
        d.out_of_bounds |= seg[i].n == 0 || !seg[i].ptr;
    }
    d.out_of_bounds |= total == 0 || offset > m.capacity * 512 ||
                       total > m.capacity * 512 - offset;
    if (d.out_of_bounds) {
        return -1;
    }
    for (unsigned i = 0; i < segs; i++) {
        for (size_t k = 0; k < seg[i].n; k++, done++) {
            uint64_t at_ = offset + done;
            bool     bad = at_ == d.disk.bad;
            if (at_ >= d.disk.backing || (!in && at_ == d.disk.stuck) ||
                done == d.most || bad) {
                model_note(&d.effects, in ? 'r' : 'w', offset, done);
                return bad && done == 0 && at_ < d.disk.backing
                           ? -5
                           : (int64_t)done;
            }
            if (in) {
                seg[i].ptr[k] = d.disk.data[at_];
            } else {
                d.disk.data[at_] = seg[i].ptr[k];
            }
        }
    }
    model_note(&d.effects, in ? 'r' : 'w', offset, done);
    return (int64_t)done;
}

static int64_t disk_read(void *user, uint64_t offset, const vblk_seg *seg,
                         unsigned segs) {
    (void)user;
    return move(offset, seg, segs, true);
}

static int64_t disk_write(void *user, uint64_t offset, const vblk_seg *seg,
                          unsigned segs) {
    (void)user;
    return move(offset, seg, segs, false);
}

static int disk_flush(void *user) {
    (void)user;
    model_note(&d.effects, 'f', 0, 0);
    return d.disk.bad_flush ? -5 : 0;
}

static int clear(char what, uint64_t offset, uint64_t bytes) {
    d.out_of_bounds |= bytes == 0 || offset > m.capacity * 512 ||
                       bytes > m.capacity * 512 - offset;
    model_note(&d.effects, what, offset, bytes);
    return model_clear(&d.disk, what, offset, bytes) ? 0 : -5;
}

static int disk_discard(void *user, uint64_t offset, uint64_t bytes,
                        bool unmap) {
    (void)user;
    d.out_of_bounds |= unmap;
    return clear('d', offset, bytes);
}

static int disk_zero(void *user, uint64_t offset, uint64_t bytes, bool unmap) {
    (void)user;
    return clear(unmap ? 'u' : 'z', offset, bytes);
}

static int disk_erase(void *user, uint64_t offset, uint64_t bytes,
                      bool unmap) {
    (void)user;
    d.out_of_bounds |= unmap;
    return clear('e', offset, bytes);
}

static const uint16_t disk_lifetime[3] = {1, 11, 12};

static uint64_t disk_size(void *user) {
    (void)user;
    return d.disk.backing;
}

static vblk_engine engine;

static int on_quiesce(void *user, int queue) {
    (void)user;
    if (d.engine) {
        return vblk_engine_quiesce(&engine, queue, 1 + test_below(9));
    }
    rule(queue == VBLK_ALL_QUEUES || (queue >= 0 && queue < (int)m.queues),
         "no queue is to be quiet", 0);
    return d.busy ? -1 : 0;
}


// ---- Comparison -----------------------------------------------------------

// The four stretches of guest memory that the driver uses.
enum { WINDOW = 0x10000 };
static const uint64_t windows[] = {0, SEAM - WINDOW / 2, RAM_END - WINDOW,
                                   HIGH};

static void compare_bytes(const char *what, uint64_t base,
                          const uint8_t *want, const uint8_t *got, size_t n) {
    if (memcmp(want, got, n) == 0) {
        return;
    }
    size_t i = 0;
    while (want[i] == got[i]) {
        i++;
    }
    differ(what, base + i, want[i], got[i]);
}

static void compare_memory(bool all) {
    for (size_t i = 0; i < m.loose_count; i++) {
        size_t   k = m.loose_at[i];
        uint64_t gpa = k < RAM_END ? k : HIGH + (k - RAM_END);
        if (m.loose[k] == MODEL_ANY || m.other[k] == *at(gpa)) {
            m.memory[k] = *at(gpa);
        }
        m.loose[k] = 0;
    }
    m.loose_count = 0;
    for (size_t i = 0; i < COUNT(windows); i++) {
        uint64_t end = windows[i] + WINDOW - 1;
        for (uint64_t gpa = windows[i]; gpa - 1 != end; gpa += WINDOW / 2) {
            compare_bytes("guest memory at", gpa, model_at(&m, gpa), at(gpa),
                          WINDOW / 2);
        }
    }
    if (all) {
        compare_bytes("guest memory at", 0, m.memory, at(0), SEAM);
        compare_bytes("guest memory at", SEAM, m.memory + SEAM, at(SEAM),
                      RAM_END - SEAM);
        for (size_t i = 0; i < GAP; i++) {
            if (at(0)[SEAM + i] != CANARY || at(SEAM)[SEAM + i] != CANARY) {
                differ("host memory outside the guest's, byte", i, CANARY, 0);
            }
        }
    }
}

static void compare_registers(void) {
    for (uint32_t offset = 0; offset < 0x200; offset += 4) {
        uint64_t want = model_read(&m, offset, 4);
        uint64_t got = vblk_mmio_read(&g.dev, offset, 4);
        if (offset == VBLK_REG_CONFIG_GENERATION) { // begins anywhere
            bool moved = got != d.generation;
            if (moved != (want != d.moves)) {
                differ("ConfigGeneration moved", offset, !moved, moved);
            }
            d.generation = (uint32_t)got;
            d.moves = (uint32_t)want;
        } else if (want != got) {
            differ("register", offset, want, got);
        }
    }
    bool line = vblk_interrupt_line(&g.dev);
    if (line != m.line) {
        differ("interrupt line", 0, m.line, line);
    }
    if (g.fired != m.fired) {
        differ("interrupts fired", 0, m.fired, g.fired);
    }
    if (d.line && !line && g.lowered == d.lowered) {
        differ("the line fell, calls to say so", 0, 1, 0);
    }
    d.line = line;
    d.lowered = g.lowered;
}

static void compare_counts(void) {
    vblk_counts got = vblk_counters(&g.dev), want = m.counts;
#define COMPARE(field)                                                         \
    if (want.field != got.field) {                                             \
        differ("counter " #field, 0, want.field, got.field);                   \
    }
    COMPARE(reads)
    COMPARE(writes)
    COMPARE(flushes)
    COMPARE(discards)
    COMPARE(write_zeroes)
    COMPARE(secure_erases)
    COMPARE(bytes_read)
    COMPARE(bytes_written)
    COMPARE(io_errors)
    COMPARE(throttled)
    COMPARE(currently_throttled)
    if (!m.time_unknown) {
        COMPARE(throttled_ns)
    }
    COMPARE(broken_queues)
#undef COMPARE
}

static void compare_disk(void) {
    unsigned most = m.effects.count > d.effects.count ? m.effects.count
                                                      : d.effects.count;
    for (unsigned i = 0; i < most && i < COUNT(m.effects.list); i++) {
        model_effect none = {'-', 0, 0};
        model_effect want = i < m.effects.count ? m.effects.list[i] : none;
        model_effect got = i < d.effects.count ? d.effects.list[i] : none;
        if (want.what != got.what) {
            differ("backend call, number", i, (uint64_t)want.what,
                   (uint64_t)got.what);
        }
        if (want.offset != got.offset) {
            differ("offset of backend call", i, want.offset, got.offset);
        }
        if (want.bytes != got.bytes) {
            differ("bytes of backend call", i, want.bytes, got.bytes);
        }
    }
    m.effects.count = d.effects.count = 0;
    compare_bytes("disk at", 0, m.disk.data, d.disk.data, sizeof m.disk.data);
    if (d.out_of_bounds) {
        differ("backend asked for what is not there", 0, 0, 1);
    }
}

static void compare(bool all) {
    compare_registers();
    compare_counts();
    compare_disk();
    compare_memory(all);
}


// ---- Both at once ---------------------------------------------------------

// At `offset` of what begins at `base`: what is no memory is left out, and so
// is what lies beyond the end of the address space.
static void poke_in(uint64_t base, uint64_t offset, uint64_t value,
                    unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        uint64_t gpa = base + offset + i;
        uint8_t *p = gpa < base ? NULL : model_at(&m, gpa);
        if (p) {
            *p = *at(gpa) = (uint8_t)(value >> 8 * i);
            *truth_at(gpa) = *p;
        }
    }
}

static bool is_mapped(uint64_t gpa, uint64_t n) {
    return model_at(&m, gpa) && model_at(&m, gpa + (n - 1)) &&
           (gpa < RAM_END) == (gpa + (n - 1) < RAM_END);
}

// Of the device's memory.
static uint32_t peek(uint64_t base, uint64_t offset, unsigned bytes) {
    uint32_t value = 0;
    for (unsigned i = 0; i < bytes; i++) {
        value |= (uint32_t)*at(base + offset + i) << 8 * i;
    }
    return value;
}

static void poke(uint64_t gpa, uint64_t value, unsigned bytes) {
    poke_in(gpa, 0, value, bytes);
}

// An engine is called until it has nothing to do, or a few times.
static uint64_t poll_engine(unsigned times) {
    kernel.now = kernel.now < d.now ? d.now : kernel.now;
    uint64_t next = 0;
    bool     busy = true;
    while (times-- > 0 && (busy || next <= kernel.now)) {
        next = vblk_engine_poll(&engine);
        busy = engine.under_way > 0;
        if (busy) { // and whatever it hears of then, the next poll shows
            vblk_engine_wait(&engine, 0, kernel.now + test_below(1000));
        }
    }
    d.now = kernel.now;
    say(" engine, %u under way", engine.under_way);
    return next;
}

static void poll_both(void) {
    if (d.engine) {
        poll_engine(1 + test_below(4));
        return;
    }
    for (int i = 0; i < 3; i++) {
        uint64_t want = model_poll(&m, d.now);
        uint64_t got = vblk_poll(&g.dev, d.now);
        say(" poll");
        if (want != got) {
            differ("time to poll again, at", d.now, want, got);
        }
        d.wait = want != VBLK_NEVER ? want - d.now : d.wait;
        if (want != d.now || d.differs) {
            break;
        }
    }
}

static void drain_both(int queue) {
    if (d.engine || queue == VBLK_ALL_QUEUES || one_in(3)) {
        poll_both();
        return;
    }
    for (int i = 0; i < 3; i++) {
        outcome want = model_drain(&m, (unsigned)queue, d.now);
        outcome got = drain_at(queue, d.now);
        say(" drain(%d)=%d", queue, (int)got.state);
        if (want.state != got.state) {
            differ("outcome of a drain of", (uint64_t)queue,
                   (uint64_t)want.state, (uint64_t)got.state);
        } else if (want.state == STALLED && want.wait_ns != got.wait_ns) {
            differ("wait of a drain of", (uint64_t)queue, want.wait_ns,
                   got.wait_ns);
        }
        if (want.state == STALLED) {
            d.wait = want.wait_ns;
            say(" wait %" PRIu64, d.wait);
        }
        if (want.state != MORE || d.differs) {
            break;
        }
    }
}

static int write_both(uint64_t offset, unsigned bytes, uint64_t value) {
    int want = model_write(&m, offset, bytes, value);
    g.notified = VBLK_NO_QUEUE;
    vblk_mmio_write(&g.dev, offset, bytes, value);
    int got = g.notified;
    say(" %#x/%u=%#" PRIx64, (unsigned)offset, bytes, value);
    if (want != got) {
        differ("queue notified by a write of register", offset,
               (uint64_t)(int64_t)want, (uint64_t)(int64_t)got);
    }
    return want;
}

static void read_both(uint64_t offset, unsigned bytes) {
    uint64_t want = model_read(&m, offset, bytes);
    uint64_t got = vblk_mmio_read(&g.dev, offset, bytes);
    say(" read %#" PRIx64 "/%u", offset, bytes);
    if (offset != VBLK_REG_CONFIG_GENERATION && want != got) {
        differ("read of register", offset, want, got);
    }
}

static void set(uint32_t offset, uint32_t value) {
    int queue = write_both(offset, 4, value);
    if (queue != VBLK_NO_QUEUE && !one_in(20)) {
        drain_both(queue);
    }
}


// ---- Memory for rings and buffers -----------------------------------------

static bool is_free(uint64_t gpa, uint64_t n) {
    uint64_t last = n - 1 > UINT64_MAX - gpa ? UINT64_MAX : gpa + (n - 1);
    for (unsigned i = 0; n > 0 && i < d.takens; i++) {
        const range *t = &d.taken[i];
        if (gpa <= t->last && t->gpa <= last) {
            return false;
        }
    }
    return true;
}

static void occupy(uint64_t gpa, uint64_t n) {
    if (n > 0 && d.takens < COUNT(d.taken)) {
        bool wraps = n - 1 > UINT64_MAX - gpa;
        d.taken[d.takens].gpa = gpa;
        d.taken[d.takens++].last = wraps ? UINT64_MAX : gpa + (n - 1);
    }
}

static void may_be_written(uint64_t gpa, uint64_t n) {
    if (d.writables == COUNT(d.writable)) {
        d.forged = true;
    } else if (n > 0) {
        range *r = &d.writable[d.writables++];
        r->gpa = gpa;
        r->last = n - 1 > UINT64_MAX - gpa ? UINT64_MAX : gpa + (n - 1);
    }
}

// `n` bytes that nobody uses, preferably where memory ends or crosses the
// seam. UINT64_MAX if there are none.
static uint64_t place(uint64_t n, uint64_t align) {
    if (d.forged && d.takens > 0 && one_in(6)) {
        return d.taken[test_below(d.takens)].gpa / align * align;
    }
    for (int tries = 0; tries < 60 && n <= WINDOW; tries++) {
        uint64_t base = windows[test_below(COUNT(windows))], gpa;
        uint32_t room = (uint32_t)(WINDOW - n);
        switch (test_below(8)) {
        case 0:  gpa = base; break;
        case 1:  gpa = base + room; break;
        case 2:  gpa = SEAM - test_below((uint32_t)n + 1); break;
        default: gpa = base + test_below(room + 1); break;
        }
        gpa = gpa / align * align;
        if (is_free(gpa, n)) {
            occupy(gpa, n);
            return gpa;
        }
    }
    return UINT64_MAX;
}

static uint64_t used_bytes(const rings *r) {
    return 6 + 8 * (uint64_t)r->size;
}

static bool pending(void) {
    for (unsigned i = 0; i < SLOTS; i++) {
        if (d.slot[i].used) {
            return true;
        }
    }
    for (unsigned i = 0; i < m.queues; i++) {
        const model_queue *q = &m.queue[i];
        if (q->ready && !q->poisoned && q->next != d.ring[i].idx) {
            return true;
        }
    }
    return false;
}

static const uint64_t nowhere[] = {
    RAM_END, RAM_END + 4096, 0x40000000, 0x5000000000, HIGH - 0x1000,
};

// `n` bytes, more than one, that are not all memory.
static uint64_t bad_place(uint64_t n) {
    uint64_t back = 1 + test_below((uint32_t)(n < 99 ? n - 1 : 98)), gpa;
    switch (test_below(4)) {
    case 0:  gpa = RAM_END - back; break;
    case 1:  gpa = HIGH - back; break;
    case 2:  gpa = UINT64_MAX - back + 1; break;
    default: gpa = nowhere[test_below(COUNT(nowhere))]; break;
    }
    if (!is_free(gpa, n)) {
        return RAM_END;
    }
    occupy(gpa, n);
    return gpa;
}


// ---- Requests -------------------------------------------------------------

static void add(part *p, unsigned *n, uint64_t gpa, uint64_t bytes,
                uint16_t flags) {
    if (*n < MOST_PARTS) {
        p[*n].gpa = gpa;
        p[*n].n = (uint32_t)bytes;
        p[(*n)++].flags = flags;
    }
}

static uint32_t random_type(void) {
    static const uint32_t odd[] = {2, 5, 7, 9, 11, 13, 0x80000000, 0x100,
                                   UINT32_MAX};
    static const uint32_t more[] = {VBLK_T_DISCARD, VBLK_T_WRITE_ZEROES,
                                    VBLK_T_SECURE_ERASE, VBLK_T_WRITE_ZEROES,
                                    VBLK_T_GET_LIFETIME};
    if (one_in(30)) { // P9
        return random_type() | 0x80000000;
    }
    switch (test_below(20)) {
    case 0:  return odd[test_below(COUNT(odd))];
    case 1:
    case 2:  return VBLK_T_FLUSH;
    case 3:  return VBLK_T_GET_ID;
    case 4:  return more[(m.requests + d.step) % COUNT(more)];
    default: return one_in(2) ? VBLK_T_IN : VBLK_T_OUT;
    }
}

static uint64_t random_sector(uint32_t bytes) {
    static const uint64_t odd[] = {UINT64_MAX, UINT64_C(1) << 55,
                                   (UINT64_C(1) << 55) - 1,
                                   UINT64_C(1) << 32, UINT64_MAX / 512};
    uint32_t sectors = bytes / 512, capacity = (uint32_t)m.capacity;
    if (one_in(50)) {
        return odd[test_below(COUNT(odd))];
    }
    if (one_in(25)) {
        return capacity - sectors + test_below(3);
    }
    capacity = capacity > MODEL_SECTORS ? MODEL_SECTORS : capacity;
    return sectors < capacity ? test_below(capacity - sectors + 1) : 0;
}

static uint32_t random_bytes(uint32_t type) {
    if (type == VBLK_T_FLUSH) {
        return one_in(8) ? test_below(1000) : 0;
    }
    if (type == VBLK_T_GET_ID || type == VBLK_T_GET_LIFETIME) {
        return one_in(2) ? 20 : test_below(50);
    }
    if (model_has_ranges(type)) {
        return one_in(8) ? test_below(1200) : 16 * (1 + test_below(6));
    }
    if (one_in(15)) {
        return one_in(3) ? 0 : test_below(3000);
    }
    if (one_in(20)) {
        return 512 * test_below(40);
    }
    return 512 * (1 + test_below(4));
}

// `bytes` of data, cut up, in one piece of memory or in several.
static bool add_data(part *p, unsigned *n, uint32_t bytes, uint16_t flags,
                     unsigned most) {
    unsigned cuts = one_in(3) ? 1 : 1 + test_below(most);
    uint64_t whole = one_in(2) ? place(bytes + 1, 1) : UINT64_MAX;
    for (uint32_t done = 0; done < bytes;) {
        if (one_in(12)) { // an empty one: its address is nobody's
            add(p, n, one_in(2) ? UINT64_MAX : RAM_END, 0,
                one_in(2) ? WRITE : 0);
        }
        uint32_t size = bytes - done;
        if (cuts-- > 1) {
            size = one_in(2) ? 1 + test_below(size)
                             : size > 512 ? 512
                                          : size;
        }
        uint64_t gpa = whole == UINT64_MAX ? place(size, 1) : whole + done;
        if (gpa == UINT64_MAX) {
            return false;
        }
        add(p, n, gpa, size, flags);
        done += size;
    }
    return true;
}

// Header, data, status as a driver writes them.
static unsigned usual_parts(part *p, uint32_t type, uint64_t sector,
                            uint32_t bytes, unsigned most) {
    unsigned n = 0;
    uint64_t header = place(16, 1), status = place(1, 1);
    if (header == UINT64_MAX || status == UINT64_MAX) {
        return 0;
    }
    poke(header, type, 4);
    poke(header + 4, test_random(), 4);
    poke(header + 8, sector, 8);
    poke(status, 0xee, 1);
    add(p, &n, header, 16, 0);
    bool out = type == VBLK_T_OUT || model_has_ranges(type) ||
               (type != VBLK_T_IN && type != VBLK_T_GET_ID && one_in(2));
    if (!add_data(p, &n, bytes, out ? 0 : WRITE, most)) {
        return 0;
    }
    add(p, &n, status, 1, WRITE);
    return n;
}

// The same with no regard for what belongs together: two areas, cut anyhow.
static unsigned free_parts(part *p, uint32_t type, uint64_t sector,
                           uint32_t bytes, unsigned most) {
    unsigned n = 0;
    bool     in = type != VBLK_T_OUT && !model_has_ranges(type);
    uint32_t size[2] = {16 + (in ? 0 : bytes), 1 + (in ? bytes : 0)};
    for (unsigned i = 0; i < 2; i++) {
        uint64_t area = place(size[i], 1);
        if (area == UINT64_MAX) {
            return 0;
        }
        if (i == 0) {
            poke(area, type, 4);
            poke(area + 4, test_random(), 4);
            poke(area + 8, sector, 8);
        }
        unsigned cuts = 1 + test_below(one_in(4) ? 20 : most);
        for (uint32_t done = 0; done < size[i];) {
            uint32_t left = size[i] - done;
            uint32_t cut = cuts-- > 1 ? test_below(left < 30 || one_in(2)
                                                       ? left + 1
                                                       : 30)
                                      : left;
            add(p, &n, area + done, cut, i ? WRITE : 0);
            done += cut;
        }
    }
    return n;
}

// Byte `at` of what is readable.
static void poke_readable(const part *p, unsigned n, uint32_t at,
                          uint8_t byte) {
    for (unsigned i = 0; i < n; i++) {
        if (p[i].flags & WRITE) {
            continue;
        }
        if (at < p[i].n) {
            poke(p[i].gpa + at, byte, 1);
            return;
        }
        at -= p[i].n;
    }
}

// The ranges, and in `touched` the sectors of the disk that they are about.
static void put_ranges(const part *p, unsigned n, uint32_t type, uint32_t bytes,
                       uint8_t *touched, size_t sectors) {
    for (uint32_t done = 0; done + 16 <= bytes; done += 16) {
        uint32_t length = test_below(9), flags = 0;
        uint64_t sector = random_sector(length * 512);
        if (m.backend.block_size > 512 && !one_in(20)) {
            sector &= ~UINT64_C(7);
            length = 8 * (length > 4);
        }
        length = one_in(25) ? test_random() : length;
        flags = type == VBLK_T_WRITE_ZEROES ? test_below(2) : 0;
        flags = one_in(12) ? 1u << (d.step + done) % 32 : flags;
        for (uint64_t i = sector; i < sectors && i - sector < length; i++) {
            touched[i] |= 2;
        }
        for (unsigned i = 0; i < 8; i++) {
            poke_readable(p, n, 16 + done + i, (uint8_t)(sector >> 8 * i));
        }
        for (unsigned i = 0; i < 4; i++) {
            poke_readable(p, n, 24 + done + i, (uint8_t)(length >> 8 * i));
            poke_readable(p, n, 28 + done + i, (uint8_t)(flags >> 8 * i));
        }
    }
}

// One thing wrong, or at least unusual.
static unsigned spoil(part *p, unsigned n) {
    if (n == 0) {
        return 0;
    }
    unsigned k = test_below(n);
    part    *first = &p[0], *last = &p[n - 1];
    uint64_t gpa;
    switch (test_below(25)) {
    case 0: first->n = test_below(16); break;
    case 1: first->gpa = bad_place(16); break;
    case 2: first->flags ^= WRITE; break;
    case 3: // a header that ends where the address space does, and goes on
        gpa = UINT64_MAX - 15;
        if (is_free(gpa, 16)) {
            occupy(gpa, 16);
            poke(gpa, random_type(), 4);
            poke(gpa + 8, test_below(8), 8);
            first->gpa = gpa;
            first->n = 16 + 512 * test_below(3) + test_below(2);
        }
        break;
    case 4: n--; break;
    case 5: last->flags ^= WRITE; break;
    case 6: last->n = 0; break;
    case 7:
        last->n = 2 + test_below(40);
        last->gpa = bad_place(last->n);
        break;
    case 8: last->gpa = nowhere[test_below(COUNT(nowhere))]; break;
    case 9:
    case 10:
        last->n = 1 + test_below(40);
        gpa = place(last->n, 1);
        last->gpa = gpa == UINT64_MAX ? RAM_END : gpa;
        break;
    case 11: p[k].flags ^= WRITE; break;
    case 12:
        p[k].n += p[k].n < 2 ? 2 : 0;
        p[k].gpa = bad_place(p[k].n);
        break;
    case 13: p[k].n = one_in(2) ? UINT32_MAX : 0x80000000; break;
    case 14: // beyond the disk, or beyond memory: rings are not data
        p[k].n = m.capacity > MODEL_SECTORS ? RAM_END : MODEL_SECTORS * 512;
        p[k].n += 512 * (1 + test_below(100));
        break;
    case 15: add(p, &n, RAM_END, 0, one_in(2) ? WRITE : 0); break;
    case 16:
        gpa = place(30, 1);
        if (gpa != UINT64_MAX) {
            add(p, &n, gpa, 30, one_in(2) ? WRITE : 0);
        }
        break;
    case 17: { // about as long as a chain may be
        unsigned want = m.seg_max + test_below(5);
        part     end = p[n - 1];
        for (n--; n + 1 < want && n + 1 < MOST_PARTS;) {
            add(p, &n, UINT64_MAX, 0, end.flags);
        }
        p[n++] = end;
        break;
    }
    case 18: { // two change places
        part     was = p[k];
        unsigned other = test_below(n);
        p[k] = p[other];
        p[other] = was;
        break;
    }
    case 19:
        memmove(&p[k], &p[k + 1], sizeof p[0] * (n - k - 1));
        n--;
        break;
    case 20: n = 1; break;
    case 21: p[k].n = test_below(p[k].n + 1); break;
    case 22: // a segment about as long as allowed
        if (m.size_max < 0x4000) {
            uint32_t size = m.size_max + test_below(3) - 1;
            gpa = place(size, 1);
            if (gpa != UINT64_MAX) {
                p[k].gpa = gpa;
                p[k].n = size;
            }
        }
        break;
    case 23: // more than fits into 32 bits
        for (k = 1; k + 1 < n; k++) {
            p[k].n = 0x80000000;
        }
        break;
    default: p[k].flags |= 0xfff8; break;
    }
    return n;
}

static void desc(uint64_t table, uint64_t i, part p, uint32_t next) {
    if (d.wild && p.flags & WRITE) {
        may_be_written(p.gpa, p.n);
    }
    poke_in(table, 16 * i, p.gpa, 8);
    poke_in(table, 16 * i + 8, p.n, 4);
    poke_in(table, 16 * i + 12, p.flags, 2);
    poke_in(table, 16 * i + 14, next, 2);
    if (d.said_bytes < 2000) {
        say(" {%#" PRIx64 ",%u,%#x,%u}", p.gpa, p.n, p.flags, next);
    }
}

// The parts as an indirect table; what points to it.
static part table_of(const part *p, unsigned n) {
    unsigned entries = n + (one_in(3) ? test_below(4) : 0);
    uint64_t gpa = place(16 * (uint64_t)entries, one_in(3) ? 1 : 16);
    part     in = {gpa, 16 * entries, INDIRECT};
    if (gpa == UINT64_MAX || n == 0) {
        in.gpa = RAM_END;
        return in;
    }
    uint16_t slot[MOST_PARTS + 4];
    for (unsigned i = 0; i < entries; i++) {
        slot[i] = (uint16_t)i;
        desc(gpa, i, (part){UINT64_MAX, 0, 0}, 0);
    }
    for (unsigned i = 2; i < entries && one_in(2); i++) { // out of order
        unsigned k = 1 + test_below(i);
        uint16_t was = slot[i];
        slot[i] = slot[k];
        slot[k] = was;
    }
    int wrong = one_in(12) ? (int)test_below(10) : -1;
    for (unsigned i = 0; i < n; i++) {
        part     here = p[i];
        uint32_t next = i + 1 < n ? slot[i + 1] : test_below(0x10000);
        here.flags |= i + 1 < n ? NEXT : 0;
        if (i + 1 == n && wrong == 0) { // loops, or leaves its table
            here.flags |= NEXT;
            next = one_in(2) ? test_below(n) : entries;
        }
        if (i + 1 == n && wrong == 1) {
            here = in;
        }
        desc(gpa, slot[i], here, next);
    }
    switch (wrong) {
    case 2: in.n -= 1 + test_below(15); break;
    case 3: in.n = 0; break;
    case 4: in.n += 16 * (1 + test_below(100)); break;
    case 5: in.flags |= NEXT; break;
    case 6: in.gpa = bad_place(in.n); break;
    case 7: in.n = (n - 1) * 16; break;
    case 8: in.n = 0xfffffff0; break;
    default: break;
    }
    in.flags |= one_in(3) ? WRITE : 0;
    return in;
}

// Put the parts into the queue's table and offer them.
static void offer_parts(unsigned queue, part *p, unsigned n) {
    rings   *r = &d.ring[queue];
    bool     indirect = m.accepted & VBLK_F_INDIRECT_DESC;
    unsigned direct = n;
    if (n > 0 && (indirect ? n > r->size || one_in(3) : one_in(60))) {
        direct = one_in(2) ? 0 : test_below(n < r->size ? n : r->size);
        p[direct] = table_of(p + direct, n - direct);
        n = direct + 1;
    }
    uint32_t head = r->slot % r->size;
    int      wrong = one_in(40) ? (int)test_below(4) : -1;
    for (unsigned i = 0; i < n; i++) {
        uint32_t here = r->slot % r->size;
        uint32_t next = (here + 1) % r->size;
        bool     last = i + 1 == n;
        r->slot++;
        if (!last) {
            p[i].flags |= NEXT;
        } else if (wrong == 0) { // a loop, or a walk into older chains
            p[i].flags |= NEXT;
            next = test_below(r->size);
        } else if (wrong == 1) {
            p[i].flags |= NEXT;
            next = r->size + test_below(2) * test_below(0x8000);
        } else {
            next = test_below(0x10000);
        }
        desc(r->desc, here, p[i], next);
    }
    poke_in(r->avail, 4 + 2 * (uint64_t)(r->idx % r->size), head, 2);
    poke_in(r->avail, 2, ++r->idx, 2);
    r->owed[head]++;
    say(" head %u idx %u;", head, r->idx);
}

// What an engine was given that is as it should be; and how often each sector
// may be written.
typedef struct plain {
    uint32_t type, bytes;
    uint64_t sector, status;
    part     p[8];
    unsigned parts;
} plain;

static plain    plains[200];
static unsigned plain_count;
static uint8_t  writes[MODEL_SECTORS + 64];

static void remember(const part *p, unsigned n, uint32_t type, uint64_t sector,
                     uint32_t bytes, bool usual) {
    if (type != VBLK_T_IN || !usual) { // whatever else it may be
        for (uint64_t i = sector; i < sector + 64 && i < COUNT(writes); i++) {
            bool sure = usual && i >= sector + (bytes + 511) / 512;
            writes[i] = (uint8_t)(writes[i] + !sure + !usual);
        }
    }
    if (usual && type <= VBLK_T_OUT && sector < MODEL_SECTORS &&
        n <= COUNT(plains->p) &&
        plain_count < COUNT(plains)) {
        plain *r = &plains[plain_count++];
        *r = (plain){type, bytes, sector, p[n - 1].gpa, {{0, 0, 0}}, n};
        memcpy(r->p, p, n * sizeof *p);
    }
}

static void submit_one(unsigned queue) {
    part     p[MOST_PARTS + 1];
    uint32_t type = random_type();
    uint32_t bytes = random_bytes(type);
    uint64_t sector = random_sector(bytes);
    uint32_t size = d.ring[queue].size;
    unsigned most = m.seg_max < 6 ? m.seg_max : 6;
    if (size < 8 && !(m.accepted & VBLK_F_INDIRECT_DESC)) {
        most = 1;
    }
    say(" q%u type %u sector %" PRIu64 " bytes %u:", queue, type, sector,
        bytes);
    bool     usual = !one_in(m.standard ? 3 : 30);
    unsigned n = usual ? usual_parts(p, type, sector, bytes, most)
                       : free_parts(p, type, sector, bytes, most);
    if (model_has_ranges(type)) {
        put_ranges(p, n, type, bytes, writes, sizeof writes);
    }
    for (int i = 0; i < 3 && one_in(4); i++) {
        usual = false;
        n = spoil(p, n);
        if (model_has_ranges(type)) { // any range
            memset(writes, 2, sizeof writes);
        }
    }
    if (d.engine && n > 0) {
        remember(p, n, type, sector, bytes, usual);
    }
    if (n > 0) {
        offer_parts(queue, p, n);
    }
}


// ---- Bringing it up -------------------------------------------------------

static bool live(unsigned queue) {
    return d.ring[queue].size > 0 && m.queue[queue].ready &&
           m.status & VBLK_STATUS_DRIVER_OK;
}

// Where a ring of `n` bytes goes: anywhere it may, or somewhere odd.
static uint64_t place_ring(uint64_t n, uint64_t align, bool odd) {
    uint64_t gpa = UINT64_MAX;
    if (odd) {
        switch (test_below(8)) {
        case 5:
        case 6:
        case 7:  gpa = 0x4000 + align / 2; break; // misaligned
        case 1:  gpa = UINT64_MAX / align * align - align; break; // wraps
        case 2:  gpa = nowhere[test_below(COUNT(nowhere))]; break;
        case 3:  gpa = RAM_END - (1 + test_below(8)) * align; break;
        case 4:  gpa = HIGH - (align == 4 ? 4096 : align); break;
        default: gpa = (UINT64_MAX - n + 1) / align * align; break;
        }
        if (is_free(gpa, n)) {
            occupy(gpa, n);
            return gpa;
        }
    }
    gpa = place(n, align);
    return gpa == UINT64_MAX ? 0x40000000 : gpa;
}

static void bring_up_queue(unsigned queue) {
    rings *r = &d.ring[queue];
    memset(r, 0, sizeof *r);
    uint32_t most = m.queue_size > 64 && !one_in(8) ? 64 : m.queue_size;
    r->size = 1;
    while (r->size < most && !one_in(6)) {
        r->size *= 2;
    }
    uint64_t bytes[3] = {16 * (uint64_t)r->size, 6 + 2 * (uint64_t)r->size,
                         6 + 8 * (uint64_t)r->size};
    unsigned odd = one_in(10) ? test_below(3) : 3;
    r->desc = place_ring(bytes[0], 16, odd == 0);
    r->avail = place_ring(bytes[1], 2, odd == 1);
    r->used = place_ring(bytes[2], 4, odd == 2);
    uint64_t base[3] = {r->desc, r->avail, r->used};
    for (unsigned i = 0; i < 3; i++) {
        for (uint64_t k = 0; k < bytes[i]; k++) {
            poke_in(base[i], k, 0, 1);
        }
    }
    if (one_in(6)) {
        poke(r->used, 1, 2); // left behind by an earlier driver
    }
    say(" rings %#" PRIx64 " %#" PRIx64 " %#" PRIx64 ":", r->desc, r->avail,
        r->used);
    set(VBLK_REG_QUEUE_SEL, queue);
    if (!one_in(60)) {
        set(VBLK_REG_QUEUE_NUM, r->size);
    }
    if (one_in(30)) {
        set(VBLK_REG_QUEUE_NUM, r->size + test_below(one_in(2) ? 3 : 999));
    }
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t low = VBLK_REG_QUEUE_DESC_LOW + 0x10 * i;
        uint32_t high = one_in(2) ? 4 : 0;
        set(low + high, (uint32_t)(base[i] >> (high ? 32 : 0)));
        high ^= 4;
        set(low + high, (uint32_t)(base[i] >> (high ? 32 : 0)));
    }
    if (!one_in(20)) {
        set(VBLK_REG_QUEUE_READY, 1);
    }
    d.fixed = d.takens;
}

static void needs_reset(void) {
    if (!(m.status & VBLK_STATUS_NEEDS_RESET)) {
        say(" needs reset");
        model_needs_reset(&m);
        vblk_needs_reset(&g.dev);
    }
}

// A step of the handshake, sometimes with a false one before it.
static void set_status(uint32_t value) {
    if (one_in(60)) {
        needs_reset();
    }
    if (one_in(12)) {
        set(VBLK_REG_STATUS, m.status | 1u << test_below(9));
        set(VBLK_REG_STATUS, value & ~(1u << test_below(4)));
        set(VBLK_REG_STATUS, 1 + test_below(0xff));
    }
    set(VBLK_REG_STATUS, value);
}

// From a reset to DRIVER_OK, as a driver does it, mostly.
static void bind_driver(void) {
    bool uboot = m.standard && one_in(5);
    d.takens = d.fixed = plain_count = 0; // buffers are used again
    memset(d.ring, 0, sizeof d.ring);
    say(" bind:");
    set(VBLK_REG_STATUS, 0);
    if (!uboot) {
        set_status(1);
    }
    set_status(uboot ? 2 : 3);
    uint64_t features = m.offered;
    for (unsigned bit = 0; bit < 32; bit++) {
        if (one_in(3)) {
            features &= ~(UINT64_C(1) << bit);
        }
    }
    if (one_in(50)) {
        features ^= UINT64_C(1) << test_below(64);
    }
    for (uint32_t sel = one_in(30); sel < 2; sel++) {
        if (one_in(30)) {
            continue;
        }
        set(VBLK_REG_DRIVER_FEATURES_SEL, sel);
        set(VBLK_REG_DRIVER_FEATURES, (uint32_t)(features >> 32 * sel));
    }
    set_status(uboot ? 0xa : 0xb);
    for (unsigned i = 0; i < m.queues; i++) {
        if (!one_in(15)) {
            bring_up_queue(i);
            if (one_in(4) && m.queue[i].ready) {
                submit_one(i); // before DRIVER_OK (Q10)
            }
        }
    }
    set_status(uboot ? 0xe : 0xf);
}

// A rate and what may be saved up: tight ones mostly, and absurd ones.
static void random_limit(uint64_t *rate, uint64_t *burst, uint32_t usual) {
    *rate = *burst = 0;
    if (one_in(4)) {
        return;
    }
    *rate = 1 + test_below(usual);
    if (one_in(8)) { // the same choices everywhere
        unsigned less = test_below(63);
        *rate = MODEL_WIDE ? (uint64_t)INT64_MAX >> less : *rate;
    }
    if (one_in(2)) {
        uint64_t room = INT64_MAX - *rate, more = test_below(usual);
        more = one_in(8) && MODEL_WIDE ? room : more;
        *burst = *rate + (more < room ? more : room);
    }
}

static vblk_limits random_limits(void) {
    vblk_limits l;
    random_limit(&l.iops, &l.iops_burst, one_in(2) ? 5 : 1000);
    random_limit(&l.bps, &l.bps_burst, one_in(2) ? 3000 : 100000);
    return l;
}

static void init_both(void);

static uint32_t mixed; // a fuzzer's choice of what the backend has

static void make(vblk_profile profile) {
    static const uint32_t backings[] = {MODEL_SECTORS * 512, 511, 0, 512,
                                        0x4000, 0x4000 + 100};
    guest_init();
    uint64_t session = d.session, requests = d.requests;
    bool     throttled = d.throttled, async = d.async, engines = d.engines;
    memset(&d, 0, sizeof d);
    d.session = session;
    d.requests = requests;
    d.throttled = throttled;
    d.async = async;
    d.engines = engines;
    for (size_t i = 0; i < sizeof d.disk.data; i += sizeof(uint32_t)) {
        uint32_t word = test_random();
        memcpy(d.disk.data + i, &word, sizeof word);
    }
    d.disk.backing = backings[one_in(3) ? test_below(COUNT(backings)) : 0];
    d.disk.bad = d.disk.stuck = MODEL_NEVER;
    d.most = MODEL_NEVER;
    g.o.profile = profile;
    g.o.backend.read = disk_read;
    g.o.backend.write = one_in(7) ? NULL : disk_write;
    g.o.backend.flush = one_in(5) ? NULL : disk_flush;
    g.o.backend.size = disk_size;
    g.o.capacity = one_in(4) ? 1 + test_below(MODEL_SECTORS) : 0;
    g.o.capacity = one_in(12) ? UINT64_C(1) << 24 : g.o.capacity;
    g.o.queues = test_below(4);
    g.o.queue_size = 1u << test_below(10);
    g.o.queue_size = g.o.queue_size == 512 ? 0 : g.o.queue_size;
    g.o.seg_max = one_in(2) ? 1 + test_below(MAX_SEGS) : 0;
    g.o.seg_max = one_in(4) ? 1 + test_below(4) : g.o.seg_max;
    g.o.size_max = one_in(3) ? 4096 + 512 * test_below(3) : 0;
    g.o.size_max = one_in(6) ? 4096 + test_below(3000) : g.o.size_max;
    uint32_t entries = g.o.queue_size ? g.o.queue_size : 256;
    uint32_t most = entries > 3 ? entries - 2 : 1;
    g.o.seg_max = g.o.seg_max > most ? most : g.o.seg_max;
    g.o.vendor_id = test_random();
    uint32_t has = g.o.vendor_id ^ mixed; // of this, too: a choice less
    g.o.backend.discard = has & 3 ? disk_discard : NULL;
    g.o.backend.write_zeroes = has & 0xc ? disk_zero : NULL;
    g.o.backend.secure_erase = has & 0x30 ? disk_erase : NULL;
    g.o.backend.unmaps = has & 0x40;
    g.o.backend.lifetime = has & 0x180 ? disk_lifetime : NULL;
    g.o.access_platform = (has & 0xf000) == 0xf000;
    if (has & 0x600) {
        g.o.backend.physical_size = 4096 << (has >> 16 & 3);
        g.o.backend.align_offset = has & 0x40000 ? 4096 / 8 * 4 : 0;
        g.o.backend.opt_io = 4096 * (has >> 20 & 0xff);
    }
    if ((has & 0x70000000) == 0x70000000) {
        g.o.backend.block_size = 4096;
        g.o.backend.align_offset = 0;
        g.o.capacity &= ~UINT64_C(7);
    }
    g.o.range_max = has & 0x800 ? 1 + (has >> 22 & 1) : 0;
    g.o.range_sectors = has & 0x800 ? 8 + (has >> 20 & 0xf8) : 0;
    g.o.id = one_in(4) ? "an id of more than twenty bytes" : "id";
    g.o.features_off = one_in(6) ? VBLK_F_INDIRECT_DESC : 0;
    if (g.o.features_off) { // or it is refused
        g.o.seg_max = 0;
        if (g.o.queue_size == 1 || g.o.queue_size == 2) {
            g.o.queue_size = 4;
        }
    }
    g.o.features_off |= one_in(6) ? VBLK_F_EVENT_IDX : 0;
    g.o.features_off |= one_in(6) ? VBLK_F_SIZE_MAX | VBLK_F_SEG_MAX : 0;
    g.o.features_off |= one_in(6) ? VBLK_F_BLK_SIZE : 0;
    if (d.throttled) {
        g.o.limits = random_limits();
        d.now = one_in(2) ? test_random() : 0;
    }
    g.o.quiesce = on_quiesce;
    d.memory = g.o.memory;
    if (one_in(12)) { // given later (W9)
        memset(&g.o.memory, 0, sizeof g.o.memory);
    }
    init_both();
}

// After power-on or a reset: the model takes memory as it is, and the driver
// has no rings.
static void begin_anew(void) {
    memcpy(m.memory, at(0), SEAM);
    memcpy(m.memory + SEAM, at(SEAM), RAM_END - SEAM);
    memcpy(m.memory + RAM_END, at(HIGH), HIGH_SIZE);
    for (unsigned i = 0; i < SLOTS; i++) { // of another life
        d.slot[i].want.session = ~0u;
    }
    d.line = false;
    d.generation = (uint32_t)rd(VBLK_REG_CONFIG_GENERATION);
    d.moves = m.resets + m.resizes;
    d.takens = d.fixed = d.writables = 0;
    memset(d.ring, 0, sizeof d.ring);
}

// Power-on, with whatever memory and disk hold.
static void init_both(void) {
    model_disk disk = d.disk;
    bool       again = m.queues > 0 && d.step > 0;
    uint64_t   fired = again ? m.fired : 0;
    if (again) {
        g.o.memory = m.memory_given ? d.memory : g.o.memory;
        say(" init");
    }
    model_init(&m, &g.o);
    m.disk = disk;
    m.fired = (unsigned)fired;
    guest_make();
    begin_anew();
}


// ---- Steps ----------------------------------------------------------------

static bool is_full(unsigned queue) {
    const vblk_run *run = &g.dev.queue[queue].run;
    uint16_t next = d.engine ? run->used_shown : run->avail_next;
    return (uint16_t)(d.ring[queue].idx - next) >= d.ring[queue].size ||
           d.takens > COUNT(d.taken) - 300;
}

static void step_requests(void) {
    unsigned queue = test_below(m.queues);
    rings   *r = &d.ring[queue];
    if (!live(queue)) {
        return;
    }
    unsigned batch = one_in(3) ? 1 + test_below(16) : 1;
    for (unsigned i = 0; i < batch; i++) {
        if (is_full(queue) && !one_in(500)) {
            break;
        }
        r->muddled |= is_full(queue);
        submit_one(queue);
    }
    if (one_in(400)) { // older heads again, or a jump
        r->idx = (uint16_t)(r->idx + test_below(one_in(2) ? 3 : 0x10000));
        poke_in(r->avail, 2, r->idx, 2);
        r->muddled = true;
        say(" idx jumps to %u", r->idx);
    }
    if (one_in(400)) {
        uint64_t entry = 4 + 2 * (uint64_t)(r->idx % r->size);
        uint32_t head = r->size + (one_in(2) ? 0 : test_below(0x8000));
        poke_in(r->avail, entry, head, 2);
        poke_in(r->avail, 2, ++r->idx, 2);
        r->muddled = true;
        say(" head out of range");
    }
    if (!one_in(12)) {
        set(VBLK_REG_QUEUE_NOTIFY, queue);
    }
}

static void step_suppression(void) {
    unsigned queue = test_below(m.queues);
    rings   *r = &d.ring[queue];
    if (!live(queue)) {
        return;
    }
    poke(r->avail, test_below(2), 2);
    uint32_t event = m.queue[queue].done + test_below(6) - 2;
    poke_in(r->avail, 4 + 2 * (uint64_t)r->size, event, 2);
    say(" used_event %u", event & 0xffff);
}

static void step_register(void) {
    static const uint32_t values[] = {0, 1, 2, 3, 4, 7, 8, 0xb, 0xf, 0x10,
                                      0x4f, 0x80, 0x8f, 0xcf, 0x100,
                                      0x40000000, 0xffffffff};
    uint32_t value = values[test_below(COUNT(values))];
    uint32_t offset = 4 * test_below(0x200 / 4);
    unsigned bytes = 4;
    switch (test_below(8)) {
    case 0: offset = VBLK_REG_STATUS; break;
    case 1: offset = VBLK_REG_QUEUE_NOTIFY; break;
    case 2:
        offset = one_in(3) ? VBLK_REG_QUEUE_RESET : VBLK_REG_QUEUE_READY;
        break;
    case 3:
        offset = test_below(0x210);
        bytes = 1 + test_below(8);
        break;
    default: break;
    }
    bool address = offset >= VBLK_REG_QUEUE_DESC_LOW &&
                   offset <= VBLK_REG_QUEUE_DEVICE_HIGH;
    if (address) { // rings may go where no memory is, not over buffers
        value = offset & 4 ? value | 1 : 0x40000000 | value << 1 | 1;
    }
    if (offset == VBLK_REG_STATUS && one_in(3)) {
        value = m.status | 1u << test_below(8);
    }
    if (offset == VBLK_REG_STATUS && value == 0 && !one_in(8)) {
        value = 1;
    }
    if ((offset == VBLK_REG_QUEUE_READY || offset == VBLK_REG_QUEUE_RESET) &&
        m.queue_sel < m.queues) {
        d.ring[m.queue_sel].muddled = true; // may begin at an older position
    }
    int queue = write_both(offset, bytes, value);
    if (queue != VBLK_NO_QUEUE) {
        drain_both(queue);
    }
    read_both(offset, bytes);
}

static void step_read(void) {
    uint64_t offset = one_in(2) ? VBLK_REG_CONFIG + test_below(70)
                                : test_below(0x300);
    if (one_in(20)) {
        offset = UINT64_MAX - test_below(9);
    }
    read_both(offset, 1 + test_below(8));
}

static void step_selectors(void) {
    set(VBLK_REG_QUEUE_SEL, test_below(4));
    set(VBLK_REG_DEVICE_FEATURES_SEL, test_below(3));
    set(VBLK_REG_DRIVER_FEATURES_SEL, test_below(3));
}

static void step_disk(void) {
    uint64_t disk = m.capacity < MODEL_SECTORS ? m.capacity * 512
                                               : MODEL_SECTORS * 512;
    uint64_t where = disk ? test_below((uint32_t)disk) : 0;
    d.disk.bad = one_in(3) ? where : MODEL_NEVER;
    d.disk.stuck = one_in(4) ? where / 2 : MODEL_NEVER;
    d.disk.bad_flush = one_in(4);
    d.most = one_in(3) ? 1 + test_below(3000) : MODEL_NEVER;
    d.disk.backing = one_in(4) ? where : disk;
    m.disk.bad = d.disk.bad;
    m.disk.stuck = d.disk.stuck;
    m.disk.bad_flush = d.disk.bad_flush;
    m.disk.backing = d.disk.backing;
    say(" disk: bad %" PRId64 ", stuck %" PRId64 ", flush %d, backing %" PRIu64
        ", most %" PRId64, (int64_t)d.disk.bad, (int64_t)d.disk.stuck,
        d.disk.bad_flush, d.disk.backing, (int64_t)d.most);
}

static void step_resize(void) {
    uint64_t sectors = d.disk.backing % 7 * (MODEL_SECTORS / 7);
    sectors -= sectors % (m.backend.block_size / 512);
    say(" resize(%" PRIu64 ")", sectors);
    model_resize(&m, sectors, g.dev.backend.size(g.dev.backend.user));
    if (vblk_resize(&g.dev, sectors)) {
        differ("resize refused, to", sectors, 0, 1);
    }
}

static void check_all_used(void);
static void check_wild(void);

// P8, M13: a queue is stopped, and comes up again somewhere else.
static void step_restart(void) {
    unsigned queue = test_below(m.queues);
    set(VBLK_REG_QUEUE_SEL, queue);
    if (one_in(2)) {
        set(VBLK_REG_QUEUE_READY, 0);
    } else {
        set(VBLK_REG_QUEUE_RESET, 1);
    }
    if (!m.queue[queue].ready && !pending()) {
        d.takens = d.fixed; // the old rings stay taken
        plain_count = 0;
        if (d.engine) { // it ended what was under way, in the old rings
            check_all_used();
            check_wild();
        }
        bring_up_queue(queue);
    }
}

static void step_time(void) {
    static const uint64_t most[] = {1, 1000, 1000000, 1000000000, UINT32_MAX};
    uint64_t wait = d.wait;
    if (wait > 0 && wait < UINT64_C(1) << 60 && !one_in(4)) {
        // Too early by a nanosecond, and just in time.
        d.now += wait - 1;
        say(" +%" PRIu64, wait - 1);
        drain_both(VBLK_ALL_QUEUES);
        d.now++;
        drain_both(VBLK_ALL_QUEUES);
        d.wait = 0;
    } else {
        uint64_t ns = test_below((uint32_t)most[test_below(COUNT(most))]);
        ns = one_in(30) ? ns << test_below(20) : ns;
        d.now += ns;
        say(" +%" PRIu64, ns);
        drain_both(VBLK_ALL_QUEUES);
    }
    if (one_in(40)) {
        vblk_limits l = random_limits();
        model_set_limits(&m, &l, d.now);
        if (vblk_set_limits(&g.dev, &l, d.now) != VBLK_OK) {
            differ("vblk_set_limits", 0, 0, 1);
        }
        say(" limits %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64, l.iops,
            l.iops_burst, l.bps, l.bps_burst);
    }
}


// ---- Steps of the host ------------------------------------------------------

static void compare_time(const char *what, uint64_t want, uint64_t got) {
    if (want != got) {
        differ(what, d.now, want, got);
    }
    d.wait = want != VBLK_NEVER ? want - d.now : d.wait;
}

static void step_next(unsigned queue) {
    unsigned room = m.seg_max + 2 + (one_in(2) ? test_below(17) : 16);
    for (unsigned i = 0; i < SLOTS; i++) {
        held *s = &d.slot[i];
        if (s->used) {
            continue;
        }
        bool want = model_next(&m, queue, d.now, &s->want);
        bool got = vblk_next(&g.dev, queue, d.now, &s->req, s->seg, room);
        say(" next(%u)=%d", queue, got);
        s->used = got;
        if (!want) {
            s->want.session = ~0u;
        }
        if (want != got) {
            differ("a request of queue", queue, want, got);
        } else if (got) {
            const model_chain *c = &s->want.c;
            bool flush = c->type == VBLK_T_FLUSH;
            bool through = m.write_through;
            bool ranges = model_has_ranges(c->type);
            bool moves = !flush && !ranges;
            bool same = s->req.type == c->type && s->req.queue == queue &&
                        s->req.head == s->want.head &&
                        s->req.bytes == (moves ? c->bytes : 0) &&
                        (ranges ||
                         s->req.offset == (flush ? 0 : c->sector * 512)) &&
                        s->req.durable == (through &&
                                           (ranges || c->type == VBLK_T_OUT));
            same = same && (!ranges || s->req.segs == c->ranges);
            for (unsigned k = 0; k < c->ranges && same; k++) {
                vblk_range is = vblk_range_of(&s->req, k);
                same = is.offset == c->range[k].sector * 512 &&
                       is.bytes == c->range[k].sectors * 512 &&
                       is.unmap == c->range[k].flags;
            }
            if (!same) {
                differ("what a request says, of head", s->want.head, 1, 0);
            }
        }
        if (!got || one_in(3)) {
            return;
        }
    }
}

// The host's I/O, as a thread pool does it: copies, and the disk.
static void move_slot(const held *s, uint64_t n) {
    static uint8_t buffer[MODEL_SECTORS * 512];
    const vblk_request *r = &s->req;
    uint8_t *disk = d.disk.data + r->offset;
    int      err = VBLK_OK;
    for (uint64_t done = 0, now; done < n && !err; done += now) {
        now = one_in(2) ? n - done : 1 + test_below((uint32_t)(n - done));
        if (r->type == VBLK_T_OUT) {
            err = vblk_get(&g.dev, r, done, buffer, (size_t)now);
            memcpy(disk + done, buffer, err ? 0 : (size_t)now);
        } else {
            err = vblk_put(&g.dev, r, done, disk + done, (size_t)now);
        }
    }
    bool stale = s->want.session != m.queue[s->want.queue].session;
    if ((err != VBLK_OK) != (stale && n > 0)) {
        differ("copies of head", s->want.head, stale,
               (uint64_t)(int64_t)err);
    }
}

static void step_complete(void) {
    unsigned first = test_below(SLOTS), i = 0;
    while (i < SLOTS && !d.slot[(first + i) % SLOTS].used) {
        i++;
    }
    if (i == SLOTS) {
        return;
    }
    held *s = &d.slot[(first + i) % SLOTS];
    s->used = false;
    int64_t result = (int64_t)s->req.bytes;
    if (one_in(5)) {
        result = one_in(2) ? -5 : (int64_t)test_below((uint32_t)result + 1);
    }
    uint64_t from = s->req.offset, end = sizeof d.disk.data;
    int64_t  there = from < end ? (int64_t)(end - from) : 0;
    result = result > there ? there : result;
    say(" complete(head %u)=%" PRId64, s->want.head, result);
    bool fresh = s->want.session == m.queue[s->want.queue].session;
    bool clears = model_has_ranges(s->req.type) && fresh && result >= 0;
    for (unsigned k = 0; clears && k < s->req.segs; k++) {
        vblk_range is = vblk_range_of(&s->req, k);
        char what = s->req.type == VBLK_T_DISCARD ? 'd' : 'z';
        if (!model_clear(&d.disk, what, is.offset, is.bytes)) {
            break;
        }
    }
    if (s->req.bytes > 0) {
        move_slot(s, result < 0 ? 0 : (uint64_t)result);
    }
    int want = model_complete(&m, &s->want, result);
    int got = vblk_complete(&g.dev, &s->req, result);
    if (want != got) {
        differ("completion of head", s->want.head, (uint64_t)(int64_t)want,
               (uint64_t)(int64_t)got);
    }
}

static void step_stop(unsigned queue) {
    rings    *now = &d.ring[queue];
    vblk_ring r = {.size = now->size, .desc = now->desc, .avail = now->avail,
                   .used = now->used};
    now->muddled |= !m.queue[queue].ready; // it begins at an older position
    if (m.queue[queue].ready || one_in(4)) {
        int want = model_stop(&m, queue);
        vblk_ring left;
        int got = vblk_queue_stop(&g.dev, queue, &left);
        got = got < 0 ? got : left.position;
        say(" stop(%u)=%d", queue, got);
        if (want != got) {
            differ("position at the stop of queue", queue, (uint64_t)want,
                   (uint64_t)got);
        }
        r.position = (uint16_t)want;
    }
    if (one_in(3) || !m.memory_given) {
        return;
    }
    int want = model_start(&m, queue, &r);
    int got = vblk_queue_start(&g.dev, queue, &r);
    say(" start(%u)=%d", queue, got);
    if (want != got) {
        differ("start of queue", queue, (uint64_t)(int64_t)want,
               (uint64_t)(int64_t)got);
    }
}

// Anything a host may do, at any time.
static void step_host(void) {
    unsigned queue = test_below(m.queues);
    switch (test_below(24)) {
    case 0:
    case 1:
    case 2:
        compare_time("time to arm again, at", model_arm(&m, queue, d.now),
                     vblk_arm(&g.dev, queue, d.now));
        say(" arm(%u)", queue);
        break;
    case 3:
    case 4:
        model_publish(&m, queue);
        vblk_publish(&g.dev, queue);
        say(" publish(%u)", queue);
        break;
    case 5: poll_both(); break;
    case 6:
        if (one_in(6)) {
            step_stop(queue);
        }
        break;
    case 7:
        if (one_in(20)) {
            init_both();
        }
        break;
    case 8:
    case 9:
    case 10:
    case 11:
    case 12:
    case 13: step_next(queue); break;
    default: step_complete(); break;
    }
}

static void set_memory(void) {
    vblk_memory memory = d.memory;
    bool busy = false;
    for (unsigned i = 0; i < m.queues; i++) {
        busy |= g.dev.queue[i].run.under_way > 0;
        if (m.queue[i].under_way != g.dev.queue[i].run.under_way) {
            differ("requests under way of queue", i, m.queue[i].under_way,
                   g.dev.queue[i].run.under_way);
        }
    }
    if (!busy && one_in(2)) {
        guest_move();
        say(" memory moves;");
    }
    if (one_in(3)) {
        memory.map = NULL;
    }
    say(" set_memory");
    int err = vblk_set_memory(&g.dev, memory);
    rule(err == (busy ? VBLK_ERR_BUSY : VBLK_OK), "vblk_set_memory", busy);
    if (!err) {
        m.memory_given = true;
        m.again = 0;
        model_notify(&m, VBLK_ALL_QUEUES);
    }
}

// What hosts with another transport call.
static void step_transport(void) {
    uint8_t  config[80];
    uint64_t from = one_in(4) ? UINT64_MAX - test_below(100) : test_below(100);
    unsigned n = test_below(sizeof config + 1);
    switch (test_below(3)) {
    case 0:
        vblk_read_config(&g.dev, from, config, n);
        for (unsigned i = 0; i < n; i++) {
            bool    there = from < 0x100 && from + i < 0x100;
            uint8_t want = 0;
            if (there) {
                want = (uint8_t)model_read(&m, VBLK_REG_CONFIG + from + i, 1);
            }
            if (config[i] != want) {
                differ("config space at", from + i, want, config[i]);
            }
        }
        break;
    case 1: {
        uint32_t sel = m.driver_sel;
        uint64_t features = m.offered & ~(UINT64_C(1) << test_below(64));
        say(" features %#" PRIx64, features);
        vblk_set_driver_features(&g.dev, features);
        for (uint32_t i = 0; i < 2; i++) {
            model_write(&m, VBLK_REG_DRIVER_FEATURES_SEL, 4, i);
            model_write(&m, VBLK_REG_DRIVER_FEATURES, 4, features >> 32 * i);
        }
        model_write(&m, VBLK_REG_DRIVER_FEATURES_SEL, 4, sel);
        break;
    }
    default: {
        uint32_t status = m.status | 1u << test_below(8);
        say(" status %#x", status);
        vblk_set_status(&g.dev, status);
        model_write(&m, VBLK_REG_STATUS, 4, status);
        break;
    }
    }
    uint64_t got = vblk_driver_features(&g.dev);
    if (got != m.accepted) {
        differ("features accepted", 0, m.accepted, got);
    }
}

static void step(void) {
    bool down = !(m.status & VBLK_STATUS_DRIVER_OK) ||
                m.status & VBLK_STATUS_NEEDS_RESET;
    if (!d.wild && !pending()) {
        d.takens = d.fixed;
    }
    if (down ? one_in(6) : one_in(100)) {
        bind_driver();
        return;
    }
    if (d.async && !d.engine && !one_in(3)) {
        step_host();
        return;
    }
    if (d.throttled && one_in(3)) {
        step_time();
        return;
    }
    switch (test_below(32)) {
    case 0:
    case 1: step_register(); break;
    case 2: step_read(); break;
    case 3: step_selectors(); break;
    case 4: set(VBLK_REG_INTERRUPT_ACK, test_below(8)); break;
    case 5:
        step_disk();
        if (d.disk.bad_flush) {
            step_resize();
        }
        break;
    case 6:
    case 7: step_suppression(); break;
    case 8: drain_both((int)test_below(m.queues)); break;
    case 9: drain_both(VBLK_ALL_QUEUES); break;
    case 10:
        if (one_in(4)) {
            step_restart();
        }
        break;
    case 11:
        if (one_in(8) || (!m.memory_given && one_in(2))) {
            set_memory();
        }
        if (one_in(20)) {
            needs_reset();
        }
        break;
    case 12:
        if (one_in(3)) {
            step_transport();
        }
        break;
    default: step_requests(); break;
    }
}


// ---- Where the model cannot follow -----------------------------------------

static bool may_write(uint64_t gpa) {
    for (unsigned i = 0; i < m.queues; i++) {
        const vblk_queue *q = &g.dev.queue[i];
        const rings      *r = &d.ring[i]; // a queue that stops is told none
        if ((q->ready && gpa - q->used_gpa < 6 + 8 * (uint64_t)q->size) ||
            (r->size > 0 && gpa - r->used < used_bytes(r))) {
            return true;
        }
    }
    for (unsigned i = 0; i < d.writables; i++) {
        if (gpa >= d.writable[i].gpa && gpa <= d.writable[i].last) {
            return true;
        }
    }
    return false;
}

static void check_memory(void) {
    enum { BLOCK = 256 };
    for (size_t i = 0; i < MODEL_BYTES; i += BLOCK) {
        uint64_t gpa = i < RAM_END ? i : HIGH + (i - RAM_END);
        uint8_t *now = at(gpa), *was = truth_at(gpa);
        for (size_t k = 0; memcmp(now, was, BLOCK) && k < BLOCK; k++) {
            if (now[k] != was[k]) {
                rule(d.forged || may_write(gpa + k),
                     "a byte changed that was not offered, at", gpa + k);
                was[k] = now[k];
            }
        }
    }
    rule(memcmp(g.base, g.truth, sizeof g.ram) == 0,
         "host memory outside the guest's changed", 0);
    rule(guest_left_alone(), "memory changed where the guest's was", 0);
}

// What the device returned since it was last looked at.
static void check_used(unsigned queue) {
    rings *r = &d.ring[queue];
    const vblk_queue *q = &g.dev.queue[queue];
    r->muddled |= q->size != r->size || q->used_gpa != r->used;
    if (r->size == 0 || r->muddled || !is_mapped(r->used, used_bytes(r))) {
        return;
    }
    uint16_t idx = (uint16_t)peek(r->used, 2, 2);
    r->muddled |= (uint16_t)(idx - r->done) > r->size;
    for (; r->done != idx && !r->muddled && !d.differs; r->done++) {
        uint32_t id = peek(r->used, 4 + 8 * (uint64_t)(r->done % r->size), 4);
        rule(id < r->size && r->owed[id] > 0,
             "a chain is returned that was not offered, or twice, head", id);
        r->owed[id % r->size]--;
    }
}

static void check_all_used(void) {
    for (unsigned i = 0; i < m.queues && !d.forged; i++) {
        check_used(i);
    }
}

static void check_registers(void) {
    uint32_t is = rd(VBLK_REG_INTERRUPT_STATUS), status = rd(VBLK_REG_STATUS);
    bool     line = vblk_interrupt_line(&g.dev);
    rule((is & ~3u) == 0, "InterruptStatus has an undefined bit", is);
    rule((status & ~0xcfu) == 0, "Status has an undefined bit", status);
    rule(!line || is, "the line is high and InterruptStatus is", is);
    rule(!m.standard || line == (is != 0), "the line is not InterruptStatus",
         is);
}

static void check_wild(void) {
    check_memory();
    check_registers();
    rule(g.accesses < 1000000, "memory accesses", g.accesses);
    rule(!d.out_of_bounds, "the backend is asked for what is not there", 0);
    g.accesses = 0;
}

// The driver does something while the device is at work: offers more, or
// changes a byte that the device goes by.
static void strike(void) {
    unsigned queue = d.forged ? test_below(m.queues) : d.victim;
    rings   *r = &d.ring[queue];
    if (!live(queue) || is_full(queue)) {
        return;
    }
    if (!d.forged) {
        uint16_t idx = r->idx;
        say(" strike:");
        submit_one(queue);
        bool event = m.accepted & VBLK_F_EVENT_IDX;
        d.struck = true;
        d.told = !is_mapped(r->used, used_bytes(r)) || r->idx == idx ||
                 (event ? peek(r->used, used_bytes(r) - 2, 2) == idx
                        : !(peek(r->used, 0, 2) & 1));
    } else {
        uint64_t base = one_in(2) ? r->desc : r->avail;
        poke_in(base, test_below(256), test_below(256), 1);
        say(" strike");
    }
}

// Serve a queue until it is armed; the time at which to look again.
static uint64_t serve(unsigned queue) {
    vblk_request r;
    vblk_seg     seg[MAX_SEGS + 2];
    uint64_t     again = d.now;
    for (int i = 0; again == d.now && i < 100; i++) {
        if (d.engine) {
            return poll_engine(1000);
        }
        if (!d.async) {
            again = vblk_poll(&g.dev, d.now);
            continue;
        }
        while (vblk_next(&g.dev, queue, d.now, &r, seg, COUNT(seg))) {
            vblk_complete(&g.dev, &r, one_in(4) ? -5 : (int64_t)r.bytes);
        }
        vblk_publish(&g.dev, queue);
        again = vblk_arm(&g.dev, queue, d.now);
    }
    return again;
}

// The driver offers more at any moment of a drain. Unless the queue ends
// unarmed, that is seen: by the device, or by a driver who was to notify.
static void ambush(void) {
    unsigned queue = test_below(m.queues);
    rings   *r = &d.ring[queue];
    if (!live(queue) || is_full(queue) || !g.dev.memory.read) {
        return;
    }
    d.struck = d.told = false;
    d.victim = queue;
    submit_one(queue);
    g.ambush = 1 + test_below(100);
    say(" ambush at access %u:", g.ambush);
    vblk_mmio_write(&g.dev, VBLK_REG_QUEUE_NOTIFY, 4, queue);
    if (serve(queue) == VBLK_NEVER && d.struck && !d.told && !r->muddled &&
        !vblk_queue_broken(&g.dev, queue)) {
        rule(g.dev.queue[queue].run.avail_next == r->idx,
             "armed, and nobody will see the entry", r->idx - 1u);
    }
}

// Leave it to the model again: a reset, and both are as new.
static void tame(void) {
    g.fail_access = 0;
    g.keep_failing = false;
    g.hole_bytes = 0;
    g.ambush = 0;
    d.busy = d.forged = false;
    say(" tame");
    if (d.throttled || m.memory_given != (g.dev.memory.read != NULL)) {
        init_both();
    }
    vblk_mmio_write(&g.dev, VBLK_REG_STATUS, 4, 0);
    model_write(&m, VBLK_REG_STATUS, 4, 0);
    memcpy(m.disk.data, d.disk.data, sizeof m.disk.data);
    m.effects.count = d.effects.count = 0;
    m.counts = vblk_counters(&g.dev);
    m.reach = g.dev.backing;
    m.fired = g.fired;
    d.lowered = g.lowered;
    while (m.loose_count > 0) {
        m.loose[m.loose_at[--m.loose_count]] = 0;
    }
    begin_anew();
    d.wild = false;
}

// What descriptors say, those of requests that are over too: chains run into
// them.
static void find_writable(uint64_t table, uint64_t entries, bool indirect) {
    for (uint64_t i = 0; i < entries; i++) {
        if (!is_mapped(table + 16 * i, 16)) {
            continue;
        }
        uint64_t gpa = peek(table, 16 * i, 4) |
                       (uint64_t)peek(table, 16 * i + 4, 4) << 32;
        uint32_t n = peek(table, 16 * i + 8, 4);
        uint32_t flags = peek(table, 16 * i + 12, 2);
        if (flags & INDIRECT && !indirect) {
            find_writable(gpa, n / 16 < 256 ? n / 16 : 256, true);
        } else if (flags & WRITE) {
            may_be_written(gpa, n);
        }
    }
}

static vblk_file    file;
static vblk_backend ours;

// From here on the host is an engine, on a file, on a kernel that does what it
// likes.
static void become_engine(void) {
    int fd = memfd_create("disk", MFD_CLOEXEC);
    CHECK_EQ(sizeof d.disk.data, write(fd, d.disk.data, sizeof d.disk.data));
    CHECK_EQ(VBLK_OK, vblk_file_from(&file, fd, !g.dev.backend.write));
    ours = g.dev.backend;
    g.dev.backend = vblk_file_backend(&file);
    g.dev.backend.secure_erase = g.dev.backend.write_zeroes;
    g.dev.backend.lifetime = ours.lifetime;
    g.dev.backend.block_size = ours.block_size;
    g.dev.backend.physical_size = ours.physical_size;
    g.dev.backend.align_offset = ours.align_offset;
    g.dev.backend.opt_io = ours.opt_io;
    g.dev.backend.flush = ours.flush ? g.dev.backend.flush : NULL;
    uring_start(fd);
    kernel.now = d.now;
    kernel.tick = 100;
    kernel.ends = 10 + test_below(91);
    kernel.shorts = one_in(2) ? 0 : test_below(60);
    kernel.hold = d.busy ? test_below(20) : 0;
    kernel.hold_syncs = d.busy && one_in(3);
    kernel.cancels = one_in(2);
    kernel.error = one_in(3) ? 5 : 0;
    kernel.sync_error = one_in(6) ? 5 : 0;
    CHECK_EQ(VBLK_OK,
             vblk_engine_open(&engine, &g.dev, VBLK_ALL_QUEUES, true));
    plain_count = 0;
    memset(writes, 0, sizeof writes);
    engine.now = uring_now;
    engine.look_on_ns = test_below(2) * 1000;
    d.engine = true;
    say(" engine;");
}

// Whether what the driver offered in `queue` was served and shown.
static void check_served(unsigned queue, uint64_t next) {
    const vblk_run *run = &g.dev.queue[queue].run;
    bool            same = g.dev.queue[queue].size == d.ring[queue].size &&
                g.dev.queue[queue].used_gpa == d.ring[queue].used;
    if (!live(queue) || vblk_queue_broken(&g.dev, queue) || !same ||
        !g.dev.queue[queue].ready || d.ring[queue].muddled ||
        !g.dev.memory.read || d.forged || d.busy || g.fail_access ||
        g.hole_bytes ||
        rd(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET) {
        return;
    }
    rule(run->used_shown == (uint16_t)run->used_next,
         "an end is not shown, of queue", queue);
    rule(!run->stalled || next != VBLK_NEVER, "nobody comes back to queue",
         queue);
    rule(run->stalled || run->avail_next == d.ring[queue].idx,
         "what was offered is not seen, in queue", queue);
}

// Reads of what nobody wrote, and writes of what nobody else did, which ended
// well: their data.
static void check_plain(const plain *r, const uint8_t *now) {
    uint64_t sector = r->sector;
    unsigned done = 0;
    if (*at(r->status) != VBLK_S_OK) {
        return;
    }
    for (unsigned i = 1; i + 1 < r->parts; i++) {
        for (unsigned k = 0; k < r->p[i].n && !d.differs; k++, done++) {
            uint64_t byte = sector * 512 + done;
            bool     in = r->type == VBLK_T_IN;
            if (byte < sizeof d.disk.data && writes[byte / 512] == !in) {
                rule(*at(r->p[i].gpa + k) == (in ? d.disk.data : now)[byte],
                     in ? "an engine reads something else, at"
                        : "an engine wrote something else, at", byte);
            }
        }
    }
}

static void check_plains(void) {
    static uint8_t now[sizeof d.disk.data];
    CHECK_EQ(sizeof now, pread(file.fd, now, sizeof now, 0));
    for (unsigned i = 0; i < plain_count && !d.differs; i++) {
        if (!d.forged && !g.hole_bytes && m.capacity <= MODEL_SECTORS) {
            check_plain(&plains[i], now);
        }
    }
    memcpy(d.disk.data, now, sizeof now);
}

// All that it took has an end, and what ends late touches nothing.
static void leave_engine(void) {
    kernel.let_go = 1;
    vblk_notify(&g.dev, VBLK_ALL_QUEUES);
    uint64_t next = poll_engine(2000);
    for (unsigned i = 0; i < m.queues; i++) {
        check_served(i, next);
    }
    check_all_used();
    check_wild();
    rule(engine.under_way == 0, "an engine does not end, requests",
         engine.under_way);
    rule(vblk_engine_quiesce(&engine, VBLK_ALL_QUEUES, 1) == VBLK_OK &&
         vblk_engine_close(&engine) == VBLK_OK, "an engine is not quiet", 0);
    uring_stop();
    check_plains();
    vblk_file_close(&file);
    g.dev.backend = ours;
    d.engine = false;
}

static void go_wild(void) {
    d.wild = true;
    d.writables = 0;
    for (unsigned i = 0; i < m.queues; i++) {
        find_writable(g.dev.queue[i].desc_gpa, g.dev.queue[i].size, false);
    }
    for (unsigned i = 0; i < SLOTS; i++) { // their descriptors may be others'
        const model_chain *c = &d.slot[i].want.c;
        for (unsigned k = 0; d.slot[i].used && k < c->count; k++) {
            if (c->all[k].write) {
                may_be_written(c->all[k].gpa, c->all[k].n);
            }
        }
    }
    memcpy(g.truth, g.base, sizeof g.ram);
    g.accesses = 0;
    unsigned how = test_below(d.engines ? 8 : 6);
    switch (how) {
    case 0:
        g.fail_access = 1 + (int)test_below(60);
        g.keep_failing = one_in(4);
        say(" access %d is refused%s", g.fail_access,
            g.keep_failing ? ", and all after it" : "");
        break;
    case 1:
        g.hole = d.takens > 0 ? d.taken[test_below(d.takens)].gpa : 0;
        g.hole += test_below(64);
        g.hole_bytes = 1 + test_below(100);
        say(" no memory at %#" PRIx64, g.hole);
        break;
    case 2: break; // ambush()
    case 3: d.forged = true; break;
    case 4:
        d.forged = true;
        g.ambush = 1 + test_below(100);
        break;
    case 5: d.busy = true; break;
    default: break; // an engine alone
    }
    g.strike = strike;
    unsigned steps = 1 + test_below(4);
    if (d.engines && (how > 5 || one_in(3))) {
        become_engine();
        steps += 2 + test_below(10);
        if (!live(0)) {
            bind_driver();
            check_all_used();
            check_wild();
        }
    }
    for (; steps > 0 && !d.differs; steps--) {
        if (d.forged && d.takens > 0) {
            const range *r = &d.taken[test_below(d.takens)];
            poke_in(r->gpa, test_below(64), test_below(256), 1);
        }
        if (how == 2) {
            ambush();
        } else if (d.engine && one_in(2)) {
            step_requests();
        } else {
            step();
        }
        check_all_used();
        check_wild();
    }
    if (d.engine) {
        leave_engine();
    }
    tame();
}

static uint64_t soak(uint64_t sessions) {
    const char *times = getenv("VBLK_SOAK");
    double      n = (double)sessions * (times ? strtod(times, NULL) : 1);
    return n < 1 ? 1 : (uint64_t)n;
}

static void agree(vblk_profile profile, bool throttled, bool async) {
    uint64_t sessions = soak(throttled ? SESSIONS / 2 : SESSIONS);
    memset(&d, 0, sizeof d);
    mixed = 0;
    d.throttled = throttled;
    d.async = async;
    for (uint64_t i = 0; i < sessions && !d.differs; i++) {
        make(profile);
        for (uint64_t k = 0; k < STEPS && !d.differs; k++) {
            d.session = i;
            d.step = k;
            d.said_bytes = 0;
            d.said[0] = 0;
            step();
            compare(k % 100 == 0 || k + 1 == STEPS);
        }
        d.requests += m.requests;
    }
    if (getenv("VBLK_SOAK")) {
        printf("  %" PRIu64 " requests compared\n", d.requests);
    }
    guest_init(); // its own rules are about another driver
}

// A session by the choices of a fuzzer: first what kind, a bit each.
bool model_session(const uint8_t *in, size_t n) {
    uint8_t kind = n > 0 ? *in : 0;
    guest_use_map = kind & 2;
    memset(&d, 0, sizeof d);
    d.throttled = kind & 4;
    d.async = kind & 8;
    d.engines = kind >= 0xc0;
    test_feed(in + 1, n > 0 ? n - 1 : 0);
    mixed = 0;
    for (size_t i = n < 4 ? 0 : n - 4; i < n; i++) { // its end
        mixed = mixed << 8 | in[i];
    }
    mixed *= 0x9e3779b1;
    make(kind & 1 ? VBLK_STANDARD : VBLK_STRICT);
    for (d.step = 0; test_fed() > 0 && !d.differs; d.step++) {
        d.said_bytes = 0;
        d.said[0] = 0;
        if (one_in(8)) {
            go_wild();
        } else {
            step();
            check_all_used();
        }
        compare(test_fed() == 0);
    }
    return !d.differs;
}

void model_agrees_strict(void) {
    agree(VBLK_STRICT, false, false);
}

void model_agrees_standard(void) {
    agree(VBLK_STANDARD, false, false);
}

// Both profiles, and time: it moves when the test says so.
void model_agrees_throttled(void) {
    agree(VBLK_STRICT, true, false);
    agree(VBLK_STANDARD, true, false);
}

// Both profiles, with a host that takes requests, ends them late and in any
// order, and does what else a host may.
void model_agrees_with_any_host(void) {
    agree(VBLK_STRICT, false, true);
    agree(VBLK_STANDARD, false, true);
    agree(VBLK_STRICT, true, true);
    agree(VBLK_STANDARD, true, true);
}

// Memory that refuses, moves or changes in the middle of a call, a host that
// cannot end what it has: after a reset the model and the device agree again.
void model_comes_back_from_anything(void) {
    uint8_t  in[3000];
    uint64_t sessions = soak(32);
    for (uint64_t i = 0; i < sessions && !test_failed; i++) {
        test_random_from(test_seed + i);
        for (size_t k = 0; k < sizeof in; k++) {
            in[k] = (uint8_t)test_random();
        }
        in[0] = (uint8_t)(i % 16 + (i / 16 % 2 ? 0 : 0xc0));
        ROW_BEGIN();
        (void)model_session(in, sizeof in);
        ROW("session %" PRIu64, i);
    }
    guest_init();
}
