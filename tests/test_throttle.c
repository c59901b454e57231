// Group T: the buckets in injected time, the throttle in the pipeline, the
// blocking limiter.
#include "guest.h"

#include "../examples/pacer.h"

#include <errno.h>
#include <pthread.h>


// ---- Token bucket ---------------------------------------------------------

void t3_a_request_larger_than_the_bucket(void) {
    vblk_bucket b;
    vblk_bucket_init(&b, 10, 10);
    CHECK(vblk_bucket_can_take(&b, 25)); // full, and it can never hold 25
    vblk_bucket_take(&b, 25);
    CHECK_EQ((uint64_t)-15, (uint64_t)b.tokens);
    CHECK(!vblk_bucket_can_take(&b, 25));
    CHECK(vblk_bucket_can_take(&b, 0)); // cost 0 always passes
    CHECK_EQ(1600000000, vblk_bucket_wait(&b, 1, 0));  // 16 tokens
    CHECK_EQ(1500000000, vblk_bucket_wait(&b, 25, 0)); // a balance of 0
    CHECK_EQ(2500000000, vblk_bucket_wait(&b, 10, 0));
    vblk_bucket_refill(&b, 1499999999);
    CHECK(!vblk_bucket_can_take(&b, 25));
    vblk_bucket_refill(&b, 1500000000);
    CHECK(vblk_bucket_can_take(&b, 25));
    CHECK(!vblk_bucket_can_take(&b, 1));
}

// A number of a random length.
static uint64_t any(unsigned bits) {
    uint64_t n = (uint64_t)test_random() << 32 | test_random();
    return n >> (64 - bits) >> test_below(bits);
}

void t6_waits_are_exact_to_a_nanosecond(void) {
    static const uint64_t rates[] = {1, 3, 7, 100, 3000, 999999937,
                                     1000000000, 1000000007,
                                     UINT64_C(10) << 30, INT64_MAX};
    for (size_t i = 0; i < 100; i++) {
        uint64_t rate = i < COUNT(rates) ? rates[i] : 1 + any(62);
        for (int k = 0; k < 50; k++) {
            vblk_bucket b, early;
            uint64_t now = (uint64_t)test_random() << 20;
            vblk_bucket_init(&b, rate, INT64_MAX);
            vblk_bucket_refill(&b, now);
            vblk_bucket_take(&b, INT64_MAX);
            for (int n = 0; n < 5; n++) {
                // Up to 2^62 ns, over 2^64 / 10^9 tokens where that fits.
                uint64_t cost = 1 + any(62) % (rate > UINT64_C(4000000000)
                                                   ? UINT64_C(1) << 62
                                                   : rate * 1000000000);
                now += test_below(1000);
                vblk_bucket_refill(&b, now);
                uint64_t wait = vblk_bucket_wait(&b, cost, now);
                if (wait == 0) {
                    CHECK(vblk_bucket_can_take(&b, cost));
                    vblk_bucket_take(&b, cost);
                    continue;
                }
                CHECK(!vblk_bucket_can_take(&b, cost));
                early = b;
                vblk_bucket_refill(&early, now + wait - 1);
                CHECK(!vblk_bucket_can_take(&early, cost));
                vblk_bucket_refill(&b, now + wait);
                CHECK(vblk_bucket_can_take(&b, cost));
                vblk_bucket_take(&b, cost);
                now += wait;
            }
        }
    }
}

// However a time is cut, it brings the same, to the last fraction.
void t6_refills_add_up(void) {
    for (int i = 0; i < 20000; i++) {
        vblk_bucket once, twice;
        uint64_t now = any(62), first = any(62) % (now + 1);
        vblk_bucket_init(&once, 1 + any(62), INT64_MAX);
        vblk_bucket_take(&once, INT64_MAX);
        twice = once;
        vblk_bucket_refill(&once, now);
        vblk_bucket_refill(&twice, first);
        vblk_bucket_refill(&twice, now);
        CHECK_EQ(once.tokens, twice.tokens);
        CHECK_EQ(once.fraction, twice.fraction);
    }
}

void t6_nothing_overflows(void) {
    static const uint64_t big[] = {1, 2, 1000000000, UINT32_MAX,
                                   UINT64_C(1) << 62, INT64_MAX - 1,
                                   INT64_MAX};
    for (size_t r = 0; r < COUNT(big); r++) {
        for (size_t c = 0; c < COUNT(big); c++) {
            for (size_t n = 0; n < COUNT(big); n++) {
                for (size_t t = 0; t < COUNT(big); t++) {
                    vblk_bucket b;
                    vblk_bucket_init(&b, big[r], big[c]);
                    vblk_bucket_refill(&b, 5);
                    vblk_bucket_take(&b, big[n]);
                    int64_t before = b.tokens;
                    uint64_t wait = vblk_bucket_wait(&b, big[n], 5);
                    vblk_bucket_refill(&b, big[t]);
                    CHECK(b.tokens >= before);
                    CHECK(b.tokens <= (int64_t)big[c]);
                    if (wait == 0 || (big[t] > 5 && big[t] - 5 >= wait)) {
                        CHECK(vblk_bucket_can_take(&b, big[n]));
                    } else {
                        CHECK(!vblk_bucket_can_take(&b, big[n]));
                    }
                }
            }
        }
    }
}

void t6_products_beyond_64_bits(void) {
    vblk_bucket b;
    vblk_bucket_init(&b, UINT64_C(1) << 32, INT64_MAX);
    vblk_bucket_take(&b, INT64_MAX);
    vblk_bucket_refill(&b, UINT64_C(1) << 32); // 2^64 / 10^9 tokens
    CHECK_EQ(UINT64_C(18446744073), b.tokens);
    CHECK_EQ(709551616, b.fraction);
    vblk_bucket_init(&b, UINT64_C(1000000000000), UINT64_C(1000000000000));
    vblk_bucket_take(&b, UINT64_C(1000000000000));
    CHECK_EQ(20000001, vblk_bucket_wait(&b, UINT64_C(20000000001), 0));
}

