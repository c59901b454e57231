// The worker's edges: descriptors that break or cannot be had, the host's own
// hooks, registers of other widths, kicks and pauses at awkward moments.
#include "rig.h"
#include "uring.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static unsigned            said, flushed, evented;
static char                told[8192]; // all lines
static pthread_mutex_t     lock = PTHREAD_MUTEX_INITIALIZER;

static void on_log(void *user, const vblk_event *event) {
    char line[400];
    (void)user;
    vblk_event_line(event, line, sizeof line);
    pthread_mutex_lock(&lock);
    strncat(told, line, sizeof told - strlen(told) - 1);
    __atomic_fetch_add(&said, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
}

static bool was_told(const char *text) {
    pthread_mutex_lock(&lock);
    bool is = strstr(told, text) != NULL;
    pthread_mutex_unlock(&lock);
    return is;
}

static int count_flush(void *user) {
    (void)user;
    __atomic_fetch_add(&flushed, 1, __ATOMIC_RELEASE);
    return 0;
}

static void count_event(void *user, const vblk_event *event) {
    (void)user;
    (void)event;
    __atomic_fetch_add(&evented, 1, __ATOMIC_RELEASE);
}

static void worker_options(void) {
    rig_options();
    o.backend.flush = count_flush;
    o.event = on_log;
    said = flushed = evented = 0;
    memset(told, 0, sizeof told);
}

static void make_worker(void) {
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&w, &o, &wo));
}

void w_flush_in_the_thread(void) {
    worker_options();
    make_worker();
    bind_driver();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK_EQ(1, flushed);
    CHECK_EQ(VBLK_S_OK, ram[0x3010]);
    CHECK(!vblk_worker_close(&w));
}

void w_events_go_to_the_hosts_hook(void) {
    worker_options();
    o.event = count_event;
    o.backend.write = NULL;
    o.backend.flush = NULL;
    make_worker();
    bind_driver();
    ram[0x1004] = 99; // no head
    put_flush(1);
    EVENTUALLY(__atomic_load_n(&evented, __ATOMIC_ACQUIRE) > 0);
    EVENTUALLY(load(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET);
    CHECK_EQ(0, said);
    CHECK(!vblk_worker_close(&w));
}

// B7: the driver is interrupted, also while the threads rest.
void w_resize(void) {
    uint64_t n;
    worker_options();
    make_worker();
    bind_driver();
    for (uint64_t sectors = 3; sectors < 5; sectors++) {
        CHECK(read(w.irq_fd, &n, sizeof n) < 0);
        CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_resize(&w, sectors));
        CHECK_EQ(8, read(w.irq_fd, &n, sizeof n));
        CHECK_EQ(VBLK_INTERRUPT_CONFIG, load(VBLK_REG_INTERRUPT_STATUS));
        CHECK_EQ(sectors, load(VBLK_REG_CONFIG));
        store(VBLK_REG_INTERRUPT_ACK, 2);
        CHECK(!vblk_worker_pause(&w, 1000));
    }
    CHECK_EQ((uint64_t)VBLK_ERR_CAPACITY,
             (uint64_t)vblk_worker_resize(&w, UINT64_MAX));
    CHECK(!vblk_worker_close(&w));
}

void w_registers_of_other_widths(void) {
    worker_options();
    o.event = count_event;
    o.profile = VBLK_STANDARD;
    make_worker();
    bind_driver();
    vblk_worker_mmio_write(&w, VBLK_REG_QUEUE_NOTIFY, 2, 0);
    vblk_worker_mmio_write(&w, VBLK_REG_STATUS, 1, 0);
    vblk_worker_mmio_write(&w, VBLK_REG_INTERRUPT_ACK, 8, 1);
    vblk_worker_mmio_write(&w, VBLK_REG_QUEUE_READY, 1, 0);
    CHECK_EQ(4, evented);
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
    CHECK_EQ(1, load(VBLK_REG_QUEUE_READY));
    CHECK(!vblk_worker_close(&w));
    int cpu = CPU_SETSIZE;
    wo.cpus = &cpu;
    wo.cpu_count = 1;
    CHECK_EQ((uint64_t)VBLK_ERR_CPUS, (uint64_t)vblk_worker_init(&w, &o, &wo));
}

