// The host's side: when it is to call again, whom it is to wake, what it must
// have ended, and what its own segments and threads may do.
#include "guest.h"

#include <pthread.h>

// ---- Poll: what is due, and when to look again ------------------------------

void q14_poll_serves_what_was_notified(void) {
    g.o.queues = 3;
    guest_up();
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 5)); // looked at at DRIVER_OK
    req r[3];
    for (unsigned i = 0; i < 3; i++) {
        r[i] = prepare(VBLK_T_IN, i, 512);
        send(i, &r[i]);
    }
    unsigned accesses = g.accesses;
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 5)); // nobody said so
    CHECK_EQ(accesses, g.accesses);
    CHECK_EQ(2, wr(VBLK_REG_QUEUE_NOTIFY, 2));
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 5));
    CHECK_EQ(VBLK_S_OK, status_of(&r[0]));
    CHECK_EQ(0xff, status_of(&r[1]));
    CHECK_EQ(VBLK_S_OK, status_of(&r[2]));
    vblk_notify(&g.dev, 1); // as another transport would
    CHECK_EQ(1, g.notified);
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 5));
    CHECK_EQ(VBLK_S_OK, status_of(&r[1]));
    accesses = g.accesses;
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 5));
    CHECK_EQ(accesses, g.accesses); // each notification once
}

void q14_poll_returns_now_while_there_is_more(void) {
    g.o.queue_size = 4;
    guest_up();
    req r = request(VBLK_T_FLUSH, 0, 0);
    rewritable(r.status);
    for (unsigned i = 1; i < 6; i++) { // more than the queue has entries
        request(VBLK_T_FLUSH, 0, 0);
        g.queue[0].avail_idx = 4;
    }
    put16(g.queue[0].avail + 2, 4);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    g.dev.yield = 1; // whoever asks the drain to end at once
    CHECK_EQ(77, vblk_poll(&g.dev, 77));
    CHECK_EQ(77, vblk_poll(&g.dev, 77)); // still
    CHECK_EQ(0, used_count(0));
    g.dev.yield = 0;
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 78));
    CHECK_EQ(4, used_count(0));
    memset(g.writes, 0, sizeof g.writes);
}

// Deadlines of several queues are one number, and stand while others work.
void t4_poll_keeps_the_time_of_a_stalled_queue(void) {
    g.o.queues = 2;
    g.o.limits.bps = 512;
    guest_up();
    vblk_poll(&g.dev, 1000);
    req first = request(VBLK_T_IN, 0, 512);
    req stalls = request(VBLK_T_IN, 1, 512);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(1000 + SECOND, vblk_poll(&g.dev, 1000));
    CHECK_EQ(VBLK_S_OK, status_of(&first));
    CHECK_EQ(1000 + SECOND, vblk_poll(&g.dev, 2000)); // early is harmless
    CHECK_EQ(1, counts().throttled);
    req free = prepare(VBLK_T_FLUSH, 0, 0); // bytes alone are limited
    send(1, &free);
    wr(VBLK_REG_QUEUE_NOTIFY, 1);
    wr(VBLK_REG_QUEUE_NOTIFY, 0); // which does not shorten the stall
    CHECK_EQ(1000 + SECOND, vblk_poll(&g.dev, 3000));
    CHECK_EQ(VBLK_S_OK, status_of(&free));
    CHECK_EQ(1, counts().throttled);
    CHECK_EQ(1000 + SECOND, vblk_poll(&g.dev, 999 + SECOND));
    CHECK_EQ(0xff, status_of(&stalls));
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 1000 + SECOND));
    CHECK_EQ(VBLK_S_OK, status_of(&stalls));
}

// A stall that a drain of one queue met is a poll's too, and so is its end.
void t4_drain_and_poll_share_a_stall(void) {
    g.o.limits.iops = 1;
    guest_up();
    vblk_poll(&g.dev, 0);
    request(VBLK_T_IN, 0, 512);
    req r = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(SECOND, vblk_drain(&g.dev, 0, 0));
    CHECK_EQ(SECOND, vblk_poll(&g.dev, 1));
    CHECK_EQ(VBLK_NEVER, vblk_drain(&g.dev, 0, SECOND));
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, SECOND));
    vblk_limits none = {0}, slow = {.iops = 1};
    request(VBLK_T_IN, 0, 512);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(2 * SECOND, vblk_poll(&g.dev, SECOND));
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &none, SECOND));
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, SECOND)); // at once
    CHECK_EQ(3, counts().reads);
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &slow, SECOND));
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(2 * SECOND, vblk_poll(&g.dev, SECOND));
    reset(); // nothing waits any more
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, SECOND));
}