void t6_a_clock_that_stands_still_or_goes_back(void) {
    vblk_bucket b;
    vblk_bucket_init(&b, 1000, 1000);
    vblk_bucket_refill(&b, 5 * SECOND);
    vblk_bucket_take(&b, 1000);
    for (int i = 0; i < 1000; i++) {
        vblk_bucket_refill(&b, 5 * SECOND);
        vblk_bucket_refill(&b, test_random());
        vblk_bucket_refill(&b, 0);
    }
    CHECK_EQ(0, b.tokens);
    // The wait counts from the moment the caller has, however wrong.
    CHECK_EQ(5 * SECOND + 1000000, vblk_bucket_wait(&b, 1, 0));
    vblk_bucket_refill(&b, 5 * SECOND + 1000000);
    CHECK_EQ(1, b.tokens);
}

void t_change_of_limits(void) {
    vblk_bucket b;
    vblk_bucket_init(&b, 100, 1000);
    vblk_bucket_change(&b, 10, 50, SECOND); // savings up to the new burst
    CHECK_EQ(50, b.tokens);
    vblk_bucket_take(&b, 50);
    vblk_bucket_refill(&b, SECOND + 150000000);
    vblk_bucket_change(&b, 100, 100, SECOND + 150000000); // 1.5 tokens stay
    CHECK_EQ(1, b.tokens);
    vblk_bucket_refill(&b, SECOND + 154999999);
    CHECK_EQ(1, b.tokens);
    vblk_bucket_refill(&b, SECOND + 155000000);
    CHECK_EQ(2, b.tokens);
    vblk_bucket_take(&b, 500);
    vblk_bucket_change(&b, 10, 10, 2 * SECOND); // a debt stays
    CHECK(b.tokens < -400);
    vblk_bucket_change(&b, 0, 0, 2 * SECOND);
    CHECK(vblk_bucket_can_take(&b, 1000));
    vblk_bucket_change(&b, 10, 20, 3 * SECOND); // no limit before: full
    CHECK_EQ(20, b.tokens);
    vblk_bucket_refill(&b, SECOND);
    CHECK_EQ(20, b.tokens);
}

void t_a_bucket_cut_to_full_has_no_fraction(void) {
    vblk_bucket b;
    vblk_bucket_init(&b, 1000, 2000);
    vblk_bucket_take(&b, 2000);
    vblk_bucket_change(&b, 1000, 1000, 1000500000); // 1000.5 tokens
    CHECK_EQ(1000, b.tokens);
    vblk_bucket_take(&b, 1000);
    CHECK_EQ(1000000, vblk_bucket_wait(&b, 1, 1000500000));
}


// ---- Ten simulated minutes ------------------------------------------------

// A limiter that forgets the fraction of a token at each refill, as several
// well-known ones do: the simulation must notice.
static void lossy_refill(vblk_bucket *b, uint64_t now) {
    if (now <= b->last_ns) {
        return;
    }
    uint64_t gained = (now - b->last_ns) * b->rate / SECOND;
    b->last_ns = now;
    b->tokens += (int64_t)gained;
    b->tokens = b->tokens < (int64_t)b->burst ? b->tokens
                                              : (int64_t)b->burst;
}

typedef void (*refill)(vblk_bucket *b, uint64_t now);

// A saturated load of costs 1 to `most`, looked at also at moments when it
// cannot pass. Returns the long-run rate as a share of the limit.
static double ten_minutes(refill fill_up, uint64_t rate, uint64_t burst,
                          uint64_t most) {
    const uint64_t end = 600 * SECOND;
    vblk_bucket b;
    uint64_t now = 0, passed = 0, needed = 0;
    long double lowest = 0; // of passed - limit * time, just before a pass
    vblk_bucket_init(&b, rate, burst);
    for (;;) {
        uint64_t cost = 1 + (uint64_t)test_random() % most;
        for (unsigned looks = 0;; looks++) {
            fill_up(&b, now);
            uint64_t wait = vblk_bucket_wait(&b, cost, now);
            if (wait == 0) {
                break;
            }
            if (looks < 3 && wait > 8) {
                now += wait / 8 + test_random() % (wait / 2); // too early
            } else if (looks == 3 && wait > 1) {
                now += wait - 1;
            } else {
                now += wait;
            }
        }
        if (now >= end) {
            break;
        }
        long double line = (long double)rate * (long double)now / 1e9L;
        long double before = (long double)passed - line;
        lowest = before < lowest ? before : lowest;
        vblk_bucket_take(&b, cost);
        needed = passed + (cost > burst ? 0 : cost);
        passed += cost;
        // Over any window: limit * time + burst + one request.
        if ((long double)passed - line - lowest >
            (long double)(burst + most) + 1e-3L) {
            test_fail(__FILE__, __LINE__, "more passed than the limit allows");
            break;
        }
        if (now > 0) {
            continue;
        }
    }
    return (double)((long double)(needed - burst) * 1e9L /
                    ((long double)rate * (long double)now));
}

// What a run of ten minutes adds up to, when the last pass was at `now` and
// the next would have been at most a request later.
static bool within(double share, double tolerance) {
    return share > 1 - tolerance && share < 1 + tolerance;
}

static const struct limit_row {
    uint64_t rate, burst, most;
} limit_rows[] = {
    {1, 1, 1},
    {1, 10, 3},
    {100, 100, 1},
    {100, 100, 250}, // also above the burst
    {3000, 3000, 1},
    {3000, 5000, 64},
    {1000000, 1000000, 1500},
    {1000, 1000, 700},
    {1000, 1000, 5000},
    {1000000, 1000000, 4096},
    {100000000, 100000000, 1048576},
    {10000000000, 10000000000, 67108864},
    {10000000000, 20000000000, 40000000},
};

void t6_ten_minutes_at_the_limit(void) {
    for (size_t i = 0; i < COUNT(limit_rows); i++) {
        const struct limit_row *r = &limit_rows[i];
        ROW_BEGIN();
        double share = ten_minutes(vblk_bucket_refill, r->rate, r->burst,
                                   r->most);
        // The last request may be cut off by the end of the simulation.
        double cut = (double)r->most / ((double)r->rate * 600);
        CHECK(within(share, 0.0001 + 2 * cut));
        ROW("rate %" PRIu64 ", burst %" PRIu64 ", costs to %" PRIu64
            ": share %.6f", r->rate, r->burst, r->most, share);
    }
}

