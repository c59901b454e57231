// Groups X (execution), B (backends), the request interface, the options.
#include "guest.h"

#include "../examples/pacer.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

void x1_one_vectored_call_for_a_request(void) {
    guest_up();
    req r = prepare(VBLK_T_OUT, 10, 1536);
    for (uint32_t i = 0; i < 1536; i++) {
        uint8_t byte = (uint8_t)(i * 11);
        put(r.data + i, &byte, 1);
    }
    part p[5] = {{r.header, 16, 0}, {r.data, 600, 0}, {r.data + 600, 500, 0},
                 {r.data + 1100, 436, 0}, {r.status, 1, WRITE}};
    submit(0, p, 5);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(1, g.calls);
    CHECK_EQ(g.mapped ? 3 : 1, g.op[0].segs);
    CHECK_EQ(10 * 512, g.op[0].offset);
    CHECK_EQ(1536, g.op[0].bytes);
    CHECK_MEM(at(r.data), g.disk + 5120, 1536);
}

void x1_a_segment_across_a_seam_becomes_two(void) {
    guest_up();
    for (uint32_t type = 0; type < 2; type++) {
        req r = prepare(type, 3, 1024);
        r.data = SEAM - 300;
        fill(r.data, 0x3c, 1024);
        g.calls = 0;
        send(0, &r);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(1, g.calls);
        CHECK_EQ(g.mapped ? 2 : 1, g.op[0].segs);
        for (uint64_t i = 0; i < 1024; i++) {
            CHECK_EQ(g.disk[3 * 512 + i], *at(r.data + i));
        }
    }
}

// A map that hands out one page at a time: more pieces than fit, so the
// accessors take over; fewer, so all have pointers.
static void *map_pages(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    uint64_t left = 4096 - gpa % 4096;
    *n = *n < left ? *n : left;
    return m.map(m.user, gpa, n, writable);
}

void x1_more_pieces_than_fit(void) {
    if (!g.mapped) {
        return;
    }
    g.o.memory.map = map_pages;
    guest_up_without(VBLK_F_EVENT_IDX | VBLK_F_SIZE_MAX);
    static const uint32_t pages[] = {1, 17, 140, 160, 200};
    for (size_t i = 0; i < COUNT(pages); i++) {
        uint64_t bump = g.bump;
        req r = request(VBLK_T_IN, 0, pages[i] * 4096);
        g.calls = 0;
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        uint8_t *data = malloc(pages[i] * 4096u);
        for (uint64_t k = 0; k < pages[i] * 4096u; k++) {
            data[k] = *at(r.data + k);
        }
        CHECK_MEM(g.disk, data, pages[i] * 4096u);
        free(data);
        CHECK_EQ(pages[i] * 4096 + 1, used_len(0));
        g.bump = bump;
    }
    CHECK(g.calls > 1); // the last went through the buffer
}

// A map that claims more than it was asked for, or nothing.
static uint64_t claimed;

static void *map_liar(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    bool data = *n == 512;
    void *p = m.map(m.user, gpa, n, writable);
    *n = data ? claimed : *n;
    return p;
}

void x5_a_map_that_breaks_its_word(void) {
    if (!g.mapped) {
        return;
    }
    g.o.memory.map = map_liar;
    guest_up();
    static const uint64_t claims[] = {0, 1024, (UINT64_C(1) << 32) + 512};
    for (size_t i = 0; i < COUNT(claims); i++) {
        claimed = claims[i];
        CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 0, 512));
    }
    CHECK_EQ(0, g.calls);
}

// One that knows no end of memory is not asked what goes on at address 0.
static unsigned asked_round;

static void *map_all(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    asked_round += gpa > 0 - *n;
    return gpa > 0 - *n ? g.ram : m.map(m.user, gpa, n, writable);
}

void x5_no_map_is_asked_what_goes_round(void) {
    if (!g.mapped) {
        return;
    }
    g.o.memory.map = map_all;
    asked_round = 0;
    guest_up();
    part p[4] = {{put_header(VBLK_T_IN, 0), 16, 0},
                 {alloc(512, 1), 512, WRITE}, {0, 512, WRITE},
                 {alloc(1, 1), 1, WRITE}};
    mark(p[1].gpa, 512, OFFERED);
    mark(p[3].gpa, 1, OFFERED);
    p[2].gpa = UINT64_MAX - 255;
    submit(0, p, 4);
    kick(0);
    CHECK_EQ(VBLK_S_IOERR, *at(p[3].gpa));
    CHECK_EQ(VBLK_EV_DATA_UNMAPPED, g.last.code);
    CHECK_EQ(p[2].gpa, g.last.address);
    CHECK_EQ(0, asked_round);
    CHECK_EQ(0, g.calls);
}

void x1_larger_than_the_scratch_buffer(void) {
    guest_up();
    uint32_t bytes = SCRATCH * 3 + 512;
    req r = request(VBLK_T_IN, 1, bytes);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(g.disk + 512, at(r.data), bytes);
    CHECK_EQ(g.mapped ? 1 : 4, g.calls);
    r = prepare(VBLK_T_OUT, 100, bytes);
    put(r.data, g.disk, bytes);
    send(0, &r);
    kick(0);
    CHECK_MEM(g.disk, g.disk + 51200, bytes);
}

// X2: wherever the backing ends, the rest reads as zeroes.
void x2_a_backing_shorter_than_the_capacity(void) {
    static const uint32_t cut[] = {0, 1, 511, 512, 513, 4095, 4096, 5000,
                                   8191, 8192};
    for (size_t i = 0; i < COUNT(cut); i++) {
        for (int most = 0; most < 2; most++) {
            guest_init();
            g.o.capacity = 16;
            g.backing = cut[i];
            g.most = most ? 700 : 0;
            guest_up();
            req r = prepare(VBLK_T_IN, 0, 8192);
            part p[4] = {{r.header, 16, 0}, {r.data, 1000, WRITE},
                         {r.data + 1000, 7192, WRITE}, {r.status, 1, WRITE}};
            submit(0, p, 4);
            kick(0);
            ROW_BEGIN();
            CHECK_EQ(VBLK_S_OK, status_of(&r));
            CHECK_EQ(8193, used_len(0));
            CHECK_EQ(cut[i] < 8192, g.events[VBLK_EV_CAPACITY_LARGE]);
            CHECK_EQ(cut[i], counts().bytes_read);
            CHECK_EQ(1, counts().reads);
            uint8_t want[8192] = {0};
            memcpy(want, g.disk, cut[i]);
            CHECK_MEM(want, at(r.data), 8192);
            guest_check();
            ROW("backing of %u bytes", cut[i]);
        }
    }
}

void x3_partial_transfers_are_continued(void) {
    static const uint64_t most[] = {1, 100, 511, 512, 513, 1000, 4095};
    for (size_t i = 0; i < COUNT(most); i++) {
        guest_init();
        g.most = most[i];
        guest_up();
        for (uint32_t type = 0; type < 2; type++) {
            req r = prepare(type, 5, 2048);
            fill(r.data, 0x99, 2048);
            part p[5] = {{r.header, 16, 0},
                         {r.data, 3, type ? 0 : WRITE},
                         {r.data + 3, 1000, type ? 0 : WRITE},
                         {r.data + 1003, 1045, type ? 0 : WRITE},
                         {r.status, 1, WRITE}};
            submit(0, p, 5);
            kick(0);
            ROW_BEGIN();
            CHECK_EQ(VBLK_S_OK, status_of(&r));
            CHECK_MEM(at(r.data), g.disk + 5 * 512, 2048);
            ROW("type %u, %" PRIu64 " bytes a call", type, most[i]);
        }
        CHECK_EQ(2048, counts().bytes_read);
        CHECK_EQ(2048, counts().bytes_written);
        guest_check();
    }
}

void x3_backend_errors(void) {
    for (uint32_t type = 0; type < 2; type++) {
        guest_init();
        guest_up();
        g.fail_call = 1;
        req r = request(type, 7, 512);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, status_of(&r));
        CHECK_EQ(1, used_len(0));
        CHECK_EQ(1, counts().io_errors);
        CHECK_EQ(0, counts().reads + counts().writes);
        CHECK_EQ(1, g.events[type ? VBLK_EV_WRITE_FAILED
                                  : VBLK_EV_READ_FAILED]);
        CHECK_EQ(7, event_a(&g.last));
        CHECK_EQ(type ? 28 : 5, event_b(&g.last));
        CHECK_EQ(VBLK_S_OK, run(type, 0, 512));
    }
}

