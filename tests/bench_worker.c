// The worker beside its limits: 4 KiB reads of a /dev/shm file at several
// queue depths beside a bare preadv loop; latency at depth 1 of a driver that
// sleeps beside a bare eventfd ping-pong between two threads, and of one that
// polls beside preadv by a thread that spins for it. Medians of paired rounds.
//
//     make bench
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <inttypes.h>
#include <string.h>

enum { QUEUE = 512, ROUNDS = 9, DISK = 1 << 20 };
#define ROUND_NS UINT64_C(150000000)
#define DESC   0x00000u // guest addresses
#define AVAIL  0x04000u
#define USED   0x06000u
#define HEADER 0x08000u
#define DATA   0x20000u

static uint64_t ram_words[0x100000 / 8];
static uint8_t *const ram = (uint8_t *)ram_words;
static vblk_worker w;

static void put(uint32_t gpa, uint64_t value, unsigned bytes) {
    memcpy(ram + gpa, &value, bytes);
}

static uint16_t *word(uint32_t gpa) {
    return (uint16_t *)(void *)(ram + gpa);
}

static void store(uint32_t offset, uint32_t value) {
    vblk_worker_mmio_write(&w, offset, 4, value);
}

static void bind_driver(void) {
    static const uint32_t steps[][2] = {
        {VBLK_REG_STATUS, 0}, {VBLK_REG_STATUS, 1}, {VBLK_REG_STATUS, 3},
        {VBLK_REG_DRIVER_FEATURES, 1u << 29},
        {VBLK_REG_DRIVER_FEATURES_SEL, 1}, {VBLK_REG_DRIVER_FEATURES, 1},
        {VBLK_REG_STATUS, 0xb}, {VBLK_REG_QUEUE_NUM, QUEUE},
        {VBLK_REG_QUEUE_DESC_LOW, DESC}, {VBLK_REG_QUEUE_DRIVER_LOW, AVAIL},
        {VBLK_REG_QUEUE_DEVICE_LOW, USED}, {VBLK_REG_QUEUE_READY, 1},
        {VBLK_REG_STATUS, 0xf}};
    memset(ram, 0, HEADER);
    for (unsigned slot = 0; slot < 128; slot++) {
        uint32_t header = HEADER + 32 * slot, d = DESC + 48 * slot;
        put(header + 8, slot * 8u, 8);
        put(d, header, 8);
        put(d + 8, 16 | UINT64_C(1) << 32 | (uint64_t)(3 * slot + 1) << 48,
            8);
        put(d + 16, DATA + 4096 * slot, 8);
        put(d + 24, 4096 | UINT64_C(3) << 32 |
                        (uint64_t)(3 * slot + 2) << 48, 8);
        put(d + 32, header + 16, 8);
        put(d + 40, 1 | UINT64_C(2) << 32, 8);
    }
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        store(steps[i][0], steps[i][1]);
    }
}

typedef struct load {
    double per_second, kicks, interrupts; // the last two per 1,000 requests
} load;

// Keep `depth` reads under way for a round; wait on the interrupt, or poll.
static load drive(unsigned depth, bool polls) {
    uint16_t made = 0, seen = 0;
    uint64_t count, done = 0, kicks = 0, interrupts = 0;
    bind_driver();
    for (unsigned slot = 0; slot < depth; slot++) {
        word(AVAIL + 4)[made++ % QUEUE] = (uint16_t)(3 * slot);
    }
    uint16_t shown = 0;
    uint64_t start = vblk__clock(), now;
    while ((now = vblk__clock()) - start < ROUND_NS) {
        __atomic_store_n(word(AVAIL + 2), made, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        uint16_t event = __atomic_load_n(word(USED + 4 + 8 * QUEUE),
                                         __ATOMIC_ACQUIRE);
        if ((uint16_t)(made - event - 1) < (uint16_t)(made - shown)) {
            store(VBLK_REG_QUEUE_NOTIFY, 0);
            kicks++;
        }
        shown = made;
        // An interrupt for the next completion, if there is none yet, or never.
        *word(AVAIL + 4 + 2 * QUEUE) = polls ? (uint16_t)(seen - 1) : seen;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (!polls &&
            seen == __atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE)) {
            struct pollfd p = {w.irq_fd, POLLIN, 0};
            poll(&p, 1, 1000);
        }
        if (!polls && read(w.irq_fd, &count, sizeof count) > 0) {
            interrupts += count;
            store(VBLK_REG_INTERRUPT_ACK, 3);
        }
        while (seen != __atomic_load_n(word(USED + 2), __ATOMIC_ACQUIRE)) {
            word(AVAIL + 4)[made++ % QUEUE] =
                *word(USED + 4 + 8 * (seen++ % QUEUE));
            done++;
        }
    }
    double s = (double)(now - start) / 1e9, n = (double)done;
    load l = {n / s, 1000.0 * (double)kicks / n,
              1000.0 * (double)interrupts / n};
    return l;
}

static double preadv_per_second(int fd) {
    uint64_t start = vblk__clock(), now, done = 0;
    while ((now = vblk__clock()) - start < ROUND_NS) {
        for (unsigned i = 0; i < 64; i++, done++) {
            struct iovec iov = {ram + DATA + 4096 * (done % 128), 4096};
            if (preadv(fd, &iov, 1, 4096 * (off_t)(done % 128)) != 4096) {
                return 0;
            }
        }
    }
    return (double)done * 1e9 / (double)(now - start);
}

