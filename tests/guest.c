#include "guest.h"

guest g;
bool  guest_use_map;
vblk_profile guest_profile = VBLK_STRICT;


// ---- Memory ----------------------------------------------------------------

static size_t host_offset(uint64_t gpa) {
    if (gpa < SEAM) {
        return (size_t)gpa;
    }
    if (gpa < RAM_END) {
        return (size_t)gpa + GAP;
    }
    return (size_t)(gpa - HIGH) + RAM_END + 2 * GAP;
}

static bool is_ram(uint64_t gpa) {
    return gpa < RAM_END || gpa >= HIGH;
}

uint8_t *at(uint64_t gpa) {
    if (!is_ram(gpa)) {
        fprintf(stderr, "test bug: %#" PRIx64 " is no guest memory\n", gpa);
        abort();
    }
    return g.base + host_offset(gpa);
}

uint8_t *truth_at(uint64_t gpa) {
    return g.truth + host_offset(gpa);
}

void put(uint64_t gpa, const void *src, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = ((const uint8_t *)src)[i];
        *at(gpa + i) = byte;
        g.truth[host_offset(gpa + i)] = byte;
    }
}

void fill(uint64_t gpa, uint8_t value, size_t n) {
    for (size_t i = 0; i < n; i++) {
        put(gpa + i, &value, 1);
    }
}

static void put_le(uint64_t gpa, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        uint8_t b = (uint8_t)(value >> 8 * i);
        put(gpa + i, &b, 1);
    }
}

void put16(uint64_t gpa, uint16_t value) {
    put_le(gpa, value, 2);
}

void put32(uint64_t gpa, uint32_t value) {
    put_le(gpa, value, 4);
}

void put64(uint64_t gpa, uint64_t value) {
    put_le(gpa, value, 8);
}

uint16_t get16(uint64_t gpa) {
    return (uint16_t)(*at(gpa) | *at(gpa + 1) << 8);
}

uint32_t get32(uint64_t gpa) {
    return get16(gpa) | (uint32_t)get16(gpa + 2) << 16;
}

uint64_t alloc(size_t n, size_t align) {
    g.bump = (g.bump + align - 1) / align * align;
    uint64_t gpa = g.bump;
    g.bump += n;
    if (g.bump > RAM_END) {
        fprintf(stderr, "test bug: out of guest memory\n");
        abort();
    }
    return gpa;
}

void mark(uint64_t gpa, uint64_t n, uint8_t bits) {
    for (uint64_t i = 0; i < n && is_ram(gpa + i); i++) {
        g.mark[host_offset(gpa + i)] |= bits;
        if (bits & OFFERED) {
            g.offers[host_offset(gpa + i)]++;
        }
    }
}

void rewritable(uint64_t gpa) {
    g.writes[host_offset(gpa)] = 0;
}

static bool in_hole(uint64_t gpa, uint64_t n) {
    return g.hole_bytes && n && gpa < g.hole + g.hole_bytes &&
           g.hole < gpa + n;
}

static bool refused(uint64_t gpa, uint64_t n) {
    g.accesses++;
    if (g.ambush > 0 && --g.ambush == 0) {
        g.strike();
    }
    if (g.fail_access > 0 && --g.fail_access == 0) {
        g.fail_access = g.keep_failing ? 1 : 0;
        g.tripped++;
        return true;
    }
    return in_hole(gpa, n);
}

static void remember(bool write, uint64_t gpa, uint64_t n) {
    guest_access *a = &g.trace[g.traced++ % COUNT(g.trace)];
    a->write = write;
    a->gpa = gpa;
    a->n = n;
}

static int mem_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    if (refused(gpa, n) || m.read(m.user, gpa, dst, n)) {
        return -1;
    }
    if (dst) {
        remember(false, gpa, n);
        for (uint64_t i = 0; i < n; i++) { // SPLIT-04
            uint8_t bits = g.mark[host_offset(gpa + i)];
            g.read_offered |= bits & OFFERED && !(bits & READABLE);
        }
    }
    return 0;
}