void w_pause_before_the_start(void) {
    worker_options();
    make_worker();
    CHECK(!vblk_worker_pause(&w, 1000));
    bind_driver();
    put_flush(1);
    CHECK(!used_is(1));
    vblk_worker_resume(&w);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_pause(&w, 1000));
    CHECK(!vblk_worker_close(&w));
}

// Descriptors are made all or none, and none is left open.
void w_without_descriptors(void) {
    struct rlimit was, few;
    worker_options();
    int next = dup(0);
    close(next);
    getrlimit(RLIMIT_NOFILE, &was);
    for (int n = 0; n < 2; n++) {
        few = was;
        few.rlim_cur = (rlim_t)(next + n);
        setrlimit(RLIMIT_NOFILE, &few);
        int err = vblk_worker_init(&w, &o, &wo);
        int saved = errno;
        setrlimit(RLIMIT_NOFILE, &was);
        CHECK_EQ((uint64_t)VBLK_ERR_WORKER, (uint64_t)err);
        CHECK_EQ(EMFILE, saved);
        int after = dup(0);
        close(after);
        CHECK_EQ(next, after);
    }
}

void w_without_a_thread(void) {
    worker_options();
    make_worker();
    test_calls_fail("pthread_create", EAGAIN, 0, 1);
    bind_driver();
    CHECK_EQ(0, test_calls_left());
    CHECK_EQ(0x4f, load(VBLK_REG_STATUS));
    CHECK(was_told("cannot be started"));
    CHECK(vblk_worker_paused(&w));
    store(VBLK_REG_STATUS, 0);
    bind_driver();
    put_flush(1);
    EVENTUALLY(used_is(1));
    CHECK(!vblk_worker_close(&w));
}

// Reads of 512 bytes, all by the chain at 0.
static void put_reads(uint8_t n) {
    ram[1] = 0x30, ram[8] = 16, ram[12] = NEXT, ram[14] = 1;
    ram[17] = 0x40, ram[25] = 2, ram[28] = NEXT | WRITE, ram[30] = 2;
    ram[32] = 16, ram[33] = 0x30, ram[40] = 1, ram[44] = WRITE;
    offer_up_to(n, true);
}

// A kick neither shortens a stall nor loses it; bytes alone are limited.
void w_kick_while_stalled(void) {
    worker_options();
    o.limits.bps = 5120;
    make_worker();
    bind_driver();
    put_reads(11);
    EVENTUALLY(used_is(10));
    for (int i = 0; i < 3; i++) {
        struct timespec t = {0, 5000000};
        store(VBLK_REG_QUEUE_NOTIFY, 0);
        nanosleep(&t, NULL);
    }
    EVENTUALLY(used_is(11));
    CHECK_EQ(1, vblk_counters(&w.dev).throttled);
    CHECK(!vblk_worker_close(&w));
}

static int64_t slow_read(void *user, uint64_t offset, const vblk_seg *seg,
                         unsigned segs) {
    struct timespec t = {0, 5000000};
    (void)user, (void)offset, (void)segs;
    nanosleep(&t, NULL);
    return (int64_t)seg[0].n;
}

// W3: the thread sleeps until the limit allows, whatever the disk took
// meanwhile.
void w3_a_sleep_ends_at_a_moment(void) {
    uint64_t start = clock_ns();
    worker_options();
    o.limits.bps = 5120;
    o.backend.read = slow_read;
    make_worker();
    bind_driver();
    put_reads(11); // 50 ms for ten, and the eleventh may go after 100
    EVENTUALLY(vblk_counters(&w.dev).currently_throttled == 1);
    EVENTUALLY(used_is(11));
    CHECK(clock_ns() - start >= 100000000);
    CHECK(!vblk_worker_close(&w));
}

