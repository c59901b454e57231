// Group W (worker thread), R2, with real threads.
#include "guest.h"

#include "../examples/pacer.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>


// ---- A device with a worker, and what a driver needs around it ------------

static vblk_worker w;
static vblk_options o;
static vblk_worker_options wo;
static uint8_t ram[1 << 20];
static vblk_region region = {.bytes = sizeof ram, .host = ram};
static vblk_regions guest_ram = {.region = &region, .count = 1};
static uint8_t disk[1 << 20];
static vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};

enum { QUEUE = 64 };
#define DESC   0x0000u
#define AVAIL  0x1000u
#define USED   0x2000u
#define HEADER 0x3000u // 32 bytes a request: header, status byte at + 16
#define DATA   0x10000u

static unsigned logged;
static char     last_line[320];
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

static vblk_level last_level;

static void on_log(void *user, const vblk_event *event) {
    (void)user;
    pthread_mutex_lock(&log_lock);
    last_level = event->level;
    __atomic_fetch_add(&logged, 1, __ATOMIC_RELEASE);
    vblk_event_line(event, last_line, sizeof last_line);
    pthread_mutex_unlock(&log_lock);
}

static void make_worker(void) {
    int err = vblk_worker_init(&w, &o, &wo);
    CHECK_EQ(VBLK_OK, (uint64_t)err);
}

static void worker_options(void) {
    memset(&o, 0, sizeof o);
    memset(&wo, 0, sizeof wo);
    o.memory = vblk_regions_memory(&guest_ram);
    o.backend = vblk_ramdisk_backend(&image);
    o.queue_size = QUEUE;
    o.profile = VBLK_STRICT;
    o.event = on_log;
    logged = 0;
}

static void store(uint32_t offset, uint32_t value) {
    vblk_worker_mmio_write(&w, offset, 4, value);
}

static uint32_t load(uint32_t offset) {
    return (uint32_t)vblk_mmio_read(&w.dev, offset, 4);
}

static uint16_t *word(uint32_t gpa) {
    return (uint16_t *)(void *)(ram + gpa);
}

// Numbers in guest memory are little-endian, whatever this host is.
static uint16_t le16(uint16_t value) {
    uint8_t b[2];
    memcpy(b, &value, 2);
    return (uint16_t)(b[0] | b[1] << 8);
}

static void put_le32(uint32_t gpa, uint32_t value) {
    for (unsigned i = 0; i < 4; i++) {
        ram[gpa + i] = (uint8_t)(value >> 8 * i);
    }
}

static void bind_driver(uint64_t declined) {
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    for (uint32_t page = 0; page < 2; page++) {
        store(VBLK_REG_DEVICE_FEATURES_SEL, page);
        store(VBLK_REG_DRIVER_FEATURES_SEL, page);
        store(VBLK_REG_DRIVER_FEATURES,
              load(VBLK_REG_DEVICE_FEATURES) &
                  ~(uint32_t)(declined >> 32 * page));
    }
    store(VBLK_REG_STATUS, 0xb);
    memset(ram, 0, 0x10000);
    store(VBLK_REG_QUEUE_SEL, 0);
    store(VBLK_REG_QUEUE_NUM, QUEUE);
    store(VBLK_REG_QUEUE_DESC_LOW, DESC);
    store(VBLK_REG_QUEUE_DRIVER_LOW, AVAIL);
    store(VBLK_REG_QUEUE_DEVICE_LOW, USED);
    store(VBLK_REG_QUEUE_READY, 1);
}

static void go(void) {
    store(VBLK_REG_STATUS, 0xf);
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
}

static uint16_t used_idx(void) {
    return le16(__atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE));
}

// Chain `slot` (three descriptors at 3 * slot): read or write of 512 bytes.
static void chain(unsigned slot, uint32_t type, uint32_t sector) {
    uint32_t header = HEADER + 32 * slot, d = DESC + 48 * slot;
    put_le32(header, type);
    put_le32(header + 4, 0);
    put_le32(header + 8, sector);
    put_le32(header + 12, 0);
    ram[header + 16] = 0xff;
    uint32_t parts[3][3] = {{header, 16, 1},
                            {DATA + 512 * slot, 512, type ? 1 : 3},
                            {header + 16, 1, 2}};
    for (unsigned i = 0; i < 3; i++) {
        put_le32(d + 16 * i, parts[i][0]);
        put_le32(d + 16 * i + 4, 0);
        put_le32(d + 16 * i + 8, parts[i][1]);
        put_le32(d + 16 * i + 12,
                 parts[i][2] | (3 * slot + i + 1) << 16);
    }
}

static uint16_t avail_made;

static void add(unsigned slot) {
    word(AVAIL + 4)[avail_made % QUEUE] = le16((uint16_t)(3 * slot));
    avail_made++;
    __atomic_store_n(word(AVAIL + 2), le16(avail_made), __ATOMIC_RELEASE);
}

static void up_made(void) {
    bind_driver(VBLK_F_EVENT_IDX);
    avail_made = 0;
    go();
}

static void up(void) {
    make_worker();
    up_made();
}

static void read_one(void) {
    chain(0, VBLK_T_IN, 3);
    uint16_t before = used_idx();
    add(0);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(used_idx() == (uint16_t)(before + 1));
    CHECK_EQ(VBLK_S_OK, ram[HEADER + 16]);
}

static void again_from_reset(void) {
    bind_driver(VBLK_F_EVENT_IDX);
    avail_made = 0;
    go();
    read_one();
}

static void finish(void) {
    CHECK(!vblk_worker_close(&w));
}

static bool started(void) {
    return w.thread != NULL;
}


// ---- Start, kicks, stop ---------------------------------------------------

void w2_no_thread_before_driver_ok(void) {
    worker_options();
    make_worker();
    CHECK(!started());
    CHECK(vblk_worker_paused(&w)); // W5
    bind_driver(VBLK_F_EVENT_IDX);
    avail_made = 0;
    chain(0, VBLK_T_IN, 0);
    add(0);
    store(VBLK_REG_QUEUE_NOTIFY, 0); // harmless
    vblk_worker_kick(&w);
    CHECK(!started());
    CHECK_EQ(0, used_idx());
    go();
    CHECK(started());
    EVENTUALLY(used_idx() == 1); // Q10: without a further kick
    read_one();
    store(VBLK_REG_STATUS, 0);
    CHECK(!started());
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    store(VBLK_REG_STATUS, 0); // a second reset in a row
    again_from_reset();
    CHECK(started());
    finish();
}

