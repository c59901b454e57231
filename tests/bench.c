// Nanoseconds per request, beside the limit in the same run: a bare memcpy, a
// bare preadv. Medians of paired rounds; the ratios are what to compare.
//
//     make bench
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { QUEUE = 256, BUFFERS = 85, ROUNDS = 31, DISK = 1 << 20 };

#define RAM_BYTES (4u << 20)
#define DESC  0x10000u // guest addresses
#define AVAIL 0x20000u
#define USED  0x30000u
#define TABLE 0x40000u // indirect tables
#define HEAD  0x60000u // headers, 64 bytes apart, status byte at + 32
#define DATA  0x100000u

static uint8_t *ram, *image;
static vblk_dev dev;

static void put(uint64_t gpa, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        ram[gpa + (uint64_t)i] = (uint8_t)(value >> 8 * i);
    }
}

static void desc(uint64_t at, uint64_t gpa, uint32_t n, int flags, int next) {
    put(at, gpa, 8);
    put(at + 8, n, 4);
    put(at + 12, (uint64_t)flags, 2);
    put(at + 14, (uint64_t)next, 2);
}

// 85 chains of three descriptors (FLUSH: two), or as many indirect tables;
// the available ring names them in turn.
static void lay_out(uint32_t type, uint32_t bytes, bool indirect) {
    memset(ram + DESC, 0, TABLE - DESC);
    for (int i = 0; i < BUFFERS; i++) {
        uint64_t head = HEAD + 64u * (unsigned)i;
        uint64_t data = DATA + 4096u * (unsigned)i;
        uint64_t table = indirect ? TABLE + 48u * (unsigned)i : DESC;
        int first = indirect ? 0 : 3 * i;
        uint64_t at = table + 16u * (unsigned)first;
        put(head, type, 8);
        put(head + 8, type == VBLK_T_IN ? 8u * (unsigned)i : 0, 8);
        if (type == VBLK_T_FLUSH) {
            desc(at, head, 16, 1, first + 1);
            desc(at + 16, head + 32, 1, 2, 0);
        } else {
            desc(at, head, 16, 1, first + 1);
            desc(at + 16, data, bytes, 3, first + 2);
            desc(at + 32, head + 32, 1, 2, 0);
        }
        if (indirect) {
            desc(DESC + 16u * (unsigned)i, table,
                 type == VBLK_T_FLUSH ? 32 : 48, 4, 0);
        }
    }
}

static void up(vblk_backend backend) {
    static vblk_region region;
    static vblk_regions guest;
    vblk_options o;
    region.bytes = RAM_BYTES;
    region.host = ram;
    guest.region = &region;
    guest.count = 1;
    memset(&o, 0, sizeof o);
    o.memory = vblk_regions_memory(&guest);
    o.backend = backend;
    if (vblk_init(&dev, &o)) {
        abort();
    }
    vblk_ring ring = {.size = QUEUE, .desc = DESC, .avail = AVAIL,
                      .used = USED};
    vblk_set_status(&dev, 1);
    vblk_set_status(&dev, 3);
    vblk_set_driver_features(&dev, vblk_device_features(&dev));
    vblk_set_status(&dev, 0xb);
    vblk_queue_start(&dev, 0, &ring);
    vblk_set_status(&dev, 0xf);
}

static uint64_t ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Requests in batches, as a driver and a kick would bring them.
static double device_ns(unsigned batch, unsigned count, bool indirect) {
    static uint16_t idx;
    static unsigned turn;
    idx = (uint16_t)(ram[AVAIL + 2] | ram[AVAIL + 3] << 8);
    uint64_t start = ns();
    for (unsigned done = 0; done < count; done += batch) {
        for (unsigned k = 0; k < batch; k++) {
            uint16_t head = (uint16_t)(indirect ? turn : 3 * turn);
            memcpy(ram + AVAIL + 4 + 2 * (idx % QUEUE), &head, 2);
            turn = (turn + 1) % BUFFERS;
            idx++;
        }
        __atomic_store_n((uint16_t *)(void *)(ram + AVAIL + 2), idx,
                         __ATOMIC_RELEASE);
        vblk_drain(&dev, 0, 0);
    }
    uint64_t end = ns();
    uint16_t used;
    memcpy(&used, ram + USED + 2, 2);
    if (used != idx || ram[HEAD + 32] != VBLK_S_OK) {
        fprintf(stderr, "bench: the device did not do the work\n");
        exit(1);
    }
    return (double)(end - start) / count;
}