// W3: what costs nothing waits for nobody, in another queue than the one that
// is stalled either.
void w3_a_kick_while_another_queue_is_stalled(void) {
    worker_options();
    o.limits.bps = 512;
    o.queues = 2;
    make_worker();
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)(VBLK_F_FLUSH | VBLK_F_MQ));
    store(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    store(VBLK_REG_DRIVER_FEATURES, 1);
    store(VBLK_REG_STATUS, 0xb);
    for (uint32_t queue = 0; queue < 2; queue++) {
        uint32_t base = queue ? 0x6000 : 0;
        store(VBLK_REG_QUEUE_SEL, queue);
        store(VBLK_REG_QUEUE_NUM, 16);
        store(VBLK_REG_QUEUE_DESC_LOW, base);
        store(VBLK_REG_QUEUE_DRIVER_LOW, base + 0x1000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, base + 0x2000);
        store(VBLK_REG_QUEUE_READY, 1);
    }
    store(VBLK_REG_STATUS, 0xf);
    put_reads(3);
    EVENTUALLY(vblk_counters(&w.dev).currently_throttled == 1);
    uint64_t stalls = vblk_counters(&w.dev).throttled;
    uint8_t *d = ram + 0x6000; // a FLUSH, header and status byte at 0xa000
    d[1] = 0xa0, d[8] = 16, d[12] = NEXT, d[14] = 1;
    d[16] = 16, d[17] = 0xa0, d[24] = 1, d[28] = WRITE;
    ram[0xa000] = VBLK_T_FLUSH;
    ram[0xa010] = 0xff;
    __atomic_store_n(ram + 0x7002, 1, __ATOMIC_RELEASE);
    store(VBLK_REG_QUEUE_NOTIFY, 1);
    EVENTUALLY(__atomic_load_n(ram + 0x8002, __ATOMIC_ACQUIRE) == 1);
    CHECK_EQ(VBLK_S_OK, ram[0xa010]);
    CHECK_EQ(stalls, vblk_counters(&w.dev).throttled); // before its time
    CHECK(!vblk_worker_close(&w));
}

static unsigned hold, inside, released;

static int slow_flush(void *user) {
    (void)user;
    __atomic_store_n(&inside, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&hold, __ATOMIC_ACQUIRE)) {
        sched_yield();
    }
    return 0;
}

static void on_released(void *user) {
    (void)user;
    __atomic_store_n(&released, 1, __ATOMIC_RELEASE);
}

// Whoever waits for a pause hears of it when a thread that was left behind is
// gone, not before.
void w_pause_is_told_when_the_thread_is_left_behind(void) {
    worker_options();
    hold = 1, inside = released = 0;
    o.backend.flush = slow_flush;
    wo.released = on_released;
    wo.stop_ms = 20;
    make_worker();
    bind_driver();
    put_flush(1);
    EVENTUALLY(__atomic_load_n(&inside, __ATOMIC_ACQUIRE));
    CHECK(vblk_worker_pause(&w, 1));
    CHECK(!worker_reset(&w));
    CHECK(!vblk_worker_paused(&w)); // its call may still move data
    CHECK(vblk_worker_pause(&w, 600000)); // which is known at once
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_worker_set_memory(&w, o.memory));
    CHECK(load(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET);
    __atomic_store_n(&hold, 0, __ATOMIC_RELEASE);
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    EVENTUALLY(worker_reset(&w));
    CHECK(vblk_worker_paused(&w));
    CHECK(!vblk_worker_close(&w));
}


// ---- Several threads, files -------------------------------------------------

#define QUEUES 4u

// Queue `i` has its rings at i * 0x3000; its requests' header, status byte and
// data are at 0xc000 + i * 0x1000.
static void bind_queues(void) {
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    store(VBLK_REG_DRIVER_FEATURES_SEL, 0);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)(VBLK_F_FLUSH | VBLK_F_MQ));
    store(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    store(VBLK_REG_DRIVER_FEATURES, 1);
    store(VBLK_REG_STATUS, 0xb);
    for (uint32_t i = 0; i < QUEUES; i++) {
        store(VBLK_REG_QUEUE_SEL, i);
        store(VBLK_REG_QUEUE_NUM, 16);
        store(VBLK_REG_QUEUE_DESC_LOW, i * 0x3000);
        store(VBLK_REG_QUEUE_DRIVER_LOW, i * 0x3000 + 0x1000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, i * 0x3000 + 0x2000);
        store(VBLK_REG_QUEUE_READY, 1);
    }
    store(VBLK_REG_STATUS, 0xf);
}