static int mem_write(void *user, uint64_t gpa, const void *src, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    if (refused(gpa, n) || m.write(m.user, gpa, src, n)) {
        return -1;
    }
    if (src) {
        remember(true, gpa, n);
        for (uint64_t i = 0; i < n; i++) {
            g.writes[host_offset(gpa + i)]++;
        }
    }
    return 0;
}

static void *mem_map(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    uint64_t hole = g.hole;
    if (refused(gpa, 1)) {
        return NULL;
    }
    if (g.hole_bytes && gpa < hole && hole - gpa < *n) {
        *n = hole - gpa;
    }
    for (unsigned i = 0; i < COUNT(g.queue) && writable; i++) {
        guest_queue *q = &g.queue[i];
        g.mapped_for_writing |= q->size && (gpa == q->desc || gpa == q->avail);
    }
    g.mapped_for_writing |= writable && is_ram(gpa) &&
                            g.mark[host_offset(gpa)] == READABLE;
    return m.map(m.user, gpa, n, writable);
}


// ---- Disk ------------------------------------------------------------------

static bool call_fails(char what, uint64_t offset, const vblk_seg *seg,
                       unsigned segs) {
    guest_op *op = &g.op[g.calls++ % COUNT(g.op)];
    op->what = what;
    op->offset = offset;
    op->segs = segs;
    op->bytes = 0;
    for (unsigned i = 0; i < segs; i++) {
        op->bytes += seg[i].n;
        g.broken_rule |= seg[i].n == 0 || !seg[i].ptr;
    }
    uint64_t end = (g.dev.disk & UINT64_MAX >> 10) * 512;
    g.broken_rule |= offset > end || op->bytes > end - offset;
    g.broken_rule |= what != 'f' && op->bytes == 0;
    if (g.fail_call > 0 && --g.fail_call == 0) {
        g.fail_call = g.keep_failing_calls ? 1 : 0;
        g.tripped++;
        return true;
    }
    return false;
}

static int64_t move(uint64_t offset, const vblk_seg *seg, unsigned segs,
                    bool in) {
    uint64_t most = g.most ? g.most : UINT64_MAX;
    uint64_t done = 0;
    for (unsigned i = 0; i < segs; i++) {
        for (size_t k = 0; k < seg[i].n; k++, done++) {
            if (offset + done >= g.backing || done == most ||
                (!in && g.stuck && g.written == g.stuck)) {
                return (int64_t)done;
            }
            g.written += !in;
            if (in) {
                seg[i].ptr[k] = g.disk[offset + done];
            } else {
                g.disk[offset + done] = seg[i].ptr[k];
            }
        }
    }
    return (int64_t)done;
}

static int64_t disk_read(void *user, uint64_t offset, const vblk_seg *seg,
                         unsigned segs) {
    (void)user;
    return call_fails('r', offset, seg, segs) ? -5
                                              : move(offset, seg, segs, true);
}

static int64_t disk_write(void *user, uint64_t offset, const vblk_seg *seg,
                          unsigned segs) {
    (void)user;
    return call_fails('w', offset, seg, segs)
               ? -28
               : move(offset, seg, segs, false);
}

static int disk_flush(void *user) {
    (void)user;
    g.flushes++;
    return call_fails('f', 0, NULL, 0) ? -5 : 0;
}

static uint64_t disk_size(void *user) {
    (void)user;
    return g.backing;
}


// ---- Hooks -----------------------------------------------------------------

static void on_interrupt(void *user, int queue, bool fire) {
    (void)user;
    g.fired_queue = queue;
    CHECK(!fire || queue != VBLK_NO_QUEUE ||
          vblk_status(&g.dev) & VBLK_STATUS_DRIVER_OK);
    g.fired += fire;
    g.lowered += !fire;
}

