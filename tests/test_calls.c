// System calls that fail or are interrupted, and the host's own calls at
// moments that are rarely met: what the Linux part makes of them.
#include "rig.h"

#include <time.h>
#define nanosleep(a, b) (test_call_fails("nanosleep") ? -1 : nanosleep(a, b))
#include "../examples/pacer.h"
#undef nanosleep

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

static void set(uint32_t *flag, uint32_t value) {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

static uint32_t get(const uint32_t *flag) {
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}


// ---- Files, pacer ----------------------------------------------------------

void x3_interrupted_calls_are_repeated(void) {
    static const char *const calls[] = {"pread", "preadv", "pwrite",
                                        "pwritev", "fdatasync"};
    char path[] = "/tmp/vblk_test_XXXXXX";
    uint8_t data[1024] = {1, 2, 3};
    vblk_seg seg[2] = {{data, 512, 0}, {data + 512, 512, 0}};
    vblk_file file;
    close(mkstemp(path));
    CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, false));
    vblk_backend b = vblk_file_backend(&file);
    CHECK_EQ(1024, b.write(b.user, 0, seg, 2));
    test_calls_fail("lseek", EINTR, 0, 2); // of a flush, to see the length
    CHECK_EQ(0, b.flush(b.user));
    CHECK_EQ(0, test_calls_left());
    for (unsigned i = 0; i < COUNT(calls); i++) {
        for (int err = EINTR; err == EINTR || err == EIO;
             err += EIO - EINTR) {
            unsigned segs = i & 1 ? 2 : 1;
            int64_t bytes = i == 4 ? 0 : 512 * (int64_t)segs;
            test_calls_fail(calls[i], err, 0, err == EINTR ? 3 : 1);
            int64_t n = i == 4  ? b.flush(b.user)
                        : i < 2 ? b.read(b.user, 0, seg, segs)
                                : b.write(b.user, 0, seg, segs);
            ROW_BEGIN();
            CHECK_EQ((uint64_t)(err == EINTR ? bytes : -EIO), (uint64_t)n);
            CHECK_EQ(0, test_calls_left());
            ROW("%s, errno %d", calls[i], err);
        }
    }
    errno = EINTR; // of another call: the end of the file is no interruption
    CHECK_EQ(0, b.read(b.user, 1 << 20, seg, 1));
    vblk_file_close(&file);
    unlink(path);
}

static const vblk_limits one = {
    .iops = 1, .iops_burst = 1, .bps = 1, .bps_burst = 1};

void t8_a_signal_does_not_shorten_a_sleep(void) {
    pacer l;
    vblk_backend inner = {0};
    CHECK_EQ(VBLK_OK, pacer_init(&l, inner, &one));
    test_calls_fail("nanosleep", EINTR, 0, 3);
    uint64_t start = clock_ns();
    l.sleep(3000000);
    CHECK(clock_ns() - start >= 3000000);
    CHECK_EQ(0, test_calls_left());
    pacer_close(&l);
}


// ---- A worker ---------------------------------------------------------------

// A callback that stays until it may go.
static uint32_t may_go, inside, released;

static void stay(void) {
    set(&inside, 1);
    while (!get(&may_go)) {
        sched_yield();
    }
}

static int staying_flush(void *user) {
    (void)user;
    stay();
    return 0;
}

static void staying_event(void *user, const vblk_event *event) {
    (void)user, (void)event;
    stay();
}

static uint32_t lines;
static char     last_line[400]; // to be read when its writer rests

static void count_line(void *user, const vblk_event *event) {
    (void)user;
    vblk_event_line(event, last_line, sizeof last_line);
    __atomic_fetch_add(&lines, 1, __ATOMIC_RELEASE);
}

static void on_released(void *user) {
    set(&released, user == &wo);
}

static void worker_options(void) {
    rig_options();
    o.event = count_line;
    wo.released = on_released;
    wo.user = &wo;
    wo.stop_ms = 10000;
    may_go = inside = released = lines = 0;
}