void x3_an_error_after_a_part(void) {
    for (uint32_t type = 0; type < 2; type++) {
        guest_init();
        guest_up();
        g.most = 512;
        g.fail_call = 2;
        CHECK_EQ(VBLK_S_IOERR, run(type, 6, 2048));
        CHECK_EQ(1, counts().io_errors);
        CHECK_EQ(0, counts().bytes_read + counts().bytes_written);
        CHECK_EQ(7, event_a(&g.last)); // the sector that it came to
    }
}

void x3_a_write_without_progress(void) {
    guest_up();
    g.stuck = 700;
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 3, 2048));
    CHECK_EQ(1, g.events[VBLK_EV_WRITE_STUCK]);
    CHECK_EQ(4, event_a(&g.last));
    CHECK_EQ(2048 - 700, event_b(&g.last));
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(0, counts().writes);
}

// Memory that agrees to `fickle` when it is asked, and then refuses it.
static vblk_memory steady;
static uint64_t    fickle;

static int fickle_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    bool no = dst && gpa <= fickle && fickle - gpa < n;
    return no ? -1 : steady.read(user, gpa, dst, n);
}

static int fickle_write(void *user, uint64_t gpa, const void *src,
                        uint64_t n) {
    bool no = src && gpa <= fickle && fickle - gpa < n;
    return no ? -1 : steady.write(user, gpa, src, n);
}

// X5: memory that goes after it was looked at is an event, with its address.
void x5_what_memory_refuses_in_the_middle_is_told(void) {
    static const uint32_t types[] = {VBLK_T_IN, VBLK_T_OUT, VBLK_T_GET_ID};
    for (unsigned i = 0; i < 4 && !g.mapped; i++) {
        guest_init();
        steady = g.o.memory;
        g.o.memory.read = fickle_read;
        g.o.memory.write = fickle_write;
        g.backing = i == 3 ? 2 * 4096 : g.backing; // and what is padded
        g.o.capacity = SECTORS;
        guest_up();
        uint32_t n = types[i % 3] == VBLK_T_GET_ID ? 20 : 8192;
        req r = prepare(types[i % 3], 8, n);
        uint64_t at_fault = n > 20 ? r.data + 4096 : r.data;
        uint32_t first = n > 20 ? 4096 : 20;
        uint16_t way = types[i % 3] == VBLK_T_OUT ? 0 : WRITE;
        part p[4] = {{r.header, 16, 0}, {r.data, first, way},
                     {at_fault, 4096, way}, {r.status, 1, WRITE}};
        p[2] = n > 20 ? p[2] : p[3];
        submit(0, p, n > 20 ? 4 : 3);
        fickle = at_fault + 8;
        kick(0);
        ROW_BEGIN();
        CHECK_EQ(VBLK_S_IOERR, status_of(&r));
        CHECK_EQ(1, g.events[VBLK_EV_DATA_UNMAPPED]);
        CHECK_EQ(at_fault, event_a(&g.last));
        CHECK_EQ(n > 20 ? 4096 : 20, event_b(&g.last));
        CHECK_EQ(1, counts().io_errors);
        ROW("case %u", i);
    }
}

void x4_flush(void) {
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(0, g.flushes); // writeback: not before the FLUSH
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ(1, g.flushes);
    g.fail_call = 1;
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(1, counts().flushes);
    CHECK_EQ(1, g.events[VBLK_EV_FLUSH_FAILED]);
    CHECK_EQ(0, event_a(&g.last));
    CHECK_EQ(5, event_b(&g.last));
}

// BDUR-05: the flush is for the disk, whichever queue it came by.
void x4_flush_covers_all_queues(void) {
    g.o.queues = 2;
    guest_up();
    req w = prepare(VBLK_T_OUT, 0, 512);
    send(1, &w);
    kick(1);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ('w', g.op[0].what);
    CHECK_EQ('f', g.op[1].what);
}

// BDUR-02: the driver declined FLUSH, so each write is durable before it
// completes; a failed sync is a failed write.
void x4_write_through_when_flush_is_declined(void) {
    guest_up_without(VBLK_F_FLUSH | VBLK_F_EVENT_IDX);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(2, g.calls);
    CHECK_EQ('w', g.op[0].what);
    CHECK_EQ('f', g.op[1].what);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(1, g.flushes);
    CHECK_EQ(0, counts().flushes);
    g.fail_call = 2;
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 8, 512));
    CHECK_EQ(1, counts().writes);
    CHECK_EQ(VBLK_EV_FLUSH_FAILED, g.last.code);
    CHECK_EQ(9, event_a(&g.last));
    vblk_request r;
    request(VBLK_T_OUT, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    CHECK(r.durable);
    CHECK(!vblk_complete(&g.dev, &r, 512));
    reset();
    guest_negotiate(VBLK_F_EVENT_IDX); // the next driver accepts it
    guest_queue_up(0, 16);
    guest_go();
    g.flushes = 0;
    run(VBLK_T_OUT, 0, 512);
    CHECK_EQ(0, g.flushes);
}

// BDUR-03: the driver turned the cache off, and on again.
void x4_write_through_when_writeback_is_0(void) {
    guest_up();
    for (unsigned i = 0; i < 6; i++) {
        bool through = i & 1;
        vblk_request r;
        vblk_mmio_write(&g.dev, VBLK_REG_CONFIG + 32, 1, !through);
        g.calls = 0;
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 0, 512));
        CHECK_EQ(through ? 2 : 1, g.calls);
        CHECK_EQ('w', g.op[0].what);
        CHECK(!through || g.op[1].what == 'f');
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0)); // goes on to work
        request(VBLK_T_OUT, 0, 512);
        CHECK_EQ(REQUEST, take(0, 0, &r).state);
        CHECK_EQ(through, r.durable); // as it was when the request was taken
        vblk_mmio_write(&g.dev, VBLK_REG_CONFIG + 32, 1, through);
        CHECK_EQ(through, r.durable);
        CHECK(!vblk_complete(&g.dev, &r, 512));
        vblk_publish(&g.dev, 0);
    }
    vblk_mmio_write(&g.dev, VBLK_REG_CONFIG + 32, 1, 0);
    g.fail_call = 2;
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 8, 512));
}

void b3_unsafe_never_flushes(void) {
    g.o.backend.flush = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(0, g.flushes);
}

// X5, ROB-12: nothing of a write reaches the disk if any of it is bad.
void x5_one_bad_segment_among_good_ones(void) {
    for (uint32_t type = 0; type < 2; type++) {
        guest_init();
        guest_up();
        req r = prepare(type, 0, 16384);
        uint16_t dir = type ? 0 : WRITE;
        part p[4] = {{r.header, 16, 0}, {r.data, 16384 - 512, dir},
                     {RAM_END + 512, 512, dir}, {r.status, 1, WRITE}};
        submit(0, p, 4);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, status_of(&r));
        CHECK_EQ(0, g.calls);
        CHECK_EQ(1, counts().io_errors);
        CHECK_EQ(DIRT, *at(r.data));
        CHECK_EQ(VBLK_S_OK, run(type, 0, 512));
    }
}

// Without map, guest memory may refuse after it agreed.
void x5_memory_that_changes_its_mind(void) {
    if (g.mapped) {
        return;
    }
    for (uint32_t type = 0; type < 2; type++) {
        guest_init();
        guest_up();
        request(type, 0, 512);
        vblk_request r;
        CHECK_EQ(REQUEST, take(0, 0, &r).state);
        uint8_t buffer[512];
        g.hole = r.seg[0].gpa;
        g.hole_bytes = 1;
        CHECK(type ? vblk_get(&g.dev, &r, 0, buffer, 512)
                   : vblk_put(&g.dev, &r, 0, buffer, 512));
        if (type == VBLK_T_IN) { // the padding is refused: IOERR
            vblk_complete(&g.dev, &r, 0);
            CHECK_EQ(VBLK_S_IOERR, *at(r.status_gpa));
            CHECK_EQ(1, counts().io_errors);
        }
    }
}

void x5_status_byte_refused_at_the_end(void) {
    if (g.mapped) {
        return;
    }
    guest_up();
    request(VBLK_T_FLUSH, 0, 0);
    vblk_request r;
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    g.hole = r.status_gpa;
    g.hole_bytes = 1;
    vblk_complete(&g.dev, &r, 0);
    vblk_publish(&g.dev, 0);
    CHECK_EQ(0, used_count(0)); // V17
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(1, g.events[VBLK_EV_STATUS_UNWRITABLE]);
}