// A moment that no clock comes to is not "never".
void t4_the_latest_moment(void) {
    g.o.limits.bps = 512;
    g.o.limits.bps_burst = INT64_MAX;
    guest_up();
    vblk_poll(&g.dev, 0);
    g.dev.bytes.tokens = INT64_MIN / 2;
    req r = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(VBLK_NEVER - 1, vblk_drain(&g.dev, 0, UINT64_MAX / 2));
    CHECK_EQ(0xff, status_of(&r));
}


// ---- Next and arm -----------------------------------------------------------

// Q15: from vblk_next() to vblk_arm() the driver does not notify.
void q15_notifications_are_off_until_the_host_waits(void) {
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        vblk_seg     seg[MAX_SEGS + 2];
        vblk_request r;
        guest_init();
        guest_up_without(event_idx ? 0 : VBLK_F_EVENT_IDX);
        uint64_t flags = g.queue[0].used;
        uint64_t event = flags + 4 + 8 * 256;
        request(VBLK_T_IN, 0, 512);
        CHECK(vblk_next(&g.dev, 0, 0, &r, seg, COUNT(seg)));
        CHECK(!vblk_complete(&g.dev, &r, 512));
        CHECK(!vblk_next(&g.dev, 0, 0, &r, seg, COUNT(seg)));
        CHECK_EQ(0, used_count(0)); // nor is it shown
        CHECK_EQ(event_idx ? 0 : 1, get16(event_idx ? event : flags));
        vblk_publish(&g.dev, 0);
        CHECK_EQ(1, used_count(0));
        CHECK_EQ(event_idx ? 0 : 1, get16(event_idx ? event : flags));
        CHECK_EQ(VBLK_NEVER, vblk_arm(&g.dev, 0, 0));
        CHECK_EQ(event_idx ? 1 : 0, get16(event_idx ? event : flags));
        req late = request(VBLK_T_IN, 0, 512);
        CHECK_EQ(9, vblk_arm(&g.dev, 0, 9)); // there is work after all
        CHECK(vblk_next(&g.dev, 0, 0, &r, seg, COUNT(seg)));
        CHECK(!vblk_complete(&g.dev, &r, 512));
        CHECK_EQ(VBLK_NEVER, vblk_arm(&g.dev, 0, 9));
        CHECK_EQ(2, used_count(0)); // arm publishes
        CHECK_EQ(VBLK_S_OK, status_of(&late));
        CHECK_EQ(event_idx ? 1 : 2, g.fired); // used_event is 0
    }
}

void q15_arm_answers_like_a_drain(void) {
    vblk_request r;
    vblk_seg     seg[MAX_SEGS + 2];
    g.o.limits.iops = 1;
    CHECK_EQ(VBLK_OK, vblk_init(&g.dev, &g.o));
    CHECK_EQ(VBLK_NEVER, vblk_arm(&g.dev, 0, 0)); // not live
    guest_up();
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK(vblk_next(&g.dev, 0, 3, &r, seg, COUNT(seg)));
    CHECK(!vblk_next(&g.dev, 0, 3, &r, seg, COUNT(seg)));
    CHECK_EQ(3 + SECOND, vblk_arm(&g.dev, 0, 3));
    put16(g.queue[0].avail + 2, 1000);
    CHECK(!vblk_queue_broken(&g.dev, 0));
    CHECK(vblk_next(&g.dev, 0, 3 + SECOND, &r, seg, COUNT(seg)));
    CHECK(!vblk_next(&g.dev, 0, 3 + SECOND, &r, seg, COUNT(seg)));
    CHECK_EQ(VBLK_NEVER, vblk_arm(&g.dev, 0, 3 + SECOND));
    CHECK(vblk_queue_broken(&g.dev, 0));
    reset();
    CHECK(!vblk_queue_broken(&g.dev, 0));
}