// As it lies in memory.
static uint16_t little(uint16_t value) {
    uint8_t le[2] = {(uint8_t)value, (uint8_t)(value >> 8)};
    memcpy(&value, le, 2);
    return value;
}

// Up to that index in queue `i`, all by the chain at 0 of its table.
static void read_by(uint32_t i, uint16_t upto) {
    uint8_t *d = ram + i * 0x3000;
    d[1] = (uint8_t)(0xc0 + i * 16), d[8] = 16, d[12] = NEXT, d[14] = 1;
    d[16] = 0, d[17] = (uint8_t)(0xc8 + i * 16), d[25] = 2;
    d[28] = NEXT | WRITE, d[30] = 2;
    d[32] = 16, d[33] = (uint8_t)(0xc0 + i * 16), d[40] = 1, d[44] = WRITE;
    __atomic_store_n((uint16_t *)(void *)(ram + i * 0x3000 + 0x1002),
                     little(upto), __ATOMIC_RELEASE);
    store(VBLK_REG_QUEUE_NOTIFY, i);
}

static bool used_by(uint32_t i, uint16_t upto) {
    return __atomic_load_n((uint16_t *)(void *)(ram + i * 0x3000 + 0x2002),
                           __ATOMIC_ACQUIRE) == little(upto);
}

static pthread_t readers[64];
static uint32_t  reads_done;

static int64_t notes_who_reads(void *user, uint64_t offset,
                               const vblk_seg *seg, unsigned segs) {
    uint32_t n = __atomic_fetch_add(&reads_done, 1, __ATOMIC_RELAXED);
    (void)user, (void)offset, (void)segs;
    if (n < COUNT(readers)) {
        readers[n] = pthread_self();
    }
    return (int64_t)seg[0].n;
}

static void several(void) {
    worker_options();
    memset(ram, 0, sizeof ram);
    o.queues = QUEUES;
    wo.each_queue = true;
    reads_done = 0;
}

void w12_a_thread_for_each_queue(void) {
    several();
    o.backend.read = notes_who_reads;
    make_worker();
    for (unsigned round = 1; round <= 3; round++) {
        bind_queues();
        for (uint32_t i = 0; i < QUEUES; i++) {
            CHECK(vblk_worker_kick_fd(&w, i) >= 0);
            read_by(i, 5);
        }
        for (uint32_t i = 0; i < QUEUES; i++) {
            EVENTUALLY(used_by(i, 5));
        }
        CHECK(!vblk_worker_pause(&w, 5000));
        read_by(2, 6);
        CHECK(vblk_worker_paused(&w) && used_by(2, 5));
        vblk_worker_resume(&w);
        EVENTUALLY(used_by(2, 6));
        CHECK(worker_reset(&w));
        CHECK(vblk_worker_paused(&w));
        memset(ram, 0, sizeof ram);
    }
    unsigned threads = 0;
    for (unsigned i = 0; i < 21; i++) {
        unsigned j = 0;
        while (j < i && !pthread_equal(readers[i], readers[j])) {
            j++;
        }
        threads += j == i;
    }
    CHECK_EQ(QUEUES, threads);
    CHECK_EQ(63, reads_done);
    CHECK(!vblk_worker_close(&w));
}

// T4: they share one limit, and none is passed over.
void w12_limits_of_several_threads(void) {
    several();
    o.limits.iops = 200;
    o.limits.iops_burst = 200;
    make_worker();
    bind_queues();
    uint64_t start = clock_ns();
    w.dev.ops.tokens = 0;
    w.dev.ops.last_ns = start;
    for (uint32_t i = 0; i < QUEUES; i++) {
        read_by(i, 10);
    }
    for (uint32_t i = 0; i < QUEUES; i++) {
        EVENTUALLY(used_by(i, 10));
    }
    uint64_t took = clock_ns() - start;
    CHECK(took >= 39 * (SECOND / 200));
    CHECK_EQ(40, vblk_counters(&w.dev).reads);
    CHECK(!vblk_worker_close(&w));
}