void x6_counters(void) {
    g.o.queues = 2;
    guest_up();
    for (unsigned q = 0; q < 2; q++) {
        static const struct {
            uint32_t type, bytes;
        } rows[] = {{VBLK_T_IN, 1024}, {VBLK_T_OUT, 512}, {VBLK_T_FLUSH, 0},
                    {VBLK_T_GET_ID, 20}, {VBLK_T_IN, 100}};
        for (size_t i = 0; i < COUNT(rows); i++) {
            req r = prepare(rows[i].type, 0, rows[i].bytes);
            send(q, &r);
            kick(q);
        }
    }
    wr(VBLK_REG_STATUS, 0);
    vblk_counts c = counts();
    CHECK_EQ(2, c.reads);
    CHECK_EQ(2048, c.bytes_read);
    CHECK_EQ(2, c.writes);
    CHECK_EQ(1024, c.bytes_written);
    CHECK_EQ(2, c.flushes);
    CHECK_EQ(2, c.io_errors);
    CHECK_EQ(0, c.throttled + c.currently_throttled + c.broken_queues);
}


// ---- The request interface ------------------------------------------------

void next_and_complete_in_any_order(void) {
    enum { N = 20 };
    guest_up();
    req r[N];
    vblk_request under_way[N], none;
    for (unsigned i = 0; i < N; i++) {
        r[i] = request(i & 1 ? VBLK_T_OUT : VBLK_T_IN, i * 2, 1024);
    }
    for (unsigned i = 0; i < N; i++) {
        CHECK_EQ(REQUEST,
                 take(0, 0, &under_way[i]).state);
        CHECK_EQ(i & 1, under_way[i].type);
        CHECK_EQ(i * 1024, under_way[i].offset);
        CHECK_EQ(1024, under_way[i].bytes);
        CHECK_EQ(g.mapped, under_way[i].direct);
    }
    CHECK_EQ(EMPTY, take(0, 0, &none).state);
    for (unsigned n = N; n > 0; n--) { // backwards, with a hop
        unsigned i = (n * 7) % N;
        uint8_t buffer[1024];
        memset(buffer, (int)i, sizeof buffer);
        if (!(i & 1)) {
            CHECK(!vblk_put(&g.dev, &under_way[i], 0, buffer, 1024));
        }
        CHECK(!vblk_complete(&g.dev, &under_way[i], i == 3 ? -5 : 1024));
    }
    CHECK_EQ(0, used_count(0));
    g.fired = 0;
    vblk_publish(&g.dev, 0);
    vblk_publish(&g.dev, 0);
    CHECK_EQ(1, g.fired);
    CHECK_EQ(N, used_count(0));
    for (unsigned n = N; n > 0; n--) {
        unsigned i = (n * 7) % N;
        uint32_t id, len;
        CHECK(used_next(0, &id, &len));
        CHECK_EQ(r[i].head, id);
        CHECK_EQ(i & 1 ? 1 : 1025, len);
        CHECK_EQ(i == 3 ? VBLK_S_IOERR : VBLK_S_OK, status_of(&r[i]));
        if (!(i & 1)) {
            CHECK_EQ(i, *at(r[i].data + 1023));
        }
    }
    CHECK_EQ(N / 2, counts().reads);
    CHECK_EQ(N / 2 - 1, counts().writes);
    CHECK_EQ(1, counts().io_errors);
}

// RST-02, -03: what was under way at a reset is recognised, and nothing of it
// reaches the new session's memory.
void complete_after_a_reset_is_thrown_away(void) {
    guest_up();
    vblk_request old, none;
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &old).state);
    for (int bound = 0; bound < 2; bound++) {
        reset();
        if (bound) {
            guest_negotiate(VBLK_F_EVENT_IDX);
            guest_queue_up(0, 256);
            guest_go();
            request(VBLK_T_IN, 0, 512);
            CHECK_EQ(REQUEST, take(0, 0, &none).state);
        }
        unsigned accesses = g.accesses;
        vblk_counts before = counts();
        uint8_t data[512] = {0};
        CHECK(vblk_put(&g.dev, &old, 0, data, sizeof data));
        CHECK(vblk_get(&g.dev, &old, 0, data, sizeof data));
        CHECK(vblk_complete(&g.dev, &old, 0));
        CHECK(vblk_complete(&g.dev, &old, -5));
        if (!bound) {
            vblk_publish(&g.dev, 0);
        }
        vblk_counts after = counts();
        CHECK_EQ(accesses, g.accesses);
        CHECK_MEM(&before, &after, sizeof before);
        CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
        CHECK_EQ(0xff, *at(old.status_gpa));
    }
    CHECK(!vblk_complete(&g.dev, &none, 0)); // the new one counts
}

void get_and_put_cover_any_part(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 1024);
    part p[5] = {{r.header, 16, 0}, {r.data, 10, WRITE},
                 {r.data + 10, 600, WRITE}, {r.data + 610, 414, WRITE},
                 {r.status, 1, WRITE}};
    submit(0, p, 5);
    vblk_request q;
    CHECK_EQ(REQUEST, take(0, 0, &q).state);
    uint8_t data[1024];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)(i * 13);
    }
    for (size_t at_ = 0, n; at_ < 1024; at_ += n) {
        n = 1 + test_below(300);
        n = n < 1024 - at_ ? n : 1024 - at_;
        CHECK(!vblk_put(&g.dev, &q, at_, data + at_, n));
    }
    CHECK_MEM(data, at(r.data), 1024);
    vblk_complete(&g.dev, &q, 1024);
}

// Memory that comes after the driver (W9): one event, nothing lost.
void w9_memory_later(void) {
    vblk_memory later = g.o.memory;
    memset(&g.o.memory, 0, sizeof g.o.memory);
    guest_make();
    for (int i = 0; i < 2; i++) {
        guest_negotiate(VBLK_F_EVENT_IDX);
        guest_queue_up(0, 16);
        guest_go();
        req r = request(VBLK_T_IN, 0, 512);
        kick(0);
        kick(0);
        CHECK_EQ(i + 1, g.events[VBLK_EV_NO_MEMORY]);
        CHECK_EQ(0xff, status_of(&r));
        vblk_set_memory(&g.dev, later);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        reset();
        vblk_memory none = {0};
        vblk_set_memory(&g.dev, none);
    }
}


// ---- Options --------------------------------------------------------------

void options_defaults(void) {
    guest_make();
    CHECK_EQ(256, g.dev.queue_size);
    CHECK_EQ(MAX_SEGS, vblk_seg_max(&g.dev));
    CHECK_EQ(1 << 20, g.dev.size_max);
    CHECK_EQ(1, g.dev.queues);
    CHECK_EQ(g.o.profile == VBLK_STRICT, g.dev.strict);
    static const struct {
        uint32_t queue_size, seg_max;
    } rows[] = {{1, 1}, {2, 1}, {4, 2}, {16, 14}, {128, 126}, {32768, 128}};
    for (size_t i = 0; i < COUNT(rows); i++) { // BCFG-20
        g.o.queue_size = rows[i].queue_size;
        guest_make();
        CHECK_EQ(rows[i].seg_max, vblk_seg_max(&g.dev));
    }
}

// BCFG-20: no limit that a driver sees is 0.
void options_defaults_are_usable(void) {
    static const uint32_t sizes[] = {1, 2, 4, 256, 32768};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        g.o.queue_size = sizes[i];
        guest_make();
        uint64_t size_max = vblk_mmio_read(&g.dev, 0x108, 4);
        uint64_t seg_max = vblk_mmio_read(&g.dev, 0x10c, 4);
        CHECK(seg_max >= 1);
        CHECK_EQ(g.o.profile == VBLK_STRICT ? 1 << 20 : 0, size_max); // P12
        CHECK(seg_max + 2 <= sizes[i] || sizes[i] < 4);
    }
}

static int64_t no_read(void *user, uint64_t offset, const vblk_seg *seg,
                       unsigned segs) {
    (void)user, (void)offset, (void)seg, (void)segs;
    return -1;
}

static uint64_t huge_size(void *user) {
    (void)user;
    return UINT64_MAX;
}