static void make_worker(void) {
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    bind_driver();
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
}

static unsigned threads(void) {
    unsigned n = 0;
    DIR *dir = opendir("/proc/self/task");
    while (dir && readdir(dir)) {
        n++;
    }
    closedir(dir);
    return n;
}

// Any of its descriptors may be the one that cannot be had.
void w_descriptors_that_cannot_be_had(void) {
    worker_options();
    int next = dup(0);
    close(next);
    for (unsigned i = 0; i < 4; i++) {
        test_calls_fail(i < 3 ? "eventfd" : "calloc", ENOMEM, i % 3, 1);
        errno = 0;
        int err = vblk_worker_init(&w, &o, &wo);
        ROW_BEGIN();
        if (i == 2) { // there are two
            CHECK_EQ(VBLK_OK, (uint64_t)err);
            CHECK_EQ(1, test_calls_left());
            CHECK(!vblk_worker_close(&w));
        } else {
            CHECK_EQ((uint64_t)VBLK_ERR_WORKER, (uint64_t)err);
            CHECK_EQ(ENOMEM, errno);
            CHECK_EQ(0, test_calls_left());
        }
        int after = dup(0);
        close(after);
        CHECK_EQ(next, after);
        ROW("call %u", i);
    }
    test_calls_fail("", 0, 0, 0);
}