// The segments of the longest chain fit an array of seg_max + 2, and nothing
// is written behind it, whether regions meet in every buffer or in none.
void x1_segments_stay_in_their_array(void) {
    static const uint32_t seg_max[] = {1, 2, 5, 60};
    for (size_t i = 0; i < COUNT(seg_max); i++) {
        for (unsigned more = 0; more < 4; more++) {
            uint32_t     n = seg_max[i], room = n + 2 + more;
            vblk_seg     seg[70], mark_ = {NULL, 77, 0x7777};
            part         p[70];
            vblk_request r;
            guest_init();
            g.o.seg_max = n;
            guest_up();
            p[0] = (part){put_header(VBLK_T_OUT, 0), 16, 0};
            for (uint32_t k = 0; k < n; k++) { // all of them across the seam
                p[k + 1] = (part){SEAM - 256, 512, 0};
            }
            p[n + 1] = (part){alloc(1, 1), 1, WRITE};
            fill(SEAM - 256, 3, 512);
            for (size_t k = 0; k < COUNT(seg); k++) {
                seg[k] = mark_;
            }
            submit(0, p, n + 2);
            CHECK(vblk_next(&g.dev, 0, 0, &r, seg, room));
            CHECK(r.seg >= seg && r.seg + r.segs <= seg + room);
            for (size_t k = room; k < COUNT(seg); k++) {
                CHECK_EQ(0x7777, seg[k].gpa);
            }
            uint64_t bytes = 0;
            for (unsigned k = 0; k < r.segs; k++) {
                bytes += r.seg[k].n;
                CHECK(r.seg[k].ptr || !r.direct);
            }
            CHECK_EQ(512 * (uint64_t)n, bytes);
            CHECK(n > 1 || r.direct == g.mapped); // there is room for two
            uint8_t copy[512];
            for (uint32_t k = 0; k < n; k++) {
                CHECK_EQ(VBLK_OK, vblk_get(&g.dev, &r, 512 * k, copy, 512));
                CHECK_MEM(at(SEAM - 256), copy, 256);
                CHECK_EQ(3, copy[511]);
            }
            CHECK_EQ(VBLK_OK, vblk_complete(&g.dev, &r, 512 * n));
            vblk_publish(&g.dev, 0);
            CHECK_EQ(1, used_count(0));
        }
    }
}


// ---- Notify, quiesce --------------------------------------------------------

void q10_the_host_hears_who_has_work(void) {
    vblk_limits none = {0};
    g.o.queues = 2;
    g.o.profile = VBLK_STANDARD;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_queue_up(1, 16);
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE, (uint64_t)g.notified);
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)wr(VBLK_REG_STATUS, 0xf));
    CHECK_EQ(1, wr(VBLK_REG_QUEUE_NOTIFY, 1));
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_NOTIFY, 2));
    wr(VBLK_REG_QUEUE_SEL, 1);
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE, (uint64_t)wr(VBLK_REG_QUEUE_READY, 0));
    CHECK_EQ(1, wr(VBLK_REG_QUEUE_READY, 1));
    g.notified = VBLK_NO_QUEUE;
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &none, 0));
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)g.notified);
    g.notified = VBLK_NO_QUEUE;
    CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, g.o.memory));
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)g.notified);
}

static struct {
    unsigned     calls;
    int          queue, answer;
    uint32_t     status; // as it was then
    vblk_request *complete;
} quiet;

static int on_quiesce(void *user, int queue) {
    (void)user;
    quiet.calls++;
    quiet.queue = queue;
    quiet.status = vblk_status(&g.dev);
    if (quiet.complete) {
        CHECK(!vblk_complete(&g.dev, quiet.complete, 512));
    }
    return quiet.answer;
}

static void with_quiesce(void) {
    memset(&quiet, 0, sizeof quiet);
    g.o.quiesce = on_quiesce;
    g.o.profile = VBLK_STANDARD;
    guest_up();
    quiet.calls = 0;
}

// R4: asked before anything of the session goes.
void r4_a_reset_waits_for_the_host(void) {
    vblk_request r;
    with_quiesce();
    req q = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(1, quiet.calls);
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)quiet.queue);
    CHECK_EQ(0xf, quiet.status);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    CHECK_EQ((uint64_t)VBLK_ERR_STALE,
             (uint64_t)vblk_complete(&g.dev, &r, 512));
    CHECK_EQ(0xff, status_of(&q));
}

