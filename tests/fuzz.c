// Bytes to a program of guest and host actions, and the rules that hold after
// each of them. A broken rule aborts with one line.
//
//     -fsanitize=fuzzer              LLVMFuzzerTestOneInput(); the device in
//                                    a unit of its own, so that branches are
//                                    counted there alone
//     -DFUZZ_REPLAY                  main() that runs the files it is given
//     -DFUZZ_REPLAY -DFUZZ_SEEDS     main() that writes seeds to a directory
//     -DFUZZ_IN_TESTS                the test fuzz_corpus_replays
#define _FILE_OFFSET_BITS 64
#ifdef FUZZ_IN_TESTS
#include "test.h"
const char *event_text(int code); // of guest.h
#include "tests.h"
#endif
#ifdef FUZZ_REPLAY
#define VBLK_IMPLEMENTATION
#endif
#include "../vblk.h"
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Guest memory: two regions that touch at SEAM but lie apart in the host, a
// hole, and one that ends at 2^64.
#define SEAM     0x2000u
#define RAM_END  0x4000u
#define HIGH     0xfffffffffffff000u
#define BYTES    0x5000u // of all three
#define MOVED    0xdd    // what an old mapping holds
#define QUEUES   8
#define SEGS     (128 + 2 + 16)
#define MAX_SIZE 256u // entries of a queue that the rules are checked for
#define SLOTS    24
#define COUNT_OF(array) (sizeof(array) / sizeof(array)[0])

int  LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
bool fuzz_replay_dir(const char *dir);

// The programs. An action is one of these and its parameters, a byte each
// unless said otherwise.
enum {
    READ,     // offset, width
    WRITE,    // offset, width, value
    POKE,     // address, value, bytes
    DESC,     // queue, index, address, length, flags, next
    AVAIL,    // queue, head, step of avail.idx
    WISH,     // queue, avail.flags or used_event
    REQUEST,  // what and where, type, sector and length, framing, place
    MANY,     // how many, and a REQUEST
    KICK,     // queue
    DRAIN,    // queue, how
    NEXT,     // queue, how
    COMPLETE, // slot, how, bytes
    PUBLISH,  // queue
    ACK,      // bits
    TIME,     // amount
    UP,       // declined, sizes, place
    BACKEND,  // outcome, when
    REFUSE,   // address or access, how many
    REMAP,    // how
    LIMIT,    // which
    HOST,     // needs reset, accept, status
    START,    // queue, size, position
    STOP,     // queue
    FORGE,    // what a driver could not have meant to offer
    AMBUSH,   // memory access, what the guest does meanwhile
    ACTIONS
};

typedef struct range {
    uint64_t gpa, n;
    int      queue;
    bool     write;
} range;

// A chain that waits in a ring, as the rules read it.
typedef struct waiting {
    uint16_t head;
    unsigned first, ranges; // in step.range
    uint64_t in_bytes;
} waiting;

typedef struct slot { // a request in the hands of the host
    bool         used, tangled;
    unsigned     session;
    unsigned     ranges;
    range        range[SEGS];
    vblk_request req;
    vblk_seg     seg[SEGS];
} slot;

typedef struct seen { // what is known of a queue
    unsigned session;  // changes when requests of it go stale
    bool     tangled;  // the guest wrote over its own rings
    bool     poisoned;
    uint16_t used;     // position
    uint16_t decided;  // used.idx when an interrupt was last decided on
    uint16_t desc;     // next descriptor of the driver
    unsigned fired;
    uint16_t owed[MAX_SIZE]; // chains taken and not returned, by head
    uint64_t in_bytes[MAX_SIZE];
    uint64_t status[MAX_SIZE]; // address, 0: not known
    unsigned taken_at[MAX_SIZE];
    bool     back[MAX_SIZE]; // returned in this step
} seen;

static struct fuzz {
    const uint8_t *in;
    size_t         left;

    vblk_dev      dev;
    vblk_queue    vq[QUEUES];
    vblk_options  o;
    vblk_region   region[3];
    vblk_regions  vram;
    unsigned      bank; // which of two mappings guest memory is at
    bool          moved;
    uint64_t      hole, hole_bytes;
    unsigned      fail_access; // the nth from now is refused
    unsigned      said;        // events
    uint64_t      rings, bump; // next free address
    uint64_t      now;

    uint64_t backing;   // bytes the backend has
    uint64_t most;      // a call moves at most this much; 0: all
    unsigned fail_call; // the nth from now
    bool     stuck;     // writes move nothing
    uint64_t   last_end; // where a call stopped inside a segment
    const void *last_ptr;

    bool     busy;   // what is under way cannot be ended
    bool     async;  // drain by next, complete and publish
    unsigned ambush; // memory accesses until the guest strikes
    uint8_t  ambush_how;

    seen        queue[QUEUES];
    slot        slot[SLOTS];
    vblk_counts counts;
} f;

// What the action under way may do. Filled in by begin().
static struct step {
    uint16_t from[QUEUES]; // position in the available ring
    unsigned first[QUEUES], waits[QUEUES];
    unsigned chains, ranges, tables;
    waiting  chain[2048];
    range    range[8192];
    range    table[512]; // what the device goes by: rings, indirect tables
    bool     tangled;    // these may change under it: no rule can tell
    bool     takes;
    uint64_t payload, walked; // bytes, descriptors
    uint64_t accesses, calls;
    unsigned bytes_written; // entries of byte[]
    uint64_t byte[256];     // addresses of writes of one byte
    uint64_t ended; // by the counters
    unsigned refusals;
    unsigned moody;    // of those, where memory had said yes before
    bool     notified; // the guest was told to notify when it struck
    unsigned number;
} s;

static uint8_t     low0[SEAM], mid0[SEAM], high0[0x1000];
static uint8_t     low1[SEAM + 1], mid1[SEAM + 1], high1[0x1000 + 1];
static const size_t area[] = {0, SEAM, RAM_END, BYTES};
static uint8_t     dirt[BYTES];  // what memory holds at first
static uint8_t     truth[BYTES]; // what the guest wrote, or let be written

// Seen ever: events, by profile and by whether there is map. A fuzzer counts
// them as it counts branches.
#if defined(__clang__) && defined(__linux__)
__attribute__((section("__libfuzzer_extra_counters")))
#endif
static uint8_t events[VBLK_EV_END][2][2];
static const char *current = "";

static void die(const char *rule) {
    fprintf(stderr, "fuzz: %s%s%s\n", rule, *current ? ": " : "", current);
    abort();
}

static void rule(bool holds, const char *text) {
    if (!holds) {
        die(text);
    }
}

static uint8_t byte(void) {
    if (f.left == 0) {
        return 0;
    }
    f.left--;
    return *f.in++;
}


// ---- Memory ----------------------------------------------------------------

static bool is_ram(uint64_t gpa) {
    return gpa < RAM_END || gpa >= HIGH;
}

static size_t flat(uint64_t gpa) {
    return (size_t)(gpa < RAM_END ? gpa : gpa - HIGH + RAM_END);
}

static uint64_t gpa_of(size_t at) {
    return at < RAM_END ? at : at - RAM_END + HIGH;
}

// The second mapping is at odd addresses.
static uint8_t *in_bank(unsigned bank, size_t at) {
    static uint8_t *const base[2][3] = {
        {low0, mid0, high0},
        {low1 + 1, mid1 + 1, high1 + 1},
    };
    unsigned a = at < SEAM ? 0 : at < RAM_END ? 1 : 2;
    return base[bank][a] + (at - area[a]);
}

static uint8_t *at(uint64_t gpa) {
    return in_bank(f.bank, flat(gpa));
}

static bool overlap(uint64_t a, uint64_t an, uint64_t b, uint64_t bn) {
    return an && bn && (a <= b ? b - a < an : a - b < bn);
}

static uint64_t used_bytes(const vblk_queue *q) {
    return 6 + 8 * (uint64_t)q->size;
}

// The guest or the host wrote there: what a ring says may not be what the
// device put into it.
static void disturb(uint64_t gpa, uint64_t n) {
    for (unsigned i = 0; i < QUEUES; i++) {
        const vblk_queue *q = &f.dev.queue[i];
        f.queue[i].tangled |= overlap(gpa, n, q->used_gpa, used_bytes(q));
    }
}

static void poke(uint64_t gpa, const void *src, size_t n) {
    disturb(gpa, n);
    while (n > 0 && is_ram(gpa)) {
        size_t i = flat(gpa), run = n;
        for (unsigned a = 1; a < 4; a++) {
            if (i < area[a]) {
                run = area[a] - i < n ? area[a] - i : n;
                break;
            }
        }
        memcpy(in_bank(f.bank, i), src, run);
        memcpy(truth + i, src, run);
        src = (const uint8_t *)src + run;
        gpa += run;
        n -= run;
    }
}

static void poke_le(uint64_t gpa, uint64_t value, unsigned bytes) {
    uint8_t b[8];
    for (unsigned i = 0; i < bytes; i++) {
        b[i] = (uint8_t)(value >> 8 * i);
    }
    poke(gpa, b, bytes);
}

static bool peek(uint64_t gpa, unsigned bytes, uint64_t *value) {
    *value = 0;
    for (unsigned i = 0; i < bytes; i++) {
        if (!is_ram(gpa + i)) {
            return false;
        }
        *value |= (uint64_t)*at(gpa + i) << 8 * i;
    }
    return true;
}

static void strike(void);

static uint16_t peek16(uint64_t gpa) {
    uint64_t value;
    peek(gpa, 2, &value);
    return (uint16_t)value;
}

static bool refused(uint64_t gpa, uint64_t n) {
    s.accesses++;
    if (f.ambush > 0 && --f.ambush == 0) {
        strike();
    }
    rule(s.accesses < 10000000, "memory is accessed without end");
    bool now = f.fail_access > 0 && --f.fail_access == 0;
    s.moody += now;
    return now || overlap(gpa, n, f.hole, f.hole_bytes);
}

static int mem_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    if (refused(gpa, n) || m.read(m.user, gpa, dst, n)) {
        s.refusals++;
        return -1;
    }
    return 0;
}

// How many of the ranges that may be written hold `gpa`.
static unsigned covered(uint64_t gpa) {
    unsigned n = 0;
    for (unsigned i = 0; i < s.ranges; i++) {
        n += s.range[i].write && gpa - s.range[i].gpa < s.range[i].n;
    }
    return n;
}

static int mem_write(void *user, uint64_t gpa, const void *src, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    if (refused(gpa, n) || m.write(m.user, gpa, src, n)) {
        s.refusals++;
        return -1;
    }
    if (src && n == 1 && !s.tangled &&
        s.bytes_written < COUNT_OF(s.byte)) {
        unsigned times = 1;
        for (unsigned i = 0; i < s.bytes_written; i++) {
            times += s.byte[i] == gpa;
        }
        s.byte[s.bytes_written++] = gpa;
        rule(times <= covered(gpa), "a status byte is written twice");
    }
    return 0;
}

static void *mem_map(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    rule(*n > 0, "map is asked for nothing");
    if (f.hole_bytes && gpa < f.hole && f.hole - gpa < *n) {
        *n = f.hole - gpa;
    }
    void *p = refused(gpa, 1) ? NULL : m.map(m.user, gpa, n, writable);
    s.refusals += !p;
    return p;
}

static void set_regions(unsigned regions) {
    static const uint64_t gpa[3] = {SEAM, 0, HIGH};
    for (unsigned i = 0; i < 3; i++) {
        f.region[i].gpa = gpa[i];
        f.region[i].bytes = i < 2 ? SEAM : BYTES - RAM_END;
        f.region[i].host = at(gpa[i]);
    }
    f.vram.region = f.region;
    f.vram.count = regions;
}

static vblk_memory memory(bool map) {
    vblk_memory m = {mem_read, mem_write, map ? mem_map : NULL, &f.vram};
    return m;
}


// ---- Disk ------------------------------------------------------------------