void w_no_memory_for_a_thread(void) {
    worker_options();
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    test_calls_fail("calloc", ENOMEM, 0, 1);
    bind_driver();
    CHECK_EQ(0x4f, load(VBLK_REG_STATUS));
    CHECK_EQ(1, get(&lines)); // why, and that it needs a reset
    store(VBLK_REG_STATUS, 0);
    bind_driver();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

// For its engine: the driver hears of it, and may try again.
void w12_no_memory_for_an_engine(void) {
    for (unsigned i = 0; i < 3; i++) {
        worker_options();
        CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
        test_calls_fail("calloc", ENOMEM, 1 + i, 1);
        bind_driver();
        EVENTUALLY(load(VBLK_REG_STATUS) == 0x4f);
        CHECK_EQ(0, test_calls_left());
        store(VBLK_REG_STATUS, 0);
        bind_driver();
        put_flush(1);
        EVENTUALLY(used_is(1));
        CHECK(!vblk_worker_close(&w));
    }
}

// The time is over while the thread is between two callbacks: it is not left
// behind, it ends at once.
void w7_a_thread_at_work_is_not_left_behind(void) {
    unsigned late = 0; // the thread had not ended when it was looked at
    worker_options();
    make_worker();
    for (unsigned i = 0; i < 20; i++) {
        test_calls_fail("pthread_cond_timedwait", ETIMEDOUT, 0, 1);
        CHECK(worker_reset(&w));
        late += test_calls_left() == 0;
        CHECK_EQ(0, load(VBLK_REG_STATUS));
        bind_driver();
    }
    CHECK(late > 0);
    test_calls_fail("", 0, 0, 0);
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK_EQ(0, get(&released));
    CHECK(!vblk_worker_close(&w));
}

// A thread that is left behind in the log: the reset does not go there too.
void w7_a_log_that_is_stuck(void) {
    worker_options();
    o.event = staying_event;
    wo.stop_ms = 20;
    make_worker();
    ram[0x1004] = 99; // no head: an event, and so a line
    put_flush(1);
    EVENTUALLY(get(&inside));
    uint64_t start = clock_ns();
    CHECK(!worker_reset(&w));
    CHECK(clock_ns() - start < 5 * SECOND);
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
    set(&may_go, 1);
    EVENTUALLY(get(&released));
    EVENTUALLY(worker_reset(&w));
    memset(ram, 0, sizeof ram);
    bind_driver();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

// But where the thread is stuck elsewhere, the reset says so, though it did
// log before.
void w7_a_line_before_and_one_after(void) {
    worker_options();
    o.backend.flush = staying_flush;
    wo.stop_ms = 20;
    make_worker();
    ram[0x1004] = 3; // a chain of no descriptors
    offer_up_to(1, true);
    EVENTUALLY(get(&lines) == 1);
    CHECK(strstr(last_line, "queue 0, head 3: ") != NULL);
    put_flush(1);
    offer_up_to(2, true);
    EVENTUALLY(get(&inside));
    CHECK(!worker_reset(&w));
    CHECK_EQ(2, get(&lines));
    CHECK(strstr(last_line, "left behind") != NULL);
    set(&may_go, 1);
    EVENTUALLY(get(&released));
    EVENTUALLY(worker_reset(&w));
    CHECK(!vblk_worker_close(&w));
}

// Nobody asked to be told, and the thread is gone before the worker is.
void w7_left_behind_and_gone_before_the_end(void) {
    for (int told = 0; told < 2; told++) {
        worker_options();
        unsigned before = threads();
        o.backend.flush = staying_flush;
        wo.stop_ms = 5;
        wo.released = told ? on_released : NULL;
        make_worker();
        put_flush(1);
        EVENTUALLY(get(&inside));
        CHECK(!worker_reset(&w));
        CHECK_EQ(before + 1, threads());
        set(&may_go, 1);
        EVENTUALLY(threads() == before);
        CHECK_EQ(told, get(&released));
        CHECK(!vblk_worker_close(&w));
    }
}

// A callback of the worker's own thread may use its registers: what that
// makes it call is a callback inside a callback.
static int notifying_flush(void *user) {
    (void)user;
    store(VBLK_REG_QUEUE_NOTIFY, 9); // an event, and so a line
    set(&inside, 1);
    return 0;
}

void w_a_callback_inside_a_callback(void) {
    worker_options();
    o.backend.flush = notifying_flush;
    make_worker();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK_EQ(1, get(&inside));
    CHECK_EQ(1, get(&lines));
    CHECK(strstr(last_line, "QueueNotify") == last_line); // of no queue
    CHECK(worker_reset(&w));
    CHECK(!vblk_worker_close(&w));
}

// One request of 512 bytes: IN or OUT, by the chain at 0.
static void put_one(uint8_t type, uint8_t idx, bool notify) {
    ram[1] = 0x30, ram[8] = 16, ram[12] = NEXT, ram[14] = 1;
    ram[17] = 0x40, ram[25] = 2, ram[30] = 2;
    ram[28] = type == VBLK_T_IN ? NEXT | WRITE : NEXT;
    ram[32] = 16, ram[33] = 0x30, ram[40] = 1, ram[44] = WRITE;
    ram[0x3000] = type;
    ram[0x3010] = 0xff;
    offer_up_to(idx, notify);
}

static void wait_ms(unsigned ms) {
    struct timespec t = {0, (long)ms * 1000000};
    nanosleep(&t, NULL);
}

// R2, RST-04: Status is 0 when the thread has come to rest, and not before.
static uint32_t status_seen;

static int64_t slow_read(void *user, uint64_t offset, const vblk_seg *seg,
                         unsigned segs) {
    (void)user, (void)offset, (void)segs;
    set(&inside, 1);
    for (int i = 0; i < 30; i++) {
        wait_ms(1);
        status_seen |= load(VBLK_REG_STATUS) == 0;
    }
    return (int64_t)seg[0].n;
}

void r2_status_is_0_after_the_thread_has_stopped(void) {
    worker_options();
    o.backend.read = slow_read;
    status_seen = 0;
    make_worker();
    put_one(VBLK_T_IN, 1, true);
    EVENTUALLY(get(&inside));
    store(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    CHECK_EQ(0, status_seen);
    CHECK(!vblk_worker_close(&w));
}

void r2_a_reset_takes_the_kicks(void) {
    uint64_t n;
    worker_options();
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    CHECK(!vblk_worker_pause(&w, 5000));
    store(VBLK_REG_STATUS, 0);
    CHECK(read(w.kick_fd, &n, sizeof n) < 0 && errno == EAGAIN);
    vblk_worker_resume(&w);
    CHECK(!vblk_worker_close(&w));
}

// W1: QueueNotify and InterruptACK never wait, not even for a reset.
static int64_t staying_move(void *user, uint64_t offset, const vblk_seg *seg,
                            unsigned segs) {
    (void)user, (void)offset, (void)segs;
    stay();
    return (int64_t)seg[0].n;
}

static void *reset_it(void *arg) {
    store(VBLK_REG_STATUS, 0);
    return arg;
}

static void *notify_it(void *arg) {
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    store(VBLK_REG_INTERRUPT_ACK, 3);
    set(&status_seen, 7);
    return arg;
}

void w1_notify_and_ack_do_not_wait(void) {
    pthread_t reset, notify;
    worker_options();
    wo.stop_ms = 20000;
    o.backend.read = staying_move;
    status_seen = 0;
    make_worker();
    put_one(VBLK_T_IN, 1, true);
    EVENTUALLY(get(&inside));
    CHECK_EQ(0, pthread_create(&reset, NULL, reset_it, NULL));
    EVENTUALLY(__atomic_load_n(&w.dev.yield, __ATOMIC_ACQUIRE));
    CHECK_EQ(0, pthread_create(&notify, NULL, notify_it, NULL));
    EVENTUALLY(get(&status_seen) == 7);
    set(&may_go, 1);
    pthread_join(reset, NULL);
    pthread_join(notify, NULL);
    CHECK(!vblk_worker_close(&w));
}

// W4: a signal to the thread is nothing.
static pthread_t served_by;
static int       cpus_seen;

static void nothing(int signal) {
    (void)signal;
}

static int64_t notes_its_thread(void *user, uint64_t offset,
                                const vblk_seg *seg, unsigned segs) {
    (void)user, (void)offset, (void)segs;
    cpu_set_t cpus;
    served_by = pthread_self();
    sched_getaffinity(0, sizeof cpus, &cpus);
    cpus_seen = CPU_COUNT(&cpus);
    return (int64_t)seg[0].n;
}

void w4_an_interrupted_wait_is_repeated(void) {
    struct sigaction action, was;
    memset(&action, 0, sizeof action);
    action.sa_handler = nothing;
    sigaction(SIGUSR1, &action, &was);
    worker_options();
    o.backend.read = notes_its_thread;
    make_worker();
    put_one(VBLK_T_IN, 1, true);
    EVENTUALLY(used_is(1));
    for (int i = 0; i < 10; i++) {
        wait_ms(1); // so that it waits
        pthread_kill(served_by, SIGUSR1);
    }
    put_one(VBLK_T_IN, 2, true);
    EVENTUALLY(used_is(2));
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
    CHECK(!vblk_worker_close(&w));
    sigaction(SIGUSR1, &was, NULL);
}

// W6: a set of processors is a set.
void w6_two_processors(void) {
    const int cpus[] = {0, 1};
    cpu_set_t mine;
    sched_getaffinity(0, sizeof mine, &mine);
    if (!CPU_ISSET(0, &mine) || !CPU_ISSET(1, &mine)) {
        return; // there are no two to be had
    }
    worker_options();
    o.backend.read = notes_its_thread;
    wo.cpus = cpus;
    wo.cpu_count = 2;
    make_worker();
    put_one(VBLK_T_IN, 1, true);
    EVENTUALLY(used_is(1));
    CHECK_EQ(2, cpus_seen);
    CHECK(!vblk_worker_close(&w));
}

// P8, W1: a live queue that is enabled again finds what waits there.
void p8_what_waits_in_a_queue_that_starts_again(void) {
    worker_options();
    o.profile = VBLK_STANDARD;
    make_worker();
    put_one(VBLK_T_IN, 1, true);
    EVENTUALLY(used_is(1));
    wait_ms(10); // so that it waits
    store(VBLK_REG_QUEUE_READY, 0);
    memset(ram, 0, sizeof ram);
    put_one(VBLK_T_IN, 1, false);
    store(VBLK_REG_QUEUE_READY, 1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

static int failing_flush(void *user) {
    (void)user;
    return -EIO;
}

// W7, W8, LIB-09: wherever of the host's the thread is stuck, it is left
// behind and touches nothing afterwards.
void w7_w8_stuck_anywhere(void) {
    for (int where = 0; where < 5; where++) {
        worker_options();
        wo.stop_ms = 20;
        o.backend.read = where == 0 ? staying_move : o.backend.read;
        o.backend.write = where == 1 ? staying_move : o.backend.write;
        o.backend.flush = where == 2 ? staying_flush : o.backend.flush;
        o.backend.flush = where == 4 ? failing_flush : o.backend.flush;
        o.event = where >= 3 ? staying_event : count_line;
        make_worker();
        ROW_BEGIN();
        if (where == 3) {
            ram[0x1004] = 99; // no head
            offer_up_to(1, true);
        } else if (where == 2 || where == 4) { // or with what came of it
            put_flush(1);
        } else {
            put_one((uint8_t)where, 1, true);
        }
        EVENTUALLY(get(&inside));
        CHECK(!worker_reset(&w));
        CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
        memset(ram, 0x5a, sizeof ram);
        set(&may_go, 1);
        EVENTUALLY(get(&released));
        EVENTUALLY(worker_reset(&w));
        CHECK(ram[0] == 0x5a && !memcmp(ram, ram + 1, sizeof ram - 1));
        CHECK(!vblk_worker_close(&w));
        ROW("where %d", where);
    }
}

static void accept_queues(uint64_t more) {
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)VBLK_F_MQ);
    store(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)(more >> 32));
    store(VBLK_REG_STATUS, 0xb);
}

// W1, Q10, MMIO-14: a queue other than the first.
void w1_q10_the_second_queue(void) {
    for (int kicked = 0; kicked < 2; kicked++) {
        worker_options();
        o.queues = 2;
        CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
        accept_queues(VBLK_F_VERSION_1);
        store(VBLK_REG_QUEUE_SEL, 1);
        store(VBLK_REG_QUEUE_NUM, 16);
        store(VBLK_REG_QUEUE_DRIVER_LOW, 0x1000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, 0x2000);
        store(VBLK_REG_QUEUE_READY, 1);
        if (!kicked) {
            put_one(VBLK_T_IN, 1, false);
        }
        store(VBLK_REG_STATUS, 0xf);
        if (kicked) {
            wait_ms(10); // so that it waits
            put_one(VBLK_T_IN, 1, false);
            store(VBLK_REG_QUEUE_NOTIFY, 1);
        }
        EVENTUALLY(used_is(1));
        CHECK(!vblk_worker_close(&w));
    }
}

// P8, T4: a queue that waited behind one that is stopped looks at once.
void p8_the_queue_behind_a_stopped_one(void) {
    worker_options();
    o.queues = 2;
    o.profile = VBLK_STANDARD;
    o.limits.bps = 1024;
    o.limits.bps_burst = 65536;
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    w.dev.bytes.tokens = 1024;
    w.dev.bytes.last_ns = clock_ns();
    accept_queues(VBLK_F_VERSION_1);
    for (uint32_t queue = 0; queue < 2; queue++) {
        store(VBLK_REG_QUEUE_SEL, queue);
        store(VBLK_REG_QUEUE_NUM, 16);
        store(VBLK_REG_QUEUE_DESC_LOW, queue ? 0 : 0x5000);
        store(VBLK_REG_QUEUE_DRIVER_LOW, queue ? 0x1000 : 0x6000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, queue ? 0x2000 : 0x7000);
        store(VBLK_REG_QUEUE_READY, 1);
    }
    put_one(VBLK_T_IN, 1, false);
    memcpy(ram + 0x5000, ram, 64);
    ram[0x5000 + 17] = 0x80; // 32768 bytes at 0x8000
    ram[0x5000 + 25] = 0x80;
    memcpy(ram + 0x6000, ram + 0x1000, 8);
    store(VBLK_REG_STATUS, 0xf);
    EVENTUALLY(vblk_counters(&w.dev).currently_throttled == 2);
    store(VBLK_REG_QUEUE_SEL, 0);
    store(VBLK_REG_QUEUE_READY, 0);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

// M13: one queue is reset and comes up again, while the threads serve both.
void m13_a_queue_of_a_live_worker(void) {
    worker_options();
    o.queues = 2;
    wo.each_queue = true;
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    accept_queues(VBLK_F_VERSION_1 | VBLK_F_RING_RESET);
    for (unsigned i = 0; i < 300; i++) {
        uint32_t queue = i > 0;
        store(VBLK_REG_QUEUE_SEL, queue);
        if (i > 1) {
            store(VBLK_REG_QUEUE_RESET, 1);
            CHECK_EQ(0, load(VBLK_REG_QUEUE_RESET));
            CHECK_EQ(0, load(VBLK_REG_QUEUE_READY));
            memset(ram + 0x2000, 0, 256); // no thread's any more
            ram[0x3010] = 0xff;
        }
        store(VBLK_REG_QUEUE_NUM, 16);
        store(VBLK_REG_QUEUE_DESC_LOW, queue ? 0 : 0x5000);
        store(VBLK_REG_QUEUE_DRIVER_LOW, queue ? 0x1000 : 0x6000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, queue ? 0x2000 : 0x7000);
        store(VBLK_REG_QUEUE_READY, 1);
        if (i == 0) {
            continue;
        }
        if (i == 1) {
            put_one(VBLK_T_IN, 1, false);
            store(VBLK_REG_STATUS, 0xf);
        }
        store(VBLK_REG_QUEUE_NOTIFY, 0);
        store(VBLK_REG_QUEUE_NOTIFY, 1);
        if (i % 2) { // else it is reset as it works
            EVENTUALLY(used_is(1));
            CHECK_EQ(VBLK_S_OK, ram[0x3010]);
        }
    }
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
    CHECK_EQ(0, vblk_counters(&w.dev).broken_queues);
    CHECK(!vblk_worker_close(&w));
}

// W11: no two workers have the same number.
void w11_numbers_differ(void) {
    static vblk_worker other;
    worker_options();
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&other, &o, &wo));
    CHECK(w.number != other.number);
    CHECK(!vblk_worker_close(&w));
    CHECK(!vblk_worker_close(&other));
}

static void *pause_for_long(void *arg) {
    (void)arg;
    int err = vblk_worker_pause(&w, 600000);
    set(&released, err ? 1 : 2);
    return NULL;
}

void w5_a_pause_that_is_taken_back(void) {
    pthread_t thread;
    worker_options();
    o.backend.flush = staying_flush;
    make_worker();
    put_flush(1);
    EVENTUALLY(get(&inside));
    CHECK_EQ(0, pthread_create(&thread, NULL, pause_for_long, NULL));
    while (!get(&released)) { // until the resume comes after the pause
        vblk_worker_resume(&w);
        sched_yield();
    }
    pthread_join(thread, NULL);
    CHECK_EQ(1, get(&released));
    CHECK(!used_is(1));
    set(&may_go, 1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

// The strict profile has no QueueReady 0 on a live queue: an event, no rest.
void f_queue_ready_of_a_live_worker(void) {
    worker_options();
    o.backend.flush = staying_flush;
    make_worker();
    put_flush(1);
    EVENTUALLY(get(&inside));
    store(VBLK_REG_QUEUE_READY, 0); // does not wait
    CHECK_EQ(1, load(VBLK_REG_QUEUE_READY));
    CHECK_EQ(1, lines);
    set(&may_go, 1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

void w_all_options_have_defaults(void) {
    worker_options();
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, NULL));
    CHECK_EQ(1000, w.wo.stop_ms);
    bind_driver();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK(worker_reset(&w));
    CHECK(!vblk_worker_close(&w));
}
