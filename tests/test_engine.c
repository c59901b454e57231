// The engine: many requests at once, over a kernel that is wrong on purpose
// (uring.c), over the real one, and by a backend.
#include "guest.h"

#include "tests.h"
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

static vblk_engine engine;
static vblk_file   file;
static char        path[64];
static uint8_t     shadow[SECTORS * 512]; // what the file has to hold

static int on_quiesce(void *user, int queue) {
    (void)user;
    return vblk_engine_quiesce(&engine, queue, 1000);
}

static bool make_image(const char *where, unsigned flags) {
    snprintf(path, sizeof path, "%s/vblk_test_XXXXXX", where);
    int fd = mkstemp(path);
    for (size_t i = 0; i < sizeof shadow; i++) {
        shadow[i] = (uint8_t)(i / 512 * 7 + i);
    }
    CHECK(fd >= 0 && write(fd, shadow, sizeof shadow) == sizeof shadow);
    close(fd);
    bool ok = vblk_file_open(&file, path, flags) == VBLK_OK;
    if (!ok) {
        unlink(path);
    }
    return ok;
}

static void options(void) {
    memset(&engine, 0, sizeof engine);
    g.o.backend = vblk_file_backend(&file);
    g.o.quiesce = on_quiesce;
}

static int open_engine(bool uring) {
    return vblk_engine_open(&engine, &g.dev, VBLK_ALL_QUEUES, uring);
}

// A device over a file, and an engine on the kernel of uring.c.
static void engine_up(uint64_t declined) {
    CHECK(make_image("/tmp", 0));
    options();
    guest_up_without(declined);
    uring_start(file.fd);
    CHECK_EQ(VBLK_OK, open_engine(true));
    engine.now = uring_now;
    engine.look_on_ns = 0;
}

// It holds what was written.
static void drop_image(void) {
    uint8_t *now = malloc(sizeof shadow);
    int      fd = open(path, O_RDONLY);
    CHECK_EQ(sizeof shadow, pread(fd, now, sizeof shadow, 0));
    CHECK_MEM(shadow, now, sizeof shadow);
    free(now);
    close(fd);
    vblk_file_close(&file);
    unlink(path);
}

static void engine_down(void) {
    vblk_engine_quiesce(&engine, VBLK_ALL_QUEUES, 1000);
    CHECK_EQ(VBLK_OK, vblk_engine_close(&engine));
    uring_stop();
    drop_image();
}

// Until nothing more happens.
static void poll_all(void) {
    for (int i = 0; i < 200; i++) {
        vblk_engine_poll(&engine);
        kernel.now += kernel.on ? 1000 : 0;
    }
}

static void wait_for_all(void) {
    uint64_t end = clock_ns() + 5 * SECOND;
    while (vblk_engine_poll(&engine) == 0 ||
           (engine.under_way && clock_ns() < end)) {
        if (engine.under_way && engine.ring_fd >= 0) {
            vblk_engine_wait(&engine, 0, clock_ns() + SECOND / 100);
        }
    }
}

typedef struct sent {
    req      r;
    uint32_t type;
    uint64_t sector;
} sent;

// `n` requests of any kind, of sectors of their own, in `queue`.
static void send_some(sent *s, unsigned n, unsigned queue) {
    uint64_t sector = test_below(100);
    for (unsigned i = 0; i < n; i++) {
        uint32_t kind = test_below(10), bytes = 512 * (1 + test_below(8));
        s[i].type = kind < 5 ? VBLK_T_IN : kind < 9 ? VBLK_T_OUT
                                                     : VBLK_T_FLUSH;
        s[i].sector = sector;
        s[i].r = prepare(s[i].type, sector,
                         s[i].type == VBLK_T_FLUSH ? 0 : bytes);
        if (s[i].type == VBLK_T_OUT) {
            fill(s[i].r.data, (uint8_t)test_random(), bytes);
            memcpy(shadow + sector * 512, at(s[i].r.data), bytes);
        }
        if (bytes > 512 && s[i].type != VBLK_T_FLUSH && test_below(2)) {
            uint16_t way = s[i].type == VBLK_T_IN ? WRITE : 0; // in pieces
            uint32_t cut = 1 + test_below(bytes - 2);
            part p[] = {{s[i].r.header, 16, 0}, {s[i].r.data, cut, way},
                        {s[i].r.data + cut, bytes - cut, way},
                        {s[i].r.status, 1, WRITE}};
            submit(queue, p, 4);
        } else {
            send(queue, &s[i].r);
        }
        sector += bytes / 512 + test_below(30);
    }
    wr(VBLK_REG_QUEUE_NOTIFY, queue);
}