void t6_the_simulation_notices_a_lossy_limiter(void) {
    double worst = 1;
    for (size_t i = 0; i < COUNT(limit_rows); i++) {
        const struct limit_row *r = &limit_rows[i];
        if (r->rate > 1 && r->rate <= 1000000) {
            double share = ten_minutes(lossy_refill, r->rate, r->burst,
                                       r->most);
            worst = share < worst ? share : worst;
        }
    }
    CHECK(worst < 0.95);
    CHECK(!within(ten_minutes(lossy_refill, 3000, 3000, 1), 0.01));
}


// ---- In the pipeline ------------------------------------------------------

static void limits(uint64_t iops, uint64_t bps) {
    g.o.limits.iops = iops;
    g.o.limits.bps = bps;
    guest_up();
}

void t1_limits_are_checked(void) {
    static const struct {
        vblk_limits limits;
        bool        fine;
    } rows[] = {
        {{0, 0, 0, 0}, true},
        {{100, 0, 100, 0}, true},
        {{100, 100, 0, 0}, true},
        {{100, 99, 0, 0}, false},
        {{0, 5, 0, 0}, false},
        {{0, 0, 100, 99}, false},
        {{0, 0, 0, 1}, false},
        {{0, 0, 100, 1000}, true},
        {{INT64_MAX, 0, INT64_MAX, 0}, true},
        {{UINT64_C(1) << 63, 0, 0, 0}, false},
        {{1, UINT64_C(1) << 63, 0, 0}, false},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        g.o.limits = rows[i].limits;
        ROW_BEGIN();
        CHECK_EQ((uint64_t)(rows[i].fine ? VBLK_OK : VBLK_ERR_LIMITS),
                 (uint64_t)vblk_init(&g.dev, &g.o));
        if (g.dev.memory.read) {
            vblk_bucket before = g.dev.ops;
            CHECK_EQ((uint64_t)(rows[i].fine ? VBLK_OK : VBLK_ERR_LIMITS),
                     (uint64_t)vblk_set_limits(&g.dev, &rows[i].limits, 0));
            if (!rows[i].fine) {
                CHECK_MEM(&before, &g.dev.ops, sizeof before);
            }
        }
        ROW("limits %zu", i);
    }
}

// No limit: no time is needed, and none is looked at.
void t1_no_limit_ignores_the_clock(void) {
    guest_up();
    for (int i = 0; i < 1000; i++) {
        req r = request(VBLK_T_IN, 0, 512);
        CHECK_EQ(EMPTY, drain_at(0, i & 1 ? 0 : UINT64_MAX).state);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        g.bump = 0x8000;
    }
    CHECK_EQ(0, g.dev.ops.last_ns + g.dev.bytes.last_ns);
    memset(g.writes, 0, sizeof g.writes);
}

void t2_what_a_request_costs(void) {
    static const struct {
        uint32_t type, bytes, ops, cost;
    } rows[] = {
        {VBLK_T_IN, 1024, 1, 1024}, {VBLK_T_OUT, 512, 1, 512},
        {VBLK_T_FLUSH, 0, 1, 0},    {VBLK_T_GET_ID, 20, 1, 20},
        {VBLK_T_IN, 511, 0, 0},     {99, 0, 0, 0},
        {VBLK_T_IN, 0, 0, 0},
    };
    limits(1000, 1000000);
    for (size_t i = 0; i < COUNT(rows); i++) {
        int64_t ops = g.dev.ops.tokens, bytes = g.dev.bytes.tokens;
        request(rows[i].type, 0, rows[i].bytes);
        drain_at(0, 0);
        ROW_BEGIN();
        CHECK_EQ(rows[i].ops, ops - g.dev.ops.tokens);
        CHECK_EQ(rows[i].cost, bytes - g.dev.bytes.tokens);
        ROW("type %u, %u bytes", rows[i].type, rows[i].bytes);
    }
    g.fail_call = 1; // a failing backend was asked, so it costs
    int64_t ops = g.dev.ops.tokens;
    request(VBLK_T_IN, 0, 512);
    drain_at(0, 0);
    CHECK_EQ(1, ops - g.dev.ops.tokens);
}

void t2_a_read_only_flush_and_an_empty_read_cost_nothing(void) {
    g.o.backend.write = NULL;
    g.o.profile = VBLK_STANDARD;
    limits(1, 0);
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 0));
    }
    CHECK_EQ(1, g.dev.ops.tokens);
}

// T2: both are checked before either is charged.
void t2_one_bucket_empty_leaves_the_other_alone(void) {
    limits(1, 1000000);
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(1000000 - 512, g.dev.bytes.tokens);
    CHECK_EQ(0, g.dev.ops.tokens);
    guest_init();
    limits(1000, 512);
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(999, g.dev.ops.tokens);
}

void t4_a_stalled_request_is_unseen_and_the_wait_is_exact(void) {
    limits(3, 0); // a third of a second each
    req r[5];
    for (int i = 0; i < 5; i++) {
        r[i] = request(VBLK_T_IN, 0, 512);
    }
    outcome out = drain_at(0, 1000);
    CHECK_EQ(STALLED, out.state);
    CHECK_EQ(333333334, out.wait_ns);
    CHECK_EQ(3, used_count(0));
    CHECK_EQ(0xff, status_of(&r[3]));
    CHECK_EQ(1, counts().throttled);
    CHECK_EQ(1, counts().currently_throttled);
    g.fired = 0;
    uint64_t due = 1000 + out.wait_ns;
    out = drain_at(0, due - 1);
    CHECK_EQ(STALLED, out.state);
    CHECK_EQ(1, out.wait_ns);
    CHECK_EQ(0xff, status_of(&r[3]));
    CHECK_EQ(0, g.fired);
    CHECK_EQ(1, counts().throttled); // the same one
    CHECK_EQ(1, counts().currently_throttled);
    out = drain_at(0, due);
    CHECK_EQ(VBLK_S_OK, status_of(&r[3]));
    CHECK_EQ(0xff, status_of(&r[4]));
    CHECK_EQ(due - 1000, counts().throttled_ns);
    CHECK_EQ(1, g.fired);
    CHECK_EQ(EMPTY, drain_at(0, due + out.wait_ns).state);
    CHECK_EQ(0, counts().currently_throttled);
    for (int i = 0; i < 5; i++) { // in order
        uint32_t id = 0, len;
        CHECK(used_next(0, &id, &len));
        CHECK_EQ(r[i].head, id);
    }
}