void options_refused_with_a_code_and_nothing_half_set_up(void) {
    for (int i = 0; i < 23; i++) {
        vblk_options o = g.o;
        int want = VBLK_OK;
        switch (i) {
        case 0:  o.memory.read = NULL;  want = VBLK_ERR_MEMORY;        break;
        case 1:  o.memory.write = NULL; want = VBLK_ERR_MEMORY;        break;
        case 2:  o.backend.read = NULL; want = VBLK_ERR_BACKEND;       break;
        case 3:  o.backend.size = NULL; want = VBLK_ERR_CAPACITY;      break;
        case 4:  o.capacity = UINT64_C(1) << 54;
                 want = VBLK_ERR_CAPACITY;                             break;
        case 5:  o.backend.size = huge_size; want = VBLK_ERR_CAPACITY; break;
        case 6:  o.queues = 2; o.queue = NULL; want = VBLK_ERR_QUEUES; break;
        case 7:  o.profile = (vblk_profile)2; want = VBLK_ERR_PROFILE; break;
        case 8:  o.queues = 65536; o.queue = g.vq;
                 want = VBLK_ERR_QUEUES;                               break;
        case 9:  o.queue_size = 3;      want = VBLK_ERR_QUEUE_SIZE;    break;
        case 10: o.queue_size = 65536;  want = VBLK_ERR_QUEUE_SIZE;    break;
        case 11: o.seg_max = MAX_SEGS + 1; want = VBLK_ERR_SEG_MAX;
                 break;
        case 12: o.size_max = 4095;     want = VBLK_ERR_SIZE_MAX;      break;
        case 13: o.features_off = VBLK_F_VERSION_1;
                 want = VBLK_ERR_FEATURES;                             break;
        case 14: o.features_off = VBLK_F_FLUSH;
                 want = VBLK_ERR_FEATURES;                             break;
        case 15: // BCFG-20
        case 16: o.features_off = VBLK_F_INDIRECT_DESC;
                 o.queue_size = 16;
                 o.seg_max = i == 15 ? 14 : 15;
                 want = i == 15 ? VBLK_OK : VBLK_ERR_SEG_MAX;          break;
        case 17:
        case 18:
        case 19: o.features_off = VBLK_F_INDIRECT_DESC;
                 o.queue_size = i == 19 ? 4 : 2;
                 o.seg_max = i == 18 ? 1 : 0;
                 want = i == 19 ? VBLK_OK : VBLK_ERR_SEG_MAX;          break;
        case 20:
        case 21: o.queue_size = 64; // with INDIRECT_DESC too
                 o.seg_max = i == 20 ? 62 : 63;
                 want = i == 20 ? VBLK_OK : VBLK_ERR_SEG_MAX;          break;
        default: o.memory.read = NULL;
                 o.memory.write = NULL;
                 o.memory.map = g.o.memory.map; // nothing at all is fine
                 want = o.memory.map ? VBLK_ERR_MEMORY : VBLK_OK;      break;
        }
        vblk_dev before, dev;
        memset(&dev, 0x5a, sizeof dev);
        before = dev;
        ROW_BEGIN();
        CHECK_EQ((uint64_t)want, (uint64_t)vblk_init(&dev, &o));
        if (want) {
            CHECK_MEM(&before, &dev, sizeof dev);
            CHECK(strlen(vblk_strerror(want)) > 20);
            CHECK(strcmp(vblk_strerror(want), "unknown error code") != 0);
        }
        ROW("option case %d", i);
    }
    vblk_dev other = g.dev; // what another header calls so
    CHECK_EQ((uint64_t)VBLK_ERR_LAYOUT,
             (uint64_t)vblk_init_checked(&other, &g.o, VBLK_VERSION + 100,
                                         sizeof other));
    CHECK_EQ((uint64_t)VBLK_ERR_LAYOUT,
             (uint64_t)vblk_init_checked(&other, &g.o, VBLK_VERSION,
                                         sizeof other - 8));
    CHECK_MEM(&g.dev, &other, sizeof other);
    vblk_options least = {0}; // no more than it takes
    least.backend.read = no_read;
    least.capacity = 1;
    CHECK_EQ(VBLK_OK, vblk_init(&g.dev, &least));
    CHECK_EQ(VBLK_F_RO, g.dev.offered & VBLK_F_RO);
    wr(VBLK_REG_STATUS, 0); // no hooks, no memory: nothing is called
    vblk_needs_reset(&g.dev);
    CHECK_EQ(1, g.dev.queues);
    memset(&g.dev, 0, sizeof g.dev);
}

void every_error_and_event_has_a_sentence(void) {
    for (int i = 0; i < 256; i++) {
        const char *text = event_text(i);
        for (int k = 0; k < i && text; k++) {
            CHECK(!event_text(k) || strcmp(text, event_text(k)) != 0);
        }
        CHECK(!text || (strlen(text) > 15 && i > 0 && i < VBLK_EV_END));
    }
    CHECK(event_text(VBLK_EV_END - 1) && !event_text(VBLK_EV_END));
    for (int i = VBLK_ERROR_LAST; i <= 0; i++) {
        CHECK(strcmp(vblk_strerror(i), "unknown error code") != 0);
    }
    CHECK_EQ(0, strcmp("unknown error code",
                       vblk_strerror(VBLK_ERROR_LAST - 1)));
    CHECK_EQ(0, strcmp("unknown error code", vblk_strerror(1)));
}

// Numbers that others have written down do not change.
void event_numbers_are_for_ever(void) {
    static const struct {
        int code, number;
    } rows[] = {
        {VBLK_EV_NONE, 0},           {VBLK_EV_CAPACITY_LARGE, 1},
        {VBLK_EV_REG_WIDTH, 10},     {VBLK_EV_NOTIFY_EARLY, 18},
        {VBLK_EV_STATUS_CLEARS, 20}, {VBLK_EV_FEATURES_UNOFFERED, 27},
        {VBLK_EV_RING_SIZE, 30},     {VBLK_EV_NOTIFY_SWITCH, 37},
        {VBLK_EV_CHAIN_LONG, 40},    {VBLK_EV_STATUS_UNWRITABLE, 51},
        {VBLK_EV_HEADER_SHORT, 60},  {VBLK_EV_ID_SHORT, 75},
        {VBLK_EV_READ_SHORT, 80},    {VBLK_EV_FLUSH_FAILED, 84},
        {VBLK_EV_NO_MEMORY, 90},     {VBLK_EV_NOT_QUIET, 93},
        {VBLK_EV_WORKER_LEFT, 100},  {VBLK_EV_WORKER_CPUS, 107},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        CHECK_EQ(rows[i].number, rows[i].code);
    }
}

void event_lines(void) {
    char line[400], cut[24];
    guest_up();
    wr(VBLK_REG_STATUS, 0x43);
    CHECK_EQ(VBLK_LEVEL_WARNING, g.last.level);
    vblk_event_line(&g.last, line, sizeof line);
    CHECK(strstr(line, " (F2") && strstr(line, "[value 0x43, against 0xf]"));
    CHECK(line == strstr(line, "a Status write"));
    request(VBLK_T_FLUSH, 0, 0);
    run(VBLK_T_IN, SECTORS, 512);
    CHECK_EQ(1, g.last.head / 2);
    CHECK_EQ(0, strcmp("queue 0, head 2: beyond the disk's end "
                       "(V13) [sector 2048, bytes 512]",
                       vblk_event_line(&g.last, line, sizeof line)));
    memset(cut, 'x', sizeof cut);
    vblk_event_line(&g.last, cut, 20);
    CHECK_EQ(0, strcmp("queue 0, head 2: be", cut));
    CHECK_EQ('x', cut[20]);
    vblk_event_line(&g.last, cut, 1);
    CHECK_EQ(0, cut[0]);
    cut[0] = 'x';
    vblk_event_line(&g.last, cut, 0);
    CHECK_EQ('x', cut[0]);
    g.fail_call = 1;
    run(VBLK_T_IN, 8, 512);
    CHECK_EQ(VBLK_LEVEL_ERROR, g.last.level);
    vblk_event_line(&g.last, line, sizeof line);
    CHECK(strstr(line, " [sector 8, error 5]") != NULL);
    vblk_event other = {VBLK_EV_NONE, VBLK_LEVEL_NOTE, -1, -1, 0, 0, 0, 0, 0,
                        0, 0};
    CHECK_EQ(0, strcmp("unknown event code",
                       vblk_event_line(&other, line, sizeof line)));
    other.code = (vblk_event_code)251; // of another version
    other.queue = 3;
    CHECK_EQ(0, strcmp("queue 3: unknown event code",
                       vblk_event_line(&other, line, sizeof line)));
    vblk_needs_reset(&g.dev); // without numbers
    CHECK_EQ(VBLK_LEVEL_NOTE, g.last.level);
    CHECK_EQ(0, strcmp("the host asked for a reset",
                       vblk_event_line(&g.last, line, sizeof line)));
}

// "When strict refuses what standard accepts, the event says so."
void events_of_strict_rules_name_the_standard_profile(void) {
    static const vblk_event_code codes[] = {
        VBLK_EV_STATUS_NO_ACK,       VBLK_EV_STATUS_FRAMING,
        VBLK_EV_HEADER_FRAMING,      VBLK_EV_SEGMENT_LONG_STRICT,
        VBLK_EV_DATA_MISSING,        VBLK_EV_DATA_UNWANTED,
        VBLK_EV_ID_SHORT,            VBLK_EV_REG_QUEUE_FROZEN,
        VBLK_EV_STATUS_CLEARS,       VBLK_EV_STATUS_BITS,
        VBLK_EV_FEATURES_VERSION,    VBLK_EV_TYPE_BARRIER,
        VBLK_EV_REG_QUEUE_WINDOW,
    };
    unsigned named = 0;
    for (size_t i = 0; i < COUNT(codes); i++) {
        CHECK(strstr(event_text((int)codes[i]), "standard profile") != NULL);
    }
    for (int i = 0; i < VBLK_EV_END; i++) {
        const char *text = event_text(i);
        named += text && strstr(text, "standard profile");
    }
    CHECK_EQ(COUNT(codes), named);
}