static void check_sent(const sent *s, unsigned n) {
    for (unsigned i = 0; i < n; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&s[i].r));
        if (s[i].type == VBLK_T_IN) {
            CHECK_MEM(shadow + s[i].sector * 512, at(s[i].r.data),
                      s[i].r.bytes);
        }
    }
}

static void rounds(unsigned n, void (*settle)(void)) {
    static sent s[40];
    uint64_t    bump = g.bump;
    for (unsigned i = 0; i < n; i++) {
        unsigned many = 1 + test_below(COUNT(s));
        g.bump = i % 8 ? g.bump : bump; // its memory is used again
        send_some(s, many, 0);
        settle();
        CHECK_EQ(many, used_count(0));
        g.queue[0].used_idx = (uint16_t)(g.queue[0].used_idx + many);
        check_sent(s, many);
    }
}

void e1_many_at_once(void) {
    engine_up(0);
    kernel.shorts = 40;
    rounds(20, poll_all);
    CHECK(g.mapped == (kernel.transfers > 100));
    CHECK(kernel.syncs > 5);
    CHECK_EQ(0, counts().io_errors);
    engine_down();
}

// Vectors of what has ended serve again, and what io_uring has done is not done
// once more by the backend, which fails here.
void e1_all_of_it_by_the_kernel(void) {
    engine_up(0);
    if (g.mapped) {
        test_calls_fail("preadv", EIO, 0, 1);
    }
    uint64_t bump = g.bump;
    for (unsigned round = 0; round < 60; round++) { // there are 2,048
        req r[40];
        g.bump = bump;
        for (unsigned i = 0; i < 40; i++) {
            r[i] = prepare(VBLK_T_IN, i, 512);
            part p[] = {{r[i].header, 16, 0}, {r[i].data, 100, WRITE},
                        {r[i].data + 100, 412, WRITE},
                        {r[i].status, 1, WRITE}};
            submit(0, p, 4);
        }
        wr(VBLK_REG_QUEUE_NOTIFY, 0);
        poll_all();
        CHECK_EQ(40, used_count(0));
        CHECK_EQ(VBLK_S_OK, status_of(&r[0]) | status_of(&r[39]));
        g.queue[0].used_idx = (uint16_t)(g.queue[0].used_idx + 40);
    }
    CHECK_EQ(g.mapped ? 1 : 0, test_calls_left());
    test_calls_fail("", 0, 0, 0);
    engine_down();
}

void e1_many_at_once_by_the_backend(void) {
    CHECK(make_image("/tmp", 0));
    options();
    guest_up();
    CHECK_EQ(VBLK_OK, open_engine(false));
    rounds(10, wait_for_all);
    engine_down();
}

// Where the kernel and the file system of build/ have what it takes.
void e1_many_at_once_by_the_kernel(void) {
    for (unsigned direct = 0; direct < 2; direct++) {
        guest_init();
        if (!make_image(".", direct ? VBLK_FILE_DIRECT : 0)) {
            continue;
        }
        options();
        guest_up();
        int err = open_engine(true);
        CHECK(err == VBLK_OK || err == VBLK_ERR_URING);
        rounds(10, wait_for_all);
        CHECK_EQ(0, counts().io_errors);
        engine_down();
    }
}

// They end in another order than they began, and each queue hears of its own.
void e1_several_queues(void) {
    static sent s[3][12];
    g.o.queues = 3;
    engine_up(0);
    for (unsigned i = 0; i < 3; i++) {
        send_some(s[i], 12, i);
        poll_all();
        CHECK_EQ(12, used_count(i));
        check_sent(s[i], 12);
    }
    kernel.hold = 1;
    req first = request(VBLK_T_IN, 3, 512), second = prepare(VBLK_T_IN, 5, 512);
    send(2, &second);
    poll_all();
    if (g.mapped) {
        CHECK_EQ(0xff, status_of(&first));
        CHECK_EQ(12, used_count(0));
    }
    CHECK_EQ(VBLK_S_OK, status_of(&second));
    CHECK_EQ(13, used_count(2));
    kernel.cancels = true;
    engine_down();
}