void t4_only_waiting_is_counted(void) {
    const uint64_t second = UINT64_C(1000000000);
    g.o.limits.iops = 1;
    guest_up();
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(1, counts().currently_throttled);
    CHECK_EQ(EMPTY, drain_at(0, second).state);
    CHECK_EQ(second, counts().throttled_ns);
    CHECK_EQ(0, counts().currently_throttled);
    request(VBLK_T_IN, 0, 512); // comes when there is a token
    CHECK_EQ(EMPTY, drain_at(0, 5 * second).state);
    CHECK_EQ(second, counts().throttled_ns);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 5 * second).state);
    CHECK_EQ(EMPTY, drain_at(0, 6 * second).state);
    CHECK_EQ(2 * second, counts().throttled_ns);
    CHECK_EQ(2, counts().throttled);
}

void t4_the_longer_wait_of_the_two(void) {
    limits(10, 5120);
    for (int i = 0; i < 12; i++) {
        request(VBLK_T_IN, 0, 1024);
    }
    CHECK_EQ(200000000, drain_at(0, 0).wait_ns); // 5 passed; 1024 bytes
    guest_init();
    limits(2, 1000000);
    for (int i = 0; i < 3; i++) {
        request(VBLK_T_IN, 0, 512);
    }
    CHECK_EQ(500000000, drain_at(0, 0).wait_ns);
}

// Q6: the head goes back over the wrap of the ring positions.
void t4_a_stall_at_position_0(void) {
    limits(1, 0);
    req r = request(VBLK_T_IN, 0, 512);
    g.dev.ops.tokens = 0;
    g.dev.queue[0].run.avail_next = g.dev.queue[0].run.avail_seen = 0xffff;
    put16(g.queue[0].avail + 2, 1);
    put16(g.queue[0].avail + 4 + 2 * 255, r.head);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(0xffff, g.dev.queue[0].run.avail_next);
    g.dev.queue[0].run.avail_next = g.dev.queue[0].run.avail_seen = 0;
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(0, g.dev.queue[0].run.avail_next);
}

// Nothing behind a stalled head passes it, however cheap.
void t4_order_is_kept(void) {
    limits(0, 100000);
    req big = request(VBLK_T_IN, 0, 90112);
    req bigger = request(VBLK_T_IN, 0, 90112);
    req flush = request(VBLK_T_FLUSH, 0, 0);
    outcome out = drain_at(0, 0);
    CHECK_EQ(STALLED, out.state);
    CHECK_EQ(VBLK_S_OK, status_of(&big));
    CHECK_EQ(0xff, status_of(&bigger));
    CHECK_EQ(0xff, status_of(&flush));
    drain_at(0, out.wait_ns);
    CHECK_EQ(VBLK_S_OK, status_of(&bigger));
    CHECK_EQ(VBLK_S_OK, status_of(&flush));
}

void t5_reset_and_a_change_of_mind_end_a_stall(void) {
    limits(1, 0);
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    reset();
    CHECK_EQ(0, counts().currently_throttled);
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    req r = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(1, counts().currently_throttled);
    put32(r.header, 99); // the guest turns it into something that is free
    CHECK_EQ(EMPTY, drain_at(0, 5).state);
    CHECK_EQ(VBLK_S_UNSUPP, status_of(&r));
    CHECK_EQ(0, counts().currently_throttled);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 5).state);
    put16(g.queue[0].avail + 2, 5000);
    g.dev.queue[0].run.avail_seen = g.dev.queue[0].run.avail_next;
    CHECK_EQ(BROKEN, drain_at(0, 6).state);
}

// T7: a guest that resets after every request gets no token more.
void t7_reset_storm(void) {
    g.o.limits.iops = 100;
    guest_make();
    uint64_t bump = g.bump, now = 0;
    unsigned passed = 0;
    while (now < 10 * SECOND) {
        g.bump = bump;
        guest_negotiate(VBLK_F_EVENT_IDX);
        guest_queue_up(0, 4);
        guest_go();
        req r = request(VBLK_T_IN, 0, 512);
        outcome out = drain_at(0, now);
        passed += status_of(&r) == VBLK_S_OK;
        now += out.state == STALLED && (passed & 1) ? out.wait_ns
                                                         : 3000000;
        reset();
        memset(g.writes + bump, 0, 4096);
    }
    CHECK(passed <= 100 + 1000 + 1);
    CHECK(passed > 900);
}

void t_next_stalls_and_gives_the_wait(void) {
    limits(1, 0);
    vblk_request r;
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    vblk_complete(&g.dev, &r, 512);
    outcome out = take(0, 0, &r);
    CHECK_EQ(STALLED, out.state);
    CHECK_EQ(SECOND, out.wait_ns);
    CHECK_EQ(1, used_count(0)); // published on the way out
    CHECK_EQ(STALLED, take(0, SECOND - 1, &r).state);
    CHECK_EQ(REQUEST, take(0, SECOND, &r).state);
    vblk_complete(&g.dev, &r, 512);
}

void t_limits_change_at_run_time(void) {
    limits(1, 0);
    request(VBLK_T_IN, 0, 512);
    req r = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(SECOND, drain_at(0, 0).wait_ns);
    vblk_limits faster = {.iops = 10};
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &faster, 0));
    CHECK_EQ(faster.iops, g.dev.ops.rate);
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)g.notified);
    CHECK_EQ(100000000, drain_at(0, 0).wait_ns);
    vblk_limits none = {0};
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &none, 0));
    CHECK_EQ(EMPTY, drain_at(0, 0).state);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(0, counts().currently_throttled);
}