// With io_uring where this file system and kernel have it, and without.
void w12_files_by_io_uring(void) {
    for (unsigned without = 0; without < 2; without++) {
        char      path[] = "./vblk_test_XXXXXX";
        vblk_file file;
        int       fd = mkstemp(path);
        uint8_t   sector[512];
        memset(sector, 0x3c, sizeof sector);
        for (unsigned i = 0; i < 64; i++) {
            CHECK(write(fd, sector, sizeof sector) == sizeof sector);
        }
        close(fd);
        CHECK_EQ(VBLK_OK, vblk_file_open(&file, path, 0));
        several();
        o.backend = vblk_file_backend(&file);
        wo.no_uring = without;
        make_worker();
        for (unsigned round = 0; round < 3; round++) {
            memset(ram, 0, sizeof ram);
            bind_queues();
            for (uint16_t upto = 1; upto <= 40; upto++) {
                for (uint32_t i = 0; i < QUEUES; i++) {
                    read_by(i, upto);
                }
                for (uint32_t i = 0; i < QUEUES; i++) {
                    EVENTUALLY(used_by(i, upto));
                }
            }
            CHECK_EQ(0x3c, ram[0xc800]);
            CHECK_EQ(0x3c, ram[0xf800 + 511]);
            read_by(1, 44); // under way, perhaps
            CHECK(worker_reset(&w));
        }
        CHECK_EQ(0, vblk_counters(&w.dev).io_errors);
        CHECK(!vblk_worker_close(&w));
        vblk_file_close(&file);
        unlink(path);
    }
}

static uint32_t came_back;

static void on_came_back(void *user) {
    (void)user;
    __atomic_store_n(&came_back, 1, __ATOMIC_RELEASE);
}

// A worker over a file, and a read that io_uring does not end by itself.
static vblk_file held_file;

static void up_held(void) {
    char    path[] = "/tmp/vblk_test_XXXXXX";
    int     fd = mkstemp(path);
    uint8_t sector[512] = {0x3c};
    for (unsigned i = 0; i < 8; i++) {
        CHECK(write(fd, sector, sizeof sector) == sizeof sector);
    }
    unlink(path);
    CHECK_EQ(VBLK_OK, vblk_file_from(&held_file, fd, false));
    worker_options();
    o.backend = vblk_file_backend(&held_file);
    o.event = on_log;
    wo.stop_ms = 20;
    wo.released = on_came_back;
    __atomic_store_n(&came_back, 0, __ATOMIC_RELEASE);
    uring_start(fd);
    kernel.ends = 100;
    kernel.hold = 1;
    make_worker();
    bind_driver();
    put_reads(1);
    EVENTUALLY(__atomic_load_n(&kernel.transfers, __ATOMIC_ACQUIRE) == 1);
}

static void down_held(void) {
    CHECK(!vblk_worker_close(&w));
    uring_stop();
    vblk_file_close(&held_file);
}

// W5: at rest nothing is under way, or guest memory would change.
void w12_a_pause_waits_for_io_uring(void) {
    up_held();
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY, (uint64_t)vblk_worker_pause(&w, 20));
    CHECK(!vblk_worker_paused(&w) && used_is(0));
    __atomic_store_n(&kernel.let_go, 1, __ATOMIC_RELEASE);
    EVENTUALLY(vblk_worker_paused(&w));
    CHECK(used_is(1));
    CHECK_EQ(0x3c, ram[0x4000]);
    vblk_worker_resume(&w);
    put_reads(2);
    EVENTUALLY(used_is(2));
    down_held();
}

// W7, W8: nor does a reset end, but when its time is over.
void w12_a_reset_that_io_uring_holds_up(void) {
    up_held();
    CHECK(!worker_reset(&w));
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
    CHECK(was_told("left behind"));
    CHECK(!worker_reset(&w));
    __atomic_store_n(&kernel.let_go, 1, __ATOMIC_RELEASE);
    EVENTUALLY(__atomic_load_n(&came_back, __ATOMIC_ACQUIRE));
    CHECK(used_is(0));
    CHECK(worker_reset(&w));
    memset(ram, 0, sizeof ram);
    bind_driver();
    put_reads(1);
    EVENTUALLY(used_is(1));
    down_held();
}