// One call moves 4 MiB, as it may copy before it returns; after 64 MiB nothing
// more is begun; and no queue has all of that.
void e1_large_requests_take_turns(void) {
    enum { PIECES = 20, PIECE = 0x40000, REQUESTS = 20 }; // of 5 MiB
    uint64_t status[2][REQUESTS], data;
    part     p[PIECES + 2];
    g.o.queues = 2;
    g.o.capacity = 8 << 11;
    engine_up(0);
    data = alloc(PIECE, 512);
    for (unsigned i = 0; i < 2 * REQUESTS; i++) {
        p[0] = (part){put_header(VBLK_T_IN, 0), 16, 0};
        for (unsigned k = 1; k <= PIECES; k++) {
            p[k] = (part){data, PIECE, WRITE};
        }
        status[i / REQUESTS][i % REQUESTS] = alloc(1, 1);
        p[PIECES + 1] = (part){status[i / REQUESTS][i % REQUESTS], 1, WRITE};
        part whole = {put_table(p, PIECES + 2), 16 * (PIECES + 2), INDIRECT};
        submit(i / REQUESTS, &whole, 1);
    }
    kernel.hold = 1000;
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    wr(VBLK_REG_QUEUE_NOTIFY, 1);
    poll_all();
    if (g.mapped) {
        CHECK_EQ(4 << 20, kernel.largest);
        CHECK_EQ(13, kernel.under_way); // 12 would be 60 MiB
        CHECK(g.dev.queue[0].run.under_way >= 6);
        CHECK(g.dev.queue[1].run.under_way >= 6);
    }
    kernel.let_go = 1;
    kernel.hold = 0;
    CHECK_EQ(VBLK_OK, vblk_engine_quiesce(&engine, 0, 1000));
    poll_all();
    CHECK_EQ(REQUESTS, used_count(0));
    CHECK_EQ(REQUESTS, used_count(1));
    for (unsigned i = 0; i < 2 * REQUESTS; i++) {
        CHECK_EQ(VBLK_S_OK, *at(status[i / REQUESTS][i % REQUESTS]));
    }
    engine_down();
}

static bool is_idle(const req *r) {
    return status_of(r) == 0xff;
}

// X4: without FLUSH each write is durable when it is completed.
void e2_one_sync_for_many(void) {
    req r[16];
    engine_up(VBLK_F_FLUSH);
    kernel.hold_syncs = true;
    for (unsigned i = 0; i < 16; i++) {
        r[i] = request(VBLK_T_OUT, i, 512);
        memcpy(shadow + i * 512, at(r[i].data), 512);
    }
    poll_all();
    for (unsigned i = 0; i < 16 && g.mapped; i++) {
        CHECK(is_idle(&r[i]));
    }
    CHECK(!g.mapped || kernel.syncs == 1);
    kernel.hold_syncs = false;
    kernel.cancels = true;
    vblk_engine_quiesce(&engine, VBLK_ALL_QUEUES, 1); // of the first only
    engine_down();
}

void e2_a_flush_covers_what_was_completed(void) {
    engine_up(VBLK_F_FLUSH);
    req r[16];
    for (unsigned i = 0; i < 16; i++) {
        r[i] = request(VBLK_T_OUT, i, 512);
        memcpy(shadow + i * 512, at(r[i].data), 512);
    }
    poll_all();
    for (unsigned i = 0; i < 16; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&r[i]));
    }
    CHECK(kernel.syncs >= 1 && kernel.syncs <= 16);
    engine_down();
}

// B2: once a flush failed, each fails; a write is no success without it.
void e2_a_sync_that_fails(void) {
    engine_up(0);
    kernel.sync_error = EIO;
    req a = request(VBLK_T_FLUSH, 0, 0);
    poll_all();
    kernel.sync_error = 0;
    req b = request(VBLK_T_FLUSH, 0, 0);
    poll_all();
    CHECK_EQ(VBLK_S_IOERR, status_of(&a));
    CHECK_EQ(VBLK_S_IOERR, status_of(&b));
    CHECK_EQ(2, g.events[VBLK_EV_FLUSH_FAILED]);
    CHECK_EQ(EIO, g.last.error);
    engine_down();
}

