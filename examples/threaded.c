// A host with a worker thread: memory, a file as disk, eventfds; and a driver
// in another thread that keeps 32 reads under way for three seconds.
//
//     make threaded
//
// In a VMM the two eventfds go to KVM: kick_fd as an ioeventfd on QueueNotify,
// irq_fd as an irqfd. Then neither a request nor an interrupt passes through
// the VMM's own code.
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DISK = 16 << 20, DEPTH = 32, QUEUE = 128, SECONDS = 3 };
#define DESC   0x0000u // guest addresses
#define AVAIL  0x1000u
#define USED   0x2000u
#define HEADER 0x3000u
#define DATA   0x10000u

static uint64_t ram_words[0x40000 / 8];
static uint8_t *const ram = (uint8_t *)ram_words;
static vblk_worker w;

#define SECOND UINT64_C(1000000000) // nanoseconds

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void put(uint32_t gpa, uint64_t value, unsigned bytes) {
    memcpy(ram + gpa, &value, bytes);
}

static uint16_t *word(uint32_t gpa) {
    return (uint16_t *)(void *)(ram + gpa);
}

static void store(uint32_t offset, uint32_t value) {
    vblk_worker_mmio_write(&w, offset, 4, value); // from the vCPU's exit
}

static void describe(unsigned slot) {
    uint32_t header = HEADER + 32 * slot, d = DESC + 48 * slot;
    uint32_t data = DATA + 4096 * slot;
    put(header + 8, slot * 8u, 8);
    put(d, header, 8);
    put(d + 8, 16 | UINT64_C(1) << 32 | (uint64_t)(3 * slot + 1) << 48, 8);
    put(d + 16, data, 8);
    put(d + 24, 4096 | UINT64_C(3) << 32 | (uint64_t)(3 * slot + 2) << 48, 8);
    put(d + 32, header + 16, 8);
    put(d + 40, 1 | UINT64_C(2) << 32, 8);
}

// Bind, then reuse each chain as it completes, waiting on the interrupt.
static uint64_t drive(uint64_t until) {
    static const uint32_t steps[][2] = {
        {VBLK_REG_STATUS, 1}, {VBLK_REG_STATUS, 3},
        {VBLK_REG_DRIVER_FEATURES_SEL, 1}, {VBLK_REG_DRIVER_FEATURES, 1},
        {VBLK_REG_STATUS, 0xb}, {VBLK_REG_QUEUE_NUM, QUEUE},
        {VBLK_REG_QUEUE_DESC_LOW, DESC}, {VBLK_REG_QUEUE_DRIVER_LOW, AVAIL},
        {VBLK_REG_QUEUE_DEVICE_LOW, USED}, {VBLK_REG_QUEUE_READY, 1},
        {VBLK_REG_STATUS, 0xf}};
    uint16_t made = 0, seen = 0;
    uint64_t count, done = 0, said = 0;
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        store(steps[i][0], steps[i][1]);
    }
    for (unsigned slot = 0; slot < DEPTH; slot++) {
        describe(slot);
        word(AVAIL + 4)[made++ % QUEUE] = (uint16_t)(3 * slot);
    }
    while (clock_ns() < until) {
        __atomic_store_n(word(AVAIL + 2), made, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (!(*word(USED) & 1)) { // NO_NOTIFY
            store(VBLK_REG_QUEUE_NOTIFY, 0);
        }
        struct pollfd p = {w.irq_fd, POLLIN, 0};
        poll(&p, 1, 1000);
        if (read(w.irq_fd, &count, sizeof count) < 0 && errno != EAGAIN) {
            return done;
        }
        store(VBLK_REG_INTERRUPT_ACK, 3);
        while (seen != __atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE)) {
            uint16_t head = *word(USED + 4 + 8 * (seen++ % QUEUE));
            word(AVAIL + 4)[made++ % QUEUE] = head;
            done++;
        }
        if (done - said > 50000 && isatty(1)) {
            said = done;
            printf("\r%" PRIu64 " reads", done);
            fflush(stdout);
        }
    }
    return done;
}

// Any thread: what the driver does wrong, and what the host is to know. A guest
// can make many; whoever prints them in earnest counts and leaves some out.
static void event(void *user, const vblk_event *e) {
    char line[400];
    (void)user;
    fprintf(stderr, "\nvblk%d: %s\n", w.number,
            vblk_event_line(e, line, sizeof line));
}

int main(void) {
    char path[] = "/tmp/vblk_threaded_XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, DISK)) {
        perror(path);
        return 1;
    }
    vblk_region region = {.bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_file file;
    vblk_options o = {0};
    int err = vblk_file_open(&file, path, 0);
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_file_backend(&file);
    o.event = event;
    err = err ? err : vblk_worker_init(&w, &o, NULL);
    if (err) {
        perror(err == VBLK_ERR_FILE ? path : "threaded");
        fprintf(stderr, "threaded: %s\n", vblk_strerror(err));
        return 1;
    }
    uint64_t done = drive(clock_ns() + SECONDS * SECOND);
    vblk_counts c = vblk_counters(vblk_worker_dev(&w));
    printf("\r%" PRIu64 " reads of 4 KiB in %d s: %" PRIu64 " a second; the "
           "device counted %" PRIu64 "\n", done, SECONDS, done / SECONDS,
           c.reads);
    err = vblk_worker_close(&w);
    vblk_file_close(&file);
    close(fd);
    remove(path);
    return err || done == 0 || c.reads < done || c.io_errors;
}
