// A disk limited to 2,000 operations and 8 MB a second, in real time, with a
// driver that always wants more. A line each second: what was asked, what
// passed, how long requests waited.
//
//     make throttle
//
// Half of the time the requests are small and the operations limit holds, half
// of the time they are large and the bytes limit does. The worker's thread
// waits for the tokens; the driver only sees a slow disk.
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { IOPS = 2000, BPS = 8000000, SECONDS = 8, QUEUE = 128, DISK = 1 << 20 };

static uint64_t ram_words[0x40000 / 8];
static uint8_t *const ram = (uint8_t *)ram_words;
static uint8_t disk[DISK];
static vblk_worker w;
static uint16_t made; // available, in all

#define DESC   0x0000u // guest addresses
#define AVAIL  0x1000u
#define USED   0x2000u
#define HEADER 0x3000u
#define DATA   0x10000u

#define SECOND UINT64_C(1000000000) // nanoseconds

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static uint16_t *word(uint32_t gpa) {
    return (uint16_t *)(void *)(ram + gpa);
}

static void describe(uint32_t i, uint64_t gpa, uint64_t bytes,
                     uint64_t flags) {
    uint64_t d[2] = {gpa, bytes | flags << 32 | (uint64_t)(i + 1) << 48};
    memcpy(ram + DESC + 16 * i, d, sizeof d);
}

// Chains of three descriptors for reads of `bytes`, one of each pair idle.
static void lay_out(uint32_t first, uint32_t bytes) {
    describe(first, HEADER, 16, 1);
    describe(first + 1, DATA, bytes, 3);
    describe(first + 2, HEADER + 16, 1, 2);
}

static void bind_driver(void) {
    static const uint32_t steps[][2] = {
        {VBLK_REG_STATUS, 1}, {VBLK_REG_STATUS, 3},
        {VBLK_REG_DRIVER_FEATURES_SEL, 1}, {VBLK_REG_DRIVER_FEATURES, 1},
        {VBLK_REG_STATUS, 0xb}, {VBLK_REG_QUEUE_NUM, QUEUE},
        {VBLK_REG_QUEUE_DESC_LOW, DESC}, {VBLK_REG_QUEUE_DRIVER_LOW, AVAIL},
        {VBLK_REG_QUEUE_DEVICE_LOW, USED}, {VBLK_REG_QUEUE_READY, 1},
        {VBLK_REG_STATUS, 0xf}};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_worker_mmio_write(&w, steps[i][0], 4, steps[i][1]);
    }
}

// Keep 32 reads waiting, of the chain at `head`. Returns how many were added.
static unsigned ask(uint16_t head) {
    unsigned added = 0;
    uint16_t used = __atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE);
    while ((uint16_t)(made - used) < 32) {
        word(AVAIL + 4)[made++ % QUEUE] = head;
        added++;
    }
    __atomic_store_n(word(AVAIL + 2), made, __ATOMIC_RELEASE);
    vblk_worker_mmio_write(&w, VBLK_REG_QUEUE_NOTIFY, 4, 0);
    return added;
}

static void bar(double share) {
    char text[41];
    int n = (int)(share * 40);
    n = n > 40 ? 40 : n;
    memset(text, '#', (size_t)n);
    memset(text + n, '.', (size_t)(40 - n));
    text[40] = 0;
    printf("%s", text);
}

int main(void) {
    vblk_region region = {.bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.limits.iops = IOPS;
    o.limits.bps = BPS;
    int err = vblk_worker_init(&w, &o, NULL);
    if (err) {
        perror("throttle");
        fprintf(stderr, "throttle: %s\n", vblk_strerror(err));
        return 1;
    }
    lay_out(0, 512);
    lay_out(3, 16384);
    bind_driver();

    printf("limit: %d operations/s, %d bytes/s; the first second's worth is "
           "saved up\n%4s %6s %8s %10s %9s\n", IOPS, BPS, "s", "asked",
           "passed", "bytes", "waited ms");
    uint64_t start = clock_ns();
    const vblk_dev *dev = vblk_worker_dev(&w);
    vblk_counts last = vblk_counters(dev), settled = last;
    for (int s = 0; s < SECONDS; s++) {
        unsigned asked = 0;
        uint64_t count, end = start + (uint64_t)(s + 1) * SECOND, now;
        while ((now = clock_ns()) < end) {
            struct pollfd p = {w.irq_fd, POLLIN, 0};
            asked += ask(s < SECONDS / 2 ? 0 : 3);
            poll(&p, 1, (int)((end - now) / 1000000));
            if (read(w.irq_fd, &count, sizeof count) > 0) {
                vblk_worker_mmio_write(&w, VBLK_REG_INTERRUPT_ACK, 4, 3);
            }
        }
        vblk_counts c = vblk_counters(dev);
        uint64_t ops = c.reads - last.reads;
        uint64_t moved = c.bytes_read - last.bytes_read;
        double by_ops = (double)ops / IOPS, by_bytes = (double)moved / BPS;
        printf("%4d %6u %8" PRIu64 " %10" PRIu64 " %9" PRIu64 "  ", s + 1,
               asked, ops, moved, (c.throttled_ns - last.throttled_ns) /
               1000000);
        bar(by_ops > by_bytes ? by_ops : by_bytes);
        printf("%s\n", by_ops > 1.001 || by_bytes > 1.001 ? " + burst" : "");
        last = c;
        if (s + 1 == 2) {
            settled = c;
        }
        if (s + 1 == SECONDS / 2) {
            double rate = (double)(c.reads - settled.reads) / (s - 1);
            printf("     measured %.1f operations/s, limit %d\n", rate, IOPS);
        }
        if (s + 1 == SECONDS / 2 + 2) {
            settled = c;
        }
    }
    double rate = (double)(last.bytes_read - settled.bytes_read) /
                  (SECONDS / 2 - 2);
    printf("     measured %.0f bytes/s, limit %d\n", rate, BPS);
    return vblk_worker_close(&w) != VBLK_OK;
}