void e3_failures_and_what_is_tried_again(void) {
    static const int again[] = {EAGAIN, EINTR};
    engine_up(0);
    for (unsigned i = 0; i < 2; i++) {
        kernel.error = again[i];
        req r = request(VBLK_T_IN, 7, 4096);
        poll_all();
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_MEM(shadow + 7 * 512, at(r.data), 4096);
    }
    kernel.error = EIO;
    req r = request(VBLK_T_IN, 9, 512);
    poll_all();
    CHECK_EQ(g.mapped ? VBLK_S_IOERR : VBLK_S_OK, status_of(&r));
    CHECK_EQ(g.mapped, g.events[VBLK_EV_READ_FAILED]);
    CHECK_EQ(0, engine.under_way);
    kernel.error = 0;
    engine_down();
}

// X2: what never was there is zeroes, what was and is not any more an error.
void e3_the_end_of_the_file(void) {
    g.o.capacity = SECTORS + 8;
    engine_up(0);
    kernel.shorts = 100;
    req r = request(VBLK_T_IN, SECTORS - 1, 1024);
    poll_all();
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(shadow + sizeof shadow - 512, at(r.data), 512);
    CHECK(*at(r.data + 512) == 0 && *at(r.data + 1023) == 0);
    CHECK_EQ(0, ftruncate(file.fd, 512));
    req gone = request(VBLK_T_IN, 5, 512);
    poll_all();
    CHECK_EQ(0, ftruncate(file.fd, sizeof shadow)); // that brings nothing back
    req flush = request(VBLK_T_FLUSH, 0, 0);
    poll_all();
    CHECK_EQ(VBLK_S_IOERR, status_of(&gone));
    CHECK_EQ(VBLK_S_IOERR, status_of(&flush));
    CHECK_EQ(sizeof shadow, pwrite(file.fd, shadow, sizeof shadow, 0));
    engine_down();
}

// W7: after a reset no byte changes; the next driver finds a whole device.
// B3: what a sync was to make durable is gone when it ends.
void e3_a_file_that_is_cut_while_it_is_synced(void) {
    engine_up(0);
    kernel.hold_syncs = true;
    req flush = request(VBLK_T_FLUSH, 0, 0);
    poll_all();
    CHECK_EQ(0, ftruncate(file.fd, 512));
    kernel.let_go = 1;
    CHECK_EQ(VBLK_OK, vblk_engine_quiesce(&engine, 0, 1000));
    CHECK_EQ(VBLK_S_IOERR, status_of(&flush));
    CHECK_EQ(sizeof shadow, pwrite(file.fd, shadow, sizeof shadow, 0));
    engine_down();
}

void e4_a_reset_forgets_what_is_under_way(void) {
    engine_up(0);
    kernel.hold = 8;
    kernel.hold_syncs = kernel.cancels = true;
    for (unsigned i = 0; i < 8; i++) {
        request(VBLK_T_IN, i, 512);
    }
    req f = request(VBLK_T_FLUSH, 0, 0);
    poll_all();
    unsigned used = used_count(0);
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, engine.under_way);
    CHECK_EQ(used, used_count(0));
    CHECK_EQ(0, counts().io_errors); // nor does the host hear of failures
    CHECK(is_idle(&f));
    CHECK_EQ(g.mapped ? 9 : 1, kernel.cancelled);
    kernel.hold_syncs = false; // and the disk is as good as before
    guest_negotiate(0);
    guest_queue_up(0, 256);
    guest_go();
    rounds(2, poll_all);
    engine_down();
}

// W8: then the device is nobody's until it has ended.
void e4_a_reset_that_cannot_wait(void) {
    engine_up(0);
    kernel.hold = 1;
    req r = request(VBLK_T_IN, 1, 512);
    poll_all();
    uint64_t before = kernel.now;
    wr(VBLK_REG_STATUS, 0);
    if (g.mapped) {
        CHECK(kernel.now - before >= SECOND);
        CHECK(kernel.now - before < 2 * SECOND);
        CHECK_EQ(VBLK_STATUS_NEEDS_RESET, rd(VBLK_REG_STATUS));
        CHECK_EQ((uint64_t)VBLK_ERR_BUSY, (uint64_t)vblk_engine_close(&engine));
        CHECK(is_idle(&r));
        CHECK_EQ(VBLK_NEVER, vblk_engine_poll(&engine)); // and does not spin
        kernel.error = EAGAIN; // what is nobody's is not tried again
        kernel.let_go = 1;
        CHECK_EQ(VBLK_OK, vblk_engine_quiesce(&engine, 0, 1000));
        CHECK_EQ(DIRT, *at(r.data));
        CHECK_EQ(0, used_count(0));
    }
    kernel.cancels = true;
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    engine_down();
}