static bool call_fails(uint64_t offset, const vblk_seg *seg, unsigned segs) {
    uint64_t bytes = 0;
    uint64_t end = f.dev.capacity * 512;
    for (unsigned i = 0; i < segs; i++) {
        rule(seg[i].n > 0, "the backend gets an empty segment");
        rule(seg[i].ptr != NULL, "the backend gets a segment without pointer");
        bytes += seg[i].n;
    }
    rule(bytes > 0, "the backend is asked for nothing");
    rule(f.last_end != offset || !f.last_ptr || seg[0].ptr == f.last_ptr,
         "the backend is asked to go on at another place");
    f.last_ptr = NULL;
    rule(offset <= end && bytes <= end - offset,
         "the backend is asked beyond the end of the disk");
    s.calls++;
    return f.fail_call > 0 && --f.fail_call == 0;
}

static uint8_t on_disk(uint64_t offset) {
    return (uint8_t)(offset / 512 * 7 + offset * 3 + 1);
}

// How much of a call is done.
static uint64_t share(uint64_t offset, uint64_t bytes) {
    uint64_t there = offset < f.backing ? f.backing - offset : 0;
    bytes = bytes < there ? bytes : there;
    return f.most && f.most < bytes ? f.most : bytes;
}

static void stopped_at(uint64_t offset, const uint8_t *ptr) {
    f.last_end = offset;
    f.last_ptr = ptr;
}

static int64_t disk_read(void *user, uint64_t offset, const vblk_seg *seg,
                         unsigned segs) {
    (void)user;
    if (call_fails(offset, seg, segs)) {
        return -5;
    }
    uint64_t done = 0;
    for (unsigned i = 0; i < segs; i++) {
        uint64_t n = share(offset + done, seg[i].n);
        memset(seg[i].ptr, on_disk(offset + done), (size_t)n);
        done += n;
        if (n < seg[i].n) {
            stopped_at(offset + done, n ? seg[i].ptr + n : NULL);
            break;
        }
    }
    return (int64_t)done;
}

static int64_t disk_write(void *user, uint64_t offset, const vblk_seg *seg,
                          unsigned segs) {
    static uint8_t sink[512];
    (void)user;
    rule(f.dev.backend.write != NULL, "a read-only disk is written");
    if (call_fails(offset, seg, segs)) {
        return -28;
    }
    uint64_t done = 0;
    for (unsigned i = 0; i < segs && !f.stuck; i++) {
        uint64_t n = share(offset + done, seg[i].n);
        memcpy(sink, seg[i].ptr, n < sizeof sink ? (size_t)n : sizeof sink);
        done += n;
        if (n < seg[i].n) {
            stopped_at(offset + done, n ? seg[i].ptr + n : NULL);
            break;
        }
    }
    return (int64_t)done;
}

static int disk_flush(void *user) {
    (void)user;
    s.calls++;
    return f.fail_call > 0 && --f.fail_call == 0 ? -5 : 0;
}

static uint64_t disk_size(void *user) {
    (void)user;
    return f.backing;
}


// ---- Hooks -----------------------------------------------------------------

static void on_interrupt(void *user, int queue, bool fire) {
    (void)user;
    bool line = vblk_interrupt_line(&f.dev);
    rule(line == fire, "the line is not what the interrupt says");
    rule(queue == VBLK_NO_QUEUE ||
             (queue >= 0 && queue < (int)f.dev.queues),
         "an interrupt for no queue");
    if (fire && queue >= 0) {
        f.queue[queue].fired++;
    }
    vblk_counters(&f.dev);
}

static void on_event(void *user, const vblk_event *e) {
    (void)user;
    rule(e->code > VBLK_EV_NONE && e->code < VBLK_EV_END,
         "an event without a code");
    rule(e->queue >= VBLK_NO_QUEUE && e->queue < QUEUES,
         "an event of no queue");
    f.said++;
    events[e->code][f.o.profile == VBLK_STANDARD][!f.dev.memory.map] = 1;
}

static int on_quiesce(void *user, int queue) {
    (void)user;
    rule(queue == VBLK_ALL_QUEUES || (queue >= 0 && queue < (int)f.dev.queues),
         "no queue is to be quiet");
    return f.busy ? -1 : 0;
}


// ---- What waits in the rings -----------------------------------------------

static bool live(unsigned queue) {
    bool mq = vblk_driver_features(&f.dev) & VBLK_F_MQ;
    return vblk_status(&f.dev) & VBLK_STATUS_DRIVER_OK &&
           queue < (mq ? f.dev.queues : 1) && f.dev.queue[queue].ready &&
           f.dev.queue[queue].size;
}

static void add_range(int queue, uint64_t gpa, uint64_t n, bool write) {
    if (s.ranges == COUNT_OF(s.range)) {
        s.tangled = true;
        return;
    }
    range *r = &s.range[s.ranges++];
    r->gpa = gpa;
    r->n = n == 0 || n - 1 <= UINT64_MAX - gpa ? n : 0 - gpa;
    r->queue = queue;
    r->write = write;
    s.payload += n < BYTES ? n : BYTES;
}

static void add_table(int queue, uint64_t gpa, uint64_t n) {
    if (s.tables == COUNT_OF(s.table)) {
        s.tangled = true;
        return;
    }
    range r = {gpa, n, queue, false};
    s.table[s.tables++] = r;
}

// What of the chain at `head` the device may use; nothing if V1 drops it. Of
// one that is too long it uses the last writable byte (P5).
static void walk(unsigned queue, uint16_t head) {
    const vblk_queue *q = &f.dev.queue[queue];
    uint64_t table = q->desc_gpa, entries = q->size, i = head;
    bool indirect = false;
    unsigned ranges = s.ranges;
    if (s.chains == COUNT_OF(s.chain)) {
        s.tangled = true;
        return;
    }
    waiting *w = &s.chain[s.chains++];
    w->head = head;
    w->first = s.ranges;
    w->in_bytes = 0;
    uint64_t most = f.dev.strict ? f.dev.seg_max + 2 : 32768;
    for (uint64_t n = 0, taken = 0; n < most && taken < entries; taken++) {
        s.walked++;
        uint64_t gpa, len, flags, next, d = table + 16 * i;
        if (i >= entries || !peek(d, 8, &gpa) || !peek(d + 8, 4, &len) ||
            !peek(d + 12, 2, &flags) || !peek(d + 14, 2, &next)) {
            break;
        }
        if (flags & 4) {
            if (indirect || flags & 1 || len % 16 ||
                !(vblk_driver_features(&f.dev) & VBLK_F_INDIRECT_DESC)) {
                break;
            }
            indirect = true;
            table = gpa;
            entries = len / 16;
            i = 0;
            taken = UINT64_MAX; // one less than none
            add_table((int)queue, gpa, len);
            continue;
        }
        n++;
        add_range((int)queue, gpa, len, flags & 2);
        w->in_bytes += flags & 2 ? len : 0;
        if (!(flags & 1)) {
            w->ranges = s.ranges - w->first;
            return;
        }
        i = next;
    }
    w->ranges = 0;
    w->in_bytes = 0;
    s.ranges = ranges;
}

static void collect(unsigned queue) {
    const vblk_queue *q = &f.dev.queue[queue];
    uint16_t idx = peek16(q->avail_gpa + 2);
    uint16_t ahead = (uint16_t)(q->run.avail_seen - q->run.avail_next);
    uint16_t more = (uint16_t)(idx - q->run.avail_seen);
    if (more <= q->size) {
        ahead = (uint16_t)(ahead + more);
    }
    s.first[queue] = s.chains;
    for (unsigned i = 0; i < ahead; i++) {
        unsigned place = (unsigned)(q->run.avail_next + i) & (q->size - 1);
        uint16_t head = peek16(q->avail_gpa + 4 + 2 * (uint64_t)place);
        if (head >= q->size) {
            break;
        }
        walk(queue, head);
        s.waits[queue]++;
    }
}

// Ranges that may be written and what the device goes by.
static void find_overlaps(void) {
    s.tangled = s.tangled || (uint64_t)s.tables * s.ranges > 200000;
    for (unsigned i = 0; i < s.ranges && !s.tangled; i++) {
        const range *r = &s.range[i];
        for (unsigned k = 0; r->write && k < s.tables; k++) {
            s.tangled |= overlap(r->gpa, r->n, s.table[k].gpa, s.table[k].n);
        }
    }
    for (unsigned i = 0; i < s.ranges && !s.tangled; i++) {
        const range *r = &s.range[i];
        for (unsigned k = 0; r->write && k < QUEUES; k++) {
            const vblk_queue *q = &f.dev.queue[k];
            f.queue[k].tangled |=
                (r->queue != VBLK_NO_QUEUE || q->used_gpa != r->gpa) &&
                overlap(r->gpa, r->n, q->used_gpa, used_bytes(q));
        }
    }
}

// The guest does something while the device is at work: offers one more
// chain, or changes a byte that the device goes by.
static void strike(void) {
    const vblk_queue *q = &f.dev.queue[0];
    if (!s.takes || !live(0)) {
        return;
    }
    if (f.ambush_how & 1 && s.first[0] + s.waits[0] == s.chains) {
        uint16_t idx = peek16(q->avail_gpa + 2);
        uint16_t head = f.ambush_how >> 1 & (q->size - 1) & 0xff;
        uint64_t at_idx = q->avail_gpa + 4 +
                          2 * (uint64_t)(idx & (q->size - 1));
        s.tangled |= (uint16_t)(idx + 1 - q->run.avail_next) > q->size;
        s.notified = vblk_driver_features(&f.dev) & VBLK_F_EVENT_IDX
                         ? peek16(q->used_gpa + used_bytes(q) - 2) == idx
                         : !(peek16(q->used_gpa) & 1);
        poke_le(at_idx, head, 2);
        poke_le(q->avail_gpa + 2, idx + 1u, 2);
        walk(0, head);
        find_overlaps();
        s.waits[0]++;
    } else {
        uint64_t gpa = f.ambush_how & 2 ? q->desc_gpa : q->avail_gpa;
        poke_le(gpa + (f.ambush_how >> 2), f.ambush_how ^ 0x5au, 1);
        s.tangled = true;
    }
}

// Chains that ended, by the counters: an unknown type and GET_ID do not show.
static uint64_t ended(void) {
    vblk_counts c = vblk_counters(&f.dev);
    return c.reads + c.writes + c.flushes + c.io_errors;
}

// What an action on `queue` (VBLK_ALL_QUEUES: on any, VBLK_NO_QUEUE: on none)
// may write: its used ring and, if it takes chains, what they offer.
static void begin(int queue, bool takes) {
    s.chains = s.ranges = s.tables = s.bytes_written = s.refusals = 0;
    s.payload = s.walked = s.accesses = s.calls = 0;
    s.tangled = s.notified = false;
    s.moody = 0;
    f.last_ptr = NULL;
    s.takes = takes;
    s.number++;
    s.ended = ended();
    for (unsigned i = 0; i < QUEUES; i++) {
        const vblk_queue *q = &f.dev.queue[i];
        s.from[i] = q->run.avail_next;
        s.waits[i] = 0;
        f.queue[i].fired = 0;
        if (!live(i)) {
            continue;
        }
        s.tangled = s.tangled || q->size > MAX_SIZE;
        if (queue == VBLK_ALL_QUEUES || queue == (int)i) {
            add_range((int)i, q->used_gpa, used_bytes(q), true);
            s.range[s.ranges - 1].queue = VBLK_NO_QUEUE;
            add_table((int)i, q->desc_gpa, 16 * (uint64_t)q->size);
            add_table((int)i, q->avail_gpa, 6 + 2 * (uint64_t)q->size);
            if (takes && !s.tangled && !q->broken) {
                collect(i);
            }
        }
    }
    find_overlaps();
}


// ---- The rules -------------------------------------------------------------

// What of [i, end) may have changed.
static size_t past_range(size_t i, size_t end) {
    for (unsigned k = 0; k < s.ranges; k++) {
        const range *r = &s.range[k];
        uint64_t in = gpa_of(i) - r->gpa;
        if (r->write && in < r->n) {
            return r->n - in < end - i ? i + (size_t)(r->n - in) : end;
        }
    }
    die("a byte changed that was not offered");
    return end;
}