// ---- Backends -------------------------------------------------------------

void b1_without_write_the_disk_is_read_only(void) {
    g.o.backend.write = NULL;
    g.o.backend.flush = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
}

void b4_capacity_is_rounded_down_to_sectors(void) {
    g.backing = 5 * 512 + 511;
    guest_up();
    CHECK_EQ(5, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(0, g.events[VBLK_EV_CAPACITY_ZERO]);
}

// The same traffic over each backend that comes with the library.
static void over_backend(vblk_backend b) {
    guest_init();
    g.o.backend = b;
    guest_up();
    CHECK_EQ(64, vblk_mmio_read(&g.dev, 0x100, 8));
    for (uint32_t i = 0; i < 16; i++) {
        req r = prepare(VBLK_T_OUT, i * 4, 2048);
        fill(r.data, (uint8_t)(i + 1), 2048);
        send(0, &r);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
    }
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    for (uint32_t i = 0; i < 16; i++) {
        req r = prepare(VBLK_T_IN, i * 4, 2048);
        part p[4] = {{r.header, 16, 0}, {r.data, 700, WRITE},
                     {r.data + 700, 1348, WRITE}, {r.status, 1, WRITE}};
        submit(0, p, 4);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(i + 1, *at(r.data));
        CHECK_EQ(i + 1, *at(r.data + 2047));
    }
    guest_check();
}

static void read_only_backend(vblk_backend b) {
    CHECK(!b.write); // B5: there is no way to
    guest_init();
    g.o.backend = b;
    guest_up();
    CHECK_EQ(VBLK_F_RO, g.dev.offered & VBLK_F_RO);
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

void b2_b5_memory_disk(void) {
    static uint8_t data[64 * 512];
    vblk_ramdisk disk = {.data = data, .bytes = sizeof data};
    over_backend(vblk_ramdisk_backend(&disk));
    vblk_backend never = vblk_ramdisk_backend(&disk);
    never.write = NULL;
    read_only_backend(never);
    uint8_t tail[32];
    vblk_seg seg[2] = {{tail, 16, 0}, {tail + 16, 16, 0}};
    vblk_backend b = vblk_ramdisk_backend(&disk);
    CHECK_EQ(20, b.read(b.user, sizeof data - 20, seg, 2));
    CHECK_EQ(0, b.read(b.user, sizeof data, seg, 2));
    CHECK_EQ(0, b.read(b.user, sizeof data + 512, seg, 2));
}

static void make_file(char *path, off_t bytes) {
    strcpy(path, "/tmp/vblk_test_XXXXXX");
    int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, bytes) == 0);
    close(fd);
}

static void ram_of_5_gib(void) {
    const vblk_region region = {.bytes = UINT64_C(5) << 30, .host = g.ram};
    const vblk_regions ram = {.region = &region, .count = 1};
    vblk_regions_memory(&ram);
}

// Only a 32-bit program can be given one.
void b_ram_larger_than_the_address_space(void) {
    CHECK_EQ(SIZE_MAX < UINT64_MAX, test_asserts(ram_of_5_gib));
}

static vblk_request mistaken;

static void next_of_another(void) {
    take(2, 0, &mistaken);
}

static void drain_of_another(void) {
    vblk_drain(&g.dev, 2, 0);
}

static void publish_of_another(void) {
    vblk_publish(&g.dev, 2);
}

static void arm_of_another(void) {
    vblk_arm(&g.dev, 2, 0);
}

static void stop_of_another(void) {
    vblk_ring ring;
    vblk_queue_stop(&g.dev, 2, &ring);
}

static void notify_of_another(void) {
    vblk_notify(&g.dev, 2);
}

static void notify_of_none(void) {
    vblk_notify(&g.dev, VBLK_NO_QUEUE);
}

static void too_little_room(void) {
    vblk_seg     seg[2];
    vblk_request none;
    vblk_next(&g.dev, 0, 0, &none, seg, g.dev.seg_max + 1);
}

static void more_than_there_is(void) {
    vblk_complete(&g.dev, &mistaken, 1025);
}

static void twice(void) {
    vblk_complete(&g.dev, &mistaken, 1024);
    vblk_complete(&g.dev, &mistaken, 1024);
}

static void behind_its_data(void) {
    uint8_t byte;
    vblk_get(&g.dev, &mistaken, 1024, &byte, 1);
}

static void nothing_wrong(void) {
    uint8_t byte;
    drain_at(VBLK_ALL_QUEUES, 0);
    CHECK_EQ(VBLK_OK, vblk_get(&g.dev, &mistaken, 1023, &byte, 1));
    CHECK(vblk_set_memory(&g.dev, g.o.memory) == VBLK_ERR_BUSY);
    vblk_complete(&g.dev, &mistaken, 1024);
    CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, g.o.memory));
}

void callers_mistakes_are_asserted(void) {
    static void (*const calls[])(void) = {
        nothing_wrong,      next_of_another,    drain_of_another,
        publish_of_another, arm_of_another,     stop_of_another,
        notify_of_another,  notify_of_none,     too_little_room,
        more_than_there_is, behind_its_data,    twice};
    g.o.queues = 2;
    guest_up();
    request(VBLK_T_OUT, 0, 1024);
    CHECK_EQ(REQUEST, take(0, 0, &mistaken).state);
    for (size_t i = 0; i < COUNT(calls); i++) {
        ROW_BEGIN();
        CHECK_EQ(i > 0, test_asserts(calls[i]));
        ROW("call %zu", i);
    }
    vblk_memory half = g.o.memory;
    half.write = NULL;
    nothing_wrong();
    CHECK_EQ((uint64_t)VBLK_ERR_MEMORY,
             (uint64_t)vblk_set_memory(&g.dev, half));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512)); // the old one is there
    vblk_memory none = {0};
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_set_memory(&g.dev, none));
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_set_memory(&g.dev, g.o.memory));
}

// An asynchronous host's results: what is short, and where the backing ends.
void x2_x3_results_of_a_host(void) {
    static const struct {
        uint32_t type, sector;
        int64_t  result;
        int      status;
        vblk_event_code code;
        uint64_t a, b;
    } rows[] = {
        {VBLK_T_IN, 0, 2048, VBLK_S_OK, VBLK_EV_NONE, 0, 0},
        {VBLK_T_IN, 4, 512, VBLK_S_IOERR, VBLK_EV_READ_SHORT, 5, 1536},
        {VBLK_T_IN, 4, 0, VBLK_S_IOERR, VBLK_EV_READ_SHORT, 4, 2048},
        {VBLK_T_IN, 4, -6, VBLK_S_IOERR, VBLK_EV_READ_FAILED, 4, 6},
        {VBLK_T_IN, 38, 1024, VBLK_S_OK, VBLK_EV_NONE, 0, 0}, // ends there
        {VBLK_T_IN, 38, 1023, VBLK_S_IOERR, VBLK_EV_READ_SHORT, 39, 1025},
        {VBLK_T_IN, 60, 0, VBLK_S_OK, VBLK_EV_NONE, 0, 0},    // beyond it
        {VBLK_T_OUT, 0, 2048, VBLK_S_OK, VBLK_EV_NONE, 0, 0},
        {VBLK_T_OUT, 8, 512, VBLK_S_IOERR, VBLK_EV_WRITE_STUCK, 9, 1536},
        {VBLK_T_OUT, 8, 0, VBLK_S_IOERR, VBLK_EV_WRITE_STUCK, 8, 2048},
        {VBLK_T_OUT, 8, -28, VBLK_S_IOERR, VBLK_EV_WRITE_FAILED, 8, 28},
        {VBLK_T_FLUSH, 0, 0, VBLK_S_OK, VBLK_EV_NONE, 0, 0},
        {VBLK_T_FLUSH, 0, -5, VBLK_S_IOERR, VBLK_EV_FLUSH_FAILED, 0, 5},
        {VBLK_T_OUT, 60, 2048, VBLK_S_OK, VBLK_EV_NONE, 0, 0}, // it grows
        {VBLK_T_IN, 60, 0, VBLK_S_IOERR, VBLK_EV_READ_SHORT, 60, 2048},
        {VBLK_T_IN, 64, 0, VBLK_S_OK, VBLK_EV_NONE, 0, 0},
    };
    g.backing = 40 * 512;
    g.o.capacity = 100;
    guest_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        uint32_t n = rows[i].type == VBLK_T_FLUSH ? 0 : 2048;
        vblk_counts before = counts();
        vblk_request under_way;
        req r = request(rows[i].type, rows[i].sector, n);
        g.last.code = VBLK_EV_NONE;
        CHECK_EQ(REQUEST, take(0, 0, &under_way).state);
        CHECK(!vblk_complete(&g.dev, &under_way, rows[i].result));
        vblk_publish(&g.dev, 0);
        ROW_BEGIN();
        bool ok = rows[i].status == VBLK_S_OK;
        CHECK_EQ(rows[i].status, status_of(&r));
        CHECK_EQ(rows[i].code, g.last.code);
        if (rows[i].code) {
            CHECK_EQ(rows[i].a, event_a(&g.last));
            CHECK_EQ(rows[i].b, event_b(&g.last));
        }
        vblk_counts c = counts();
        CHECK_EQ(before.io_errors + !ok, c.io_errors);
        CHECK_EQ(before.reads + before.writes + before.flushes + ok,
                 c.reads + c.writes + c.flushes);
        if (ok && rows[i].type == VBLK_T_IN) {
            uint64_t moved = (uint64_t)rows[i].result;
            CHECK_EQ(before.bytes_read + moved, c.bytes_read);
            CHECK_EQ(moved < n ? 0 : *at(r.data), *at(r.data + n - 1));
        }
        ROW("row %zu", i);
    }
}