// Removing the limits ends all waiting, counted, and leaves no turn behind:
// without one, each queue may be a thread's of its own.
void t_without_limits_nobody_waits(void) {
    g.o.queues = 3;
    limits(1, 0);
    for (unsigned i = 0; i < 3; i++) {
        req r = prepare(VBLK_T_FLUSH, 0, 0);
        send(i, &r);
        send(i, &r);
    }
    CHECK_EQ(STALLED, drain_at(VBLK_ALL_QUEUES, 0).state);
    CHECK_EQ(3, counts().currently_throttled);
    vblk_limits none = {0};
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &none, SECOND / 4));
    CHECK_EQ(0, counts().currently_throttled);
    CHECK_EQ(3 * SECOND / 4, counts().throttled_ns);
    vblk_limits again = {.iops = 1, .iops_burst = 1};
    CHECK_EQ(VBLK_OK, vblk_set_limits(&g.dev, &again, SECOND / 4));
    CHECK_EQ(SECOND, drain_at(2, SECOND / 4).wait_ns); // one passes
    // It is another's turn, so it looks again a little later.
    CHECK_EQ(1000000, drain_at(1, 5 * SECOND / 4 - 1).wait_ns);
    CHECK_EQ(EMPTY, drain_at(2, 5 * SECOND / 4).state);
}

// Queues take turns: none starves behind another.
void t_queues_share_a_limit(void) {
    unsigned served[2] = {0, 0};
    g.o.queues = 2;
    limits(100, 0);
    uint64_t bump = g.bump, now = 0;
    req r[2];
    for (unsigned i = 0; i < 2; i++) {
        r[i] = prepare(VBLK_T_FLUSH, 0, 0);
        send(i, &r[i]);
        send(i, &r[i]);
    }
    while (now < 5 * SECOND) {
        outcome out = drain_at(VBLK_ALL_QUEUES, now);
        for (unsigned i = 0; i < 2; i++) { // always some more to do
            while ((uint16_t)(g.queue[i].avail_idx -
                              get16(g.queue[i].used + 2)) < 2) {
                served[i]++;
                send(i, &r[i]);
            }
            rewritable(r[i].status);
        }
        now += out.state == STALLED ? out.wait_ns : 0;
    }
    g.bump = bump;
    CHECK(served[0] > 200 && served[1] > 200);
    CHECK(served[0] + served[1] <= 601);
}

// The shortest wait, BROKEN, EMPTY; whichever queue is first.
void t_the_most_pressing_answer_of_all_queues(void) {
    static const came_to order[] = {EMPTY, BROKEN, STALLED};
    for (unsigned row = 0; row < 9; row++) {
        const unsigned what[2] = {row % 3, row / 3};
        guest_init();
        g.o.queues = 2;
        g.o.limits.iops = 1;
        guest_up();
        g.dev.ops.tokens = 0;
        for (unsigned i = 0; i < 2; i++) {
            req r = prepare(VBLK_T_IN, 0, 512);
            if (order[what[i]] == STALLED) {
                send(i, &r);
            } else if (order[what[i]] == BROKEN) {
                put16(g.queue[i].avail + 2, 1000);
            }
        }
        ROW_BEGIN();
        CHECK_EQ(order[what[0] > what[1] ? what[0] : what[1]],
                 drain_at(VBLK_ALL_QUEUES, 0).state);
        ROW("%u and %u, queue %u first", what[0], what[1], row / 9);
    }
}

// Q3 at a stall: it ends the drain, and nothing is interrupted.
void t_switching_on_fails_at_a_stall(void) {
    g.o.limits.iops = 1;
    guest_make();
    guest_negotiate(0);
    guest_queue_up(0, 16);
    guest_go();
    g.dev.ops.tokens = 0;
    req r = request(VBLK_T_IN, 0, 512);
    g.hole = g.queue[0].used + 4 + 8 * 16;
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    CHECK_EQ(0, g.fired);
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(0xff, status_of(&r));
    CHECK_EQ(0, g.dev.queue[0].run.avail_next);
    CHECK_EQ(1, counts().throttled);
}

void t_a_long_saturated_run_through_the_device(void) {
    limits(3000, 10000000);
    const uint64_t seconds = 10;
    uint64_t now = 0;
    req r = prepare(VBLK_T_OUT, 0, 16384);
    part p[3] = {{r.header, 16, 0}, {r.data, 512, 0}, {r.status, 1, WRITE}};
    while (now < seconds * SECOND) {
        while ((uint16_t)(g.queue[0].avail_idx -
                          get16(g.queue[0].used + 2)) < 8) {
            p[1].n = 512 * (1 + test_below(16));
            submit(0, p, 3);
        }
        outcome out = drain_at(0, now);
        now += out.state == STALLED ? out.wait_ns : 0;
        rewritable(r.status);
    }
    vblk_counts c = counts();
    double share = (double)(c.bytes_written - 10000000) /
                   (10000000.0 * (double)seconds);
    CHECK(share > 0.9998 && share < 1.0002);
    CHECK(c.writes < 3000 * (seconds + 1));
    CHECK(c.throttled_ns > (seconds - 2) * SECOND);
}


// ---- Blocking limiter -----------------------------------------------------

static uint64_t      limiter_now, limiter_slept;
static pacer *limiter_asking; // its lock is held then

static uint64_t fake_now(void) {
    CHECK_EQ(EBUSY, pthread_mutex_trylock(&limiter_asking->mutex));
    return limiter_now;
}

static void fake_sleep(uint64_t ns) {
    CHECK(ns > 0);
    limiter_now += ns;
    limiter_slept += ns;
}

static int limiter(pacer *l, vblk_backend inner, uint64_t bps,
                   uint64_t burst) {
    vblk_limits limits = {.bps = bps, .bps_burst = burst};
    return pacer_init(l, inner, &limits);
}

// As the device does: again and again, until all is moved.
static void move_all(const vblk_backend *b, bool in, const vblk_seg *seg,
                     unsigned segs) {
    vblk_seg left[4];
    memcpy(left, seg, segs * sizeof *seg);
    uint64_t at = 0;
    for (unsigned i = 0; i < segs;) {
        int64_t n = in ? b->read(b->user, at, left + i, segs - i)
                       : b->write(b->user, at, left + i, segs - i);
        CHECK(n > 0);
        if (n <= 0) {
            return;
        }
        at += (uint64_t)n;
        while (i < segs && (uint64_t)n >= left[i].n) {
            n -= (int64_t)left[i++].n;
        }
        if (i < segs) {
            left[i].ptr += n;
            left[i].n -= (size_t)n;
        }
    }
}

static void start_limiter(pacer *l, vblk_backend *b,
                          const vblk_limits *limits) {
    guest_make();
    CHECK_EQ(VBLK_OK, pacer_init(l, g.o.backend, limits));
    l->now = fake_now;
    l->sleep = fake_sleep;
    limiter_asking = l;
    limiter_now = 7 * SECOND;
    limiter_slept = 0;
    *b = pacer_backend(l);
}