static void check_memory(void) {
    for (unsigned a = 0; a < 3; a++) {
        const uint8_t *p = in_bank(f.bank, area[a]);
        size_t n = area[a + 1] - area[a];
        uint8_t *was = truth + area[a];
        if (memcmp(p, was, n) == 0) {
            continue;
        }
        for (size_t i = 0; i < n && !s.tangled;) {
            if (i % 64 == 0 && memcmp(p + i, was + i, 64) == 0) {
                i += 64;
            } else if (p[i] == was[i]) {
                i++;
            } else {
                i = past_range(area[a] + i, area[a + 1]) - area[a];
                while (i < n && i % 64 && p[i] == was[i]) {
                    i++;
                }
            }
        }
        memcpy(was, p, n);
    }
    for (unsigned a = 0; f.moved && a < 3; a++) {
        const uint8_t *p = in_bank(!f.bank, area[a]);
        size_t n = area[a + 1] - area[a];
        rule(*p == MOVED && !memcmp(p, p + 1, n - 1),
             "an old mapping was written to");
    }
}

static void check_counters(void) {
    vblk_counts c = vblk_counters(&f.dev);
    const vblk_counts *was = &f.counts;
    rule(c.reads >= was->reads && c.writes >= was->writes &&
             c.flushes >= was->flushes && c.io_errors >= was->io_errors &&
             c.bytes_read >= was->bytes_read &&
             c.bytes_written >= was->bytes_written &&
             c.throttled >= was->throttled &&
             (c.throttled_ns >= was->throttled_ns || f.now >> 62) && // wraps
             c.broken_queues >= was->broken_queues,
         "a counter went back");
    uint64_t stalled = 0;
    for (unsigned i = 0; i < QUEUES; i++) {
        stalled += f.dev.queue[i].run.stalled;
    }
    rule(c.currently_throttled == stalled, "the gauge is wrong");
    rule(f.dev.waits ? f.dev.queue[f.dev.turn].run.stalled : !stalled,
         "a turn without a stall, or a stall without a turn");
    f.counts = c;
}

static void check_registers(void) {
    uint64_t is = vblk_mmio_read(&f.dev, VBLK_REG_INTERRUPT_STATUS, 4);
    uint64_t status = vblk_mmio_read(&f.dev, VBLK_REG_STATUS, 4);
    bool line = vblk_interrupt_line(&f.dev);
    rule((is & ~(uint64_t)3) == 0, "InterruptStatus has an undefined bit");
    rule((status & ~(uint64_t)0xcf) == 0, "Status has an undefined bit");
    rule(!line || is, "the line is high and InterruptStatus 0");
    rule(f.o.profile == VBLK_STRICT || line == (is != 0),
         "standard: the line is not InterruptStatus");
}

// The used ring, from where it was last looked at.
static void check_used(unsigned queue) {
    const vblk_queue *q = &f.dev.queue[queue];
    seen *k = &f.queue[queue];
    uint16_t idx = peek16(q->used_gpa + 2);
    uint16_t n = (uint16_t)(q->run.used_shown - k->used);
    if (k->tangled || n == 0 || (q->broken && idx != q->run.used_shown)) {
        k->used = q->run.used_shown;
        return;
    }
    rule(idx == q->run.used_shown, "used.idx is not what the device counted");
    if (n > q->size) { // a driver that offers what it did not get back
        k->used = (uint16_t)(idx - q->size);
    }
    for (; k->used != idx; k->used++) {
        uint64_t id, len, place = k->used & (q->size - 1);
        peek(q->used_gpa + 4 + 8 * place, 4, &id);
        peek(q->used_gpa + 8 + 8 * place, 4, &len);
        rule(id < q->size, "the used ring names no head");
        rule(k->owed[id] > 0, "a chain is returned that was not taken");
        rule(len <= k->in_bytes[id], "a used length is more than was offered");
        k->owed[id]--;
        if (k->owed[id] == 0 && k->status[id] && len > 0 &&
            k->taken_at[id] == s.number) {
            uint64_t status;
            peek(k->status[id], 1, &status);
            rule(status <= 2, "a chain is returned without a status");
        }
        k->back[id] = k->owed[id] == 0 && k->status[id];
    }
}

// The driver takes its memory back: a second status would show.
static void take_back(unsigned queue) {
    seen *k = &f.queue[queue];
    for (unsigned id = 0; id < MAX_SIZE; id++) {
        if (k->back[id]) {
            poke_le(k->status[id], 0xff, 1);
            k->back[id] = false;
        }
    }
}

static bool holds(uint64_t gpa) {
    uint64_t value;
    return peek(gpa, 1, &value);
}

// Chains that were taken belong to the device.
static void check_taken(unsigned queue) {
    const vblk_queue *q = &f.dev.queue[queue];
    seen *k = &f.queue[queue];
    uint16_t taken = (uint16_t)(q->run.avail_next - s.from[queue]);
    if (!s.takes || !live(queue) || s.tangled) {
        k->tangled |= s.takes && s.tangled;
        return;
    }
    rule(taken <= s.waits[queue], "a chain is taken that was not offered");
    for (unsigned i = 0; i < taken; i++) {
        const waiting *w = &s.chain[s.first[queue] + i];
        uint64_t most = k->owed[w->head] ? k->in_bytes[w->head] : 0;
        k->status[w->head] = 0;
        if (k->owed[w->head]++ == 0 && w->ranges) {
            const range *r = &s.range[w->first + w->ranges - 1];
            uint64_t last = r->gpa + (r->n - 1);
            if (r->write && r->n && holds(last) && covered(last) == 1) {
                k->status[w->head] = last;
                k->taken_at[w->head] = s.number;
            }
        }
        k->in_bytes[w->head] = w->in_bytes > most ? w->in_bytes : most;
    }
}

// An interrupt that the driver asked for may not be missing.
static void check_wanted(unsigned queue, bool published) {
    const vblk_queue *q = &f.dev.queue[queue];
    seen *k = &f.queue[queue];
    if (!published || !live(queue)) {
        return;
    }
    uint16_t now = q->run.used_shown, event = peek16(q->avail_gpa + 4 +
                                                 2 * (uint64_t)q->size);
    bool wanted = now != k->decided && !(peek16(q->avail_gpa) & 1);
    if (vblk_driver_features(&f.dev) & VBLK_F_EVENT_IDX) {
        wanted = (uint16_t)(now - event - 1) < (uint16_t)(now - k->decided);
    }
    k->decided = now;
    if (s.refusals || s.tangled || k->tangled || q->broken) {
        return;
    }
    rule(!wanted || k->fired || !f.o.interrupt, "an interrupt is missing");
}

static void forget(unsigned queue) {
    seen *k = &f.queue[queue];
    unsigned session = k->session + 1;
    memset(k, 0, sizeof *k);
    k->session = session;
}

static void end(int queue, bool published) {
    unsigned taken = 0;
    for (unsigned i = 0; i < QUEUES; i++) {
        const vblk_queue *q = &f.dev.queue[i];
        taken += (uint16_t)(q->run.avail_next - s.from[i]);
        rule(!s.takes || (uint16_t)(q->run.avail_next - s.from[i]) <= q->size,
             "a call takes more chains than the queue has entries");
        check_taken(i);
    }
    check_memory();
    for (unsigned i = 0; i < QUEUES; i++) {
        seen *k = &f.queue[i];
        check_wanted(i, published && (queue == VBLK_ALL_QUEUES ||
                                      queue == (int)i));
        check_used(i);
        if (f.dev.queue[i].broken && !k->poisoned) {
            k->poisoned = true;
            k->session++;
            rule(vblk_status(&f.dev) & VBLK_STATUS_NEEDS_RESET,
                 "a queue broke and Status does not say so");
        }
    }
    for (unsigned i = 0; i < QUEUES; i++) {
        take_back(i); // when all are seen: they may share a status byte
    }
    if (!s.tangled && s.takes) {
        uint64_t descs = f.dev.seg_max + 4;
        rule(s.accesses <= 400 + (taken + 1) * (32 + 8 * descs) +
                               s.walked + s.payload / 32,
             "more memory accesses than the work is worth");
        rule(s.calls <= 2 * (uint64_t)taken + s.payload / 32,
             "more backend calls than the work is worth");
        rule(ended() - s.ended <= taken + s.moody, "a chain is counted twice");
    }
    check_counters();
    check_registers();
}


// ---- Calls -----------------------------------------------------------------

static int notified;

static void on_notify(void *user, int queue) {
    (void)user;
    notified = queue;
    rule(queue >= VBLK_ALL_QUEUES && queue < (int)f.dev.queues,
         "a queue that is not there is notified");
}

static void check_reset(void) {
    for (unsigned i = 0; i < QUEUES; i++) {
        if (f.busy) { // in the hands of the host still
            f.queue[i].session++;
            f.queue[i].tangled = true;
        } else {
            forget(i);
        }
    }
    rule(vblk_status(&f.dev) == (f.busy ? VBLK_STATUS_NEEDS_RESET : 0) &&
             !vblk_interrupt_line(&f.dev) &&
             !vblk_mmio_read(&f.dev, VBLK_REG_INTERRUPT_STATUS, 4) &&
             (f.busy || !vblk_mmio_read(&f.dev, VBLK_REG_QUEUE_READY, 4)),
         "a reset leaves something behind");
}

// Returns the queue that was notified, VBLK_ALL_QUEUES or VBLK_NO_QUEUE.
static int reg_write(uint64_t offset, unsigned bytes, uint64_t value) {
    uint32_t v = (uint32_t)value, sel = f.dev.queue_sel;
    bool running = vblk_status(&f.dev) & VBLK_STATUS_DRIVER_OK;
    bool was = vblk_mmio_read(&f.dev, VBLK_REG_QUEUE_READY, 4);
    begin(VBLK_NO_QUEUE, false);
    notified = VBLK_NO_QUEUE;
    vblk_mmio_write(&f.dev, offset, bytes, value);
    if (bytes == 4 && offset == VBLK_REG_STATUS && v == 0) {
        check_reset();
    }
    if (bytes == 4 && offset == VBLK_REG_QUEUE_READY && running &&
        f.o.profile == VBLK_STANDARD && v != 1 &&
        sel < (vblk_driver_features(&f.dev) & VBLK_F_MQ ? f.dev.queues : 1)) {
        rule(!f.busy || !was || vblk_status(&f.dev) & VBLK_STATUS_NEEDS_RESET,
             "a queue that is not quiet is stopped");
        if (!f.busy && was) {
            forget(sel);
        }
    }
    end(VBLK_NO_QUEUE, false);
    return notified;
}

static int wr(uint32_t offset, uint32_t value) {
    return reg_write(offset, 4, value);
}

// After EMPTY the driver has been told to notify, or will not be heard.
static void check_armed(unsigned queue) {
    const vblk_queue *q = &f.dev.queue[queue];
    if (!live(queue) || f.queue[queue].tangled || s.tangled || s.refusals ||
        !f.dev.memory.read) {
        return;
    }
    uint16_t idx = peek16(q->avail_gpa + 2);
    rule(idx == q->run.avail_next || s.notified,
         "EMPTY, but there is an entry");
    rule(vblk_driver_features(&f.dev) & VBLK_F_EVENT_IDX
             ? peek16(q->used_gpa + used_bytes(q) - 2) == q->run.avail_next
             : !(peek16(q->used_gpa) & 1),
         "EMPTY, but the driver will not notify");
}

// What the answer of a drain says: the driver will notify; a limit holds the
// head up, for so long; there is more.
typedef enum { IDLE, HELD, MORE } came_to;
typedef struct answer {
    came_to  state;
    uint64_t wait;
} answer;