static pthread_t served_by;
static char served_name[32];
static int served_cpu;

static int64_t who_am_i(void *user, uint64_t offset, const vblk_seg *seg,
                        unsigned segs) {
    (void)user, (void)offset, (void)segs;
    served_by = pthread_self();
    served_cpu = sched_getcpu();
    pthread_getname_np(served_by, served_name, sizeof served_name);
    return (int64_t)seg[0].n;
}

void w2_the_thread_has_a_name_and_a_place(void) {
    const int cpus[] = {0};
    worker_options();
    o.backend.read = who_am_i;
    wo.cpus = cpus;
    wo.cpu_count = 1;
    make_worker();
    up_made();
    read_one();
    CHECK(!pthread_equal(served_by, pthread_self()));
    char want[32];
    snprintf(want, sizeof want, "vblk%d", w.number);
    CHECK_EQ(0, strcmp(want, served_name));
    CHECK_EQ(0, served_cpu);
    CHECK_EQ(0, logged);
    finish();
}

void w6_placement_that_fails_is_logged(void) {
    const int cpus[] = {1023};
    const int bad[] = {-1};
    worker_options();
    wo.cpus = bad;
    wo.cpu_count = 1;
    CHECK_EQ((uint64_t)VBLK_ERR_CPUS, (uint64_t)vblk_worker_init(&w, &o, &wo));
    wo.cpus = cpus;
    make_worker();
    up_made();
    read_one();
    CHECK(logged >= 1);
    CHECK(strstr(last_line, "cpus") != NULL);
    CHECK_EQ(VBLK_LEVEL_WARNING, last_level);
    finish();
}

void w_options_are_checked_and_nothing_leaks(void) {
    int probe = eventfd(0, 0);
    close(probe);
    worker_options();
    o.queue_size = 3;
    CHECK_EQ((uint64_t)VBLK_ERR_QUEUE_SIZE,
             (uint64_t)vblk_worker_init(&w, &o, &wo));
    worker_options();
    make_worker();
    const int fds[] = {w.irq_fd, w.kick_fd};
    for (size_t i = 0; i < COUNT(fds); i++) { // nothing has happened yet
        uint64_t count;
        CHECK_EQ((uint64_t)-1, (uint64_t)read(fds[i], &count, 8));
    }
    CHECK(!vblk_worker_close(&w));
    for (int i = 0; i < 20; i++) {
        up();
        read_one();
        finish();
    }
    int after = eventfd(0, 0);
    CHECK_EQ(probe, after); // every descriptor was closed
    close(after);
}

void w10_interrupt_by_eventfd(void) {
    uint64_t count;
    worker_options();
    up();
    read_one();
    EVENTUALLY(read(w.irq_fd, &count, 8) == 8);
    CHECK_EQ(1, load(VBLK_REG_INTERRUPT_STATUS));
    store(VBLK_REG_INTERRUPT_ACK, 1);
    CHECK_EQ(0, load(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ((uint64_t)-1, (uint64_t)read(w.irq_fd, &count, 8)); // a fall
    read_one();
    store(VBLK_REG_STATUS, 0);
    CHECK_EQ((uint64_t)-1, (uint64_t)read(w.irq_fd, &count, 8)); // R2
    CHECK_EQ(EAGAIN, errno);
    finish();
}

void w_every_type_of_request(void) {
    worker_options();
    up();
    read_one();
    chain(1, VBLK_T_OUT, 5);
    ram[DATA + 512] = 0x3c;
    add(1);
    chain(2, VBLK_T_FLUSH, 0);
    put_le32(DESC + 48 * 2 + 12, 1 | 8 << 16); // the header, then the status
    add(2);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(used_idx() == 3);
    CHECK_EQ(VBLK_S_OK, ram[HEADER + 32 + 16]);
    CHECK_EQ(0x3c, disk[5 * 512]);
    CHECK_EQ(VBLK_S_OK, ram[HEADER + 64 + 16]);
    CHECK_EQ(1, vblk_counters(vblk_worker_dev(&w)).flushes);
    finish();
}

// A KVM ioeventfd signals the descriptor and nothing else.
void w1_the_kick_descriptor_alone_will_do(void) {
    const uint64_t one = 1;
    worker_options();
    up();
    chain(0, VBLK_T_IN, 3);
    add(0);
    CHECK_EQ(8, write(w.kick_fd, &one, 8));
    EVENTUALLY(used_idx() == 1);
    for (int i = 0; i < 100000; i++) { // many kicks are one wake-up
        vblk_worker_kick(&w);
    }
    store(VBLK_REG_QUEUE_NOTIFY, 77); // no such queue
    read_one();
    CHECK(logged >= 1);
    finish();
}

void w3_a_stalled_drain_is_ended_by_the_timer(void) {
    worker_options();
    o.limits.iops = 200;
    o.limits.iops_burst = 200;
    up();
    // More than once, if the thread comes so late that nothing must wait.
    for (uint16_t round = 1; vblk_counters(&w.dev).throttled == 0; round++) {
        w.dev.ops.tokens = 0; // the worker is idle
        w.dev.ops.last_ns = clock_ns();
        uint64_t start = clock_ns();
        for (unsigned i = 0; i < 6; i++) {
            chain(i, VBLK_T_IN, i);
            add(i);
        }
        store(VBLK_REG_QUEUE_NOTIFY, 0); // once
        EVENTUALLY(used_idx() == 6 * round);
        CHECK(clock_ns() - start > 5 * (SECOND / 200));
        CHECK(round < 10);
        if (test_failed) {
            break;
        }
    }
    finish();
}

void w_limits_change_under_way(void) {
    worker_options();
    o.limits.iops = 1;
    up();
    for (unsigned i = 0; i < 4; i++) {
        chain(i, VBLK_T_IN, i);
        add(i);
    }
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(vblk_counters(vblk_worker_dev(&w)).currently_throttled == 1);
    vblk_limits none = {0}, bad = {.iops_burst = 1};
    CHECK_EQ((uint64_t)VBLK_ERR_LIMITS,
             (uint64_t)vblk_worker_set_limits(&w, &bad));
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_set_limits(&w, &none));
    EVENTUALLY(used_idx() == 4);
    finish();
}

void w9_memory_later_with_a_worker(void) {
    worker_options();
    vblk_memory later = o.memory, none = {0};
    o.memory = none;
    up();
    chain(0, VBLK_T_IN, 0);
    add(0);
    for (int i = 0; i < 10; i++) {
        store(VBLK_REG_QUEUE_NOTIFY, 0);
    }
    EVENTUALLY(__atomic_load_n(&logged, __ATOMIC_ACQUIRE) == 1);
    CHECK_EQ(0, used_idx());
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_set_memory(&w, later));
    EVENTUALLY(used_idx() == 1);
    CHECK_EQ(1, logged);
    finish();
}

