// Two threads on one device: bits that are not lost, words that are read once.
// Loads and stores of the guest that race by design are not watched by the
// thread sanitizer.
#include "guest.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

static uint32_t over, turn, done; // atomic
static uint64_t until;            // when a race has lasted long enough

static void set(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static uint32_t get(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

// Rounds are counted, and on a slow machine fewer.
static bool more(unsigned round, unsigned rounds) {
    return round < rounds && !test_failed &&
           (round % 64 != 0 || clock_ns() < until);
}

// Wait for the other thread, which may have no processor of its own.
static void spin(unsigned round) {
    if (round % 1000 == 999) {
        sched_yield();
    }
}

static pthread_t start(void *(*other)(void *)) {
    pthread_t thread;
    over = turn = done = 0;
    until = clock_ns() + 400000000;
    CHECK_EQ(0, pthread_create(&thread, NULL, other, NULL));
    return thread;
}

static void stop(pthread_t thread) {
    set(&over, 1);
    pthread_join(thread, NULL);
}

static void *raise_config(void *arg) {
    (void)arg;
    while (!get(&over)) {
        vblk_needs_reset(&g.dev);
    }
    return NULL;
}

static void *raise_and_clear_config(void *arg) {
    (void)arg;
    while (!get(&over)) {
        vblk_interrupt_ack(&g.dev, 2);
        vblk_needs_reset(&g.dev);
    }
    return NULL;
}

// Q12, LIB-07: of two bits that two threads set and clear, neither is lost and
// neither comes back.
void race_of_interrupt_bits(void) {
    for (int kind = 0; kind < 2; kind++) {
        guest_init();
        g.o.event = NULL;
        g.o.interrupt = NULL;
        guest_up();
        req r = request(99, 0, 0);
        kick(0);
        pthread_t thread = start(kind ? raise_and_clear_config : raise_config);
        for (unsigned i = 0; more(i, 300000); i++) {
            vblk_interrupt_ack(&g.dev, kind ? 1 : 3);
            CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS) & 1);
            rewritable(r.status);
            offer(0, r.head);
            drain_at(0, 0);
            CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS) & 1);
        }
        stop(thread);
    }
}

// R1: nothing of a NEEDS_RESET that came before a reset, or beside it,
// is in InterruptStatus or on the line afterwards.
void race_of_needs_reset_and_a_reset(void) {
    guest_init();
    g.o.event = NULL;
    g.o.interrupt = NULL;
    guest_make();
    pthread_t thread = start(raise_config);
    unsigned live = 0;
    for (unsigned i = 0; more(i, 300000); i++) {
        wr(VBLK_REG_STATUS, 0);
        wr(VBLK_REG_STATUS, 1);
        wr(VBLK_REG_STATUS, 3);
        wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
        wr(VBLK_REG_DRIVER_FEATURES, 1);
        wr(VBLK_REG_STATUS, 0xb);
        wr(VBLK_REG_STATUS, 0xf);
        live += (rd(VBLK_REG_STATUS) & 4) != 0;
        wr(VBLK_REG_STATUS, 0);
        CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
        CHECK(!vblk_interrupt_line(&g.dev));
        if (i % 16 == 0) {
            sched_yield();
        }
    }
    stop(thread);
    CHECK(live > 0);
}

static void *need_reset_in_turn(void *arg) {
    (void)arg;
    for (uint32_t i = 1; !get(&over); i++) {
        for (unsigned k = 0; get(&turn) != i && !get(&over); k++) {
            spin(k);
        }
        vblk_needs_reset(&g.dev);
        set(&done, i);
    }
    return NULL;
}

// F7, STS-05: NEEDS_RESET beside a write of Status is there afterwards, with
// the interrupt if the device was live.
void race_of_needs_reset_and_status(void) {
    guest_init();
    g.o.event = NULL;
    g.o.interrupt = NULL;
    guest_make();
    pthread_t thread = start(need_reset_in_turn);
    for (uint32_t i = 1; more(i, 100000); i++) {
        guest_negotiate(0);
        set(&turn, i);
        for (volatile uint32_t k = 0; k < i % 64; k++) {
        }
        wr(VBLK_REG_STATUS, 0xf);
        for (unsigned k = 0; get(&done) != i; k++) {
            spin(k);
        }
        uint32_t status = rd(VBLK_REG_STATUS);
        CHECK_EQ(0x40, status & 0x40);
        CHECK_EQ(status & 4 ? 2 : 0, rd(VBLK_REG_INTERRUPT_STATUS));
    }
    stop(thread);
}