static void on_event(void *user, const vblk_event *event) {
    char line[400];
    (void)user;
    bool of_queue = event->code >= VBLK_EV_RING_SIZE &&
                    event->code < VBLK_EV_HOST_RESET;
    bool of_chain = event->code >= VBLK_EV_CHAIN_LONG &&
                    event->code < VBLK_EV_NO_MEMORY;
    CHECK(!of_queue || event->queue >= 0);
    CHECK_EQ(of_chain, event->head != VBLK_NO_HEAD);
    vblk_event_line(event, line, sizeof line);
    CHECK(!event->against || strstr(line, "against "));
    CHECK(!event->value || strstr(line, "[value ") || strstr(line, ", value "));
    g.events[event->code]++;
    g.last = *event;
}

static void on_notify(void *user, int queue) {
    (void)user;
    g.notified = queue;
}


// ---- Bring-up --------------------------------------------------------------

static void lie_at(uint8_t *base) {
    static const uint64_t gpa[3] = {SEAM, 0, HIGH};
    static const uint64_t bytes[3] = {RAM_END - SEAM, SEAM, HIGH_SIZE};
    g.base = base;
    for (unsigned i = 0; i < 3; i++) {
        g.region[i].gpa = gpa[i];
        g.region[i].bytes = bytes[i];
        g.region[i].host = at(gpa[i]);
    }
    g.vram.region = g.region;
    g.vram.count = 3;
}

static uint8_t elsewhere[sizeof g.ram + 1]; // from 1 on: at odd addresses

void guest_move(void) {
    uint8_t *old = g.base;
    lie_at(old == g.ram ? elsewhere + 1 : g.ram);
    memcpy(g.base, old, sizeof g.ram);
    memset(old, MOVED, sizeof g.ram);
    g.moved = true;
}

bool guest_left_alone(void) {
    const uint8_t *old = g.base == g.ram ? elsewhere + 1 : g.ram;
    return !g.moved || (*old == MOVED &&
                        memcmp(old, old + 1, sizeof g.ram - 1) == 0);
}

void guest_init(void) {
    memset(&g, 0, sizeof g);
    memset(g.ram, DIRT, sizeof g.ram);
    memset(g.ram + SEAM, CANARY, GAP);
    memset(g.ram + RAM_END + GAP, CANARY, GAP);
    memcpy(g.truth, g.ram, sizeof g.ram);
    for (size_t i = 0; i < sizeof g.disk; i++) {
        g.disk[i] = (uint8_t)(i / 512 * 7 + i * 3 + 1);
    }
    g.backing = sizeof g.disk;
    g.bump = 0x1000;
    g.mapped = guest_use_map;
    lie_at(g.ram);
    g.o.memory.read = mem_read;
    g.o.memory.write = mem_write;
    g.o.memory.map = g.mapped ? mem_map : NULL;
    g.o.memory.user = &g.vram;
    g.o.backend.read = disk_read;
    g.o.backend.write = disk_write;
    g.o.backend.flush = disk_flush;
    g.o.backend.size = disk_size;
    g.o.id = "disk-0";
    g.o.profile = guest_profile;
    g.o.interrupt = on_interrupt;
    g.o.event = on_event;
    g.o.notify = on_notify;
}

uint32_t rd(uint32_t offset) {
    return (uint32_t)vblk_mmio_read(&g.dev, offset, 4);
}

int wr(uint32_t offset, uint32_t value) {
    g.notified = VBLK_NO_QUEUE;
    vblk_mmio_write(&g.dev, offset, 4, value);
    return g.notified;
}

void wr_drain(uint32_t offset, uint32_t value) {
    int queue = wr(offset, value);
    while (queue != VBLK_NO_QUEUE && drain_at(queue, 0).state == MORE) {
    }
}

void reset(void) {
    wr(VBLK_REG_STATUS, 0);
    memset(g.queue, 0, sizeof g.queue);
}