// A power cycle: what was under way before belongs to nobody.
void a_device_made_again_knows_no_old_request(void) {
    vblk_request old, mine;
    guest_up();
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &old).state);
    guest_up(); // initialises, and binds anew
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &mine).state);
    CHECK(vblk_complete(&g.dev, &old, 512));
    CHECK_EQ(0, used_count(0));
    CHECK(!vblk_complete(&g.dev, &mine, 512));
}

void b4_the_rest_of_an_image_is_told(void) {
    g.backing = 3 * 512 + 277;
    guest_make();
    CHECK_EQ(1, g.events[VBLK_EV_CAPACITY_ROUNDED]);
    CHECK_EQ(277, event_a(&g.last));
    CHECK_EQ(3, vblk_mmio_read(&g.dev, 0x100, 8));
    g.backing = 3 * 512;
    guest_make();
    g.o.capacity = 2; // as the host wants it
    g.backing = 3 * 512 + 277;
    guest_make();
    CHECK_EQ(1, g.events[VBLK_EV_CAPACITY_ROUNDED]);
}

// B7: the driver hears of it, and new requests go by it.
void b7_resize(void) {
    g.o.capacity = 64;
    guest_make();
    guest_negotiate(0);
    guest_queue_up(0, 16);
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 32)); // nobody is to be told
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    guest_go();
    CHECK_EQ(32, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 31, 1024));
    wr(VBLK_REG_INTERRUPT_ACK, 3);
    uint32_t was = rd(VBLK_REG_CONFIG_GENERATION);
    uint64_t fired = g.fired;
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 33));
    CHECK_EQ(33, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(was + 1, rd(VBLK_REG_CONFIG_GENERATION));
    CHECK_EQ(VBLK_INTERRUPT_CONFIG, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(fired + 1, g.fired);
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE, (uint64_t)g.fired_queue);
    CHECK(vblk_interrupt_line(&g.dev));
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 31, 1024));
    wr(VBLK_REG_INTERRUPT_ACK, 3);

    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 33)); // is no change
    CHECK_EQ((uint64_t)VBLK_ERR_CAPACITY,
             (uint64_t)vblk_resize(&g.dev, (UINT64_C(1) << 54)));
    CHECK_EQ(33, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(was + 1, rd(VBLK_REG_CONFIG_GENERATION));
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));

    g.backing = 40 * 512 + 7; // as the backend says
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 0));
    CHECK_EQ(40, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(1, g.events[VBLK_EV_CAPACITY_ROUNDED]);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 39, 512));
    for (unsigned cut = 0; cut < 2; cut++) { // X2: zeroes, where it was told
        vblk_request r;
        req          q = request(VBLK_T_IN, 39, 512);
        CHECK_EQ(REQUEST, take(0, 0, &r).state);
        CHECK(!vblk_complete(&g.dev, &r, 0));
        vblk_publish(&g.dev, 0);
        CHECK_EQ(cut ? VBLK_S_OK : VBLK_S_IOERR, status_of(&q));
        g.backing = 10 * 512;
        CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 40));
    }
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, (UINT64_C(1) << 54) - 1));
    CHECK_EQ((UINT64_C(1) << 54) - 1, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 40, 512)); // zeroes
    for (uint32_t i = 1; i <= 3000; i++) {
        was = rd(VBLK_REG_CONFIG_GENERATION);
        CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 50 + (i & 1)));
        CHECK(was != rd(VBLK_REG_CONFIG_GENERATION));
        CHECK_EQ(50 + (i & 1), vblk_mmio_read(&g.dev, 0x100, 8));
    }
    wr(VBLK_REG_STATUS, 0); // stays
    CHECK_EQ(50, vblk_mmio_read(&g.dev, 0x100, 8));
}

void b7_a_backend_that_cannot_say(void) {
    g.o.capacity = 64;
    g.o.backend.size = NULL;
    guest_up();
    CHECK_EQ((uint64_t)VBLK_ERR_CAPACITY, (uint64_t)vblk_resize(&g.dev, 0));
    CHECK_EQ(64, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 65));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 64, 512));
}

// B7: what was taken ends by the capacity of then; what waits goes by the new.
void b7_requests_under_way(void) {
    vblk_request under_way;
    g.o.capacity = 64;
    g.o.limits.iops = 1;
    guest_up();
    req taken = request(VBLK_T_IN, 63, 512);
    req waits = request(VBLK_T_IN, 62, 512);
    CHECK_EQ(REQUEST, take(0, 0, &under_way).state);
    drain_at(0, 1);
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 10));
    CHECK(!vblk_put(&g.dev, &under_way, 0, g.disk + 63 * 512, 512));
    CHECK(!vblk_complete(&g.dev, &under_way, 512));
    drain_at(0, 2 * SECOND);
    CHECK_EQ(VBLK_S_OK, status_of(&taken));
    CHECK_EQ(VBLK_S_IOERR, status_of(&waits));
}

// B7: a file grows before the call, and is cut before it with nothing under
// way: then its flush does not fail for what was there.
void b7_file(void) {
    char path[64];
    vblk_file file;
    make_file(path, 64 * 512);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    guest_init();
    g.o.backend = vblk_file_backend(&file);
    guest_up();
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 64, 512));
    CHECK_EQ(0, ftruncate(file.fd, 100 * 512));
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 0));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 99, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ(0, ftruncate(file.fd, 20 * 512));
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 0));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 20, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ(0, ftruncate(file.fd, 30 * 512));
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 0));
    req r = request(VBLK_T_IN, 20, 5120); // never was there
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    vblk_file_close(&file);
    unlink(path);
}

void b2_b5_file(void) {
    char path[64];
    vblk_file file;
    make_file(path, 64 * 512 + 100);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    over_backend(vblk_file_backend(&file));
    CHECK(ftruncate(file.fd, 1000) == 0);
    vblk_file_close(&file);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    guest_init(); // X2 with a real file
    g.o.backend = vblk_file_backend(&file);
    g.o.capacity = 64;
    guest_up();
    req r = request(VBLK_T_IN, 1, 1024);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(488, counts().bytes_read);
    CHECK_EQ(1, *at(r.data));
    CHECK_EQ(0, *at(r.data + 488));
    vblk_file_close(&file);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, true));
    read_only_backend(vblk_file_backend(&file));
    vblk_file_close(&file);
    remove(path);
}

void b2_a_file_that_cannot_be_opened(void) {
    vblk_file file;
    errno = 0;
    CHECK_EQ((uint64_t)VBLK_ERR_FILE,
             (uint64_t)vblk_file_open(&file, "/nonexistent/image", true));
    CHECK_EQ(ENOENT, errno);
    int fd[2]; // a pipe has no size
    CHECK_EQ(0, pipe(fd));
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd[0]);
    int next = dup(0);
    close(next);
    CHECK_EQ((uint64_t)VBLK_ERR_FILE,
             (uint64_t)vblk_file_open(&file, path, true));
    CHECK_EQ(ENOTBLK, errno);
    make_file(path, 512);
    test_calls_fail("pthread_mutex_init", ENOMEM, 0, 1);
    CHECK_EQ((uint64_t)VBLK_ERR_FILE,
             (uint64_t)vblk_file_open(&file, path, true));
    CHECK_EQ(ENOMEM, errno);
    remove(path);
    CHECK_EQ(next, dup(0)); // none was left open
    close(next);
    close(fd[0]);
    close(fd[1]);
}