static double memcpy_ns(unsigned count, uint32_t bytes) {
    unsigned turn = 0;
    uint64_t start = ns();
    for (unsigned i = 0; i < count; i++) {
        memcpy(ram + DATA + 4096 * turn, image + 4096 * turn, bytes);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        turn = (turn + 1) % BUFFERS;
    }
    return (double)(ns() - start) / count;
}

static double preadv_ns(int fd, unsigned count, uint32_t bytes) {
    unsigned turn = 0;
    uint64_t start = ns();
    for (unsigned i = 0; i < count; i++) {
        struct iovec iov = {ram + DATA + 4096 * turn, bytes};
        if (preadv(fd, &iov, 1, 4096 * (off_t)turn) != (ssize_t)bytes) {
            exit(1);
        }
        turn = (turn + 1) % BUFFERS;
    }
    return (double)(ns() - start) / count;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, compare);
    return v[n / 2];
}

// One line of the table: device and limit in turn, ROUNDS times.
static void row(const char *name, uint32_t type, uint32_t bytes,
                unsigned batch, bool indirect, vblk_backend b, int fd) {
    double mine[ROUNDS], limit[ROUNDS], ratio[ROUNDS];
    unsigned count = fd >= 0 ? 85 * 64 : 85 * 256;
    lay_out(type, bytes, indirect);
    up(b);
    uint32_t moved = bytes ? bytes : 4096; // FLUSH: beside 4 KiB, for scale
    for (int r = 0; r < ROUNDS; r++) {
        mine[r] = device_ns(batch, count, indirect);
        limit[r] = fd >= 0 ? preadv_ns(fd, count, moved)
                           : memcpy_ns(count, moved);
        ratio[r] = mine[r] / limit[r];
    }
    printf("%-22s %5u  %-8s %9.1f  %-7s %8.1f %7.2f\n", name, batch,
           indirect ? "indirect" : "direct", median(mine, ROUNDS),
           fd >= 0 ? "preadv" : "memcpy", median(limit, ROUNDS),
           median(ratio, ROUNDS));
    fflush(stdout);
}

int main(void) {
    static const unsigned batches[] = {1, 32, 85};
    char path[] = "/dev/shm/vblk_bench_XXXXXX";
    ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    image = mmap(NULL, DISK, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = mkstemp(path);
    vblk_file file;
    memset(ram, 1, RAM_BYTES);
    memset(image, 2, DISK);
    if (fd < 0 || write(fd, image, DISK) != DISK ||
        vblk_file_open(&file, path, false)) {
        perror(path);
        return 1;
    }
    unlink(path);
    vblk_ramdisk disk = {.data = image, .bytes = DISK};
    vblk_backend memory = vblk_ramdisk_backend(&disk);
    vblk_backend shm = vblk_file_backend(&file);
    printf("%-22s %5s  %-8s %9s  %-7s %8s %7s\n", "request", "batch",
           "chain", "ns", "limit", "ns", "ratio");
    for (int indirect = 0; indirect < 2; indirect++) {
        for (size_t i = 0; i < 3; i++) {
            unsigned n = batches[i];
            row("FLUSH (ring alone)", VBLK_T_FLUSH, 0, n, indirect, memory,
                -1);
            row("IN 512, memory", VBLK_T_IN, 512, n, indirect, memory, -1);
            row("IN 4096, memory", VBLK_T_IN, 4096, n, indirect, memory, -1);
            row("IN 512, /dev/shm", VBLK_T_IN, 512, n, indirect, shm, fd);
            row("IN 4096, /dev/shm", VBLK_T_IN, 4096, n, indirect, shm, fd);
        }
    }
    vblk_file_close(&file);
    close(fd);
    return 0;
}