static uint8_t limited_data[1000 * 1024];

// More than the burst holds waits for what is missing, and what comes after it
// too.
void t8_more_than_the_burst_waits_its_time(void) {
    static const vblk_limits limits = {.bps = 1024, .bps_burst = 100};
    vblk_seg seg = {.ptr = limited_data, .n = 100};
    pacer l;
    vblk_backend b;
    start_limiter(&l, &b, &limits);
    CHECK_EQ(100, b.write(b.user, 0, &seg, 1));
    CHECK_EQ(0, limiter_slept);
    seg.n = 256;
    CHECK_EQ(256, b.write(b.user, 0, &seg, 1));
    CHECK_EQ(SECOND / 4, limiter_slept);
    pacer_close(&l);
    const vblk_limits steady = {.bps = 1 << 20};
    start_limiter(&l, &b, &steady);
    seg.n = 1 << 19;
    move_all(&b, true, &seg, 1); // half a second's, of which a tenth was saved
    CHECK(limiter_slept > SECOND * 38 / 100);
    CHECK(limiter_slept < SECOND * 41 / 100);
    pacer_close(&l);
}

// What a share has paid for is not paid for again when it comes in pieces.
void t8_a_backend_that_moves_little(void) {
    static const vblk_limits limits = {
        .iops = 10, .iops_burst = 10, .bps = 1 << 20};
    vblk_seg seg = {.ptr = limited_data, .n = 1 << 19};
    pacer l;
    vblk_backend b;
    start_limiter(&l, &b, &limits);
    g.most = 4096;
    move_all(&b, true, &seg, 1);
    CHECK(limiter_slept > SECOND * 38 / 100);
    CHECK(limiter_slept < SECOND * 41 / 100);
    CHECK(l.ops.tokens >= 9); // one was taken, whatever came back since
    pacer_close(&l);
}

// Shares end where they must, not where a segment does: a backend may want
// whole sectors.
static int64_t whole_sectors_read(void *user, uint64_t offset,
                                  const vblk_seg *seg, unsigned segs) {
    uint64_t n = 0;
    (void)user;
    for (unsigned i = 0; i < segs; i++) {
        memset(seg[i].ptr, (int)(offset / 512 + 1), seg[i].n);
        n += seg[i].n;
    }
    return n % 512 || offset % 512 ? -22 : (int64_t)n;
}

void t8_shares_are_whole_sectors(void) {
    static const vblk_limits limits = {.bps = 20480};
    vblk_seg seg[3] = {{limited_data, 100, 0}, {limited_data + 100, 3000, 0},
                       {limited_data + 3100, 996, 0}};
    pacer l;
    vblk_backend b, inner = g.o.backend;
    inner.read = whole_sectors_read;
    g.o.backend = inner;
    start_limiter(&l, &b, &limits);
    CHECK_EQ(2048, l.most);
    memset(limited_data, 0, 4096);
    move_all(&b, true, seg, 3);
    CHECK_EQ(1, limited_data[0]);
    CHECK_EQ(1, limited_data[2047]);
    CHECK_EQ(5, limited_data[2048]);
    CHECK_EQ(5, limited_data[4095]);
    pacer_close(&l);
}

// Each is at its own time: a call's sleep is when that reader comes again.
static uint64_t own_sleep;

static void sleep_alone(uint64_t ns) {
    own_sleep = ns;
}

// Four that read 4 KiB over and over, and one that wants 1000 KiB.
void t8_large_and_small_requests_take_turns(void) {
    static const vblk_limits limits = {.bps = 1 << 20};
    uint64_t ready[5], at = 0, start = 7 * SECOND;
    unsigned small = 0;
    pacer l;
    vblk_backend b;
    start_limiter(&l, &b, &limits);
    l.sleep = sleep_alone;
    for (unsigned i = 0; i < 5; i++) {
        ready[i] = start;
    }
    while (at < sizeof limited_data && limiter_now < start + 60 * SECOND) {
        unsigned who = 0;
        for (unsigned i = 1; i < 5; i++) {
            who = ready[i] < ready[who] ? i : who;
        }
        bool large = who == 4;
        vblk_seg seg = {.ptr = limited_data, .n = 4096};
        seg.n = large ? sizeof limited_data - (size_t)at : seg.n;
        limiter_now = ready[who];
        own_sleep = 0;
        int64_t n = b.read(b.user, large ? at : 4096 * who, &seg, 1);
        CHECK(n > 0);
        ready[who] += own_sleep;
        at += large ? (uint64_t)n : 0;
        small += !large;
    }
    CHECK_EQ(sizeof limited_data, at);
    CHECK(ready[4] - start < SECOND * 14 / 10);
    CHECK(small >= 40);
    pacer_close(&l);
}

// One for a request, in however many shares it comes; a FLUSH is one, and
// waits for operations alone.
void t8_operations(void) {
    static const vblk_limits limits = {
        .iops = 2, .iops_burst = 1, .bps = 1 << 20};
    vblk_seg seg = {.ptr = limited_data, .n = sizeof limited_data};
    pacer l;
    vblk_backend b;
    start_limiter(&l, &b, &limits);
    for (int i = 0; i < 3; i++) {
        move_all(&b, true, &seg, 1);
    }
    CHECK(limiter_slept < SECOND * 29 / 10);
    CHECK(limiter_slept > SECOND * 27 / 10);
    limiter_now += 100 * SECOND;
    limiter_slept = 0;
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(0, b.flush(b.user));
    }
    CHECK_EQ(2 * SECOND, limiter_slept);
    l.ops.tokens = 1;
    l.bytes.tokens = -1000000;
    CHECK_EQ(0, b.flush(b.user));
    CHECK_EQ(2 * SECOND, limiter_slept);
    const vblk_limits odd = {.iops_burst = 5};
    CHECK_EQ((uint64_t)VBLK_ERR_LIMITS,
             (uint64_t)pacer_init(&l, g.o.backend, &odd));
    pacer_close(&l);
}