// By the rule: 0 resets, the same value is nothing; strict: one bit may be
// added, in order; standard: what is new in it is added if each step of it is
// in order; FAILED any time.
uint32_t guest_status_after(bool standard, uint32_t old, uint32_t value) {
    static const uint8_t ways[][5] = {{0, 1, 3, 0xb, 0xf}, {0, 2, 0xa, 0xe}};
    uint32_t add = value & ~old & (standard ? 0x8fu : ~0u);
    if (value == 0) {
        return 0;
    }
    if (!standard && (old & ~value || add & (add - 1))) {
        return old;
    }
    for (unsigned way = 0; way <= standard; way++) {
        for (unsigned i = 0; i < 5; i++) {
            for (unsigned k = i; k < 5; k++) {
                uint32_t from = ways[way][i], to = ways[way][k] | (add & 0x80);
                if (old == from && to == (from | add)) {
                    return to;
                }
            }
        }
    }
    return add == 0x80 ? old | 0x80 : old;
}

void guest_make(void) {
    g.o.queue = g.o.queues > 1 ? g.vq : NULL;
    int err = vblk_init(&g.dev, &g.o);
    CHECK_EQ(VBLK_OK, err);
}

void guest_negotiate(uint64_t declined) {
    wr(VBLK_REG_STATUS, 0);
    wr(VBLK_REG_STATUS, 1);
    wr(VBLK_REG_STATUS, 3);
    g.features = 0;
    for (uint32_t sel = 0; sel < 2; sel++) {
        wr(VBLK_REG_DEVICE_FEATURES_SEL, sel);
        g.features |= (uint64_t)rd(VBLK_REG_DEVICE_FEATURES) << 32 * sel;
    }
    g.features &= ~declined;
    for (uint32_t sel = 0; sel < 2; sel++) {
        wr(VBLK_REG_DRIVER_FEATURES_SEL, sel);
        wr(VBLK_REG_DRIVER_FEATURES, (uint32_t)(g.features >> 32 * sel));
    }
    wr(VBLK_REG_STATUS, 0xb);
}

void guest_queue_up(unsigned queue, uint32_t size) {
    guest_queue *q = &g.queue[queue];
    memset(q, 0, sizeof *q);
    q->size = size;
    q->desc = alloc(16 * (size_t)size, 16);
    q->avail = alloc(6 + 2 * (size_t)size, 2);
    q->used = alloc(6 + 8 * (size_t)size, 4);
    fill(q->desc, 0, 16 * (size_t)size);
    fill(q->avail, 0, 6 + 2 * (size_t)size);
    fill(q->used, 0, 6 + 8 * (size_t)size);
    mark(q->desc, 16 * (uint64_t)size, READABLE);
    mark(q->avail, 6 + 2 * (uint64_t)size, READABLE);
    mark(q->used, 6 + 8 * (uint64_t)size, RING);
    wr(VBLK_REG_QUEUE_SEL, queue);
    wr(VBLK_REG_QUEUE_NUM, size);
    wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)q->desc);
    wr(VBLK_REG_QUEUE_DESC_HIGH, (uint32_t)(q->desc >> 32));
    wr(VBLK_REG_QUEUE_DRIVER_HIGH, (uint32_t)(q->avail >> 32)); // M8
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)q->avail);
    wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)q->used);
    wr(VBLK_REG_QUEUE_DEVICE_HIGH, (uint32_t)(q->used >> 32));
    wr(VBLK_REG_QUEUE_READY, 1);
}

void guest_remap(void) {
    for (unsigned i = 0; i < g.dev.queues; i++) {
        g.dev.queue[i].run.resolved = false;
        g.dev.queue[i].run.desc = g.dev.queue[i].run.avail = NULL;
        g.dev.queue[i].run.used = NULL;
    }
}

void guest_go(void) {
    wr_drain(VBLK_REG_STATUS, 0xf);
}

void guest_up_without(uint64_t declined) {
    guest_make();
    guest_negotiate(declined);
    for (unsigned i = 0;; i++) {
        wr(VBLK_REG_QUEUE_SEL, i);
        uint32_t size = rd(VBLK_REG_QUEUE_NUM_MAX);
        if (size == 0) {
            break;
        }
        guest_queue_up(i, size);
    }
    wr(VBLK_REG_QUEUE_SEL, 0);
    guest_go();
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
}

// Flag-based notifications unless a test asks for EVENT_IDX.
void guest_up(void) {
    guest_up_without(VBLK_F_EVENT_IDX);
}

