// An asynchronous host: three threads move the data, without pointers into
// guest memory; the loop's thread has the device. A driver resets it while
// requests are under way, again and again, and finds its memory its own.
//
// vblk_publish() shows what is complete; vblk_arm() also has the driver notify
// from then on, and says when to look again, so it is called before waiting for
// the driver. With no slot free, wait for what is under way alone. A request
// points to its segments, which lie in an array of the host's: take both to
// where they stay. They may go once the result is whole. Without the backend's
// size, the backing counts as long as the capacity.
//
//     make pool
#define VBLK_IMPLEMENTATION
#include "../vblk.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { THREADS = 3, JOBS = 16, SEGS = 6, ROUNDS = 200, BYTES = 4096 };

typedef struct job {
    enum { FREE, WAITING, RUNNING, ENDED } state;
    vblk_request req;
    vblk_seg     seg[SEGS]; // of req
    int64_t      result;
} job;

static uint64_t        ram[1 << 15]; // 256 KiB at 0
static vblk_dev        dev;
static int             image;
static job             jobs[JOBS]; // all of it under `lock`, but for a RUNNING
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  changed = PTHREAD_COND_INITIALIZER;


// ---- The pool ---------------------------------------------------------------

static int64_t move(const vblk_request *r) {
    uint8_t buffer[BYTES];
    off_t   at = (off_t)r->offset;
    size_t  n = (size_t)r->bytes; // at most BYTES, by what is offered below
    ssize_t done;
    if (r->type == VBLK_T_FLUSH) {
        return fsync(image) ? -errno : 0;
    }
    if (r->type == VBLK_T_OUT && vblk_get(&dev, r, 0, buffer, n)) {
        return -EFAULT;
    }
    done = r->type == VBLK_T_OUT ? pwrite(image, buffer, n, at)
                                 : pread(image, buffer, n, at);
    if (r->type == VBLK_T_IN && done > 0 &&
        vblk_put(&dev, r, 0, buffer, (size_t)done)) {
        return -EFAULT;
    }
    return done < 0 ? -errno : done;
}

static job *find(int state) {
    unsigned i = 0;
    while (i < JOBS && (int)jobs[i].state != state) {
        i++;
    }
    return i < JOBS ? &jobs[i] : NULL;
}

static void *work(void *unused) {
    pthread_mutex_lock(&lock);
    for (;;) {
        job *j;
        while (!(j = find(WAITING))) {
            pthread_cond_wait(&changed, &lock);
        }
        j->state = RUNNING;
        pthread_mutex_unlock(&lock);
        j->result = move(&j->req);
        pthread_mutex_lock(&lock);
        j->state = ENDED;
        pthread_cond_broadcast(&changed);
    }
    return unused;
}

// The driver takes its memory back: nothing more begins, what has begun ends.
static int quiesce(void *user, int queue) {
    job *j;
    (void)user, (void)queue;
    pthread_mutex_lock(&lock);
    while ((j = find(WAITING)) != NULL) {
        j->state = FREE;
    }
    while (find(RUNNING)) {
        pthread_cond_wait(&changed, &lock);
    }
    while ((j = find(ENDED)) != NULL) {
        j->state = FREE;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

// One turn of the loop: hand out, collect, and when to look again.
static uint64_t turn(uint64_t now) {
    job *j;
    pthread_mutex_lock(&lock);
    while ((j = find(FREE)) != NULL &&
           vblk_next(&dev, 0, now, &j->req, j->seg, SEGS)) {
        j->state = WAITING;
        pthread_cond_broadcast(&changed);
    }
    while ((j = find(ENDED)) != NULL) {
        vblk_complete(&dev, &j->req, j->result);
        j->state = FREE;
    }
    pthread_mutex_unlock(&lock);
    return vblk_arm(&dev, 0, now);
}


// ---- A driver ---------------------------------------------------------------

static uint8_t *at(unsigned gpa) {
    return (uint8_t *)ram + gpa;
}

static void put(unsigned gpa, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        at(gpa)[i] = (uint8_t)(value >> 8 * i);
    }
}

// Sixteen reads or writes of 4 KiB: descriptors at 0, headers and status bytes
// at 0x4000, data from 0x10000 on.
static void start_requests(unsigned type) {
    static const uint32_t steps[][2] = {
        {0x70, 1},      {0x70, 3},  {0x24, 1},    {0x20, 1},
        {0x70, 0xb},    {0x38, 64}, {0x90, 0x1000}, {0xa0, 0x2000},
        {0x44, 1},      {0x70, 0xf}};
    put(0x1000, 0, 4), put(0x2000, 0, 4);
    for (unsigned i = 0; i < JOBS; i++) {
        unsigned d = 48 * i, header = 0x4000 + 32 * i;
        put(d, header, 8), put(d + 8, 16, 4);
        put(d + 12, 1 | (3 * i + 1) << 16, 4);
        put(d + 16, 0x10000 + BYTES * i, 8), put(d + 24, BYTES, 4);
        put(d + 28, (type ? 1 : 3) | (3 * i + 2) << 16, 4);
        put(d + 32, header + 16, 8), put(d + 40, 1, 4), put(d + 44, 2, 4);
        put(header, type, 8), put(header + 8, 8 * i, 8);
        put(0x1004 + 2 * i, 3 * i, 2);
    }
    put(0x1002, JOBS, 2);
    for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_mmio_write(&dev, steps[i][0], 4, steps[i][1]);
    }
}

int main(void) {
    char         path[] = "/tmp/vblk_pool_XXXXXX";
    vblk_region  region = {.bytes = sizeof ram, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_options o = {0};
    vblk_ramdisk only = {.bytes = 1 << 20}; // says what there is, not called
    pthread_t    thread;
    unsigned     completed = 0;
    image = mkstemp(path);
    if (image < 0 || ftruncate(image, 1 << 20)) {
        perror(path);
        return 1;
    }
    unlink(path);
    o.memory = vblk_regions_memory(&guest);
    o.memory.map = NULL;
    o.backend = vblk_ramdisk_backend(&only);
    o.backend.discard = o.backend.write_zeroes = NULL; // move() does neither
    o.seg_max = SEGS - 2;
    o.quiesce = quiesce;
    int err = vblk_init(&dev, &o);
    if (err) {
        fprintf(stderr, "pool: %s\n", vblk_strerror(err));
        return 1;
    }
    for (int i = 0; i < THREADS; i++) {
        if (pthread_create(&thread, NULL, work, NULL)) {
            return 1;
        }
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned wanted = round % (JOBS + 1);
        start_requests(round & 1);
        while (at(0x2002)[0] < wanted) { // used.idx
            turn(0);
        }
        turn(0);
        completed += at(0x2002)[0];
        vblk_mmio_write(&dev, 0x70, 4, 0); // a reset, with some under way
        for (size_t i = 0; i < sizeof ram; i++) {
            at(0)[i] = 0x5a; // the driver's own, as of now
        }
        usleep(200);
        for (size_t i = 0; i < sizeof ram; i++) {
            if (at(0)[i] != 0x5a) {
                fprintf(stderr, "pool: written after a reset\n");
                return 1;
            }
        }
    }
    vblk_counts c = vblk_counters(&dev);
    printf("%d resets, %u of %d requests completed before one, %llu errors\n",
           ROUNDS, completed, ROUNDS * JOBS, (unsigned long long)c.io_errors);
    return c.reads + c.writes != completed || c.io_errors != 0;
}