void t8_blocking_limiter(void) {
    static const uint64_t rates[] = {1000000, 123456789, 4096};
    uint8_t data[16384];
    vblk_seg seg[2] = {{data, 100, 0}, {data + 100, 3996, 0}};
    for (size_t i = 0; i < COUNT(rates); i++) {
        pacer l;
        CHECK_EQ(VBLK_OK, limiter(&l, g.o.backend, rates[i], 0));
        CHECK_EQ(rates[i] / 10, l.bytes.burst); // steady
        l.now = fake_now;
        limiter_asking = &l;
        l.sleep = fake_sleep;
        limiter_now = 7 * SECOND;
        guest_make();
        vblk_backend b = pacer_backend(&l);
        uint64_t bytes = 0;
        while (limiter_now < 107 * SECOND && bytes < 20000000) {
            move_all(&b, bytes & 4096, seg, 2);
            bytes += 4096;
        }
        double due = (double)rates[i] *
                     (double)(limiter_now - 7 * SECOND) / 1e9;
        double slack = due * 0.01 + 4096; // 1 %, and the last request
        CHECK((double)bytes > due - slack);
        CHECK((double)bytes < due + (double)l.bytes.burst + slack);
        CHECK_EQ(0, b.flush(b.user));
        CHECK_EQ(g.backing, b.size(b.user));
        pacer_close(&l);
    }
}

void t8_no_rate_passes_everything(void) {
    uint8_t data[4096];
    vblk_seg seg = {.ptr = data, .n = sizeof data};
    pacer l;
    guest_make();
    CHECK_EQ((uint64_t)VBLK_ERR_LIMITS,
             (uint64_t)limiter(&l, g.o.backend, 0, 10));
    CHECK_EQ((uint64_t)VBLK_ERR_LIMITS,
             (uint64_t)limiter(&l, g.o.backend, UINT64_MAX, 0));
    CHECK_EQ(VBLK_OK, limiter(&l, g.o.backend, 0, 0));
    l.sleep = fake_sleep;
    l.now = fake_now;
    limiter_slept = 0;
    vblk_backend b = pacer_backend(&l);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(4096, b.read(b.user, 0, &seg, 1));
    }
    CHECK_EQ(0, limiter_slept);
    pacer_close(&l);
}

void t8_rate_and_burst_of_a_limiter(void) {
    static const struct {
        uint64_t bps, burst, want;
        int      err;
    } rows[] = {
        {1000, 0, 100, VBLK_OK},      {5, 0, 1, VBLK_OK},
        {9, 0, 1, VBLK_OK},           {10, 0, 1, VBLK_OK},
        {1000, 50, 50, VBLK_OK},      {0, 0, 1, VBLK_OK},
        {INT64_MAX, INT64_MAX, INT64_MAX, VBLK_OK},
        {UINT64_C(1) << 63, 0, 0, VBLK_ERR_LIMITS},
        {1, UINT64_C(1) << 63, 0, VBLK_ERR_LIMITS},
        {0, 1, 0, VBLK_ERR_LIMITS},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        pacer l;
        int err = limiter(&l, g.o.backend, rows[i].bps,
                                    rows[i].burst);
        ROW_BEGIN();
        CHECK_EQ((uint64_t)rows[i].err, (uint64_t)err);
        if (!err) {
            CHECK_EQ(rows[i].want, l.bytes.burst);
            pacer_close(&l);
        }
        ROW("limiter %zu", i);
    }
}

// The shortest wait there is.
void t8_a_wait_of_a_nanosecond(void) {
    uint8_t byte;
    vblk_seg seg = {.ptr = &byte, .n = 1};
    pacer l;
    guest_make();
    CHECK_EQ(VBLK_OK, limiter(&l, g.o.backend, SECOND, 1));
    l.now = fake_now;
    l.sleep = fake_sleep;
    limiter_asking = &l;
    limiter_now = 5;
    limiter_slept = 0;
    vblk_backend b = pacer_backend(&l);
    for (unsigned i = 0; i < 10; i++) {
        CHECK_EQ(1, b.read(b.user, 0, &seg, 1));
        CHECK_EQ(i, limiter_slept);
    }
    pacer_close(&l);
}

// The real clock and sleep, once: 20 KB at 1 MB/s after a 1 KB burst.
void t8_real_time(void) {
    uint8_t data[1024];
    vblk_seg seg = {.ptr = data, .n = sizeof data};
    pacer l;
    guest_make();
    CHECK_EQ(VBLK_OK, limiter(&l, g.o.backend, 1000000, 1024));
    vblk_backend b = pacer_backend(&l);
    uint64_t start = l.now();
    b.read(b.user, 0, &seg, 1);
    CHECK_EQ(0, l.bytes.tokens);
    for (int i = 0; i < 19; i++) {
        b.read(b.user, 0, &seg, 1);
    }
    CHECK(l.now() - start >= 19 * 1024 * 1000);
    pacer_close(&l);
}

// A quotient of 2^64 - 1 and a remainder: one more cannot be told.
void t_longest_wait_there_is(void) {
    // missing * 10^9 - fraction == 2^65 - 1, at 2 tokens a second
    vblk_bucket b = {2, INT64_MAX, 0, 0, 0};
    uint64_t missing = UINT64_C(36893488148); // of 2^65 / 10^9, rounded up
    b.fraction = 580896769;                   // what that is too much
    b.burst = missing;
    CHECK_EQ(UINT64_MAX, vblk_bucket_wait(&b, missing, 0));
    b.fraction--;
    CHECK_EQ(UINT64_MAX, vblk_bucket_wait(&b, missing, 0));
    missing = UINT64_C(73786976295); // 2^66 - 4, which is far too much
    b.fraction = 161793540;
    b.burst = missing;
    CHECK_EQ(UINT64_MAX, vblk_bucket_wait(&b, missing, 0));
}

// Small requests of one queue do not keep a large one of another waiting for
// ever: whoever stalled first goes first.
void t_a_large_request_is_not_starved(void) {
    g.o.queues = 2;
    limits(0, 1 << 20);
    req large = prepare(VBLK_T_IN, 0, 1 << 19);
    req small = prepare(VBLK_T_IN, 0, 4096);
    g.dev.bytes.tokens = 0;
    send(0, &large);
    send(1, &small);
    uint64_t now = 0;
    while (status_of(&large) == 0xff && now < 10 * SECOND) {
        outcome out = drain_at(VBLK_ALL_QUEUES, now);
        if (status_of(&small) != 0xff) { // at once the next
            fill(small.status, 0xff, 1);
            again(&small);
            send(1, &small);
        }
        now += out.state == STALLED ? out.wait_ns : 0;
    }
    CHECK(now <= SECOND);
    CHECK_EQ(VBLK_S_OK, status_of(&large));
}