// R4, W8: what cannot be ended keeps the device, and touches nothing.
void r4_a_host_that_cannot_let_go(void) {
    vblk_request r;
    uint8_t      byte = 0;
    with_quiesce();
    req q = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    quiet.answer = -1;
    for (int i = 0; i < 2; i++) {
        wr(VBLK_REG_STATUS, 0);
        CHECK_EQ(VBLK_STATUS_NEEDS_RESET, rd(VBLK_REG_STATUS));
        CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
        CHECK(!vblk_interrupt_line(&g.dev));
        wr(VBLK_REG_STATUS, 1); // no driver binds
        CHECK_EQ(VBLK_STATUS_NEEDS_RESET, rd(VBLK_REG_STATUS));
    }
    CHECK_EQ((uint64_t)VBLK_ERR_STALE,
             (uint64_t)vblk_put(&g.dev, &r, 0, &byte, 1));
    CHECK_EQ((uint64_t)VBLK_ERR_STALE,
             (uint64_t)vblk_complete(&g.dev, &r, 512));
    vblk_publish(&g.dev, 0);
    CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 0));
    CHECK_EQ(VBLK_NEVER, vblk_drain(&g.dev, 0, 0));
    CHECK_EQ(0, used_count(0));
    CHECK_EQ(0xff, status_of(&q));
    quiet.answer = 0;
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    CHECK_EQ(3, quiet.calls);
    guest_negotiate(VBLK_F_EVENT_IDX); // and it is back
    guest_queue_up(0, 16);
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

// P8: one queue; the event says what the driver met.
void p8_a_queue_that_cannot_be_stopped(void) {
    with_quiesce();
    wr(VBLK_REG_QUEUE_READY, 0);
    CHECK_EQ(1, quiet.calls);
    CHECK_EQ(0, quiet.queue);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
    wr(VBLK_REG_QUEUE_READY, 1);
    CHECK_EQ(1, quiet.calls); // to start one asks nobody
    quiet.answer = -1;
    wr(VBLK_REG_QUEUE_READY, 0);
    CHECK_EQ(1, g.events[VBLK_EV_NOT_QUIET]);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
}

// M13: the same by QueueReset.
void m13_a_queue_that_cannot_be_reset(void) {
    with_quiesce();
    quiet.answer = -1;
    wr(VBLK_REG_QUEUE_RESET, 1);
    CHECK_EQ(1, quiet.calls);
    CHECK_EQ(0, quiet.queue);
    CHECK_EQ(1, g.events[VBLK_EV_NOT_QUIET]);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
}

// A queue that is stopped already has nothing to be asked for.
void p8_a_queue_that_is_stopped_twice(void) {
    with_quiesce();
    wr(VBLK_REG_QUEUE_READY, 0);
    quiet.answer = -1;
    wr(VBLK_REG_QUEUE_READY, 0);
    CHECK_EQ(1, quiet.calls);
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
}

// W9, T4: a stall that cannot be served now has no time.
void t4_a_stall_without_memory_has_no_time(void) {
    vblk_memory none = {0};
    for (int how = 0; how < 2; how++) {
        guest_init();
        g.o.limits.iops = 1;
        with_quiesce();
        vblk_poll(&g.dev, 0);
        request(VBLK_T_IN, 0, 512);
        req r = request(VBLK_T_IN, 0, 512);
        wr(VBLK_REG_QUEUE_NOTIFY, 0);
        CHECK_EQ(SECOND, vblk_poll(&g.dev, 0));
        if (how == 0) {
            CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, none));
        } else {
            quiet.answer = -1;
            wr(VBLK_REG_STATUS, 0);
        }
        CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 2 * SECOND));
        if (how == 0) {
            CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, g.o.memory));
            CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 2 * SECOND));
            CHECK_EQ(VBLK_S_OK, status_of(&r));
        }
    }
}

// T4: who waits for the turn hears when it comes, whatever ended the other's.
void t4_the_next_in_turn_is_notified(void) {
    for (int how = 0; how < 2; how++) {
        guest_init();
        g.o.queues = 2;
        g.o.limits.bps = 512;
        g.o.limits.bps_burst = 1 << 20;
        guest_up();
        g.dev.bytes.tokens = 0;
        req large = request(VBLK_T_IN, 0, 1 << 16), small;
        CHECK_EQ(128 * SECOND, vblk_drain(&g.dev, 0, 0));
        small = prepare(VBLK_T_IN, 0, 512);
        send(1, &small);
        CHECK_EQ(128 * SECOND, vblk_drain(&g.dev, 1, 0));
        g.notified = VBLK_NO_QUEUE;
        if (how == 0) { // it passes, and looks on a little later
            CHECK_EQ(128 * SECOND - 1 + 1000000,
                     vblk_drain(&g.dev, 1, 128 * SECOND - 1));
            CHECK_EQ(VBLK_NEVER, vblk_drain(&g.dev, 0, 128 * SECOND));
            CHECK_EQ(VBLK_S_OK, status_of(&large));
        } else { // it breaks: the head is another now
            put16(g.queue[0].avail + 4, 999);
            CHECK_EQ(VBLK_NEVER, vblk_drain(&g.dev, 0, SECOND));
            CHECK(vblk_queue_broken(&g.dev, 0));
        }
        CHECK_EQ(1, g.notified);
        CHECK(vblk_drain(&g.dev, 1, 129 * SECOND) == VBLK_NEVER);
        CHECK_EQ(VBLK_S_OK, status_of(&small));
    }
}