void w4_a_worker_without_its_kick_asks_for_a_reset(void) {
    uint64_t count;
    worker_options();
    up();
    read_one();
    CHECK(!vblk_worker_pause(&w, 10000));
    close(w.kick_fd);
    vblk_worker_resume(&w);
    EVENTUALLY(load(VBLK_REG_STATUS) == 0x4f);
    EVENTUALLY(load(VBLK_REG_INTERRUPT_STATUS) & 2);
    EVENTUALLY(read(w.irq_fd, &count, 8) == 8);
    CHECK(!vblk_worker_pause(&w, 10000)); // it rests for good
    vblk_worker_resume(&w);
    w.kick_fd = w.kick_fds[0] = -1;
    finish();
}

static unsigned events_seen, interrupts_seen;

static void on_worker_event(void *user, const vblk_event *e) {
    (void)e;
    __atomic_fetch_add((unsigned *)user, 1, __ATOMIC_RELEASE);
}

static void on_worker_interrupt(void *user, int queue, bool fire) {
    (void)user;
    __atomic_fetch_add(&interrupts_seen, fire && queue == 0, __ATOMIC_RELEASE);
}

void w11_the_host_may_have_events_and_interrupts_itself(void) {
    worker_options();
    o.event = on_worker_event;
    o.interrupt = on_worker_interrupt;
    o.user = &events_seen;
    events_seen = interrupts_seen = 0;
    up();
    vblk_worker_mmio_write(&w, 0, 1, 1); // a byte access: an event
    CHECK_EQ(1, events_seen);
    chain(0, 99, 0); // an unknown type: an event in the thread
    add(0);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(used_idx() == 1);
    EVENTUALLY(__atomic_load_n(&interrupts_seen, __ATOMIC_ACQUIRE) == 1);
    read_one(); // the thread came back from both
    finish();
    CHECK_EQ(2, interrupts_seen);
    CHECK_EQ(2, events_seen);
    CHECK_EQ(0, logged);
}

// Layered disks: the backend of one device is served by another, whose events
// must not be taken for the first one's.
static vblk_worker other;

static int64_t read_through(void *user, uint64_t offset, const vblk_seg *seg,
                            unsigned segs) {
    (void)user, (void)offset, (void)segs;
    vblk_worker_mmio_write(&other, 0, 1, 1); // a byte access: an event there
    vblk_needs_reset(&other.dev);
    return (int64_t)seg[0].n;
}

void w_a_backend_that_uses_another_device(void) {
    worker_options();
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_init(&other, &o, &wo));
    o.backend.read = read_through;
    up();
    for (int i = 0; i < 10; i++) {
        read_one();
    }
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
    finish();
    CHECK(!vblk_worker_close(&other));
}


// ---- Pause ----------------------------------------------------------------

void w5_pause_and_resume(void) {
    worker_options();
    up();
    read_one();
    CHECK(!vblk_worker_paused(&w));
    for (int i = 0; i < 200; i++) {
        CHECK(!vblk_worker_pause(&w, 10000));
        CHECK(!vblk_worker_pause(&w, 10000)); // twice
        CHECK(vblk_worker_paused(&w));
        chain(0, VBLK_T_IN, 3);
        uint16_t before = used_idx();
        add(0);
        store(VBLK_REG_QUEUE_NOTIFY, 0); // not lost
        CHECK_EQ(before, used_idx());
        vblk_worker_resume(&w);
        EVENTUALLY(used_idx() == (uint16_t)(before + 1));
    }
    finish();
}

void w5_pause_in_every_state(void) {
    worker_options();
    make_worker();
    CHECK(!vblk_worker_pause(&w, 0)); // before the first start
    bind_driver(VBLK_F_EVENT_IDX);
    avail_made = 0;
    chain(0, VBLK_T_IN, 0);
    add(0);
    go();
    CHECK(vblk_worker_paused(&w));
    CHECK(!vblk_worker_pause(&w, 0));
    for (int i = 0; i < 1000; i++) {
        sched_yield();
    }
    CHECK_EQ(0, used_idx()); // started, and resting from the first moment
    vblk_worker_resume(&w);
    EVENTUALLY(used_idx() == 1);
    CHECK(!vblk_worker_pause(&w, 10000));
    store(VBLK_REG_STATUS, 0); // a paused worker can be stopped and reset
    CHECK(vblk_worker_paused(&w));
    vblk_worker_resume(&w); // between reset and restart
    CHECK(vblk_worker_paused(&w));
    again_from_reset();
    CHECK(!vblk_worker_paused(&w));
    vblk_limits slow = {.iops = 1};
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_set_limits(&w, &slow));
    for (unsigned i = 0; i < 4; i++) { // stalled on the throttle
        chain(i, VBLK_T_IN, i);
        add(i);
    }
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(vblk_counters(vblk_worker_dev(&w)).currently_throttled == 1);
    CHECK(!vblk_worker_pause(&w, 10000));
    CHECK(!vblk_worker_pause(&w, 0));
    finish(); // a paused worker can be ended
}

void w5_no_cycle_is_lost(void) {
    worker_options();
    make_worker();
    CHECK(!vblk_worker_pause(&w, 0)); // not started: at once
    vblk_worker_resume(&w);
    vblk_worker_resume(&w); // there was no pause
    bind_driver(VBLK_F_EVENT_IDX);
    avail_made = 0;
    go();
    for (int i = 0; i < 2000; i++) {
        CHECK(!vblk_worker_pause(&w, 10000));
        CHECK(vblk_worker_paused(&w));
        CHECK(!vblk_worker_pause(&w, 10000)); // it rests already
        vblk_worker_resume(&w);
    }
    finish();
}