// A queue that has the turn and breaks gives it up, whatever breaks it.
void t_a_broken_queue_holds_up_no_other(void) {
    for (int how = 0; how < 3; how++) {
        guest_init();
        g.o.queues = 2;
        limits(1, 0);
        vblk_request r;
        request(VBLK_T_IN, 0, 512);
        CHECK_EQ(REQUEST, take(0, 0, &r).state);
        request(VBLK_T_IN, 0, 512); // stalls, and has the turn
        CHECK_EQ(STALLED, take(0, 0, &r).state);
        req other = prepare(VBLK_T_IN, 0, 512);
        send(1, &other);
        CHECK_EQ(STALLED, drain_at(1, 0).state);
        CHECK_EQ(2, counts().currently_throttled);
        g.hole = g.queue[0].used + (how ? 2 : 4);
        g.hole_bytes = how ? 2 : 8;
        guest_remap();
        if (how == 2) {
            drain_at(0, 0);
        }
        r.head = 0;
        vblk_complete(&g.dev, &r, 512);
        vblk_publish(&g.dev, 0);
        ROW_BEGIN();
        CHECK(rd(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET);
        CHECK_EQ(1, counts().currently_throttled);
        drain_at(VBLK_ALL_QUEUES, SECOND);
        CHECK_EQ(VBLK_S_OK, status_of(&other));
        CHECK_EQ(0, counts().currently_throttled);
        ROW("how %d", how);
    }
}

// LIB-02: what a driver with EVENT_IDX adds while the queue is stalled, and
// need not kick for, is served, and its next kick is asked for.
void t4_what_is_added_while_stalled(void) {
    g.o.limits.iops = 1;
    guest_up_without(0);
    request(VBLK_T_IN, 0, 512);
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    req late = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(STALLED, drain_at(0, SECOND).state);
    CHECK_EQ(EMPTY, drain_at(0, 2 * SECOND).state);
    CHECK_EQ(VBLK_S_OK, status_of(&late));
    CHECK_EQ(3, get16(g.queue[0].used + 4 + 8 * g.queue[0].size));
}

// LIB-05: a FLUSH that costs nothing does not wait for another queue's write.
void t3_a_flush_waits_for_no_other_queue(void) {
    g.o.queues = 2;
    limits(0, 1024);
    for (int i = 0; i < 2; i++) {
        req r = prepare(VBLK_T_OUT, 0, 1024);
        send(0, &r);
    }
    req flush = prepare(VBLK_T_FLUSH, 0, 0);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    send(1, &flush);
    CHECK_EQ(EMPTY, drain_at(1, 0).state);
    CHECK_EQ(VBLK_S_OK, status_of(&flush));
}

// V, X5: what fails validation costs nothing, data outside memory included.
void t2_an_unmapped_request_costs_nothing(void) {
    limits(1000, 1000000);
    for (uint32_t type = 0; type < 2; type++) {
        req r = prepare(type, 0, 512);
        part p[3] = {{r.header, 16, 0},
                     {RAM_END, 512, type ? 0 : WRITE},
                     {r.status, 1, WRITE}};
        submit(0, p, 3);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, status_of(&r));
    }
    CHECK_EQ(1000, g.dev.ops.tokens);
    CHECK_EQ(1000000, g.dev.bytes.tokens);
}

// A limited backend is flushed like any other.
static unsigned inner_flushes;

static int failing_flush(void *user) {
    (void)user;
    inner_flushes++;
    return -7;
}

void t8_b2_a_flush_goes_through_the_limiter(void) {
    vblk_backend inner = g.o.backend;
    pacer l;
    inner.flush = failing_flush;
    inner_flushes = 0;
    CHECK_EQ(VBLK_OK, limiter(&l, inner, 1000, 0));
    vblk_backend b = pacer_backend(&l);
    CHECK_EQ((uint64_t)-7, (uint64_t)b.flush(b.user));
    CHECK_EQ(1, inner_flushes);
    pacer_close(&l);
}

// The wait of a drain is that of the queue whose turn it is afterwards.
void t4_the_wait_after_turns(void) {
    g.o.queues = 2;
    limits(2, 0);
    for (int i = 0; i < 5; i++) {
        for (unsigned queue = 0; queue < 2; queue++) {
            req r = prepare(VBLK_T_IN, 0, 512);
            send(queue, &r);
        }
    }
    uint64_t now = 0;
    for (unsigned done = 2; done < 10; done += 2) {
        outcome out = drain_at(VBLK_ALL_QUEUES, now);
        CHECK_EQ(STALLED, out.state);
        CHECK_EQ(done, counts().reads);
        CHECK_EQ(SECOND / 2, out.wait_ns);
        now += SECOND;
    }
}

// Who waited for a queue that is stopped need not wait any more.
void t4_p8_a_stopped_queue_holds_up_no_other(void) {
    g.o.queues = 2;
    g.o.profile = VBLK_STANDARD;
    limits(0, 1 << 20);
    req large = prepare(VBLK_T_IN, 0, 1 << 19), small[2];
    g.dev.bytes.tokens = 1 << 18;
    send(0, &large);
    CHECK_EQ(STALLED, drain_at(0, 0).state);
    for (int i = 0; i < 2; i++) {
        small[i] = prepare(VBLK_T_IN, 0, 512);
        send(1, &small[i]);
    }
    CHECK_EQ(STALLED, drain_at(1, 0).state);
    wr(VBLK_REG_QUEUE_SEL, 0);
    CHECK_EQ(1, wr(VBLK_REG_QUEUE_READY, 0)); // whose turn it is
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_READY, 0)); // is stopped
    CHECK_EQ(EMPTY, drain_at(VBLK_ALL_QUEUES, 0).state);
    CHECK_EQ(VBLK_S_OK, status_of(&small[0]));
    CHECK_EQ(VBLK_S_OK, status_of(&small[1]));
    g.queue[0].size = 0; // stopped
}