// What the driver polls; each says that something is in the used ring.
static bool is_announced(int kind) {
    return kind == 0   ? rd(VBLK_REG_INTERRUPT_STATUS) & 1
           : kind == 1 ? vblk_interrupt_line(&g.dev)
                       : rd(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET;
}

static int      polled;
static uint64_t polled_status, polled_element;

// Plain loads: what was announced is ordered before by the announcement alone.
static void *poll_and_look(void *arg) {
    (void)arg;
    for (uint32_t i = 1; !get(&over); i++) {
        for (unsigned k = 0; (get(&turn) != i || !is_announced(polled)) &&
                             !get(&over); k++) {
            spin(k);
        }
        if (get(&over)) {
            break;
        }
        CHECK_EQ(VBLK_S_OK, *at(polled_status));
        CHECK_EQ(513, get32(polled_element + 4));
        vblk_interrupt_ack(&g.dev, 3);
        set(&done, i);
    }
    return NULL;
}

// MMIO-34: a driver that polls sees what InterruptStatus, the line or Status
// speak of. The thread sanitizer sees it; so does a machine of weak order.
void race_of_a_polling_driver(void) {
    for (polled = 0; polled < 3; polled++) {
        guest_init();
        g.o.event = NULL;
        g.o.interrupt = NULL;
        guest_up();
        pthread_t thread = start(poll_and_look);
        for (uint32_t i = 1; more(i, 3000); i++) {
            if (polled == 2) { // what breaks the queue comes after a request
                reset();
                g.bump = 0x1000;
                guest_negotiate(VBLK_F_EVENT_IDX);
                guest_queue_up(0, 16);
                guest_go();
            }
            guest_queue *q = &g.queue[0];
            req r = prepare(VBLK_T_IN, 0, 512);
            r.head = send(0, &r);
            if (polled == 2) {
                put16(q->avail + 4 + 2 * (uint64_t)(q->avail_idx % q->size),
                      999);
                put16(q->avail + 2, (uint16_t)(q->avail_idx + 1));
            }
            polled_status = r.status;
            polled_element = q->used + 4 +
                             8 * ((uint64_t)(q->avail_idx - 1) % q->size);
            set(&turn, i);
            drain_at(0, 0);
            for (unsigned k = 0; get(&done) != i && !test_failed; k++) {
                spin(k);
            }
            g.bump = r.header;
        }
        stop(thread);
    }
}

static const uint64_t sizes[] = {UINT32_MAX, UINT64_C(0x100000000)};

static void *resize(void *arg) {
    (void)arg;
    for (unsigned i = 0; !get(&over); i++) {
        CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, sizes[i & 1]));
    }
    return NULL;
}

// B7, MMIO-22: a driver that finds the same generation before and after it read
// the capacity has one that was.
void race_of_a_resize_and_a_driver(void) {
    guest_init();
    g.o.capacity = sizes[1];
    g.o.backend.size = NULL;
    g.o.event = NULL;
    g.o.interrupt = NULL;
    guest_up();
    pthread_t thread = start(resize);
    unsigned  sames = 0, moves = 0;
    for (unsigned i = 0; more(i, 300000); i++) {
        uint32_t before = rd(VBLK_REG_CONFIG_GENERATION);
        uint64_t low = rd(VBLK_REG_CONFIG), high = rd(VBLK_REG_CONFIG + 4);
        if (before == rd(VBLK_REG_CONFIG_GENERATION)) {
            uint64_t capacity = high << 32 | low;
            CHECK(capacity == sizes[0] || capacity == sizes[1]);
            sames++;
        } else {
            moves++;
        }
        wr(VBLK_REG_INTERRUPT_ACK, 2);
    }
    stop(thread);
    CHECK(sames > 0 && moves > 0);
}

static vblk_file growing;

static void *grow(void *arg) {
    static uint8_t data[512];
    vblk_backend b = vblk_file_backend(&growing);
    vblk_seg seg = {.ptr = data, .n = sizeof data};
    (void)arg;
    for (uint64_t at_ = 0; !get(&over); at_ += 512) {
        if (b.write(b.user, at_, &seg, 1) != 512) {
            break;
        }
    }
    return NULL;
}

// X2: a file that grows under a read or a flush was not cut.
void race_of_a_file_that_grows(void) {
    static uint8_t data[512];
    char path[] = "/tmp/vblk_test_XXXXXX";
    vblk_seg seg = {.ptr = data, .n = sizeof data};
    close(mkstemp(path));
    CHECK_EQ(VBLK_OK, vblk_file_open(&growing, path, false));
    unlink(path);
    vblk_backend b = vblk_file_backend(&growing);
    pthread_t thread = start(grow);
    for (unsigned i = 0; more(i, 40000); i++) {
        uint64_t end = b.size(b.user);
        CHECK(b.read(b.user, end + 512 * (i % 4), &seg, 1) >= 0);
        CHECK(i % 16 || b.flush(b.user) == 0);
    }
    stop(thread);
    vblk_file_close(&growing);
}