// After "paused" the host may read rings and memory with plain loads: the
// thread sanitizer says whether that is so.
void w5_all_writes_are_visible_when_paused(void) {
    worker_options();
    up();
    for (unsigned i = 0; i < 200; i++) {
        chain(i % 8, VBLK_T_IN, i);
        add(i % 8);
        store(VBLK_REG_QUEUE_NOTIFY, 0);
        CHECK(!vblk_worker_pause(&w, 10000));
        uint32_t sum = 0;
        for (size_t k = 0; k < 0x3000; k++) {
            sum += ram[k];
        }
        CHECK(sum > 0);
        vblk_worker_resume(&w);
        EVENTUALLY(used_idx() == (uint16_t)(i + 1));
    }
    finish();
}


// ---- A backend that is stuck ----------------------------------------------

static int stuck_pipe[2], entered_pipe[2];
static uint32_t stick; // atomic: block the next calls
static uint32_t released;

static void stuck(void) {
    char byte = 1;
    if (__atomic_load_n(&stick, __ATOMIC_ACQUIRE)) {
        CHECK_EQ(1, write(entered_pipe[1], &byte, 1));
        while (read(stuck_pipe[0], &byte, 1) < 0 && errno == EINTR) {
        }
    }
}

static int64_t stuck_read(void *user, uint64_t offset, const vblk_seg *seg,
                          unsigned segs) {
    (void)user, (void)offset, (void)segs;
    stuck();
    return (int64_t)seg[0].n;
}

static int stuck_flush(void *user) {
    (void)user;
    stuck();
    return 0;
}

static void on_released(void *user) {
    (void)user;
    __atomic_store_n(&released, 1, __ATOMIC_RELEASE);
}

static void let_go(void) {
    char byte = 1;
    __atomic_store_n(&stick, 0, __ATOMIC_RELEASE);
    CHECK_EQ(1, write(stuck_pipe[1], &byte, 1));
}

static void up_stuck(void) {
    char byte;
    CHECK_EQ(0, pipe(stuck_pipe));
    CHECK_EQ(0, pipe(entered_pipe));
    stick = released = 0;
    worker_options();
    o.backend.read = stuck_read;
    o.backend.flush = stuck_flush;
    wo.stop_ms = 20;
    wo.released = on_released;
    up();
    read_one();
    __atomic_store_n(&stick, 1, __ATOMIC_RELEASE);
    chain(1, VBLK_T_IN, 0);
    chain(2, VBLK_T_IN, 0);
    add(1);
    add(2);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(1, read(entered_pipe[0], &byte, 1)); // it is in there
}

static void close_pipes(void) {
    for (int i = 0; i < 2; i++) {
        close(stuck_pipe[i]);
        close(entered_pipe[i]);
    }
}

void w7_w8_reset_of_a_stuck_worker(void) {
    up_stuck();
    uint8_t before[0x3000];
    uint64_t start = clock_ns();
    store(VBLK_REG_STATUS, 0);
    CHECK(clock_ns() - start < 5 * SECOND);
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS)); // W8
    CHECK(strstr(last_line, "left behind") != NULL);
    CHECK(!worker_reset(&w)); // still there
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
    store(VBLK_REG_STATUS, 1); // no new I/O until it has ended
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
    CHECK_EQ(0, load(VBLK_REG_INTERRUPT_STATUS));
    memset(ram, 0x5a, 0x3000); // the guest's memory is the guest's again
    memset(before, 0x5a, sizeof before);

    let_go();
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    EVENTUALLY(worker_reset(&w));

    CHECK_MEM(before, ram, sizeof before); // it touched nothing
    uint64_t count;
    CHECK_EQ((uint64_t)-1, (uint64_t)read(w.irq_fd, &count, 8));
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    again_from_reset(); // and the device is back
    finish();
    close_pipes();
}

void w7_end_of_a_stuck_worker(void) {
    up_stuck();
    uint64_t start = clock_ns();
    const int fds[] = {w.irq_fd, w.kick_fd};
    CHECK(vblk_worker_close(&w));
    CHECK(clock_ns() - start < 5 * SECOND);
    CHECK(fcntl(fds[0], F_GETFD) >= 0); // for the thread it is there
    memset(ram, 0x5a, 0x3000);
    let_go();
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    for (size_t i = 0; i < COUNT(fds); i++) { // which has freed all
        CHECK(fcntl(fds[i], F_GETFD) < 0);
    }
    memset(&w, 0x77, sizeof w); // nothing of it may be used any more
    for (size_t i = 0; i < 0x3000; i++) {
        CHECK_EQ(0x5a, ram[i]);
    }
    close_pipes();
}

void w7_end_after_a_reset_left_one_behind(void) {
    up_stuck();
    store(VBLK_REG_STATUS, 0);
    CHECK(vblk_worker_close(&w));
    let_go();
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    close_pipes();
    up_stuck(); // and when it had ended before
    store(VBLK_REG_STATUS, 0);
    let_go();
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    EVENTUALLY(worker_reset(&w));
    finish();
    close_pipes();
}

void w7_pause_of_a_stuck_worker(void) {
    up_stuck();
    uint64_t start = clock_ns();
    CHECK(vblk_worker_pause(&w, 20));
    CHECK(clock_ns() - start < 5 * SECOND);
    CHECK(!vblk_worker_paused(&w));
    vblk_limits none = {0};
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_worker_set_limits(&w, &none));
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_worker_set_memory(&w, o.memory));
    let_go();
    EVENTUALLY(vblk_worker_paused(&w)); // it rests after its request
    CHECK_EQ(2, used_idx());
    vblk_worker_resume(&w);
    EVENTUALLY(used_idx() == 3);
    finish();
    close_pipes();
    up_stuck(); // and nobody else asks it to stop for a moment
    CHECK(vblk_worker_pause(&w, 20));
    let_go();
    EVENTUALLY(vblk_worker_paused(&w));
    CHECK_EQ(2, used_idx()); // after its request, not after them all
    vblk_worker_resume(&w);
    EVENTUALLY(used_idx() == 3);
    finish();
    close_pipes();
}