void e4_a_stop_completes_what_is_under_way(void) {
    engine_up(0);
    kernel.ends = 0;
    req r = request(VBLK_T_IN, 1, 512), f = request(VBLK_T_FLUSH, 0, 0);
    vblk_engine_poll(&engine);
    kernel.ends = 50;
    vblk_ring ring;
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(2, ring.position);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(VBLK_S_OK, status_of(&f));
    CHECK_EQ(2, used_count(0));
    engine_down();
}

void e4_new_memory_with_nothing_under_way(void) {
    engine_up(0);
    kernel.ends = 0;
    req r = request(VBLK_T_IN, 1, 512);
    vblk_engine_poll(&engine);
    vblk_memory same = g.dev.memory;
    kernel.ends = 50;
    CHECK_EQ(VBLK_OK, vblk_engine_quiesce(&engine, 0, 1000));
    CHECK_EQ(VBLK_OK, vblk_set_memory(&g.dev, same));
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(513, used_len(0));
    rounds(1, poll_all);
    engine_down();
}

// Q2: either the driver sees that they are on, or the device sees its entry.
void e5_notifications_are_on_before_it_sleeps(void) {
    engine_up(0);
    for (unsigned i = 0; i < 20; i++) {
        uint64_t event = g.queue[0].used + 4 + 8 * 256;
        CHECK_EQ(VBLK_NEVER, vblk_engine_poll(&engine));
        CHECK_EQ(i, get16(event));
        req r = request(VBLK_T_FLUSH, 0, 0);
        poll_all();
        CHECK_EQ(VBLK_S_OK, status_of(&r));
    }
    // With no slot free it waits for what is under way, and not for the driver.
    if (g.mapped) {
        kernel.hold = 250;
        for (unsigned i = 0; i < 253; i++) {
            static const uint8_t in[16] = {0};
            part p[] = {{alloc(16, 1), 16, 0}, {alloc(512, 1), 512, WRITE},
                        {alloc(1, 1), 1, WRITE}};
            put(p[0].gpa, in, 16);
            part table = {put_table(p, 3), 48, INDIRECT};
            submit(0, &table, 1);
        }
        poll_all();
        CHECK_EQ(250, engine.under_way);
        CHECK_EQ(VBLK_NEVER, vblk_engine_poll(&engine));
    }
    kernel.cancels = true;
    engine_down();
}

static uint64_t ticking(void) {
    kernel.now += 1000;
    return kernel.now;
}

// With nothing under way it looks on for a while before it switches them on.
void e5_it_looks_on(void) {
    engine_up(0);
    engine.now = ticking;
    engine.look_on_ns = 50000;
    kernel.ends = 100;
    req      r = request(VBLK_T_FLUSH, 0, 0);
    uint64_t start = kernel.now;
    CHECK_EQ(VBLK_NEVER, vblk_engine_poll(&engine));
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK(kernel.now - start >= 50000 && kernel.now - start < 100000);
    start = kernel.now; // and not for nothing again
    CHECK_EQ(VBLK_NEVER, vblk_engine_poll(&engine));
    CHECK(kernel.now - start < 10000);
    engine_down();
}