static answer answer_of(int queue, uint64_t again) {
    answer out = {IDLE, 0};
    bool   held = f.dev.waits;
    if (queue >= 0) {
        held = f.dev.queue[queue].run.stalled;
    }
    for (unsigned i = 0; queue == VBLK_ALL_QUEUES && i < f.dev.queues; i++) {
        held = held && (!f.dev.queue[i].due || f.dev.queue[i].run.stalled);
    }
    rule(again >= f.now, "an answer from the past");
    if (again != VBLK_NEVER) {
        out.state = again > f.now || held ? HELD : MORE;
        out.wait = again - f.now;
    }
    // A queue waits behind another that stalled first and could pass now.
    rule(out.state != HELD || out.wait > 0 || queue < 0 ||
             f.dev.turn != (unsigned)queue,
         "a stall of no time");
    bool limited = f.dev.ops.rate || f.dev.bytes.rate;
    rule(out.state != HELD || limited, "a stall without a limit");
    if (out.state == IDLE && queue >= 0 &&
        !vblk_queue_broken(&f.dev, (unsigned)queue)) {
        check_armed((unsigned)queue);
    }
    return out;
}

static unsigned taken_in(int queue) {
    unsigned n = 0;
    for (int i = 0; i < QUEUES; i++) {
        if (queue == VBLK_ALL_QUEUES || queue == i) {
            n += (uint16_t)(f.dev.queue[i].run.avail_next - s.from[i]);
        }
    }
    return n;
}

static answer drain_once(int queue) {
    uint64_t again;
    if (queue == VBLK_ALL_QUEUES) {
        vblk_notify(&f.dev, queue);
    }
    begin(queue, true);
    again = queue == VBLK_ALL_QUEUES
                ? vblk_poll(&f.dev, f.now)
                : vblk_drain(&f.dev, (unsigned)queue, f.now);
    answer out = answer_of(queue, again);
    end(queue, true);
    return out;
}

// A stall ends when it was said to, and not before.
static void sit_out(int queue, uint64_t wait) {
    bool others = queue != VBLK_ALL_QUEUES && f.dev.turn != (unsigned)queue;
    if (wait > VBLK_NEVER - 2 - f.now || wait == 0 || others) {
        return;
    }
    unsigned said = f.said;
    f.now += wait - 1;
    if (wait > 1) {
        answer out = drain_once(queue);
        if (f.said != said || s.tangled) {
            return; // the request is another, or none: that costs nothing
        }
        rule(out.state == HELD && out.wait == 1 && taken_in(queue) == 0,
             "a stalled queue passes before its time");
    }
    f.now++;
    drain_once(queue);
    rule(taken_in(queue) > 0 || f.fail_access || s.refusals || f.said != said,
         "a stalled queue does not pass at its time");
}

static const range *range_of(const slot *t, const vblk_seg *seg, bool write) {
    for (unsigned i = 0; i < t->ranges; i++) {
        const range *r = &t->range[i];
        if (r->write == write && seg->gpa - r->gpa < r->n &&
            seg->n <= r->n - (seg->gpa - r->gpa)) {
            return r;
        }
    }
    return NULL;
}

static void check_request(const slot *t) {
    const vblk_request *r = &t->req;
    uint64_t bytes = 0, end_bytes = f.dev.capacity * 512;
    bool direct = true;
    rule(r->type == VBLK_T_IN || r->type == VBLK_T_OUT ||
             r->type == VBLK_T_FLUSH,
         "a request of no type");
    rule(r->seg == t->seg && r->segs <= SEGS,
         "a request has too many segments");
    for (unsigned i = 0; i < r->segs; i++) {
        const vblk_seg *seg = &r->seg[i];
        rule(seg->n > 0, "a request has an empty segment");
        bytes += seg->n;
        direct = direct && seg->ptr;
        rule(t->tangled || range_of(t, seg, r->type != VBLK_T_OUT),
             "a request goes where it was not offered to");
        rule(is_ram(seg->gpa) && is_ram(seg->gpa + (seg->n - 1)),
             "a request goes outside guest memory");
        rule(!seg->ptr || seg->ptr == at(seg->gpa),
             "a segment has a wrong pointer");
        rule(!seg->ptr || seg->ptr + seg->n - 1 == at(seg->gpa + seg->n - 1),
             "a segment leaves its region");
    }
    rule(bytes == r->bytes, "the segments are not what the request says");
    rule(direct == r->direct || r->segs == 0, "direct, without pointers");
    rule(r->offset % 512 == 0 && r->bytes % 512 == 0 &&
             r->offset <= end_bytes && r->bytes <= end_bytes - r->offset,
         "a request beyond the end of the disk");
    rule(r->type == VBLK_T_FLUSH || r->bytes > 0, "a request without data");
    rule(r->type != VBLK_T_OUT || f.dev.backend.write,
         "a write to a read-only disk");
    bool through = vblk_device_features(&f.dev) &
                   ~vblk_driver_features(&f.dev) & VBLK_F_FLUSH;
    rule(r->durable == (through && r->type == VBLK_T_OUT),
         "durable is wrong");
}

// False: there is none, and the queue is armed.
static bool next(int queue, slot *t) {
    begin(queue, true);
    bool got = vblk_next(&f.dev, (unsigned)queue, f.now, &t->req, t->seg, SEGS);
    if (!got) {
        answer_of(queue, vblk_arm(&f.dev, (unsigned)queue, f.now));
    } else {
        unsigned q = (unsigned)queue;
        unsigned n = taken_in(queue);
        rule(t->req.queue == q && n > 0, "a request of another queue");
        unsigned in_flight = 1;
        for (unsigned i = 0; i < SLOTS; i++) {
            in_flight += f.slot[i].used && f.slot[i].req.queue == q &&
                         f.slot[i].session == f.queue[q].session;
        }
        rule(in_flight <= f.dev.queue[q].size,
             "more requests are under way than the queue has entries");
        t->used = true;
        t->tangled = s.tangled || f.queue[q].tangled;
        t->session = f.queue[q].session;
        t->ranges = 0;
        if (!s.tangled) {
            rule(n <= s.waits[q], "a request that was not offered");
            const waiting *w = &s.chain[s.first[q] + n - 1];
            rule(w->head == t->req.head, "a request of another head");
            t->ranges = w->ranges;
            memcpy(t->range, s.range + w->first, w->ranges * sizeof(range));
        }
        check_request(t);
    }
    end(queue, !got);
    return got;
}

static void host_next(int queue, uint8_t how) {
    for (unsigned i = 0; i < SLOTS; i++) {
        if (!f.slot[i].used) {
            if (!next(queue, &f.slot[i]) || !(how & 1)) {
                return;
            }
        }
    }
}

// What the host's I/O does to guest memory before the request is completed.
static void host_io(slot *t, uint64_t bytes) {
    static uint8_t buffer[600];
    vblk_request *r = &t->req;
    for (uint64_t done = 0, n; done < bytes; done += n) {
        n = bytes - done < sizeof buffer ? bytes - done : sizeof buffer;
        memset(buffer, 0x5a, sizeof buffer);
        if (r->type == VBLK_T_OUT) {
            vblk_get(&f.dev, r, done, buffer, (size_t)n);
        } else {
            vblk_put(&f.dev, r, done, buffer, (size_t)n);
        }
    }
}

static void allow(const slot *t) {
    for (unsigned i = 0; i < t->ranges; i++) {
        add_range(t->req.queue, t->range[i].gpa, t->range[i].n,
                  t->range[i].write);
        if (t->range[i].write) {
            disturb(t->range[i].gpa, t->range[i].n);
        }
    }
    s.tangled = s.tangled || t->tangled;
}

static void check_completed(const slot *t, uint8_t status, uint64_t bytes) {
    const vblk_request *r = &t->req;
    if (s.refusals || s.tangled || f.queue[r->queue].tangled ||
        covered(r->status_gpa) != 1 || f.dev.queue[r->queue].broken) {
        return;
    }
    rule(*at(r->status_gpa) == status, "the status is not what was completed");
    uint64_t done = 0;
    for (unsigned i = 0; i < r->segs; i++) {
        for (size_t k = 0; k < r->seg[i].n; k++, done++) {
            uint64_t gpa = r->seg[i].gpa + k;
            rule(done < bytes || r->type != VBLK_T_IN || status ||
                     covered(gpa) != 1 || *at(gpa) == 0,
                 "a short read is not padded");
        }
    }
}

// With the first `most` bytes, if it is a read.
static void host_complete(slot *t, bool fails, uint64_t most) {
    vblk_request *r = &t->req;
    int queue = r->queue;
    bool stale = t->session != f.queue[queue].session;
    uint8_t status = fails ? VBLK_S_IOERR : VBLK_S_OK;
    uint64_t bytes = r->type == VBLK_T_IN && most < r->bytes ? most : r->bytes;
    if (!t->used) {
        return;
    }
    t->used = false;
    begin(stale ? VBLK_NO_QUEUE : queue, false);
    if (!stale) {
        allow(t);
        host_io(t, bytes);
    }
    uint64_t before = ended();
    int64_t result = status ? -5 : (int64_t)bytes;
    if (r->type == VBLK_T_IN && bytes < r->bytes &&
        r->offset + bytes < r->backing) {
        status = VBLK_S_IOERR; // short, and not at the end
    }
    bool taken = vblk_complete(&f.dev, r, result) == VBLK_OK;
    rule(ended() - before == !stale || s.refusals,
         "a completion is not counted once");
    rule(taken == !stale, stale ? "a stale request is completed"
                                : "a request is lost");
    if (!stale) {
        check_completed(t, status, bytes);
    }
    end(queue, false);
}

static void publish(int queue) {
    begin(queue, false);
    vblk_publish(&f.dev, (unsigned)queue);
    end(queue, true);
}

// What a drain does, by an asynchronous host that ends with the last.
static void serve(int queue) {
    unsigned first = SLOTS;
    host_next(queue, 1);
    for (unsigned i = 0; i < SLOTS; i++) {
        slot *t = &f.slot[SLOTS - 1 - i];
        if (t->used && t->req.queue == queue) {
            bool fails = f.fail_call > 0 && --f.fail_call == 0;
            host_complete(t, fails, share(t->req.offset, t->req.bytes));
            first = i;
        }
    }
    if (first < SLOTS) {
        publish(queue);
        host_next(queue, 0);
    }
}

static void drain(int queue, uint8_t how) {
    answer out;
    unsigned rounds = 0;
    if (queue < VBLK_ALL_QUEUES || queue == VBLK_NO_QUEUE ||
        queue >= (int)f.dev.queues) {
        return; // would be asserted
    }
    if (f.async && queue >= 0 && queue < QUEUES) {
        serve(queue);
        return;
    }
    do {
        out = drain_once(queue);
    } while (out.state == MORE && ++rounds < 3);
    if (out.state == HELD && how & 1 && !s.refusals && !f.fail_access) {
        sit_out(queue, out.wait);
    }
}


// ---- A driver --------------------------------------------------------------

static uint64_t alloc(uint64_t n, uint64_t align) {
    if (f.bump < f.rings || f.bump + n + align > RAM_END) {
        f.bump = f.rings;
    }
    f.bump = (f.bump + align - 1) / align * align;
    uint64_t gpa = f.bump;
    f.bump += n;
    return gpa;
}

// Where the rings of a queue go: one of them across the seam, at the top of
// the address space, or where no ring can be.
static void place_rings(vblk_ring *r, uint8_t place) {
    uint64_t n = r->size;
    r->desc = (f.rings + 15) / 16 * 16;
    r->avail = r->desc + 16 * n;
    r->used = (r->avail + 6 + 2 * n + 3) / 4 * 4;
    f.rings = r->used + 6 + 8 * n;
    switch (place % 16) {
    case 1:  r->desc = SEAM - 16 * (n / 2);       break;
    case 2:  r->avail = SEAM - 4 - 2 * (n / 2);   break;
    case 3:  r->used = SEAM - 4 - 8 * (n / 2);    break;
    case 4:  r->avail = 0 - (6 + 2 * n);          break;
    case 5:  r->used = (0 - (6 + 8 * n)) & ~3ull; break;
    case 6:  r->desc = 0 - 16 * n;                break;
    case 7:  r->desc += 8;                        break;
    case 8:  r->avail += 1;                       break;
    case 9:  r->used += 2;                        break;
    case 10: r->avail = RAM_END - 2;              break;
    case 11: r->used = RAM_END + 0x100;           break;
    case 12: r->desc = RAM_END + 0x100;           break;
    case 13: r->used = UINT64_MAX - 3;            break;
    case 14: r->used = RAM_END - 4;               break;
    default: break;
    }
}