// W8: with the thread back, whatever needs rest works again, before a reset.
void w8_rest_after_a_thread_came_back(void) {
    vblk_limits none = {0};
    up_stuck();
    store(VBLK_REG_STATUS, 0);
    CHECK(vblk_worker_pause(&w, 1));
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_worker_set_limits(&w, &none));
    CHECK(!vblk_worker_paused(&w));
    let_go();
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    CHECK(vblk_worker_paused(&w));
    CHECK(!vblk_worker_pause(&w, 0));
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_set_limits(&w, &none));
    CHECK_EQ(VBLK_OK, (uint64_t)vblk_worker_set_memory(&w, o.memory));
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    vblk_worker_resume(&w);
    again_from_reset();
    finish();
    close_pipes();
}

static uint32_t late_may_go; // atomic

static void look_and_reset(void *user) {
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    CHECK(worker_reset(&w)); // once more does no harm
    on_released(user);
}

// W8: released() speaks of what is so already.
void w8_released_and_reset(void) {
    for (int ended = 0; ended < 2; ended++) {
        up_stuck();
        w.wo.released = look_and_reset;
        store(VBLK_REG_STATUS, 0);
        let_go();
        EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
        if (!ended) {
            again_from_reset();
        }
        finish();
        close_pipes();
    }
}

// Late: the guest has the device up again. Nothing happens to it.
static void be_late(void *user) {
    while (!__atomic_load_n(&late_may_go, __ATOMIC_ACQUIRE)) {
        sched_yield();
    }
    on_released(user);
}

void w8_a_released_that_is_late(void) {
    up_stuck();
    w.wo.released = be_late;
    late_may_go = 0;
    store(VBLK_REG_STATUS, 0);
    let_go();
    EVENTUALLY(worker_reset(&w));
    again_from_reset();
    __atomic_store_n(&late_may_go, 1, __ATOMIC_RELEASE);
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    CHECK_EQ(0xf, load(VBLK_REG_STATUS));
    read_one();
    finish();
    close_pipes();
}

static void *go_on_soon(void *arg) {
    struct timespec t = {0, 20000000};
    nanosleep(&t, NULL);
    __atomic_store_n(&late_may_go, 1, __ATOMIC_RELEASE);
    return arg;
}

// An end that finds released() under way waits for it, whatever resets come
// before and in it, and frees once.
void w7_an_end_during_released(void) {
    for (int reset = 0; reset < 2; reset++) {
        pthread_t thread;
        up_stuck();
        w.wo.released = be_late;
        late_may_go = 0;
        store(VBLK_REG_STATUS, 0);
        let_go();
        EVENTUALLY(vblk_worker_paused(&w));
        if (reset) {
            CHECK(worker_reset(&w)); // once more does no harm
        }
        CHECK_EQ(0, pthread_create(&thread, NULL, go_on_soon, NULL));
        CHECK(!vblk_worker_close(&w));
        CHECK_EQ(1, released);
        pthread_join(thread, NULL);
        close_pipes();
    }
}

// W7: the thread is in no callback: a page of guest memory does not come. The
// accessor stands for it, as the kernel would.
static uint32_t pages_stop, page_asked; // atomic
static bool     page_is_written;
static uint64_t page_at;
static vblk_memory pages;

static void wait_for_page(void) {
    if (__atomic_load_n(&pages_stop, __ATOMIC_ACQUIRE)) {
        __atomic_store_n(&page_asked, 1, __ATOMIC_RELEASE);
        while (__atomic_load_n(&pages_stop, __ATOMIC_ACQUIRE)) {
            sched_yield();
        }
    }
}

static int page_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    if (dst && !page_is_written && gpa <= page_at && page_at - gpa < n) {
        wait_for_page();
    }
    return pages.read(user, gpa, dst, n);
}

static int page_write(void *user, uint64_t gpa, const void *src, uint64_t n) {
    if (src && page_is_written && gpa <= page_at && page_at - gpa < n) {
        wait_for_page();
        return 0; // the store that had begun; what follows it counts
    }
    return pages.write(user, gpa, src, n);
}

static int64_t nothing_there(void *user, uint64_t offset, const vblk_seg *seg,
                             unsigned segs) {
    (void)user, (void)offset, (void)seg, (void)segs;
    return 0;
}

static void up_without_a_page(bool padded) {
    worker_options();
    o.capacity = sizeof disk / 512;
    o.backend.read = padded ? nothing_there : o.backend.read;
    pages = o.memory;
    o.memory.read = page_read;
    o.memory.write = page_write;
    o.memory.map = NULL;
    wo.stop_ms = 20;
    wo.released = on_released;
    released = page_asked = 0;
    up();
    read_one();
    __atomic_store_n(&pages_stop, 1, __ATOMIC_RELEASE);
    chain(1, VBLK_T_IN, 0);
    put_le32(DESC + 48 + 16 + 8, 4096);
    chain(2, VBLK_T_IN, 0);
    add(1);
    add(2);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(__atomic_load_n(&page_asked, __ATOMIC_ACQUIRE));
}

// Read or written, reset or end, in the backend's stead or while padding; the
// places are header, data, the middle of data, status byte and used ring.
void w7_a_page_that_does_not_come(void) {
    static const struct {
        uint64_t at;
        bool     written;
    } places[] = {{HEADER + 32, false}, {DATA + 512, true},
                  {DATA + 512 + 2048, true}, {HEADER + 48, true},
                  {USED + 4 + 8, true}};
    for (unsigned kind = 0; kind < 8 * COUNT(places); kind++) {
        bool data = kind / 8 == 2;
        if (!data && kind % 8 != 0 && kind % 8 != 2) {
            continue; // that much is tried in one place
        }
        page_at = places[kind / 8].at;
        page_is_written = places[kind / 8].written;
        up_without_a_page(kind & 4);
        uint64_t start = clock_ns();
        if (!(kind & 2)) {
            CHECK(!worker_reset(&w));
            CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
            CHECK(strstr(last_line, "left behind") != NULL);
            CHECK(!worker_reset(&w));
            CHECK_EQ(VBLK_LEVEL_ERROR, last_level);
            if (kind & 1) { // which asks the thread for nothing
                CHECK(vblk_worker_pause(&w, 1));
                vblk_worker_resume(&w);
            }
        } else {
            CHECK(vblk_worker_close(&w));
        }
        CHECK(clock_ns() - start < 5 * SECOND);
        memset(ram, 0x5a, sizeof ram); // the guest's again
        __atomic_store_n(&pages_stop, 0, __ATOMIC_RELEASE);
        EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
        for (size_t i = 0; i < sizeof ram; i++) {
            if (ram[i] != 0x5a) {
                CHECK_EQ(0x5a, ram[i]);
                break;
            }
        }
        if (!(kind & 2)) {
            CHECK_EQ(0, load(VBLK_REG_INTERRUPT_STATUS));
            CHECK(!vblk_interrupt_line(&w.dev));
            CHECK(worker_reset(&w));
            CHECK_EQ(0, load(VBLK_REG_STATUS));
            CHECK_EQ(0, load(VBLK_REG_QUEUE_READY));
            again_from_reset();
            finish();
        }
    }
}