void e5_a_wait_ends(void) {
    guest_init();
    engine_up(0);
    int fd = eventfd(0, EFD_NONBLOCK);
    kernel.ends = 100;
    uint64_t start = kernel.now;
    CHECK(!vblk_engine_wait(&engine, fd, start + 5000));
    CHECK_EQ(start + 5000, kernel.now);
    eventfd_write(fd, 1);
    CHECK(vblk_engine_wait(&engine, fd, VBLK_NEVER));
    CHECK(vblk_engine_wait(&engine, fd, VBLK_NEVER)); // it was not read
    eventfd_t n;
    eventfd_read(fd, &n);
    CHECK(!vblk_engine_wait(&engine, fd, kernel.now)); // does not wait
    kernel.ends = 0;
    req r = request(VBLK_T_FLUSH, 0, 0);
    vblk_engine_poll(&engine);
    kernel.ends = 100;
    CHECK(!vblk_engine_wait(&engine, fd, VBLK_NEVER)); // the sync
    poll_all();
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    close(fd);
    engine_down();

    CHECK(make_image("/tmp", 0)); // and without a ring
    guest_init();
    options();
    guest_up();
    CHECK_EQ(VBLK_OK, open_engine(false));
    fd = eventfd(0, EFD_NONBLOCK);
    start = clock_ns();
    CHECK(!vblk_engine_wait(&engine, fd, start + 2000000));
    CHECK(clock_ns() - start >= 2000000);
    eventfd_write(fd, 1);
    CHECK(vblk_engine_wait(&engine, fd, VBLK_NEVER));
    close(fd);
    engine_down();
}

// A code, and all is done by the backend.
void e6_without_io_uring(void) {
    static const int why[] = {ENOSYS, EPERM, ENOMEM};
    for (unsigned i = 0; i < COUNT(why); i++) {
        guest_init();
        CHECK(make_image("/tmp", 0));
        options();
        guest_up();
        uring_start(file.fd);
        kernel.setup_errno = why[i];
        CHECK_EQ((uint64_t)VBLK_ERR_URING, (uint64_t)open_engine(true));
        CHECK_EQ(why[i], errno);
        uring_stop();
        rounds(2, wait_for_all);
        engine_down();
    }
    guest_init(); // a backend that is no file
    guest_up();
    CHECK_EQ((uint64_t)VBLK_ERR_URING, (uint64_t)open_engine(true));
    CHECK_EQ(EOPNOTSUPP, errno);
    req r = request(VBLK_T_IN, 0, 512);
    vblk_engine_poll(&engine);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(VBLK_OK, vblk_engine_close(&engine));
    test_calls_fail("calloc", ENOMEM, 1, 1);
    CHECK_EQ((uint64_t)VBLK_ERR_WORKER, (uint64_t)open_engine(false));
    CHECK_EQ(0, test_calls_left());
}

// T4: what waits goes when its time has come, and nothing passes it.
void e6_limits(void) {
    g.o.limits.iops = 10;
    engine_up(0);
    for (unsigned i = 0; i < 12; i++) {
        request(VBLK_T_IN, i, 512);
    }
    for (unsigned i = 0; i < 20; i++) {
        vblk_engine_poll(&engine);
    }
    CHECK_EQ(10, used_count(0));
    for (unsigned i = 11; i <= 12; i++) {
        uint64_t next = vblk_engine_poll(&engine);
        CHECK(next > kernel.now && next <= kernel.now + SECOND / 10);
        kernel.now = next - 1;
        vblk_engine_poll(&engine);
        CHECK_EQ(i - 1, used_count(0));
        kernel.now = next;
        for (unsigned j = 0; j < 20; j++) {
            vblk_engine_poll(&engine);
        }
        CHECK_EQ(i, used_count(0));
    }
    engine_down();
}

static jmp_buf out;

static int64_t jump_out(void *user, uint64_t offset, const vblk_seg *seg,
                        unsigned segs) {
    (void)user;
    (void)offset;
    (void)seg;
    (void)segs;
    longjmp(out, 1);
}

// As whoever catches the fault of a page of guest memory does.
void e6_a_turn_that_was_left_gives_the_limits_back(void) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    g.o.limits.iops = 10;
    g.o.backend.read = jump_out;
    guest_up();
    CHECK_EQ(VBLK_OK, open_engine(false));
    engine.lock = &lock;
    request(VBLK_T_IN, 0, 512);
    if (setjmp(out) == 0) {
        vblk_engine_poll(&engine);
    }
    CHECK_EQ(EBUSY, pthread_mutex_trylock(&lock));
    CHECK_EQ(VBLK_OK, vblk_engine_quiesce(&engine, VBLK_ALL_QUEUES, 0));
    CHECK_EQ(0, pthread_mutex_trylock(&lock));
    pthread_mutex_unlock(&lock);
    CHECK_EQ(VBLK_OK, vblk_engine_close(&engine));
}