static void clear(uint64_t gpa, uint64_t n) {
    static const uint8_t zeroes[16 * MAX_SIZE + 64];
    poke(gpa, zeroes, n < sizeof zeroes ? (size_t)n : sizeof zeroes);
}

static void clear_rings(const vblk_ring *r) {
    clear(r->desc, 16 * (uint64_t)r->size);
    clear(r->avail, 6 + 2 * (uint64_t)r->size);
    clear(r->used, 6 + 8 * (uint64_t)r->size);
}

static void queue_up(unsigned queue, uint32_t size, uint8_t place) {
    vblk_ring r = {.size = size};
    place_rings(&r, place);
    clear_rings(&r);
    wr(VBLK_REG_QUEUE_SEL, queue);
    wr(VBLK_REG_QUEUE_NUM, size);
    wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)r.desc);
    wr(VBLK_REG_QUEUE_DESC_HIGH, (uint32_t)(r.desc >> 32));
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)r.avail);
    wr(VBLK_REG_QUEUE_DRIVER_HIGH, (uint32_t)(r.avail >> 32));
    wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)r.used);
    wr(VBLK_REG_QUEUE_DEVICE_HIGH, (uint32_t)(r.used >> 32));
    wr(VBLK_REG_QUEUE_READY, 1);
    f.queue[queue].tangled = false;
}

static void bring_up(uint8_t declined, uint8_t sizes, uint8_t place) {
    static const uint64_t bit[8] = {
        VBLK_F_EVENT_IDX, VBLK_F_INDIRECT_DESC, VBLK_F_FLUSH, VBLK_F_SIZE_MAX,
        VBLK_F_SEG_MAX, VBLK_F_MQ, VBLK_F_VERSION_1, 0,
    };
    uint64_t features = vblk_device_features(&f.dev);
    for (unsigned i = 0; i < 8; i++) {
        features &= declined >> i & 1 ? ~bit[i] : ~UINT64_C(0);
    }
    wr(VBLK_REG_STATUS, 0);
    if (!(declined & 0x80)) {
        wr(VBLK_REG_STATUS, 1);
    }
    wr(VBLK_REG_STATUS, declined & 0x80 ? 2 : 3);
    for (uint32_t sel = 0; sel < 2; sel++) {
        wr(VBLK_REG_DRIVER_FEATURES_SEL, sel);
        wr(VBLK_REG_DRIVER_FEATURES, (uint32_t)(features >> 32 * sel));
    }
    wr(VBLK_REG_STATUS, declined & 0x80 ? 10 : 11);
    f.rings = 0x100;
    for (unsigned i = 0; i < f.dev.queues; i++) {
        uint32_t size = f.dev.queue_size >> (sizes & 7);
        size = size > MAX_SIZE ? MAX_SIZE : size ? size : 1;
        queue_up(i, size, i == 0 ? place : 0);
    }
    f.bump = f.rings;
    drain(wr(VBLK_REG_STATUS, declined & 0x80 ? 14 : 15), place >> 4 & 1);
}

static unsigned a_queue(uint8_t b) {
    return b % 4u < f.dev.queues ? b % 4u : 0;
}

static void put_desc(uint64_t gpa, uint64_t to, uint64_t n, unsigned flags,
                     unsigned next_desc) {
    poke_le(gpa, to, 8);
    poke_le(gpa + 8, n, 4);
    poke_le(gpa + 12, flags, 2);
    poke_le(gpa + 14, next_desc, 2);
}

static void offer(unsigned queue, uint16_t head, uint8_t step) {
    const vblk_queue *q = &f.dev.queue[queue];
    uint16_t idx = peek16(q->avail_gpa + 2);
    if (q->size) {
        poke_le(q->avail_gpa + 4 + 2 * (uint64_t)(idx & (q->size - 1)), head,
                2);
        poke_le(q->avail_gpa + 2, (uint16_t)(idx + step), 2);
    }
}

static uint64_t address(uint8_t b) {
    const vblk_queue *q = &f.dev.queue[a_queue(b >> 4)];
    switch (b % 16) {
    case 0:  return 0;
    case 1:  return SEAM - 8;
    case 2:  return SEAM;
    case 3:  return RAM_END - 1;
    case 4:  return RAM_END;
    case 5:  return HIGH;
    case 6:  return UINT64_MAX;
    case 7:  return UINT64_MAX - 15;
    case 8:  return q->desc_gpa + byte();
    case 9:  return q->avail_gpa + byte();
    case 10: return q->used_gpa + byte();
    case 11: return f.bump;
    case 12: return HIGH + byte();
    case 13: return SEAM - 256 + byte();
    default: return (uint64_t)byte() << 8 | byte();
    }
}

static uint64_t number(uint8_t b) {
    static const uint64_t some[] = {
        512, 1024, 4096, 511, 513, 0x10000, 0x7fffffff, 0x80000000,
        0xffffffff, 0xfffffe00, UINT64_C(1) << 32, UINT64_C(1) << 55,
        UINT64_MAX, UINT64_MAX >> 1, UINT64_MAX / 512, 0x8000,
    };
    if (b < 0xe0) {
        return b;
    }
    return b < 0xf0 ? some[b & 15] : (uint64_t)byte() << 8 | byte();
}

typedef struct part {
    uint64_t gpa, n;
    unsigned flags;
} part;

typedef struct parts {
    part     p[160];
    unsigned n;
} parts;

static void add(parts *c, uint64_t gpa, uint64_t n, bool write) {
    if (c->n < COUNT_OF(c->p)) {
        part p = {gpa, n, write ? 2u : 0u};
        c->p[c->n++] = p;
    }
}

static uint64_t data_place(uint8_t place, uint64_t n) {
    uint64_t half = n < 0x1000 ? n / 2 : 0x800;
    switch (place & 7) {
    case 1:  return SEAM - half;
    case 2:  return n <= 0x1000 ? 0 - n : HIGH;
    case 3:  return alloc(n + 1, 2) + 1;
    case 4:  return RAM_END - half;
    case 5:  return UINT64_MAX - half;
    case 6:  return f.dev.queue[0].used_gpa;
    case 7:  return place & 8 ? SEAM - 1 : f.dev.queue[0].desc_gpa;
    default: return alloc(n, 1);
    }
}

// `n` bytes in pieces of `piece`; all over the same memory if there are many.
static void add_data(parts *c, uint8_t place, uint64_t n, uint64_t piece,
                     bool write) {
    bool one = n > 0x2000;
    uint64_t gpa = data_place(place, one ? piece : n);
    do {
        uint64_t take = n < piece ? n : piece;
        add(c, gpa, take, write);
        gpa += one ? 0 : take;
        n -= take;
    } while (n > 0 && c->n < COUNT_OF(c->p));
}

static void frame(parts *c, uint8_t framing, uint8_t place, uint64_t header,
                  uint64_t n, bool in) {
    uint64_t word, sector, status = alloc(1, 1);
    poke_le(status, 0xff, 1);
    switch (framing % 32) {
    case 1: // the header in two
        add(c, header, 7, false);
        add(c, header + 7, 9, false);
        add_data(c, place, n, n, in);
        break;
    case 2: // header and data in one, or data and status
        if (in) {
            uint64_t gpa = data_place(place, n + 1);
            add(c, header, 16, false);
            add(c, gpa, n + 1, true);
            return;
        }
        add(c, header, 16 + n, false);
        break;
    case 3: // status first, then data
        add(c, header, 16, false);
        add(c, status, 1, true);
        add_data(c, place, n, n, in);
        return;
    case 4: // no status
        add(c, header, 16, false);
        add_data(c, place, n, n, in);
        return;
    case 5: // no header
        add_data(c, place, n, n, in);
        break;
    case 6:
        add(c, header, 15, false);
        add_data(c, place, n, n, in);
        break;
    case 7: // a long header and a long status
        add(c, header, 24, false);
        add_data(c, place, n, n, in);
        status = alloc(8, 1);
        add(c, status, 8, true);
        return;
    case 8: // empty descriptors
        add(c, header, 0, false);
        add(c, header, 16, false);
        add(c, header, 0, true);
        add_data(c, place, n, n, in);
        add(c, header, 0, false);
        break;
    case 9: // and one at the end
        add(c, header, 16, false);
        add_data(c, place, n, n, in);
        add(c, status, 1, true);
        add(c, status, 0, true);
        return;
    case 10:
        add(c, header, 16, false);
        add_data(c, place, n, 100, in);
        break;
    case 11:
        add(c, header, 16, false);
        add_data(c, place, n, 1, in);
        break;
    case 12:
        add(c, RAM_END + 8, 16, false);
        add_data(c, place, n, n, in);
        break;
    case 13: // across the seam
        peek(header, 8, &word);
        peek(header + 8, 8, &sector);
        poke_le(SEAM - 8, word, 8);
        poke_le(SEAM, sector, 8);
        add(c, SEAM - 8, 16, false);
        add_data(c, place, n, n, in);
        break;
    case 14:
        add(c, header, 16, false);
        add_data(c, place, n, n, in);
        add(c, RAM_END + 8, 1, true);
        return;
    case 15:
        add(c, header, 16, false);
        add_data(c, place, n, n, in);
        add(c, UINT64_MAX, 2, true);
        return;
    case 16: // both directions
        add(c, header, 16, false);
        add_data(c, place, n, n, !in);
        add_data(c, place, n, n, in);
        break;
    case 17: // many that cross the seam
        add(c, header, 16, false);
        for (unsigned i = 0; i < f.dev.seg_max; i++) {
            add(c, SEAM - 256, 512, in);
        }
        break;
    case 18: // more than 4 GiB
        add(c, header, 16, false);
        for (unsigned i = 0; i < f.dev.seg_max; i++) {
            add(c, 0x1000, 0xfffffe00, in);
        }
        break;
    case 19:
        add(c, header, 16, false);
        for (unsigned i = 0; i < f.dev.seg_max; i++) {
            add(c, 0x1000, 512, in);
        }
        add(c, 0x1000, framing & 32 ? 512 : 0, in);
        break;
    case 20: // nothing but the header
        add(c, header, 16, false);
        return;
    case 21: // nothing but the status
        break;
    default:
        add(c, header, 16, false);
        if (n) {
            add_data(c, place, n, n, in);
        }
        break;
    }
    add(c, status, 1, true);
}

// Put the parts into an indirect table, or into the queue's own.
static uint16_t put_parts(unsigned queue, const parts *c, uint8_t how) {
    const vblk_queue *q = &f.dev.queue[queue];
    uint16_t *here = &f.queue[queue].desc;
    uint32_t size = q->size ? q->size : 1;
    uint16_t head = (uint16_t)(*here & (size - 1));
    if (how & 1) {
        uint64_t n = 16 * (uint64_t)c->n;
        uint64_t table = how & 2 ? SEAM - 24 : alloc(n, 1);
        for (unsigned i = 0; i < c->n; i++) {
            put_desc(table + 16 * (uint64_t)i, c->p[i].gpa, c->p[i].n,
                     c->p[i].flags | (i + 1 < c->n), i + 1);
        }
        put_desc(q->desc_gpa + 16 * (uint64_t)head, table, n, 4, 0);
        *here = (uint16_t)(*here + 1);
        return head;
    }
    for (unsigned i = 0; i < c->n; i++) {
        uint16_t slot_of = (uint16_t)(*here & (size - 1));
        *here = (uint16_t)(*here + 1);
        put_desc(q->desc_gpa + 16 * (uint64_t)slot_of, c->p[i].gpa, c->p[i].n,
                 c->p[i].flags | (i + 1 < c->n), *here & (size - 1));
    }
    return head;
}