// T5: what is gone waits for nothing.
void t5_the_gauge_falls_at_the_end(void) {
    worker_options();
    o.limits.iops = 1;
    up();
    for (unsigned i = 0; i < 3; i++) {
        chain(i, VBLK_T_IN, i);
        add(i);
    }
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(vblk_counters(vblk_worker_dev(&w)).currently_throttled == 1);
    finish();
    CHECK_EQ(0, vblk_counters(vblk_worker_dev(&w)).currently_throttled);
}

// LIB: a vCPU's mask and place are its own.
static sigset_t thread_mask;
static int      thread_cpus;

static int64_t look_around(void *user, uint64_t offset, const vblk_seg *seg,
                           unsigned segs) {
    cpu_set_t set;
    (void)user, (void)offset, (void)segs;
    pthread_sigmask(SIG_BLOCK, NULL, &thread_mask);
    sched_getaffinity(0, sizeof set, &set);
    thread_cpus = CPU_COUNT(&set);
    return (int64_t)seg[0].n;
}

static void *bind_as_vcpu(void *arg) {
    cpu_set_t one;
    (void)arg;
    CPU_ZERO(&one);
    CPU_SET((unsigned)sched_getcpu(), &one);
    CHECK_EQ(0, pthread_setaffinity_np(pthread_self(), sizeof one, &one));
    up_made();
    return NULL;
}

void w_signals_and_place_are_not_the_vcpus(void) {
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP};
    pthread_t vcpu;
    cpu_set_t mine;
    sched_getaffinity(0, sizeof mine, &mine);
    worker_options();
    o.backend.read = look_around;
    make_worker();
    CHECK_EQ(0, pthread_create(&vcpu, NULL, bind_as_vcpu, NULL));
    pthread_join(vcpu, NULL);
    read_one();
    CHECK_EQ(CPU_COUNT(&mine), thread_cpus);
    for (int sig = 1; sig < 32; sig++) {
        bool fault = false;
        for (size_t i = 0; i < COUNT(own); i++) {
            fault |= sig == own[i];
        }
        if (sig != SIGKILL && sig != SIGSTOP) {
            ROW_BEGIN();
            CHECK_EQ(!fault, sigismember(&thread_mask, sig));
            ROW("signal %d", sig);
        }
    }
    sigset_t caller;
    pthread_sigmask(SIG_BLOCK, NULL, &caller);
    CHECK(!sigismember(&caller, SIGUSR1)); // its own is as it was
    finish();
}

static void no_notify(void *user, int queue) {
    (void)user, (void)queue;
}

static int no_quiesce(void *user, int queue) {
    (void)user, (void)queue;
    return 0;
}

void w_options_that_cannot_be(void) {
    worker_options();
    wo.stop_ms = (unsigned)INT_MAX + 1;
    CHECK_EQ((uint64_t)VBLK_ERR_STOP_MS,
             (uint64_t)vblk_worker_init(&w, &o, &wo));
    wo.stop_ms = INT_MAX;
    o.notify = no_notify;
    CHECK_EQ((uint64_t)VBLK_ERR_HOOKS, (uint64_t)vblk_worker_init(&w, &o, &wo));
    o.notify = NULL;
    o.quiesce = no_quiesce;
    CHECK_EQ((uint64_t)VBLK_ERR_HOOKS, (uint64_t)vblk_worker_init(&w, &o, &wo));
    o.quiesce = NULL;
    up();
    read_one();
    finish();
}

static unsigned shares_of(pacer *l) {
    pthread_mutex_lock(&l->mutex);
    unsigned shares = l->rests;
    pthread_mutex_unlock(&l->mutex);
    return shares;
}

// T8, W7: the thread stops between two shares of a limited backend.
void t8_w7_a_reset_while_a_limiter_sleeps(void) {
    static const vblk_limits slow = {.bps = 10240};
    pacer l;
    worker_options();
    CHECK_EQ(VBLK_OK, pacer_init(&l, o.backend, &slow));
    o.backend = pacer_backend(&l);
    up();
    uint64_t start = clock_ns();
    chain(0, VBLK_T_IN, 0);
    ram[DESC + 16 + 8] = 0; // 64 KiB: six seconds' worth
    ram[DESC + 16 + 10] = 1;
    add(0);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(shares_of(&l) > 1);
    CHECK(worker_reset(&w));
    CHECK(clock_ns() - start < 3 * SECOND);
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    finish();
    pacer_close(&l);
}

// LIB-09: the interrupt function wants a lock that the vCPU holds while it
// writes to Status. The reset is bounded all the same.
static pthread_mutex_t vmm_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t in_interrupt;

static void locking_interrupt(void *user, int queue, bool fire) {
    (void)user, (void)queue;
    if (fire) {
        __atomic_store_n(&in_interrupt, 1, __ATOMIC_RELEASE);
        pthread_mutex_lock(&vmm_lock);
        pthread_mutex_unlock(&vmm_lock);
    }
}