// What was there and is gone is an error and no zeroes, for each flush from
// then on too, whether it was there at first or came by a write.
void x2_a_file_that_became_shorter(void) {
    for (int written = 0; written < 2; written++) {
        char path[64];
        vblk_file file;
        make_file(path, written ? 1024 : 8192);
        guest_init();
        CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
        g.o.backend = vblk_file_backend(&file);
        g.o.capacity = 32;
        guest_up();
        if (written) {
            CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 8, 4096));
        }
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 8, 4096 + 512)); // 512 never there
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
        CHECK(ftruncate(file.fd, 4096 + 100) == 0);
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 4096));
        CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 7, 1024));
        CHECK_EQ(VBLK_EV_READ_FAILED, g.last.code);
        CHECK_EQ(8, event_a(&g.last));
        CHECK_EQ(EIO, event_b(&g.last));
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 16, 512));
        CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_FLUSH, 0, 0));
        CHECK(ftruncate(file.fd, 8192) == 0); // the data is not back
        CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_FLUSH, 0, 0));
        vblk_file_close(&file);
        CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
        vblk_backend b = vblk_file_backend(&file);
        CHECK(ftruncate(file.fd, 0) == 0); // seen by a flush first
        CHECK_EQ((uint64_t)-EIO, (uint64_t)b.flush(b.user));
        vblk_file_close(&file);
        remove(path);
    }
}

void b2_a_file_by_its_descriptor(void) {
    static const struct {
        int  flags, err;
        bool read_only;
    } rows[] = {
        {O_RDWR, 0, false},     {O_RDWR, 0, true},
        {O_RDONLY, 0, true},    {O_RDONLY, EACCES, false},
        {O_WRONLY, EACCES, false}, {O_WRONLY, EACCES, true},
        {O_RDWR | O_APPEND, EINVAL, false}, {O_RDWR | O_APPEND, 0, true},
    };
    char path[64];
    vblk_file file;
    make_file(path, 64 * 512);
    for (size_t i = 0; i < COUNT(rows); i++) {
        int fd = open(path, rows[i].flags);
        ROW_BEGIN();
        errno = 0;
        int err = vblk_file_from(&file, fd, rows[i].read_only);
        CHECK_EQ((uint64_t)(rows[i].err ? VBLK_ERR_FILE : VBLK_OK),
                 (uint64_t)err);
        CHECK_EQ(rows[i].err, err ? errno : 0);
        if (err) {
            CHECK_EQ(0, close(fd)); // still ours
        } else {
            if (rows[i].read_only) {
                read_only_backend(vblk_file_backend(&file));
            } else {
                over_backend(vblk_file_backend(&file));
            }
            vblk_file_close(&file);
            CHECK(close(fd) != 0);
        }
        ROW("%zu", i);
    }
    remove(path);
    static const struct {
        const char *path;
        int         err;
    } others[] = {{"/tmp", EISDIR}, {"/dev/null", ENOTBLK}};
    for (size_t i = 0; i < COUNT(others); i++) {
        errno = 0;
        CHECK_EQ((uint64_t)VBLK_ERR_FILE,
                 (uint64_t)vblk_file_open(&file, others[i].path, true));
        CHECK_EQ(others[i].err, errno);
    }
    CHECK_EQ((uint64_t)VBLK_ERR_FILE,
             (uint64_t)vblk_file_from(&file, -1, true));
    CHECK_EQ(EBADF, errno);
}

// A wrapper may pass more segments than a request of this device has.
void b2_more_segments_than_a_call_takes(void) {
    enum { SEGS = 1500 };
    static uint8_t data[SEGS];
    static vblk_seg seg[SEGS];
    char path[64];
    vblk_file file;
    make_file(path, SEGS);
    for (unsigned i = 0; i < SEGS; i++) {
        data[i] = (uint8_t)i;
        seg[i].ptr = data + i;
        seg[i].n = 1;
    }
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    vblk_backend b = vblk_file_backend(&file);
    int64_t n = b.write(b.user, 0, seg, SEGS);
    CHECK(n > 0 && n <= SEGS);
    uint8_t back[SEGS];
    CHECK_EQ(SEGS, pread(file.fd, back, SEGS, 0));
    CHECK_MEM(data, back, (size_t)n);
    CHECK_EQ((uint64_t)n, b.read(b.user, 0, seg, SEGS));
    vblk_file_close(&file);
    remove(path);
}

// After a failed fdatasync the kernel may say OK to the next, though the data
// is gone: the backend does not.
void b2_a_failed_flush_is_not_forgotten(void) {
    char path[64];
    vblk_file file;
    make_file(path, 4096);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    vblk_backend b = vblk_file_backend(&file);
    CHECK_EQ(0, b.flush(b.user));
    int real = file.fd;
    int fd[2];
    CHECK_EQ(0, pipe(fd));
    file.fd = fd[1]; // fdatasync of a pipe fails
    CHECK_EQ((uint64_t)-EINVAL, (uint64_t)b.flush(b.user));
    file.fd = real;
    CHECK_EQ((uint64_t)-EINVAL, (uint64_t)b.flush(b.user));
    close(fd[0]);
    close(fd[1]);
    vblk_file_close(&file);
    remove(path);
}

void b2_file_errors_reach_the_guest(void) {
    char path[64];
    vblk_file file;
    make_file(path, 64 * 512);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    g.o.backend = vblk_file_backend(&file);
    guest_up();
    vblk_file_close(&file);
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(EBADF, event_b(&g.last));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 0, 512));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_FLUSH, 0, 0));
    CHECK_EQ(3, counts().io_errors);
    remove(path);
}

// Rings at odd host addresses are reached through the accessors.
void q_rings_at_odd_host_addresses(void) {
    static uint8_t bytes[0x10001];
    static vblk_region region;
    static vblk_regions ram;
    region.bytes = 0x10000;
    region.host = bytes + 1;
    ram.region = &region;
    ram.count = 1;
    guest_init();
    guest_up();
    vblk_set_memory(&g.dev, vblk_regions_memory(&ram));
    guest_queue *q = &g.queue[0];
    memset(bytes, 0, sizeof bytes);
    uint8_t *d = bytes + 1 + q->desc, *avail = bytes + 1 + q->avail;
    d[0] = 0, d[1] = 0x80, d[8] = 16, d[12] = NEXT, d[14] = 1;
    d[16] = 0, d[17] = 0x90, d[25] = 2, d[28] = NEXT | WRITE, d[30] = 2;
    d[32] = 0, d[33] = 0xa0, d[40] = 1, d[44] = WRITE;
    avail[2] = 1;
    bytes[1 + 0xa000] = 0xff;
    kick(0);
    CHECK_EQ(VBLK_S_OK, bytes[1 + 0xa000]);
    CHECK_EQ(1, bytes[1 + q->used + 2]);
    CHECK_MEM(g.disk, bytes + 1 + 0x9000, 512);
}

static uint8_t old[0x10000], now[0x10000];

static vblk_memory memory_at(uint8_t *host) {
    static vblk_region  region[2];
    static vblk_regions ram[2];
    unsigned i = host == now;
    region[i].bytes = sizeof old;
    region[i].host = host;
    ram[i].region = &region[i];
    ram[i].count = 1;
    return vblk_regions_memory(&ram[i]);
}

// A device whose memory is `old`, and an IN there: header at 0x8000, data at
// 0x9000, status at 0xa000.
static guest_queue *in_old_memory(void) {
    memset(old, 0, sizeof old);
    guest_init();
    guest_up();
    vblk_set_memory(&g.dev, memory_at(old));
    guest_queue *q = &g.queue[0];
    uint8_t *d = old + q->desc;
    d[1] = 0x80, d[8] = 16, d[12] = NEXT, d[14] = 1;
    d[17] = 0x90, d[25] = 2, d[28] = NEXT | WRITE, d[30] = 2;
    d[33] = 0xa0, d[40] = 1, d[44] = WRITE;
    old[q->avail + 2] = 1;
    return q;
}

// Completions that were not shown yet go to the memory that is there now.
void x_completions_outlive_a_change_of_memory(void) {
    guest_queue *q = in_old_memory();
    vblk_request r;
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    CHECK(!vblk_complete(&g.dev, &r, (int64_t)r.bytes));
    memcpy(now, old, sizeof now);
    memset(old, 0xdd, sizeof old);
    vblk_set_memory(&g.dev, memory_at(now));
    vblk_publish(&g.dev, 0);
    CHECK_EQ(1, now[q->used + 2]);
    CHECK_EQ(0xdd, old[q->used + 2]);
}