static void request(uint8_t what) {
    static const uint32_t types[8] = {
        VBLK_T_IN, VBLK_T_OUT, VBLK_T_FLUSH, VBLK_T_GET_ID, 2, 11, 13, ~0u,
    };
    static const uint32_t sizes[16] = {
        512, 1024, 0, 1536, 20, 19, 1, 511, 513, 4096, 8192, 2048, 512, 64,
        17408, 1u << 20,
    };
    uint8_t type = byte(), where = byte(), framing = byte(), place = byte();
    unsigned queue = a_queue(what);
    uint64_t n = sizes[where >> 4], capacity = f.dev.capacity;
    uint64_t sector[8] = {
        0, 1, capacity - n / 512, capacity, capacity - 1, UINT64_MAX,
        UINT64_C(1) << 55, 7,
    };
    uint32_t t = types[type & 7];
    bool in = (t != VBLK_T_OUT) != (type >> 7);
    t |= type & 0x40 ? 0x80000000 : 0; // P9
    parts c;
    c.n = 0;
    uint64_t header = alloc(24, 1);
    poke_le(header, t, 4);
    poke_le(header + 4, 0x11223344, 4);
    poke_le(header + 8, sector[where & 7], 8);
    frame(&c, framing, place, header, n, in);
    uint16_t head = put_parts(queue, &c, what >> 2);
    if (!(what & 0x80)) {
        offer(queue, head, 1);
    }
    if (what & 0x40) {
        drain(wr(VBLK_REG_QUEUE_NOTIFY, queue), 0);
    }
}


// ---- The actions -----------------------------------------------------------

static unsigned width(uint8_t b) {
    return b < 0xc0 ? 4 : b & 15;
}

static uint64_t an_offset(uint8_t b) {
    return b < 0xe0 ? 4 * (uint64_t)b
                    : b < 0xf0 ? 0x100 + (b & 15) * 3u : number(byte());
}

static void set_remap(uint8_t how) {
    for (unsigned i = 0; i < f.dev.queues; i++) {
        if (f.dev.queue[i].run.under_way > 0) {
            return; // would be asserted
        }
    }
    if (how & 1) {
        for (unsigned a = 0; a < 3; a++) {
            uint8_t *p = in_bank(f.bank, area[a]);
            size_t n = area[a + 1] - area[a];
            memcpy(in_bank(!f.bank, area[a]), p, n);
            memset(p, MOVED, n);
        }
        f.bank = !f.bank;
        f.moved = true;
    }
    set_regions(how & 8 ? how >> 4 & 3 : 3);
    begin(VBLK_NO_QUEUE, false);
    vblk_set_memory(&f.dev, memory(how & 2));
    end(VBLK_NO_QUEUE, false);
}

static vblk_limits some_limits(uint8_t which) {
    static const vblk_limits some[8] = {
        {0, 0, 0, 0},
        {1, 1, 0, 0},
        {1000, 1000, 0, 0},
        {0, 0, 512, 512},
        {3, 7, 1000, 5000},
        {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX},
        {0, 0, 1, 1},
        {1, 0, 4096, 1},
    };
    return some[which & 7];
}

static void limit(uint8_t which) {
    vblk_limits l = some_limits(which);
    if (which & 0x80) {
        l.iops = byte() % 16;
        l.iops_burst = 0;
        l.bps = (uint64_t)byte() * 100;
        l.bps_burst = l.bps ? l.bps + byte() : 0;
    }
    begin(VBLK_NO_QUEUE, false);
    int err = vblk_set_limits(&f.dev, &l, f.now);
    rule(err == VBLK_OK || (err == VBLK_ERR_LIMITS && (which & 7) == 7),
         "limits are refused");
    end(VBLK_NO_QUEUE, false);
}

static void host(uint8_t what) {
    begin(VBLK_NO_QUEUE, false);
    switch (what & 7) {
    case 0:
        vblk_needs_reset(&f.dev);
        break;
    case 1:
        vblk_set_driver_features(&f.dev, vblk_device_features(&f.dev) ^
                                             number(byte()));
        break;
    case 2: {
        uint32_t status = byte() & 0xcf;
        vblk_set_status(&f.dev, status);
        if (status == 0) {
            check_reset();
        }
        break;
    }
    case 3: {
        uint8_t config[40];
        vblk_read_config(&f.dev, number(byte()), config, byte() % 41);
        break;
    }
    case 4:
        f.busy = !f.busy;
        break;
    default:
        rule(vblk_strerror(-(int)what) != NULL, "a code without text");
        break;
    }
    end(VBLK_NO_QUEUE, false);
}

static void start(uint8_t queue, uint8_t size, uint8_t position) {
    vblk_ring r = {.size = size & 0x80 ? size : 1u << (size & 7)};
    uint16_t idx = (uint16_t)(position * 257);
    if (queue & 0x40) { // where it was stopped
        const vblk_queue *q = &f.dev.queue[queue % 4u];
        r.desc = q->desc_gpa;
        r.avail = q->avail_gpa;
        r.used = q->used_gpa;
    } else {
        f.rings = f.rings < RAM_END / 2 ? f.rings : 0x100;
        place_rings(&r, queue >> 2 & 15);
    }
    r.position = idx;
    int i = queue % 4 < QUEUES ? queue % 4 : 0;
    bool was = f.dev.queue[i].ready;
    if (!was && !(queue & 0x80)) {
        clear_rings(&r);
        poke_le(r.avail + 2, idx, 2);
        poke_le(r.used + 2, idx, 2);
    }
    begin(VBLK_NO_QUEUE, false);
    notified = VBLK_NO_QUEUE;
    int err = vblk_queue_start(&f.dev, (unsigned)i, &r);
    rule((notified == i) == (err == VBLK_OK), "another queue is started");
    if (err == VBLK_OK) {
        rule(!was, "a queue is started twice");
        forget((unsigned)i);
        f.queue[i].used = f.queue[i].decided = f.dev.queue[i].run.used_shown;
        f.queue[i].tangled = f.dev.queue[i].run.adopt_used; // known later
    }
    end(VBLK_NO_QUEUE, false);
    drain(notified, 0);
}

static void stop(uint8_t queue) {
    int i = (int)a_queue(queue);
    begin(i, false); // it publishes what is completed
    int position = vblk_queue_stop(&f.dev, (unsigned)i);
    rule(position == (f.busy ? VBLK_ERR_BUSY : s.from[i]),
         "a queue stops where it was not");
    if (!f.busy) {
        forget((unsigned)i);
    }
    end(VBLK_NO_QUEUE, false);
}

// Descriptors that no framing yields.
static void forge(uint8_t what, uint8_t queue) {
    unsigned i = a_queue(queue);
    const vblk_queue *q = &f.dev.queue[i];
    uint64_t d = q->desc_gpa, table = alloc(64, 1);
    uint16_t last = (uint16_t)(q->size ? q->size - 1 : 0);
    put_desc(table, table, 16, 4, 0);
    switch (what & 15) {
    case 0:  put_desc(d, 0x1000, 16, 1, 0);             break; // a loop
    case 1:  put_desc(d, 0x1000, 16, 1, q->size);       break;
    case 2:  put_desc(d, table, 16, 4, 0);              break; // nested
    case 3:  put_desc(d, table, 16, 5, 0);              break;
    case 4:  put_desc(d, table, 0, 4, 0);               break;
    case 5:  put_desc(d, table, 17, 4, 0);              break;
    case 6:  put_desc(d, RAM_END, 32, 4, 0);            break;
    case 7:  put_desc(d, UINT64_MAX - 15, 32, 4, 0);    break;
    case 8:  put_desc(d, table, 0xfffffff0, 4, 0);      break;
    case 9:  offer(i, (uint16_t)(last + 1), 1);          return;
    case 10: offer(i, 0xffff, 1);                       return;
    case 11: offer(i, 0, (uint8_t)(q->size + 1));       return;
    case 12: offer(i, 0, 0xff);                         return;
    case 13: put_desc(d, 0x1000, 16, 0xfff8, 0);        break;
    case 14: offer(i, last, 1);                         return;
    default: put_desc(d, 0x1000, 0, 2, 0);              break;
    }
    offer(i, 0, 1);
}

static void refuse(uint8_t b, uint8_t n) {
    if (b & 0x80) {
        f.fail_access = n;
        return;
    }
    f.hole = address(b);
    f.hole_bytes = n;
}

static void pass_time(uint8_t b) {
    static const uint64_t some[8] = {
        0, 1, 1000, 1000000, 1000000000, 60000000000, UINT64_MAX / 4,
        999999999,
    };
    uint64_t by = some[b & 7];
    if (b & 0x40) {
        f.now -= by < f.now ? by : f.now; // a clock may not; nothing breaks
    } else {
        const uint64_t last = VBLK_NEVER - 2;
        f.now += by < last - f.now ? by : last - f.now;
    }
}

static void backend(uint8_t how, uint8_t when) {
    f.stuck = how & 1;
    f.most = how & 2 ? 512u : how & 4 ? 100u : 0;
    f.fail_call = when & 15;
    f.backing = how & 8 ? (uint64_t)when * 100 : UINT64_MAX;
}

static void act(uint8_t action) {
    uint8_t a = byte(), b, c;
    uint64_t x;
    unsigned queue = a_queue(a);
    switch (action) {
    case READ:
        x = an_offset(a);
        b = byte();
        begin(VBLK_NO_QUEUE, false);
        x = vblk_mmio_read(&f.dev, x, width(b));
        rule(width(b) == 0 || width(b) >= 8 || x >> 8 * width(b) == 0,
             "a register is wider than the access");
        end(VBLK_NO_QUEUE, false);
        break;
    case WRITE:
        x = an_offset(a);
        b = byte();
        drain(reg_write(x, width(b), number(byte())), b & 1);
        break;
    case POKE:
        x = address(a);
        b = byte();
        poke_le(x, number(byte()), 1u + b % 8u);
        break;
    case DESC:
        b = byte();
        x = address(byte());
        c = byte();
        put_desc(f.dev.queue[queue].desc_gpa + 16 * (uint64_t)(b & 63), x,
                 number(c), byte() % 8u, byte());
        break;
    case AVAIL:
        b = byte();
        offer(queue, b, byte());
        break;
    case WISH:
        x = f.dev.queue[queue].avail_gpa;
        poke_le(a & 0x80 ? x + 4 + 2 * (uint64_t)f.dev.queue[queue].size : x,
                byte(), 2);
        break;
    case REQUEST:
        request(a);
        break;
    case MANY: {
        const uint8_t *in = f.in;
        size_t left = f.left;
        for (unsigned i = 0; i <= a % 48u; i++) {
            f.in = in;
            f.left = left;
            request(byte());
        }
        break;
    }
    case KICK:     drain(wr(VBLK_REG_QUEUE_NOTIFY, a), a >> 7);          break;
    case DRAIN:    drain(a < 0xf0 ? a % 9 : a - 0xff, byte());           break;
    case NEXT:     host_next((int)queue, byte());                        break;
    case COMPLETE: {
        slot *t = &f.slot[a % SLOTS];
        b = byte();
        uint64_t some = t->req.bytes * byte() / 256;
        host_complete(t, b & 1, b & 2 ? some : t->req.bytes);
        break;
    }
    case PUBLISH:  publish((int)queue);                                  break;
    case ACK:      wr(VBLK_REG_INTERRUPT_ACK, (uint32_t)number(a));      break;
    case TIME:     pass_time(a);                                         break;
    case UP:       b = byte(); bring_up(a, b, byte());                   break;
    case BACKEND:  backend(a, byte());                                   break;
    case REFUSE:   refuse(a, byte());                                    break;
    case REMAP:    set_remap(a);                                         break;
    case LIMIT:    limit(a);                                             break;
    case HOST:     host(a);                                              break;
    case START:    b = byte(); start(a, b, byte());                      break;
    case STOP:     stop(a);                                              break;
    case AMBUSH:   f.ambush = a; f.ambush_how = byte();                  break;
    default:       forge(a, byte());                                     break;
    }
}