void w7_an_interrupt_that_waits_for_the_caller(void) {
    worker_options();
    wo.stop_ms = 20;
    wo.released = on_released;
    o.interrupt = locking_interrupt;
    released = in_interrupt = 0;
    up();
    pthread_mutex_lock(&vmm_lock);
    chain(0, VBLK_T_IN, 0);
    add(0);
    store(VBLK_REG_QUEUE_NOTIFY, 0);
    EVENTUALLY(__atomic_load_n(&in_interrupt, __ATOMIC_ACQUIRE));
    uint64_t start = clock_ns();
    store(VBLK_REG_STATUS, 0);
    CHECK(clock_ns() - start < 5 * SECOND);
    CHECK_EQ(VBLK_STATUS_NEEDS_RESET, load(VBLK_REG_STATUS));
    pthread_mutex_unlock(&vmm_lock);
    EVENTUALLY(__atomic_load_n(&released, __ATOMIC_ACQUIRE));
    EVENTUALLY(worker_reset(&w));
    again_from_reset();
    finish();
}

// A slow backend that returns in time is joined, its request thrown away.
void w7_reset_of_a_slow_worker(void) {
    up_stuck();
    w.wo.stop_ms = 10000;
    pthread_t helper;
    CHECK_EQ(0, pthread_create(&helper, NULL,
                               (void *(*)(void *))(void (*)(void))let_go,
                               NULL));
    store(VBLK_REG_STATUS, 0);
    pthread_join(helper, NULL);
    CHECK_EQ(0, load(VBLK_REG_STATUS));
    uint64_t reads = vblk_counters(&w.dev).reads; // the one before, and
    CHECK(reads >= 1 && reads <= 3);              // what it still got done
    again_from_reset();
    finish();
    close_pipes();
}

void p8_queue_ready_with_a_worker(void) {
    worker_options();
    o.profile = VBLK_STANDARD;
    up();
    read_one();
    for (int i = 0; i < 100; i++) {
        store(VBLK_REG_QUEUE_READY, 0);
        CHECK_EQ(0, load(VBLK_REG_QUEUE_READY));
        memset(ram, 0, 0x3000); // ring access has ceased
        avail_made = 0;
        store(VBLK_REG_QUEUE_NUM, QUEUE);
        store(VBLK_REG_QUEUE_DESC_LOW, DESC);
        store(VBLK_REG_QUEUE_DRIVER_LOW, AVAIL);
        store(VBLK_REG_QUEUE_DEVICE_LOW, USED);
        store(VBLK_REG_QUEUE_READY, 1);
        read_one();
        CHECK_EQ(1, used_idx());
    }
    finish();
    up_stuck();
    w.dev.strict = false;
    CHECK_EQ((uint64_t)VBLK_ERR_BUSY,
             (uint64_t)vblk_worker_mmio_write(&w, VBLK_REG_QUEUE_READY, 4, 0));
    CHECK_EQ(0x4f, load(VBLK_REG_STATUS)); // it could not be stopped
    let_go();
    finish();
    close_pipes();
}


// ---- Everybody at once ----------------------------------------------------

// One driver thread that kicks by the EVENT_IDX rule to the letter, so that a
// missing barrier hangs it; one that acknowledges interrupts; one that pauses
// and resumes; one that resets, for which the driver starts over.
static struct party {
    uint64_t wanted;   // requests
    uint64_t done;     // atomic
    uint32_t over;     // atomic
    uint32_t resets;   // atomic: sessions asked for
    uint64_t kicks, acks, pauses;
    bool     with_resets;
    int      depth;
} party;

static void dump(const char *what) {
    printf("  %s: done %" PRIu64 " of %" PRIu64 ", avail %u, used %u, "
           "avail_event %u, status %#x, interrupt %#x, parked %d\n",
           what, party.done, party.wanted, avail_made, used_idx(),
           le16(*word(USED + 4 + 8 * QUEUE)), load(VBLK_REG_STATUS),
           load(VBLK_REG_INTERRUPT_STATUS), vblk_worker_paused(&w));
}

static void *acknowledge(void *arg) {
    (void)arg;
    while (!__atomic_load_n(&party.over, __ATOMIC_ACQUIRE)) {
        uint32_t bits = load(VBLK_REG_INTERRUPT_STATUS);
        if (bits) {
            store(VBLK_REG_INTERRUPT_ACK, bits);
            party.acks++;
        }
        sched_yield();
    }
    return NULL;
}

static void *pause_and_resume(void *arg) {
    (void)arg;
    while (!__atomic_load_n(&party.over, __ATOMIC_ACQUIRE)) {
        party.pauses += !vblk_worker_pause(&w, 1000);
        vblk_worker_resume(&w);
        for (int i = 0; i < 200; i++) {
            sched_yield();
        }
    }
    return NULL;
}