void guest_up_standard(void) {
    g.o.profile = VBLK_STANDARD;
    guest_up();
}


// ---- Rings -----------------------------------------------------------------

void put_desc(uint64_t table, unsigned i, part p, uint16_t next) {
    uint64_t d = table + 16 * (uint64_t)i;
    put64(d, p.gpa);
    put32(d + 8, p.n);
    put16(d + 12, p.flags);
    put16(d + 14, next);
    if (p.flags & INDIRECT) {
        return;
    }
    mark(p.gpa, p.n, p.flags & WRITE ? OFFERED : READABLE);
}

uint16_t put_chain(unsigned queue, const part *p, unsigned n) {
    guest_queue *q = &g.queue[queue];
    uint16_t head = q->next_desc;
    for (unsigned i = 0; i < n; i++) {
        part d = p[i];
        uint16_t here = q->next_desc;
        q->next_desc = (uint16_t)((here + 1) % q->size);
        d.flags |= i + 1 < n ? NEXT : 0;
        put_desc(q->desc, here, d, q->next_desc);
    }
    return head;
}

uint64_t put_table(const part *p, unsigned n) {
    uint64_t table = alloc(16 * (size_t)n, 16);
    mark(table, 16 * (uint64_t)n, READABLE);
    for (unsigned i = 0; i < n; i++) {
        part d = p[i];
        d.flags |= i + 1 < n ? NEXT : 0;
        put_desc(table, i, d, (uint16_t)(i + 1));
    }
    return table;
}

void offer(unsigned queue, uint16_t head) {
    guest_queue *q = &g.queue[queue];
    put16(q->avail + 4 + 2 * (uint64_t)(q->avail_idx % q->size), head);
    put16(q->avail + 2, ++q->avail_idx);
}

uint16_t submit(unsigned queue, const part *p, unsigned n) {
    uint16_t head = put_chain(queue, p, n);
    offer(queue, head);
    return head;
}

uint64_t put_header(uint32_t type, uint64_t sector) {
    uint64_t gpa = alloc(16, 1);
    put32(gpa, type);
    put32(gpa + 4, 0xffffffff); // reserved: ignored
    put64(gpa + 8, sector);
    return gpa;
}

req prepare(uint32_t type, uint64_t sector, uint32_t bytes) {
    req r = {.bytes = bytes, .out = (type & 0x7fffffff) == VBLK_T_OUT};
    r.header = put_header(type, sector);
    r.data = alloc(bytes + 2, 1) + 1; // a byte of dirt on either side
    r.status = alloc(3, 1) + 1;
    fill(r.status, 0xff, 1);
    return r;
}

uint16_t send(unsigned queue, const req *r) {
    part p[3] = {
        {r->header, 16, 0},
        {r->data, r->bytes, r->out ? 0 : WRITE},
        {r->status, 1, WRITE},
    };
    if (r->bytes == 0) {
        p[1] = p[2];
        return submit(queue, p, 2);
    }
    return submit(queue, p, 3);
}

req request(uint32_t type, uint64_t sector, uint32_t bytes) {
    req r = prepare(type, sector, bytes);
    r.head = send(0, &r);
    return r;
}

void again(const req *r) {
    mark(r->data, r->bytes, OFFERED);
    mark(r->status, 1, OFFERED);
}

uint8_t status_of(const req *r) {
    return *at(r->status);
}

uint8_t run(uint32_t type, uint64_t sector, uint32_t bytes) {
    req r = request(type, sector, bytes);
    kick(0);
    return status_of(&r);
}

static outcome outcome_of(uint64_t again, uint64_t now, int queue) {
    outcome out = {EMPTY, 0};
    bool stalled = false;
    unsigned begin = queue < 0 ? 0 : (unsigned)queue;
    unsigned end = queue < 0 ? g.dev.queues : begin + 1;
    for (unsigned i = begin; i < end; i++) {
        stalled |= g.dev.queue[i].run.stalled;
        if (vblk_queue_broken(&g.dev, i)) {
            out.state = BROKEN;
        }
    }
    if (again != VBLK_NEVER && again >= now) {
        out.state = again > now || stalled ? STALLED : MORE;
        out.wait_ns = again - now;
    }
    return out;
}