// LIB-04: memory is not given back under requests of a queue that broke.
void w9_memory_stays_while_a_broken_queue_has_requests(void) {
    vblk_request r;
    vblk_memory  none = {0};
    guest_up();
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    put16(g.queue[0].avail + 2, 1000);
    CHECK_EQ(BROKEN, kick(0).state);
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY, (uint64_t)vblk_set_memory(&g.dev, none));
    CHECK_EQ((uint64_t)VBLK_ERR_STALE,
             (uint64_t)vblk_complete(&g.dev, &r, 512)); // it has ended
    CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, none));
    reset();
}

// R4: the reset comes while a backend is at work, and the host says no.
static unsigned reads_after;

static int64_t read_and_reset(void *user, uint64_t offset, const vblk_seg *seg,
                              unsigned segs) {
    (void)user, (void)offset, (void)segs;
    reads_after += vblk_status(&g.dev) == VBLK_STATUS_NEEDS_RESET;
    quiet.answer = -1;
    vblk_mmio_write(&g.dev, VBLK_REG_STATUS, 4, 0);
    put16(g.queue[0].avail + 2, 1000); // the driver's own again
    memset(seg[0].ptr, 0, 1);
    return seg[0].n < 512 ? (int64_t)seg[0].n : 512;
}

void r4_nothing_is_begun_after_a_reset(void) {
    reads_after = 0;
    g.o.backend.read = read_and_reset;
    with_quiesce();
    req r = request(VBLK_T_IN, 0, 4096);
    vblk_drain(&g.dev, 0, 0);
    CHECK_EQ(0, reads_after);
    CHECK_EQ(0xff, status_of(&r));
    CHECK_EQ(0, counts().broken_queues);
    CHECK_EQ(0, used_count(0));
    g.queue[0].size = 0;
}

// W7, R4: the reset comes at any access, and the host says no. That access may
// have begun to write; none does after it, and nothing is begun or looked for.
// The ring is the driver's again, and nobody is told what is in it.
static unsigned traced_by_then, calls_by_then;

static void reset_now(void) {
    traced_by_then = g.traced;
    calls_by_then = g.calls + g.flushes;
    put16(g.queue[0].avail + 4, 999);
    put16(g.queue[0].avail + 6, 999);
    quiet.answer = -1;
    vblk_mmio_write(&g.dev, VBLK_REG_STATUS, 4, 0);
}

void w7_nothing_is_written_after_a_reset(void) {
    static const struct {
        uint32_t type, bytes;
    } kinds[] = {{VBLK_T_IN, 4096}, {VBLK_T_OUT, 512}, {VBLK_T_GET_ID, 20},
                 {77, 512}, {VBLK_T_FLUSH, 0}};
    const uint64_t backing = g.backing;
    for (unsigned kind = 0; kind < 2 * COUNT(kinds); kind++) {
        unsigned n = 0;
        do {
            guest_init();
            with_quiesce();
            g.backing = kind < COUNT(kinds) ? backing : 700; // padded
            g.dev.backing = g.backing;
            for (int i = 0; i < 2; i++) {
                request(kinds[kind % COUNT(kinds)].type, 0,
                        kinds[kind % COUNT(kinds)].bytes);
            }
            g.traced = 0;
            g.strike = reset_now;
            g.ambush = ++n;
            vblk_drain(&g.dev, 0, 0);
            for (unsigned i = traced_by_then + 1; !g.ambush && i < g.traced;
                 i++) {
                CHECK(!g.trace[i].write);
                CHECK(g.trace[i].gpa != g.queue[0].avail + 2);
            }
            CHECK(g.ambush || !rd(VBLK_REG_INTERRUPT_STATUS));
            CHECK(g.ambush || calls_by_then == g.calls + g.flushes);
            CHECK_EQ(0, counts().broken_queues);
        } while (g.ambush == 0);
        CHECK(g.mapped || n > 10);
        g.ambush = 0;
    }
    guest_init();
}