static volatile uint32_t *flipped;
static uint32_t           flips[2];

UNWATCHED static void *flip(void *arg) {
    (void)arg;
    for (unsigned i = 0; !get(&over); i++) {
        *flipped = flips[i & 1];
        for (volatile int k = 0; k < 20; k++) {
        }
    }
    return NULL;
}

// V18, ROB-44: a sector and a length that change between allowed and not.
UNWATCHED void race_on_one_word(void) {
    for (int kind = 0; kind < 2; kind++) {
        guest_init();
        g.o.event = NULL;
        guest_up();
        g.bump = 0x8000;
        req r = prepare(VBLK_T_IN, 0, 512);
        r.header = alloc(16, 16);
        fill(r.header, 0, 16);
        put64(r.header + 8, kind ? SECTORS - 1 : 0);
        r.data = alloc(1024, 1);
        r.head = send(0, &r);
        uint64_t at_length = g.queue[0].desc + 16 * (r.head + 1u) + 8;
        uint64_t gpa = kind ? at_length : r.header + 8;
        flipped = (volatile uint32_t *)(void *)at(gpa);
        put32(gpa, kind ? 1024 : SECTORS); // little-endian, as all is
        flips[1] = *flipped;
        put32(gpa, kind ? 512 : 0);
        flips[0] = *flipped;
        pthread_t thread = start(flip);
        unsigned good = 0;
        for (unsigned i = 0;
             (more(i, 300000) || (good == 0 && i < 30000000)) &&
             !g.broken_rule; i++) {
            spin(i);
            offer(0, r.head);
            drain_at(0, 0);
            good += status_of(&r) == VBLK_S_OK;
        }
        stop(thread);
        CHECK(!g.broken_rule);
        CHECK(good > 0);
        mark(r.data, 1024, OFFERED); // for the guest's rules
        memset(g.writes, 0, sizeof g.writes);
    }
}

static uint32_t fired;

static void on_fire(void *user, int queue, bool fire) {
    (void)user, (void)queue;
    if (fire) {
        set(&fired, 1);
    }
}

static void *drain_always(void *arg) {
    (void)arg;
    while (!get(&over)) {
        drain_at(0, 0);
    }
    return NULL;
}

static uint16_t *word(uint64_t gpa) {
    return (uint16_t *)(void *)at(gpa);
}

static uint16_t le16(uint16_t value) {
    uint8_t b[2];
    memcpy(b, &value, 2);
    return (uint16_t)(b[0] | b[1] << 8);
}

// SPLIT-34, Q5: a driver that switches interrupts on and looks once more sees
// its completion, or else hears of it.
void race_for_an_interrupt(void) {
    guest_init();
    g.o.event = NULL;
    g.o.interrupt = on_fire;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    // No rules in between.
    vblk_set_memory(&g.dev, vblk_regions_memory(&g.vram));
    part p[2] = {{put_header(99, 0), 16, 0}, {alloc(1, 1), 1, WRITE}};
    uint16_t head = put_chain(0, p, 2), idx = 0;
    guest_queue *q = &g.queue[0];
    for (unsigned i = 0; i < 16; i++) {
        put16(q->avail + 4 + 2 * i, head);
    }
    pthread_t thread = start(drain_always);
    for (unsigned n = 0; more(n, 300000); n++) {
        __atomic_store_n(word(q->avail), le16(1), __ATOMIC_RELEASE);
        __atomic_store_n(&fired, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(word(q->avail + 2), le16(++idx), __ATOMIC_RELEASE);
        for (volatile uint32_t k = 0; k < n % 64; k++) {
        }
        __atomic_store_n(word(q->avail), 0, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        bool there = le16(__atomic_load_n(word(q->used + 2),
                                          __ATOMIC_ACQUIRE)) == idx;
        for (unsigned k = 0; !there && !get(&fired); k++) {
            spin(k);
            if (k % 4096 == 0 && clock_ns() > until + 2000000000) {
                CHECK(!"an interrupt that does not come");
                break;
            }
        }
        for (unsigned k = 0; !there && !test_failed; k++) {
            there = le16(__atomic_load_n(word(q->used + 2),
                                         __ATOMIC_ACQUIRE)) == idx;
            spin(k);
        }
    }
    stop(thread);
    memcpy(g.truth, g.ram, sizeof g.ram);
    q->avail_idx = idx;
}