// Options: profile and switches, sizes, limits, capacity.
static void make(void) {
    static const uint32_t queue_size[8] = {16, 1, 2, 4, 8, 64, 0, 32768};
    static const uint64_t capacity[8] = {
        64, 1, 0, 8, 2000, UINT64_C(1) << 40, INT64_MAX / 512, 16,
    };
    uint8_t a = byte(), b = byte(), c = byte(), d = byte();
    vblk_options *o = &f.o;
    o->profile = a & 1 ? VBLK_STANDARD : VBLK_STRICT;
    o->backend.read = disk_read;
    o->backend.write = a & (4 | 16) ? NULL : disk_write;
    o->backend.flush = a & (8 | 32) ? NULL : disk_flush;
    o->backend.size = disk_size;
    if (!(a & 64)) {
        o->memory = memory(a & 2);
    }
    f.async = c & 128;
    o->id = a & 128 ? "0123456789abcdefghijklm" : "disk";
    o->queue_size = queue_size[b & 7];
    o->queues = b >> 3 & 3;
    bool large = o->queue_size == 0 || o->queue_size > 129;
    o->seg_max = b & 32 ? 1 : b & 64 && large ? 128 : 0;
    o->size_max = b & 128 ? 4096 : c & 64 ? UINT32_MAX : 0;
    o->limits = some_limits(c & 7);
    o->features_off = c & 8 ? VBLK_F_EVENT_IDX : 0;
    if (c & 16) { // else it may be refused
        o->features_off |= VBLK_F_INDIRECT_DESC;
        o->seg_max = 0;
        o->queue_size = o->queue_size == 1 || o->queue_size == 2
                            ? 4
                            : o->queue_size;
    }
    o->features_off |= c & 32 ? VBLK_F_SIZE_MAX | VBLK_F_SEG_MAX : 0;
    o->capacity = capacity[d & 7];
    f.backing = d & 8 ? (uint64_t)(d >> 4) * 100 : UINT64_MAX >> 1;
    o->interrupt = d >> 4 == 15 ? NULL : on_interrupt;
    o->event = on_event;
    o->notify = on_notify;
    o->quiesce = on_quiesce;
    o->queue = f.vq;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    memset(&f, 0, offsetof(struct fuzz, slot));
    memset(&f.counts, 0, sizeof f.counts);
    for (unsigned i = 0; i < SLOTS; i++) {
        f.slot[i].used = false;
    }
    f.in = data;
    f.left = n;
    if (!dirt[1]) {
        for (size_t i = 0; i < BYTES; i++) {
            dirt[i] = (uint8_t)(0xa5 ^ i * 7);
        }
    }
    memcpy(truth, dirt, BYTES);
    for (unsigned a = 0; a < 3; a++) {
        memcpy(in_bank(0, area[a]), dirt + area[a], area[a + 1] - area[a]);
    }
    set_regions(3);
    f.rings = f.bump = 0x100;
    f.hole = 0;
    make();
    if (vblk_init(&f.dev, &f.o)) {
        rule((f.o.limits.bps_burst == 1 && f.o.limits.bps > 1) ||
                 (f.o.capacity == 0 && f.backing > INT64_MAX),
             "options are refused");
        return 0;
    }
    uint8_t up = byte();
    if (up & 1) {
        bring_up(up >> 1 & 0x3f, up >> 7, 0);
    }
    for (unsigned i = 0; f.left && i < 300; i++) {
        act(byte() % ACTIONS);
    }
    return 0;
}


// ---- Replay ----------------------------------------------------------------

// In both profiles, with map and without, drained and asynchronous, whatever
// the file says.
static bool replay(const char *path) {
    static uint8_t data[1 << 16];
    char name[600];
    FILE *file = fopen(path, "rb");
    if (!file) {
        return false;
    }
    size_t n = fread(data, 1, sizeof data, file);
    bool ok = !ferror(file);
    fclose(file);
    for (unsigned kind = 0; kind < 8 && n > 2; kind++) {
        snprintf(name, sizeof name, "%s, %s, %s map, %s", path,
                 kind & 1 ? "standard" : "strict", kind & 2 ? "with" : "no",
                 kind & 4 ? "asynchronous" : "drained");
        current = name;
        data[0] = (uint8_t)((data[0] & ~3u) | (kind & 3));
        data[2] = (uint8_t)((data[2] & 0x7fu) | (kind & 4) << 5);
        LLVMFuzzerTestOneInput(data, n);
    }
    current = "";
    return ok;
}

// False if there is nothing to replay.
bool fuzz_replay_dir(const char *dir) {
    char path[512];
    unsigned files = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        files += e->d_name[0] != '.' && replay(path);
    }
    if (d) {
        closedir(d);
    }
    return files > 0;
}

#ifdef FUZZ_IN_TESTS
// Every file, and every event in both profiles where both have it.
void fuzz_corpus_replays(void) {
    CHECK(fuzz_replay_dir("tests/corpus"));
    for (int i = 1; i < VBLK_EV_WORKER_LEFT; i++) {
        ROW_BEGIN();
        CHECK(!event_text(i) || events[i][0][0] || events[i][0][1] ||
              events[i][1][0] || events[i][1][1]);
        ROW("%s", event_text(i));
    }
}
#endif


#ifdef FUZZ_SEEDS

// Options and the first byte after them: a device that is up, or as made.
#define AS_IS   0, 0, 0, 0, 0
#define UP_AND  0, 0, 0, 0, 1
#define SIZE(b) 0, b, 0, 0, 1
#define TO(reg) WRITE, (reg) / 4, 0 // and the value
#define NEGOTIATED(value)                                                      \
    TO(VBLK_REG_STATUS), 1, TO(VBLK_REG_STATUS), 3,                            \
        TO(VBLK_REG_DRIVER_FEATURES_SEL), 1, TO(VBLK_REG_DRIVER_FEATURES),     \
        value, TO(VBLK_REG_STATUS), 11
#define SEND(type, where, framing, place)                                      \
    REQUEST, 0x40, type, where, framing, place
#define SEND_TABLE(type, where, framing, place)                                \
    REQUEST, 0x44, type, where, framing, place
#define RW(framing, place)                                                     \
    SEND(0, 0, framing, place), SEND(1, 0x10, framing, place)
#define SEED(name, ...) {name, {__VA_ARGS__}, sizeof((uint8_t[]){__VA_ARGS__})}