static int ping, pong;

static void *answer(void *arg) {
    uint64_t count;
    struct pollfd p = {ping, POLLIN, 0};
    (void)arg;
    do {
        poll(&p, 1, -1);
        if (read(ping, &count, sizeof count) < 0) {
            break;
        }
        vblk__signal(pong);
    } while (count < 1000);
    return NULL;
}

static double ping_pongs_per_second(void) {
    pthread_t thread;
    uint64_t count, done = 0, now;
    const uint64_t end = 1000;
    ping = eventfd(0, EFD_NONBLOCK);
    pong = eventfd(0, EFD_NONBLOCK);
    pthread_create(&thread, NULL, answer, NULL);
    uint64_t start = vblk__clock();
    while ((now = vblk__clock()) - start < ROUND_NS) {
        struct pollfd p = {pong, POLLIN, 0};
        vblk__signal(ping);
        poll(&p, 1, -1);
        done += read(pong, &count, sizeof count) > 0;
    }
    if (write(ping, &end, sizeof end) < 0) {
        exit(1);
    }
    pthread_join(thread, NULL);
    close(ping);
    close(pong);
    return (double)done * 1e9 / (double)(now - start);
}

static uint32_t turn; // 0: the asker's; 1: the reader's; 2: it is over
static int      turn_fd;

static void *read_when_asked(void *arg) {
    uint32_t t;
    (void)arg;
    while ((t = __atomic_load_n(&turn, __ATOMIC_ACQUIRE)) != 2) {
        struct iovec iov = {ram + DATA, 4096};
        if (t == 1) {
            if (preadv(turn_fd, &iov, 1, 0) != 4096) {
                exit(1);
            }
            __atomic_store_n(&turn, 0, __ATOMIC_RELEASE);
        }
    }
    return NULL;
}

static double handed_over_per_second(int fd) {
    pthread_t thread;
    uint64_t done = 0, now;
    turn_fd = fd;
    turn = 0;
    pthread_create(&thread, NULL, read_when_asked, NULL);
    uint64_t start = vblk__clock();
    while ((now = vblk__clock()) - start < ROUND_NS) {
        __atomic_store_n(&turn, 1, __ATOMIC_RELEASE);
        while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) == 1) {
        }
        done++;
    }
    __atomic_store_n(&turn, 2, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    return (double)done * 1e9 / (double)(now - start);
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v) {
    qsort(v, ROUNDS, sizeof *v, compare);
    return v[ROUNDS / 2];
}

int main(void) {
    static const unsigned depths[] = {1, 8, 32, 128};
    char path[] = "/dev/shm/vblk_bench_XXXXXX";
    int fd = mkstemp(path);
    vblk_file file;
    vblk_region region = {.bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_options o = {0};
    vblk_worker_options wo = {0};
    for (int i = 0; i < DISK / 65536; i++) {
        if (fd < 0 || write(fd, ram, 65536) != 65536) {
            perror(path);
            return 1;
        }
    }
    int err = vblk_file_open(&file, path, false);
    unlink(path);
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_file_backend(&file);
    o.queue_size = QUEUE;
    err = err ? err : vblk_worker_init(&w, &o, &wo);
    if (err) {
        fprintf(stderr, "bench: %s\n", vblk_strerror(err));
        return 1;
    }
    printf("%5s %9s %9s %7s %12s %12s\n", "depth", "IOPS", "preadv", "ratio",
           "kicks/1000", "irqs/1000");
    for (size_t i = 0; i < sizeof depths / sizeof depths[0]; i++) {
        double mine[ROUNDS], limit[ROUNDS], ratio[ROUNDS], kicks[ROUNDS],
            interrupts[ROUNDS];
        for (int r = 0; r < ROUNDS; r++) {
            load l = drive(depths[i], false);
            mine[r] = l.per_second;
            kicks[r] = l.kicks;
            interrupts[r] = l.interrupts;
            limit[r] = preadv_per_second(fd);
            ratio[r] = mine[r] / limit[r];
        }
        printf("%5u %9.0f %9.0f %7.2f %12.0f %12.0f\n", depths[i],
               median(mine), median(limit), median(ratio), median(kicks),
               median(interrupts));
    }
    double mine[ROUNDS], bare[ROUNDS], ratio[ROUNDS];
    for (int polls = 0; polls < 2; polls++) {
        for (int r = 0; r < ROUNDS; r++) {
            mine[r] = 1e6 / drive(1, polls).per_second;
            bare[r] = 1e6 / (polls ? handed_over_per_second(fd)
                                   : ping_pongs_per_second());
            ratio[r] = mine[r] / bare[r];
        }
        printf("latency at depth 1, driver %s: %.2f us; %s: %.2f us; ratio "
               "%.2f\n", polls ? "polls" : "sleeps", median(mine),
               polls ? "preadv by a thread that spins" : "eventfd ping-pong",
               median(bare), median(ratio));
    }
    vblk_worker_close(&w);
    vblk_file_close(&file);
    close(fd);
    return 0;
}