// What the kernel has under way for a process that was killed changes the file
// still: so long nobody else may have it, and no longer.
void e8_a_lock_lasts_as_long_as_the_ring(void) {
    if (!make_image(".", 0)) {
        return;
    }
    options();
    guest_up();
    int other = open(path, O_RDWR);
    CHECK_EQ(0, flock(file.fd, LOCK_EX | LOCK_NB));
    if (open_engine(true) == VBLK_OK) {
        rounds(2, wait_for_all);
        vblk_file_close(&file);
        CHECK(flock(other, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK);
        CHECK_EQ(VBLK_OK, vblk_engine_close(&engine));
        CHECK_EQ(0, flock(other, LOCK_EX | LOCK_NB));
    } else {
        CHECK_EQ(VBLK_OK, vblk_engine_close(&engine));
        vblk_file_close(&file);
    }
    close(other);
    unlink(path);
}


// ---- O_DIRECT ---------------------------------------------------------------

// Whatever the buffer is aligned to, and in however many pieces it comes.
void e7_direct_io_takes_any_buffer(void) {
    if (!make_image(".", VBLK_FILE_DIRECT)) {
        return; // this file system has none
    }
    for (unsigned block = 512; block <= 4096; block *= 8) {
        if (block < file.block) {
            continue;
        }
        file.block = block;
        options();
        guest_up();
        CHECK_EQ(block, rd(VBLK_REG_CONFIG + 20));
        for (unsigned i = 0; i < 40; i++) {
            uint32_t sectors = block / 512; // in a block
            uint32_t bytes = block * (1 + test_below(40 / sectors));
            uint64_t sector = test_below(SECTORS - 40) / sectors * sectors;
            uint32_t type = test_below(2) ? VBLK_T_IN : VBLK_T_OUT;
            req      r = prepare(type, sector, bytes);
            if (type == VBLK_T_OUT) {
                fill(r.data, (uint8_t)i, bytes);
                memcpy(shadow + sector * 512, at(r.data), bytes);
            }
            send(0, &r);
            kick(0);
            CHECK_EQ(VBLK_S_OK, status_of(&r));
            if (type == VBLK_T_IN) {
                CHECK_MEM(shadow + sector * 512, at(r.data), bytes);
            }
            g.bump += test_below(3) * 100;
        }
        guest_init();
    }
    drop_image();
}

// Segments that are no blocks, over more than is copied at once.
void e7_direct_io_in_pieces(void) {
    if (!make_image(".", VBLK_FILE_DIRECT)) {
        return;
    }
    static uint8_t data[3 * 65536], back[sizeof data];
    static const size_t cuts[] = {448, 1, 4095, 40000, 3, 65536};
    vblk_backend b = vblk_file_backend(&file);
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)test_random();
    }
    for (int reads = 0; reads < 2; reads++) {
        vblk_seg seg[COUNT(cuts) + 1];
        uint8_t *p = reads ? back : data, *end = p + sizeof data;
        for (unsigned i = 0; i <= COUNT(cuts); i++) {
            seg[i].ptr = p;
            seg[i].n = i < COUNT(cuts) ? cuts[i] : (size_t)(end - p);
            p += seg[i].n;
        }
        int64_t n = (reads ? b.read : b.write)(b.user, 65536, seg,
                                               COUNT(cuts) + 1);
        CHECK_EQ(sizeof data, n);
    }
    CHECK_MEM(data, back, sizeof data);
    memcpy(shadow + 65536, data, sizeof data);
    drop_image();
}

void b6_block_size(void) {
    static const uint32_t bad[] = {1, 256, 513, 1536, 131072};
    for (unsigned i = 0; i < COUNT(bad); i++) {
        g.o.backend.block_size = bad[i];
        CHECK_EQ((uint64_t)VBLK_ERR_BACKEND,
                 (uint64_t)vblk_init(&g.dev, &g.o));
    }
    g.o.backend.block_size = 4096;
    guest_up();
    CHECK_EQ(4096, rd(VBLK_REG_CONFIG + 20));
    CHECK_EQ(SECTORS, rd(VBLK_REG_CONFIG)); // sectors are 512 bytes still
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 8, 8192));
    g.o.backend.block_size = 0;
    guest_up();
    CHECK_EQ(512, rd(VBLK_REG_CONFIG + 20));
}