static const struct {
    const char *name;
    uint8_t     bytes[120];
    size_t      n;
} seeds[] = {
    SEED("requests", UP_AND, RW(0, 0), SEND(2, 0x20, 0, 0), SEND(3, 0x40, 0, 0),
         SEND(0, 1, 0, 1), SEND(1, 2, 0, 2), SEND(0, 0xa2, 0, 3), ACK, 3),
    SEED("indirect", UP_AND, SEND_TABLE(0, 0, 0, 0), SEND_TABLE(1, 0, 10, 1),
         REQUEST, 0x4c, 0, 0, 0, 0, REQUEST, 0x4c, 1, 0x10, 17, 0),
    SEED("capacity_zero", 0, 0, 0, 0x1a, 1, SEND(0, 0, 0, 0),
         SEND(0, 0x20, 0, 0)),
    SEED("capacity_huge", 0, 0, 0, 6, 1, RW(0, 0), SEND(0, 2, 0, 0),
         SEND(0, 5, 0, 0), SEND(0, 6, 0, 0)),
    SEED("registers", AS_IS, READ, 0, 0, READ, 1, 0, READ, 2, 0, READ, 3, 0,
         READ, 4, 0, READ, 13, 0, READ, 17, 0, READ, 24, 0, READ, 28, 0, READ,
         44, 0, READ, 63, 0, READ, 64, 0, READ, 65, 0xc1, READ, 0xe8, 0xc8,
         READ, 0, 0xc2, READ, 0, 0xcf, READ, 20, 0, WRITE, 0, 0xc8, 1, WRITE,
         0xe1, 0, 1, WRITE, 20, 0, 9, TO(0x14), 1, READ, 4, 0),
    SEED("features_window", UP_AND, TO(0x20), 1, TO(0x24), 9, TO(0x20), 1,
         HOST, 1, 1),
    SEED("queue_window", AS_IS, TO(0x38), 4, NEGOTIATED(1), TO(0x38), 3,
         TO(0x38), 0, TO(0x30), 9, TO(0x38), 4, READ, 13, 0),
    SEED("queue_frozen", UP_AND, TO(0x44), 1, TO(0x44), 0, TO(0x38), 4,
         TO(0x44), 1, TO(0x80), 16, RW(0, 0)),
    SEED("notify_ignored", AS_IS, KICK, 0, NEGOTIATED(1), TO(0x70), 15, KICK,
         0, KICK, 9),
    SEED("status", AS_IS, TO(0x70), 2, TO(0x70), 0, TO(0x70), 3, TO(0x70), 4,
         TO(0x70), 1, TO(0x70), 1, TO(0x70), 8, TO(0x70), 3, TO(0x70), 7,
         TO(0x70), 1, TO(0x70), 0x13, TO(0x70), 0x83),
    SEED("needs_reset", UP_AND, HOST, 0, TO(0x70), 15, TO(0x70), 0xcf, READ,
         28, 0, TO(0x70), 0, HOST, 0, HOST, 2, 1, HOST, 3, 0, 40, HOST, 4),
    SEED("features", AS_IS, UP, 0x40, 0, 0, TO(0x70), 0, NEGOTIATED(0x81)),
    SEED("ring_size", AS_IS, NEGOTIATED(1), TO(0x44), 1, TO(0x70), 15, DRAIN,
         0, 0),
    SEED("ring_place", UP_AND, UP, 0, 0, 7, UP, 0, 0, 8, UP, 0, 0, 9, UP, 0, 0,
         13, UP, 0, 0, 4, RW(0, 0), UP, 0, 0, 5, RW(0, 0), UP, 0, 0, 6,
         RW(0, 0)),
    SEED("ring_seams", UP_AND, UP, 0, 0, 1, RW(0, 0), RW(0, 0), UP, 0, 0, 2,
         RW(0, 0), RW(0, 0), UP, 0, 0, 3, RW(0, 0), RW(0, 0)),
    SEED("avail_outside", UP_AND, UP, 0, 0, 10, UP, 0, 0, 12, SEND(0, 0, 0, 0)),
    SEED("avail_jump", UP_AND, FORGE, 11, 0, KICK, 0, DRAIN, 0, 0),
    SEED("avail_back", UP_AND, FORGE, 12, 0, KICK, 0),
    SEED("head_range", UP_AND, SEND(0, 0, 0, 0), FORGE, 10, 0, KICK, 0),
    SEED("head_size", UP_AND, SEND(0, 0, 0, 0), FORGE, 9, 0, KICK, 0),
    SEED("next_size", UP_AND, UP, 0, 0, 1, REQUEST, 0x80, 0, 0, 0, 0, DESC, 0,
         1, 11, 200, 3, 16, DESC, 0, 16, 11, 1, 2, 0, AVAIL, 0, 0, 1, KICK, 0),
    SEED("overrun", SIZE(2), REQUEST, 4, 0, 0, 0, 0, NEXT, 0, 0, REQUEST, 4, 0,
         0, 0, 0, NEXT, 0, 0, REQUEST, 4, 0, 0, 0, 0, NEXT, 0, 0, COMPLETE, 0,
         0, 0),
    SEED("used_outside", UP_AND, UP, 0, 0, 11, SEND(0, 0, 0, 0), UP, 0, 0, 14,
         SEND(0, 0, 0, 0)),
    SEED("used_refused", UP_AND, REQUEST, 0, 0, 0, 0, 0, REFUSE, 0x80, 12,
         KICK, 0),
    SEED("used_hole", UP_AND, REFUSE, 10, 0, 200, KICK, 0, SEND(0, 0, 0, 0),
         SEND(0, 0, 0, 0)),
    SEED("chain_long", UP_AND, SEND(0, 0, 19, 0), SEND_TABLE(0, 0, 19, 0),
         SEND_TABLE(0, 0, 51, 0)),
    SEED("forged", UP_AND, FORGE, 0, 0, KICK, 0, FORGE, 1, 0, KICK, 0, FORGE, 2,
         0, KICK, 0, FORGE, 3, 0, KICK, 0, FORGE, 4, 0, KICK, 0, FORGE, 5, 0,
         KICK, 0, FORGE, 6, 0, KICK, 0, FORGE, 7, 0, KICK, 0, FORGE, 8, 0,
         KICK, 0, FORGE, 13, 0, KICK, 0, FORGE, 15, 0, KICK, 0),
    SEED("indirect_off", 0, 0, 0, 0, 5, SEND_TABLE(0, 0, 0, 0), RW(0, 0)),
    SEED("status_place", UP_AND, RW(3, 0), RW(4, 0), RW(9, 0), RW(14, 0),
         RW(15, 0), RW(20, 0), RW(21, 0)),
    SEED("header_wraps", UP_AND, REQUEST, 0x80, 1, 0, 0, 0, DESC, 0, 0, 7, 17,
         1, 1, AVAIL, 0, 0, 1, KICK, 0),
    SEED("unmapped_next", UP_AND, REQUEST, 0, 0, 0, 0, 4, NEXT, 0, 0, COMPLETE,
         0, 0, 0, REQUEST, 0, 1, 0, 0, 4, NEXT, 0, 0, REQUEST, 0, 1, 0x70, 0,
         0, NEXT, 0, 0),
    SEED("headers", UP_AND, RW(1, 0), RW(2, 0), RW(5, 0), RW(6, 0), RW(7, 0),
         RW(8, 0), RW(12, 0), RW(13, 0)),
    SEED("barrier", UP_AND, SEND(0x40, 0, 0, 0), SEND(0x41, 0, 0, 0)),
    SEED("types", UP_AND, SEND(4, 0, 0, 0), SEND(7, 0, 0, 0), SEND(5, 0, 0, 0),
         SEND(2, 0, 0, 0), SEND(0x80, 0, 0, 0), SEND(0x81, 0, 0, 0),
         SEND(0, 0, 16, 0)),
    SEED("lengths", UP_AND, SEND(0, 0x20, 0, 0), SEND(1, 0x20, 0, 0),
         SEND(0, 0x70, 0, 0), SEND(1, 0x80, 0, 0), SEND(3, 0x50, 0, 0),
         SEND(3, 0x20, 0, 0), SEND(3, 0x40, 11, 0), SEND(3, 0, 0, 0),
         SEND(0, 0xe0, 0, 0)),
    SEED("segment_strict", 0, 0x80, 0, 0, 17, SEND(0, 0xe0, 0, 0)),
    SEED("segment_long", SIZE(0x80), SEND(0, 0xe0, 0, 0), SEND(1, 0xe0, 10, 0),
         UP, 8, 0, 0, SEND(0, 0x10, 0, 0)),
    SEED("data_long", 0, 0, 0x40, 5, 1, SEND(0, 0, 18, 0), SEND(1, 0, 18, 0)),
    SEED("data_place", UP_AND, RW(0, 1), RW(0, 2), RW(0, 4), RW(0, 5),
         RW(0, 6), RW(0, 7), RW(10, 1), RW(10, 15)),
    SEED("many_seams", 0, 0x45, 0, 4, 1, RW(17, 0), SEND_TABLE(0, 0, 17, 0),
         SEND_TABLE(1, 0, 17, 0)),
    SEED("read_only", 4, 0, 0, 0, 1, RW(0, 0), SEND(2, 0x20, 0, 0)),
    SEED("no_write", 16, 0, 0, 0, 1, RW(0, 0)),
    SEED("no_flush", 32, 0, 0, 0, 1, SEND(2, 0x20, 0, 0)),
    SEED("unsafe", 8, 0, 0, 0, 1, SEND(2, 0x20, 0, 0), RW(0, 0)),
    SEED("write_through", 0, 0, 0, 0, 9, RW(0, 0), SEND(2, 0x20, 0, 0),
         BACKEND, 0, 2, SEND(1, 0, 0, 0)),
    SEED("out_of_range", UP_AND, SEND(0, 3, 0, 0), SEND(1, 4, 0, 0),
         SEND(1, 0x14, 0, 0), SEND(0, 5, 0, 0), SEND(0, 6, 0, 0)),
    SEED("backend", UP_AND, BACKEND, 0, 1, RW(0, 0), BACKEND, 0, 1,
         SEND(2, 0x20, 0, 0), BACKEND, 1, 0, RW(0, 0), BACKEND, 2, 0,
         SEND(0, 0x30, 0, 0), SEND(1, 0x30, 10, 0), BACKEND, 4, 0, RW(0, 0),
         BACKEND, 8, 3, SEND(0, 0x10, 0, 0), BACKEND, 8, 0, RW(10, 0)),
    SEED("backend_bits", UP_AND, BACKEND, 4, 0, SEND(0, 0x30, 10, 0),
         SEND(1, 0x30, 0, 1), BACKEND, 2, 0, SEND(0, 0x90, 0, 1),
         SEND(1, 0xa0, 10, 0)),
    SEED("memory_later", 64, 0, 0, 0, 1, KICK, 0, REMAP, 2, RW(0, 0), KICK, 0),
    SEED("memory_moves", UP_AND, RW(0, 0), REMAP, 3, RW(0, 0), REMAP, 1,
         RW(0, 0), REMAP, 1, RW(0, 0), REMAP, 0x2a, RW(0, 1)),
    SEED("no_interrupt", 0, 0, 0, 0xf0, 1, RW(0, 0), ACK, 1),
    SEED("asynchronous", UP_AND, MANY, 3, 0, 0, 0, 0, 0, REQUEST, 0, 1, 0x10,
         0, 1, NEXT, 0, 1, COMPLETE, 2, 0, 0, COMPLETE, 0, 1, 0, COMPLETE, 1,
         2, 100, PUBLISH, 0, COMPLETE, 4, 0, 0, COMPLETE, 3, 0, 0, NEXT, 0, 0),
    SEED("after_reset", UP_AND, MANY, 2, 0, 0, 0, 0, 0, NEXT, 0, 1, TO(0x70),
         0, COMPLETE, 0, 0, 0, UP, 0, 0, 0, COMPLETE, 1, 0, 0, RW(0, 0),
         COMPLETE, 2, 0, 0, PUBLISH, 0),
    SEED("queue_stops", UP_AND, MANY, 2, 0, 0, 0, 0, 0, NEXT, 0, 0, STOP, 0,
         START, 0xc0, 4, 0, COMPLETE, 0, 0, 0, DRAIN, 0, 0, STOP, 0, START, 0,
         4, 3, RW(0, 0)),
    SEED("queues", SIZE(0x18), REQUEST, 1, 0, 0, 0, 0, REQUEST, 2, 1, 0, 0, 0,
         DRAIN, 0xfd, 0, REQUEST, 1, 0, 0, 0, 0, KICK, 1, KICK, 3),
    SEED("no_mq", 0, 0x18, 0, 0, 0x41, REQUEST, 1, 0, 0, 0, 0, KICK, 1,
         RW(0, 0)),
    SEED("event_idx", UP_AND, WISH, 0x80, 1, RW(0, 0), WISH, 0x80, 9, RW(0, 0),
         ACK, 0xe7, ACK, 1),
    SEED("flags", 0, 0, 0, 0, 3, WISH, 0, 1, RW(0, 0), WISH, 0, 0, RW(0, 0),
         RW(0, 0), RW(0, 0), ACK, 1, ACK, 0xff),
    SEED("more", SIZE(2), MANY, 9, 4, 0, 0, 0, 0, KICK, 0),
    SEED("throttle_ops", 0, 0, 1, 0, 1, MANY, 2, 0, 0, 0, 0, 0, KICK, 0x80,
         DRAIN, 0, 1, TIME, 1, DRAIN, 0, 1, TIME, 4, DRAIN, 0, 1, TIME, 0x44,
         DRAIN, 0, 1),
    SEED("throttle_thirds", 0, 0, 4, 0, 1, MANY, 11, 4, 0, 0, 0, 0, DRAIN, 0,
         1, DRAIN, 0, 1, DRAIN, 0, 1, MANY, 3, 4, 2, 0x20, 0, 0, DRAIN, 0, 1,
         TIME, 0x44, LIMIT, 0, DRAIN, 0, 1),
    SEED("throttle_bytes", 0, 0, 4, 0, 1, MANY, 3, 0, 0, 0x30, 0, 0, DRAIN, 0,
         1, LIMIT, 3, DRAIN, 0, 1, LIMIT, 5, DRAIN, 0, 1, LIMIT, 6, DRAIN, 0,
         1, TIME, 6, TIME, 6, DRAIN, 0, 1, LIMIT, 7, LIMIT, 0x80, 3, 9, 5,
         DRAIN, 0, 1),
    SEED("throttle_both", UP_AND, LIMIT, 0x80, 1, 3, 0xff, MANY, 3, 4, 0, 0, 0,
         0, DRAIN, 0, 1, DRAIN, 0, 1),
    SEED("throttle_queues", 0, 0x18, 2, 0, 1, REQUEST, 1, 0, 0, 0, 0, REQUEST,
         2, 0, 0, 0, 0, LIMIT, 1, REQUEST, 0, 0, 0, 0, 0, DRAIN, 0xfd, 1,
         DRAIN, 0xfd, 1, TO(0x70), 0),
    SEED("ambush", UP_AND, SEND(0, 0, 0, 0), AMBUSH, 1, 1, KICK, 0, AMBUSH, 2,
         1, KICK, 0, AMBUSH, 3, 1, KICK, 0, AMBUSH, 4, 1, KICK, 0, AMBUSH, 3,
         1, SEND(0, 0, 0, 0), AMBUSH, 4, 0x32, SEND(1, 0, 0, 0), AMBUSH, 5,
         0x22, SEND(0, 0, 0, 0)),
    SEED("second_look", UP_AND, AMBUSH, 13, 1, SEND(0, 0, 0, 0), AMBUSH, 14, 1,
         SEND(0, 0, 0, 0), AMBUSH, 15, 1, SEND(0, 0, 0, 0), UP, 1, 0, 0,
         AMBUSH, 14, 1, SEND(0, 0, 0, 0), AMBUSH, 15, 1, SEND(0, 0, 0, 0)),
    SEED("budget", SIZE(1), REQUEST, 4, 0, 0, 0, 0, AMBUSH, 9, 1, KICK, 0,
         REQUEST, 4, 0, 0, 0, 0, AMBUSH, 7, 1, KICK, 0),
    SEED("moved_unpublished", UP_AND, REQUEST, 0, 0, 0, 0, 0, NEXT, 0, 0,
         COMPLETE, 0, 0, 0, REMAP, 3, PUBLISH, 0),
    SEED("not_quiet", UP_AND, RW(0, 0), MANY, 2, 0, 0, 0, 0, 0, NEXT, 0, 0,
         HOST, 4, STOP, 0, TO(VBLK_REG_QUEUE_READY), 0, TO(0x70), 0, COMPLETE,
         0, 0, 0, RW(0, 0), HOST, 4, TO(0x70), 0, UP, 0, 0, 0, RW(0, 0)),
    SEED("rewritten", UP_AND, REQUEST, 0, 0, 0, 0, 0, DESC, 0, 1, 11, 200, 3,
         0, POKE, 14, 0x11, 0, 3, 4, AVAIL, 0, 1, 1, KICK, 0),
};

static int write_seeds(const char *dir) {
    for (size_t i = 0; i < COUNT_OF(seeds); i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, seeds[i].name);
        FILE *file = fopen(path, "wb");
        if (!file ||
            fwrite(seeds[i].bytes, 1, seeds[i].n, file) != seeds[i].n ||
            fclose(file)) {
            perror(path);
            return 1;
        }
    }
    return 0;
}

#endif

#ifdef FUZZ_REPLAY
// Files are replayed, directories by their files; what was reached is told.
int main(int argc, char **argv) {
#ifdef FUZZ_SEEDS
    return argc == 2 ? write_seeds(argv[1]) : 2;
#else
    for (int i = 1; i < argc; i++) {
        if (!fuzz_replay_dir(argv[i]) && !replay(argv[i])) {
            perror(argv[i]);
            return 1;
        }
    }
#define VBLK_X(name, number, level, a, b, text)                                \
    if (!memchr(events[number], 1, sizeof events[number])) {                   \
        printf("not reached: %s\n", #name);                                    \
    }
    VBLK_EVENTS(VBLK_X)
#undef VBLK_X
    return 0;
#endif
}
#endif