// What was looked up before the memory changed is looked up again.
void x_buffers_are_where_memory_is_now(void) {
    guest_queue *q = in_old_memory();
    kick(0);
    CHECK_MEM(g.disk, old + 0x9000, 512);
    memcpy(now, old, sizeof now);
    memset(old, 0xdd, sizeof old);
    memset(now + 0x9000, 0xee, 512);
    now[0x8008] = 1; // another sector
    now[q->avail + 2] = 2;
    CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, memory_at(now)));
    kick(0);
    CHECK_MEM(g.disk + 512, now + 0x9000, 512);
    CHECK_EQ(VBLK_S_OK, now[0xa000]);
    CHECK_EQ(2, now[q->used + 2]);
    for (size_t i = 0; i < sizeof old; i++) {
        CHECK_EQ(0xdd, old[i]);
    }
}

// Every order of a table: each address is found, and no other.
void b_regions_in_any_order(void) {
    static uint8_t host[0x10000];
    static const vblk_region sorted[4] = {
        {0, 0x1000, host, false},
        {0x1000, 0x2000, host + 0x8000, true}, // touches the first
        {0x8000, 1, host + 0x3000, false},
        {UINT64_MAX - 0xfff, 0x1000, host + 0x4000, false}};
    for (unsigned order = 0; order < 256; order++) {
        vblk_region table[4];
        unsigned    count = 0, used = 0;
        for (unsigned i = 0; i < 4; i++) { // the last ones may be left out
            unsigned k = order >> 2 * i & 3;
            if (!(used >> k & 1)) {
                table[count++] = sorted[k];
            }
            used |= 1u << k;
        }
        vblk_regions all = {table, count};
        vblk_memory  m = vblk_regions_memory(&all);
        for (unsigned k = 0; k < 4; k++) {
            const vblk_region *r = &sorted[k];
            uint64_t places[] = {r->gpa - 1, r->gpa, r->gpa + r->bytes / 2,
                                 r->gpa + (r->bytes - 1), r->gpa + r->bytes};
            for (unsigned p = 0; p < COUNT(places); p++) {
                uint8_t *want = NULL;
                uint64_t run = 0x10000, left = 0x10000;
                for (unsigned i = 0; i < count; i++) {
                    uint64_t at_ = places[p] - table[i].gpa;
                    if (at_ < table[i].bytes) {
                        want = (uint8_t *)table[i].host + at_;
                        left = table[i].bytes - at_;
                    }
                }
                CHECK(m.map(m.user, places[p], &run, false) == want);
                CHECK(!want || run == left);
            }
        }
        uint64_t run = 1;
        CHECK(!m.map(m.user, 0x1000, &run, true)); // it is read-only
    }
}

void m9_no_interrupt_function(void) {
    guest_init();
    g.o.interrupt = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK(vblk_interrupt_line(&g.dev));
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    vblk_interrupt_ack(&g.dev, 1);
    CHECK(!vblk_interrupt_line(&g.dev));
}

void b_file_writes_scattered_memory(void) {
    char path[] = "/tmp/vblk_test_XXXXXX";
    uint8_t a[512], b[1024], back[1536];
    vblk_seg seg[2] = {{a, sizeof a, 0}, {b, sizeof b, 0}};
    vblk_file file;
    int fd = mkstemp(path);
    memset(a, 1, sizeof a);
    memset(b, 2, sizeof b);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    vblk_backend be = vblk_file_backend(&file);
    CHECK_EQ(1536, be.write(be.user, 512, seg, 2));
    CHECK_EQ(1536, pread(fd, back, sizeof back, 512));
    CHECK_MEM(a, back, sizeof a);
    CHECK_MEM(b, back + 512, sizeof b);
    CHECK_EQ(2048, be.size(be.user));
    vblk_file_close(&file);
    CHECK_EQ((uint64_t)-1, (uint64_t)file.fd);
    CHECK_EQ(0, be.size(be.user)); // no size to be had
    close(fd);
    unlink(path);
}

static int64_t read_nothing(void *user, uint64_t offset, const vblk_seg *seg,
                            unsigned segs) {
    (void)user;
    (void)offset;
    (void)seg;
    (void)segs;
    return 0;
}

void b_limiter_offers_what_its_backend_has(void) {
    const vblk_limits large = {.bps = 1, .bps_burst = UINT64_C(1) << 63};
    const vblk_limits none = {0};
    pacer l;
    vblk_backend inner = {.read = read_nothing};
    CHECK_EQ((uint64_t)VBLK_ERR_LIMITS,
             (uint64_t)pacer_init(&l, inner, &large));
    CHECK_EQ(VBLK_OK, pacer_init(&l, inner, &none));
    vblk_backend b = pacer_backend(&l);
    CHECK(b.read && !b.write && !b.flush && !b.size);
    pacer_close(&l);
}

// The kernel tells of lost data once. Whoever flushes meanwhile hears of it.
static struct two_flushes {
    vblk_backend b;
    uint32_t     ready; // atomic
    int          err[2];
} two;

static void *flush_too(void *arg) {
    __atomic_fetch_add(&two.ready, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&two.ready, __ATOMIC_ACQUIRE) < 2) {
    }
    *(int *)arg = two.b.flush(two.b.user);
    return NULL;
}

void b2_no_flush_passes_beside_one_that_fails(void) {
    char path[64];
    vblk_file file;
    make_file(path, 4096);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    two.b = vblk_file_backend(&file);
    // The one that holds the lock fails; the other waits for it.
    pthread_mutex_lock(&file.mutex);
    pthread_t thread[2];
    two.ready = 0;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(0, pthread_create(&thread[i], NULL, flush_too, &two.err[i]));
    }
    while (__atomic_load_n(&two.ready, __ATOMIC_ACQUIRE) < 2) {
    }
    file.flush_error = EIO; // as the failed one leaves it
    pthread_mutex_unlock(&file.mutex);
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        CHECK_EQ((uint64_t)-EIO, (uint64_t)two.err[i]);
    }
    vblk_file_close(&file);
    remove(path);
}

// Offsets of 64 bits, in a 32-bit program too.
void x1_a_file_beyond_4_gib(void) {
    char path[64];
    uint8_t data[512], back[512] = {0};
    vblk_seg seg = {.ptr = data, .n = 512};
    vblk_file file;
    make_file(path, 4096);
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    vblk_backend b = vblk_file_backend(&file);
    memset(data, 0x77, sizeof data);
    CHECK_EQ(512, b.write(b.user, UINT64_C(5) << 30, &seg, 1));
    CHECK_EQ((UINT64_C(5) << 30) + 512, b.size(b.user));
    seg.ptr = back;
    CHECK_EQ(512, b.read(b.user, UINT64_C(1) << 30, &seg, 1));
    CHECK_EQ(0, back[0]);
    CHECK_EQ(512, b.read(b.user, UINT64_C(5) << 30, &seg, 1));
    CHECK_MEM(data, back, 512);
    CHECK_EQ(512, b.read(b.user, 0, &seg, 1));
    CHECK_EQ(0, back[0]);
    vblk_file_close(&file);
    remove(path);
}

// X6, V17: what could not be told to the guest is an error and nothing else.
void x6_v17_a_lost_status_is_no_success(void) {
    guest_up();
    vblk_request r;
    req one = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    r.status_ptr = NULL;
    g.hole = one.status;
    g.hole_bytes = 1;
    CHECK(!vblk_complete(&g.dev, &r, 512));
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(0, counts().reads);
    CHECK_EQ(0, counts().bytes_read);
    CHECK_EQ(1, g.events[VBLK_EV_STATUS_UNWRITABLE]);
}

static uint64_t lost;

static int write_but_there(void *user, uint64_t gpa, const void *src,
                           uint64_t n) {
    return src && gpa == lost ? -1 : steady.write(user, gpa, src, n);
}

// The same for what is done without the backend: a FLUSH of what cannot be
// written.
void x6_v17_nor_of_an_idle_request(void) {
    if (g.mapped) {
        return;
    }
    steady = g.o.memory;
    g.o.memory.write = write_but_there;
    g.o.backend.write = NULL;
    guest_up();
    lost = request(VBLK_T_FLUSH, 0, 0).status;
    kick(0);
    CHECK_EQ(0, counts().flushes);
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(1, g.events[VBLK_EV_STATUS_UNWRITABLE]);
    lost = 0;
}

// An id without an end is not read past its 20 bytes.
void b4_an_id_of_20_bytes_and_no_more(void) {
    char *id = malloc(20);
    memset(id, 'x', 20);
    g.o.id = id;
    guest_up();
    free(id);
    req r = request(VBLK_T_GET_ID, 0, 20);
    kick(0);
    CHECK_MEM("xxxxxxxxxxxxxxxxxxxx", at(r.data), 20);
}