static void *ask_for_resets(void *arg) {
    (void)arg;
    while (!__atomic_load_n(&party.over, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < 2000; i++) {
            sched_yield();
        }
        __atomic_fetch_add(&party.resets, 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

static void session_up(bool event_idx) {
    store(VBLK_REG_STATUS, 0);
    bind_driver(event_idx ? 0 : VBLK_F_EVENT_IDX);
    avail_made = 0;
    for (unsigned i = 0; i < 16; i++) {
        chain(i, i & 1 ? VBLK_T_OUT : VBLK_T_IN, i);
    }
    store(VBLK_REG_STATUS, 0xf);
}

// Requests in flight are `depth` slots; each slot is used again when its
// completion is seen. Not one may be lost, none come twice.
static void drive(bool event_idx) {
    uint32_t session = 0;
    uint16_t seen = 0;
    bool busy[16] = {false};
    uint64_t last_progress = clock_ns();
    session_up(event_idx);
    while (party.done < party.wanted) {
        if (party.with_resets &&
            __atomic_load_n(&party.resets, __ATOMIC_ACQUIRE) != session) {
            session = __atomic_load_n(&party.resets, __ATOMIC_ACQUIRE);
            session_up(event_idx);
            memset(busy, 0, sizeof busy);
            seen = 0;
        }
        uint16_t old = avail_made;
        for (unsigned i = 0; i < (unsigned)party.depth; i++) {
            if (!busy[i]) {
                busy[i] = true;
                ram[HEADER + 32 * i + 16] = 0xff;
                add(i);
            }
        }
        // [2.7.10.1]: a full barrier, then look whether a kick is wanted.
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        bool kick_it;
        if (event_idx) {
            uint16_t event = le16(__atomic_load_n(
                word(USED + 4 + 8 * QUEUE), __ATOMIC_ACQUIRE));
            kick_it = (uint16_t)(avail_made - event - 1) <
                      (uint16_t)(avail_made - old);
        } else {
            uint16_t flags = le16(
                __atomic_load_n(word(USED), __ATOMIC_ACQUIRE));
            kick_it = old != avail_made && !(flags & 1);
        }
        if (kick_it) {
            store(VBLK_REG_QUEUE_NOTIFY, 0);
            party.kicks++;
        }
        while (seen != used_idx()) {
            uint16_t id = le16(*word(USED + 4 + 8 * (seen % QUEUE)));
            seen++;
            unsigned slot = id / 3u;
            if (slot >= 16 || !busy[slot] ||
                ram[HEADER + 32 * slot + 16] != VBLK_S_OK) {
                test_fail(__FILE__, __LINE__, "completed twice, or wrongly");
                return;
            }
            busy[slot] = false;
            party.done++;
            last_progress = clock_ns();
        }
        if (clock_ns() - last_progress > TEST_PATIENCE * SECOND) {
            test_fail(__FILE__, __LINE__, "a request was lost");
            dump("hang");
            return;
        }
        if (event_idx && party.done % 64 == 0) {
            sched_yield();
        }
    }
}

// Accessors in place of map that dawdle around the ring's 16-bit words, so that
// the other side gets in between two steps of the device's.
static uint32_t dawdled;

static void dawdle(uint64_t n) {
    dawdled = dawdled * 1664525u + 1013904223u;
    if (n == 2 && dawdled >> 30 == 0) {
        sched_yield();
    }
}

static int slow_read(void *user, uint64_t gpa, void *dst, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    dawdle(n);
    return m.read(m.user, gpa, dst, n);
}

static int slow_write(void *user, uint64_t gpa, const void *src, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    dawdle(n);
    int err = m.write(m.user, gpa, src, n);
    dawdle(n);
    return err;
}

static bool       party_is_slow;
static vblk_file *party_file; // in place of the memory disk

static void have_a_party(bool event_idx, bool resets, uint64_t requests,
                         int depth) {
    pthread_t thread[3];
    const char *more = getenv("VBLK_SOAK");
    uint64_t times = more ? strtoull(more, NULL, 0) : 1;
    memset(&party, 0, sizeof party);
    party.wanted = requests * (times ? times : 1);
    party.with_resets = resets;
    party.depth = depth;
    worker_options();
    if (party_is_slow) {
        o.memory.map = NULL;
        o.memory.read = slow_read;
        o.memory.write = slow_write;
    }
    if (party_file) {
        o.backend = vblk_file_backend(party_file);
    }
    make_worker();
    CHECK_EQ(0, pthread_create(&thread[0], NULL, acknowledge, NULL));
    CHECK_EQ(0, pthread_create(&thread[1], NULL, pause_and_resume, NULL));
    if (resets) {
        CHECK_EQ(0, pthread_create(&thread[2], NULL, ask_for_resets, NULL));
    }
    drive(event_idx);
    __atomic_store_n(&party.over, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < 2 + resets; i++) {
        pthread_join(thread[i], NULL);
    }
    vblk_counts c = vblk_counters(&w.dev);
    CHECK(c.reads + c.writes >= party.done);
    CHECK(resets || c.reads + c.writes <= party.done + (uint64_t)depth);
    CHECK_EQ(0, c.io_errors + c.broken_queues);
    finish();
}

void w_party_event_idx(void) {
    have_a_party(true, false, 40000, 8);
}

void w_party_event_idx_one_at_a_time(void) {
    have_a_party(true, false, 10000, 1);
}

void w_party_flags(void) {
    have_a_party(false, false, 40000, 16);
}

void w_party_with_slow_accessors(void) {
    party_is_slow = true;
    have_a_party(true, false, 1500, 1);
    have_a_party(false, false, 1500, 2);
    party_is_slow = false;
}

void w_party_with_resets(void) {
    have_a_party(true, true, 20000, 8);
}

// With io_uring and O_DIRECT, where they are to be had: resets cancel what the
// disk has.
void w12_party_on_a_file(void) {
    for (unsigned flags = 0; flags <= VBLK_FILE_DIRECT;
         flags += VBLK_FILE_DIRECT) {
        char      path[] = "./vblk_test_XXXXXX";
        vblk_file file;
        int       fd = mkstemp(path);
        CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
        close(fd);
        if (!vblk_file_open(&file, path, flags)) {
            party_file = &file;
            have_a_party(true, false, 3000, 16);
            have_a_party(false, true, 3000, 16);
            party_file = NULL;
            vblk_file_close(&file);
        }
        unlink(path);
    }
}

// F7: NEEDS_RESET from one thread, Status writes from another: never lost.
static void *break_it(void *arg) {
    (void)arg;
    vblk_worker_needs_reset(&w);
    return NULL;
}

void f7_needs_reset_races_status_writes(void) {
    worker_options();
    for (int i = 0; i < 300; i++) {
        pthread_t thread;
        make_worker();
        store(VBLK_REG_STATUS, 1);
        CHECK_EQ(0, pthread_create(&thread, NULL, break_it, NULL));
        store(VBLK_REG_STATUS, 3);
        store(VBLK_REG_STATUS, 0x83);
        pthread_join(thread, NULL);
        CHECK_EQ(0x40, load(VBLK_REG_STATUS) & 0x40);
        finish();
    }
}

// LIB-07: bits set by one thread and cleared by another.
static void *fire_often(void *arg) {
    (void)arg;
    for (int i = 0; i < 100000; i++) {
        vblk_needs_reset(&w.dev);
    }
    return NULL;
}

void q12_acknowledgements_race_interrupts(void) {
    worker_options();
    up();
    pthread_t thread;
    CHECK_EQ(0, pthread_create(&thread, NULL, fire_often, NULL));
    for (int i = 0; i < 100000; i++) {
        uint32_t bits = load(VBLK_REG_INTERRUPT_STATUS);
        store(VBLK_REG_INTERRUPT_ACK, bits);
    }
    pthread_join(thread, NULL);
    store(VBLK_REG_INTERRUPT_ACK, 3);
    CHECK_EQ(0, load(VBLK_REG_INTERRUPT_STATUS));
    CHECK(!vblk_interrupt_line(&w.dev));
    finish();
}
