// The nth call fails: every backend function and every memory accessor, for
// every n until the scenario passes; once, and for good. And a guest that
// changes its memory while it is read.
#include "guest.h"

#include <pthread.h>

// A session with every kind of request, and what must hold however it fares:
// each status byte is OK, IOERR or untouched; what is OK is right.
static void scenario(bool event_idx) {
    guest_negotiate(event_idx ? 0 : VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    for (int round = 0; round < 2; round++) {
        req w = prepare(VBLK_T_OUT, 7, 1536);
        fill(w.data, (uint8_t)(0x30 + round), 1536);
        part p[4] = {{w.header, 16, 0}, {w.data, 1000, 0},
                     {w.data + 1000, 536, 0}, {w.status, 1, WRITE}};
        part table = {put_table(p, 4), 64, INDIRECT};
        submit(0, &table, 1);
        req f = request(VBLK_T_FLUSH, 0, 0);
        req r = request(VBLK_T_IN, 7, 1536);
        req i = request(VBLK_T_GET_ID, 0, 20);
        for (int k = 0; k < 4; k++) {
            kick(0);
        }
        const req *all[] = {&w, &f, &r, &i};
        for (size_t k = 0; k < COUNT(all); k++) {
            uint8_t status = status_of(all[k]);
            CHECK(status == VBLK_S_OK || status == VBLK_S_IOERR ||
                  status == 0xff);
        }
        if (status_of(&w) == VBLK_S_OK) {
            CHECK_MEM(at(w.data), g.disk + 7 * 512, 1536);
        }
        if (status_of(&w) == VBLK_S_OK && status_of(&r) == VBLK_S_OK) {
            CHECK_MEM(at(w.data), at(r.data), 1536);
        }
        CHECK(used_count(0) <= 8);
    }
}

// Faults off: the device works again, at the latest after a reset.
static void usable_again(void) {
    g.fail_access = g.fail_call = 0;
    g.keep_failing = g.keep_failing_calls = false;
    reset();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 1, 512));
}

static unsigned every_nth(bool accessor, bool persistent, bool event_idx) {
    for (int n = 1;; n++) {
        guest_init();
        guest_make();
        g.keep_failing = g.keep_failing_calls = persistent;
        *(accessor ? &g.fail_access : &g.fail_call) = n;
        scenario(event_idx);
        bool passed = g.tripped == 0;
        if (passed) {
            CHECK_EQ(0, counts().io_errors + counts().broken_queues);
        }
        usable_again();
        guest_check();
        if (test_failed) {
            printf("    in run: call %d, %s\n", n,
                   persistent ? "for good" : "once");
            return 0;
        }
        if (passed) {
            return (unsigned)n;
        }
    }
}

void fault_in_every_backend_call(void) {
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        CHECK_EQ(7, every_nth(false, false, event_idx)); // 3 calls a round
        CHECK_EQ(7, every_nth(false, true, event_idx));
    }
}

void fault_in_every_memory_access(void) {
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        unsigned once = every_nth(true, false, event_idx);
        CHECK(once > (g.mapped ? 25 : 60));
        CHECK_EQ(once, every_nth(true, true, event_idx));
    }
}

// Right status, right counters, for each call that fails.
void fault_statuses_and_counters(void) {
    static const struct {
        int      call;
        uint32_t type;
    } rows[] = {{1, VBLK_T_OUT}, {1, VBLK_T_FLUSH}, {1, VBLK_T_IN}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        guest_init();
        guest_up();
        g.fail_call = rows[i].call;
        CHECK_EQ(VBLK_S_IOERR,
                 run(rows[i].type, 0, rows[i].type == 4 ? 0 : 512));
        vblk_counts c = counts();
        CHECK_EQ(1, c.io_errors);
        CHECK_EQ(0, c.reads + c.writes + c.flushes);
        CHECK_EQ(VBLK_S_OK,
                 run(rows[i].type, 0, rows[i].type == 4 ? 0 : 512));
    }
}


// ---- A guest that changes its mind ----------------------------------------

static uint32_t racing; // atomic

// Flips bytes of the rings, tables and headers below 64 KiB. What it does is
// a race by design, so the thread sanitizer does not watch it.
UNWATCHED static void *flip(void *arg) {
    uint32_t x = 12345;
    (void)arg;
    while (__atomic_load_n(&racing, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < 64; i++) {
            x = x * 1664525u + 1013904223u;
            volatile uint8_t *p = g.ram + 0x1000 + (x >> 8) % 0x3000;
            *p = (uint8_t)(x >> (x & 7) * 2);
        }
    }
    return NULL;
}

// Whatever it reads, the device stays inside guest memory and the disk (the
// address sanitizer watches both, the fake disk checks its range) and does
// bounded work.
void race_on_guest_memory(void) {
    pthread_t thread;
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        g.o.size_max = 4096;
        guest_up();
        for (int i = 0; i < 32; i++) {
            request(i % 2 ? VBLK_T_IN : VBLK_T_OUT, (uint32_t)i, 1024);
        }
        __atomic_store_n(&racing, 1, __ATOMIC_RELEASE);
        CHECK_EQ(0, pthread_create(&thread, NULL, flip, NULL));
        for (int i = 0; i < 4000; i++) {
            g.calls = 0;
            outcome out = drain_at(0, 0);
            CHECK(g.calls <= 1000);
            if (out.state == BROKEN) {
                guest_queue q = g.queue[0];
                reset();
                guest_negotiate(i & 1 ? 0 : VBLK_F_EVENT_IDX);
                wr(VBLK_REG_QUEUE_NUM, q.size);
                wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)q.desc);
                wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)q.avail);
                wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)q.used);
                wr(VBLK_REG_QUEUE_READY, 1);
                g.ram[q.avail + 2] = (uint8_t)i;
                g.ram[q.avail + 3] = 0;
                wr(VBLK_REG_STATUS, 0xf);
            }
        }
        __atomic_store_n(&racing, 0, __ATOMIC_RELEASE);
        pthread_join(thread, NULL);
        CHECK(memchr(g.ram + SEAM, 0, GAP) == NULL); // the gaps are whole
        for (size_t i = 0; i < GAP; i++) {
            CHECK_EQ(CANARY, g.ram[SEAM + i]);
            CHECK_EQ(CANARY, g.ram[RAM_END + GAP + i]);
        }
        CHECK(!g.broken_rule);
        g.read_offered = false; // a header may point anywhere
        memset(g.queue, 0, sizeof g.queue);
        memset(g.mark, RING, sizeof g.mark); // anything in memory may change
        memset(g.mark + SEAM, 0, GAP);
        memset(g.mark + RAM_END + GAP, 0, GAP);
    }
}