outcome drain_at(int queue, uint64_t now) {
    uint64_t again;
    if (queue == VBLK_ALL_QUEUES) {
        vblk_notify(&g.dev, VBLK_ALL_QUEUES);
        again = vblk_poll(&g.dev, now);
        bool due = false;
        for (unsigned i = 0; i < g.dev.queues; i++) {
            due |= g.dev.queue[i].due && !g.dev.queue[i].run.stalled;
        }
        if (due) { // more is more pressing than a stall
            outcome more = {MORE, 0};
            return more;
        }
    } else {
        again = vblk_drain(&g.dev, (unsigned)queue, now);
    }
    return outcome_of(again, now, queue);
}

outcome take(int queue, uint64_t now, vblk_request *r) {
    static vblk_seg seg[300][MAX_SEGS + 18];
    static unsigned next;
    outcome         got = {REQUEST, 0};
    if (vblk_next(&g.dev, (unsigned)queue, now, r, seg[next],
                  COUNT(seg[0]))) {
        next = (next + 1) % COUNT(seg);
        return got;
    }
    return outcome_of(vblk_arm(&g.dev, (unsigned)queue, now), now, queue);
}

outcome drain(unsigned queue) {
    outcome out;
    do {
        out = drain_at((int)queue, 0);
    } while (out.state == MORE);
    return out;
}

outcome kick(unsigned queue) {
    outcome out = {EMPTY, 0};
    int which = wr(VBLK_REG_QUEUE_NOTIFY, queue);
    return which == VBLK_NO_QUEUE ? out : drain((unsigned)which);
}

unsigned used_count(unsigned queue) {
    guest_queue *q = &g.queue[queue];
    return (uint16_t)(get16(q->used + 2) - q->used_idx);
}

bool used_next(unsigned queue, uint32_t *id, uint32_t *len) {
    guest_queue *q = &g.queue[queue];
    if (used_count(queue) == 0) {
        return false;
    }
    uint64_t e = q->used + 4 + 8 * (uint64_t)(q->used_idx++ % q->size);
    *id = get32(e);
    *len = get32(e + 4);
    return true;
}

uint32_t used_len(unsigned queue) {
    uint32_t id, len;
    return used_next(queue, &id, &len) ? len : UINT32_MAX;
}

vblk_counts counts(void) {
    return vblk_counters(&g.dev);
}


// ---- What always holds -----------------------------------------------------

static void check_fails(size_t i, const char *how) {
    char text[80];
    snprintf(text, sizeof text, "host offset %#zx: %s", i, how);
    test_fail(__FILE__, __LINE__, text);
}

void guest_check(void) {
    static const uint8_t untouched[GAP];
    CHECK(!g.broken_rule);
    CHECK(!g.read_offered);
    for (size_t i = 0; i < sizeof g.ram; i++) {
        if (i % GAP == 0 && !memcmp(g.ram + i, g.truth + i, GAP) &&
            !memcmp(g.writes + i, untouched, GAP)) {
            i += GAP - 1;
            continue;
        }
        if (!(g.mark[i] & (OFFERED | RING)) && g.ram[i] != g.truth[i]) {
            check_fails(i, "changed and was not offered");
            break;
        }
        if (!(g.mark[i] & RING) && g.writes[i] > g.offers[i]) {
            check_fails(i, "written more often than offered");
            break;
        }
    }
    for (unsigned i = 0; i < COUNT(g.queue); i++) {
        if (g.queue[i].size) {
            uint16_t done = get16(g.queue[i].used + 2);
            CHECK((uint16_t)(g.queue[i].avail_idx - done) <= 0x8000);
        }
    }
    if (!g.dev.strict && g.dev.queues) { // MMIO-19
        CHECK_EQ(rd(VBLK_REG_INTERRUPT_STATUS) != 0,
                 vblk_interrupt_line(&g.dev));
    }
}
