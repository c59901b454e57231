// A disk limited to 2,000 operations and 8 MB a second, in real time, with a
// driver that always wants more. A line each second: what was asked, what
// passed, how long requests waited.
//
//     make throttle
//
// Half of the time the requests are small and the operations limit holds, half
// of the time they are large and the bytes limit does.
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { IOPS = 2000, BPS = 8000000, SECONDS = 8, QUEUE = 128, DISK = 1 << 20 };

static uint64_t ram_words[0x40000 / 8];
static uint8_t *const ram = (uint8_t *)ram_words;
static uint8_t disk[DISK];
static vblk_dev dev;
static uint16_t made; // available, in all

#define DESC   0x0000u // guest addresses
#define AVAIL  0x1000u
#define USED   0x2000u
#define HEADER 0x3000u
#define DATA   0x10000u

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void put(uint32_t gpa, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        ram[gpa + i] = (uint8_t)(value >> 8 * i);
    }
}

static void describe(uint32_t i, uint32_t gpa, uint32_t bytes,
                     uint32_t flags) {
    put(DESC + 16 * i, gpa, 8);
    put(DESC + 16 * i + 8, bytes, 4);
    put(DESC + 16 * i + 12, flags, 2);
    put(DESC + 16 * i + 14, i + 1, 2);
}

// Keep 32 reads of `bytes` waiting. Returns how many were added.
static unsigned ask(uint32_t bytes) {
    unsigned added = 0;
    uint16_t used = (uint16_t)(ram[USED + 2] | ram[USED + 3] << 8);
    describe(0, HEADER, 16, 1);
    describe(1, DATA, bytes, 3);
    describe(2, HEADER + 16, 1, 2);
    while ((uint16_t)(made - used) < 32) {
        put(AVAIL + 4 + 2u * (made % QUEUE), 0, 2);
        put(AVAIL + 2, ++made, 2);
        added++;
    }
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
    vblk_region region = {0, sizeof ram_words, ram};
    vblk_ram guest = {&region, 1};
    vblk_memdisk image = {disk, sizeof disk, false};
    vblk_options o = {0};
    o.memory = vblk_ram_memory(&guest);
    o.backend = vblk_memdisk_backend(&image);
    o.limits.iops = IOPS;
    o.limits.bps = BPS;
    int err = vblk_init(&dev, &o);
    if (err) {
        fprintf(stderr, "throttle: %s\n", vblk_strerror(err));
        return 1;
    }
    vblk_ring ring = {QUEUE, DESC, AVAIL, USED, 0};
    vblk_set_status(&dev, 1);
    vblk_set_status(&dev, 3);
    vblk_accept(&dev, vblk_features(&dev) & ~VBLK_F_EVENT_IDX);
    vblk_set_status(&dev, 0xb);
    vblk_queue_start(&dev, 0, &ring);
    vblk_set_status(&dev, 0xf);

    printf("limit: %d operations/s, %d bytes/s; the first second's worth is "
           "saved up\n%4s %6s %8s %10s %9s\n", IOPS, BPS, "s", "asked",
           "passed", "bytes", "waited ms");
    uint64_t start = now();
    vblk_counts last = vblk_counters(&dev), settled = last;
    for (int s = 0; s < SECONDS; s++) {
        uint32_t bytes = s < SECONDS / 2 ? 512 : 16384;
        unsigned asked = 0;
        uint64_t end = start + (uint64_t)(s + 1) * 1000000000u, t;
        while ((t = now()) < end) {
            asked += ask(bytes);
            vblk_outcome out = vblk_drain(&dev, 0, t);
            if (out.state == VBLK_STALLED) {
                uint64_t left = end - t;
                vblk__sleep(out.wait_ns < left ? out.wait_ns : left);
            }
        }
        vblk_counts c = vblk_counters(&dev);
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
    return 0;
}