// What the host completes in quiesce() is not lost, and the position is right.
void r4_a_stop_completes_what_is_under_way(void) {
    vblk_request r;
    with_quiesce();
    req q = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    quiet.answer = -1;
    vblk_ring ring = {.position = 7};
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(7, ring.position);
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY)); // nothing changed
    quiet.answer = 0;
    quiet.complete = &r;
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(1, ring.position);
    CHECK_EQ(VBLK_S_OK, status_of(&q));
    CHECK_EQ(1, used_count(0));
}


// ---- Copying is anybody's ---------------------------------------------------

enum { COPIERS = 3, ROUNDS = 200 };

static struct {
    vblk_request req[COPIERS];
    uint32_t     stop;   // atomic
    uint32_t     copied[COPIERS]; // atomic
} copying;

static void *copy_often(void *arg) {
    unsigned i = *(unsigned *)arg;
    uint8_t  data[512];
    memset(data, 0x3c, sizeof data);
    while (!__atomic_load_n(&copying.stop, __ATOMIC_ACQUIRE)) {
        int err = vblk_put(&g.dev, &copying.req[i], 0, data, sizeof data);
        CHECK(err == VBLK_OK || err == VBLK_ERR_STALE);
        __atomic_fetch_add(&copying.copied[i], 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

// While the drainer serves, completes and breaks a queue, others copy: the
// thread sanitizer says whether that is so.
void race_of_copies_and_the_drainer(void) {
    pthread_t thread[COPIERS];
    unsigned  number[COPIERS] = {0, 1, 2};
    req       q[COPIERS];
    g.o.memory = vblk_regions_memory(&g.vram); // no rules: they are no thread's
    g.o.memory.map = g.mapped ? g.o.memory.map : NULL;
    guest_up();
    memset(&copying, 0, sizeof copying);
    for (unsigned i = 0; i < COPIERS; i++) {
        q[i] = request(VBLK_T_IN, i, 512);
        CHECK_EQ(REQUEST, take(0, 0, &copying.req[i]).state);
        CHECK_EQ(0, pthread_create(&thread[i], NULL, copy_often,
                                   &number[i]));
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
    }
    for (unsigned i = 0; i < COPIERS; i++) {
        EVENTUALLY(__atomic_load_n(&copying.copied[i], __ATOMIC_ACQUIRE) > 9);
    }
    put16(g.queue[0].avail + 2, 5000); // and it breaks
    kick(0);
    CHECK_EQ((uint64_t)VBLK_ERR_STALE,
             (uint64_t)vblk_put(&g.dev, &copying.req[0], 0, "x", 1));
    __atomic_store_n(&copying.stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < COPIERS; i++) {
        pthread_join(thread[i], NULL);
        CHECK_EQ(0x3c, *at(q[i].data + 511));
        CHECK_EQ(0xff, status_of(&q[i]));
    }
    memset(g.writes, 0, sizeof g.writes);
}

// A vCPU notifies while another thread polls: nothing is lost.
static void *notify_often(void *arg) {
    (void)arg;
    for (unsigned i = 0; i < 20000; i++) {
        __atomic_fetch_add(&copying.copied[0], 1, __ATOMIC_RELEASE);
        vblk_notify(&g.dev, (int)(i % 3));
    }
    __atomic_store_n(&copying.stop, 1, __ATOMIC_RELEASE);
    return NULL;
}

void race_of_notifications_and_poll(void) {
    pthread_t thread;
    g.o.queues = 3;
    g.o.notify = NULL;
    guest_up();
    vblk_poll(&g.dev, 0);
    memset(&copying, 0, sizeof copying);
    CHECK_EQ(0, pthread_create(&thread, NULL, notify_often, NULL));
    bool over = false;
    for (uint32_t seen = 0; !over || seen < 20000;) {
        over = __atomic_load_n(&copying.stop, __ATOMIC_ACQUIRE);
        bool due = __atomic_load_n(&g.dev.due, __ATOMIC_ACQUIRE);
        CHECK_EQ(VBLK_NEVER, vblk_poll(&g.dev, 0));
        if (over || due) {
            seen = __atomic_load_n(&copying.copied[0], __ATOMIC_ACQUIRE);
        }
    }
    pthread_join(thread, NULL);
    for (unsigned i = 0; i < 3; i++) {
        CHECK(!g.dev.queue[i].due);
    }
    CHECK(!g.dev.due);
}
