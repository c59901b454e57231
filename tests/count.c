// The device's instructions for a request, of many kinds: counted, because time
// wanders. The backend does nothing, so that what is counted is the device.
//
//     valgrind --tool=callgrind build/count NUMBER REQUESTS
//
// tests/count.sh runs all rows with two numbers of requests each; what the one
// costs more than the other is theirs. Without arguments: the names.
#define VBLK_IMPLEMENTATION
#define VBLK_MAX_SEGS 254
#include "../vblk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { QUEUE = 256, CHAINS = 32, RAM = 64 << 20, MOST_REGIONS = 256 };

static const struct row {
    const char *name;
    uint32_t    type;
    unsigned    batch;    // requests a kick
    unsigned    segs;     // of 512 bytes
    unsigned    regions;  // of guest memory
    unsigned    queues;   // one of them busy; more than one are polled
    enum { INDIRECT = 1, NO_MAP = 2, LIMITS = 4, SPREAD = 8, FOREIGN = 16 } how;
} rows[] = {
    {"FLUSH, the ring alone", VBLK_T_FLUSH, 32, 0, 1, 1, 0},
    {"FLUSH, one at a time", VBLK_T_FLUSH, 1, 0, 1, 1, 0},
    {"FLUSH, limits", VBLK_T_FLUSH, 32, 0, 1, 1, LIMITS},
    {"IN", VBLK_T_IN, 32, 1, 1, 1, 0},
    {"IN, one at a time", VBLK_T_IN, 1, 1, 1, 1, 0},
    {"IN, limits", VBLK_T_IN, 32, 1, 1, 1, LIMITS},
    {"OUT", VBLK_T_OUT, 32, 1, 1, 1, 0},
    {"IN, indirect", VBLK_T_IN, 32, 1, 1, 1, INDIRECT},
    {"IN, 8 segments", VBLK_T_IN, 32, 8, 1, 1, INDIRECT},
    {"IN, 64 segments", VBLK_T_IN, 32, 64, 1, 1, INDIRECT},
    {"IN, 254 segments", VBLK_T_IN, 32, 254, 1, 1, INDIRECT},
    {"IN, 8 regions", VBLK_T_IN, 32, 1, 8, 1, INDIRECT},
    {"IN, 64 regions", VBLK_T_IN, 32, 1, 64, 1, INDIRECT},
    {"IN, 256 regions", VBLK_T_IN, 32, 1, 256, 1, INDIRECT},
    {"IN, 256 regions, all", VBLK_T_IN, 32, 1, 256, 1, INDIRECT | SPREAD},
    {"IN, 254 segments, 256 regions", VBLK_T_IN, 32, 254, 256, 1, INDIRECT},
    {"IN, 254 segments, 256 regions, all", VBLK_T_IN, 32, 254, 256, 1,
     INDIRECT | SPREAD},
    {"IN, a map of the host's own", VBLK_T_IN, 32, 1, 1, 1, FOREIGN},
    {"IN, the same, 64 segments", VBLK_T_IN, 32, 64, 1, 1, INDIRECT | FOREIGN},
    {"IN, no map", VBLK_T_IN, 32, 1, 1, 1, INDIRECT | NO_MAP},
    {"IN, no map, 64 segments", VBLK_T_IN, 32, 64, 1, 1, INDIRECT | NO_MAP},
    {"IN, no map, 254 segments", VBLK_T_IN, 32, 254, 1, 1, INDIRECT | NO_MAP},
    {"IN, no map, 254 segments, 256 regions, all", VBLK_T_IN, 32, 254, 256, 1,
     INDIRECT | NO_MAP | SPREAD},
    {"IN, 1 queue of 8", VBLK_T_IN, 32, 1, 1, 8, INDIRECT},
    {"IN, 1 queue of 64", VBLK_T_IN, 32, 1, 1, 64, INDIRECT},
};

static const struct row *row;
static uint8_t     *ram;
static vblk_dev     dev;
static vblk_queue   queues[64];
static vblk_region  region[MOST_REGIONS];
static vblk_regions guest = {region, 0};
static size_t       taken[MOST_REGIONS];
static uint64_t     desc_gpa, avail_gpa, used_gpa, status_gpa;
static uint16_t     head_of[CHAINS];

static int64_t move(void *user, uint64_t offset, const vblk_seg *seg,
                    unsigned segs) {
    (void)user, (void)offset;
    return segs == row->segs ? 512 * (int64_t)segs // with map
                             : (int64_t)seg->n;
}

static int flush(void *user) {
    (void)user;
    return 0;
}

static uint64_t size(void *user) {
    (void)user;
    return 1u << 20;
}

// Regions lie in the host in another order than in the guest.
static uint8_t *at(uint64_t gpa) {
    size_t each = RAM / row->regions, i = gpa / each;
    return ram + (row->regions - 1 - i) * each + gpa % each;
}

// A table in disorder, unless all of it is used.
static void lay_regions(void) {
    size_t each = RAM / row->regions;
    for (size_t i = 0; i < row->regions; i++) {
        size_t there = row->how & SPREAD ? i : i * 101 % row->regions;
        region[there].gpa = i * each;
        region[there].bytes = each;
        region[there].host = at(i * each);
    }
    guest.count = row->regions;
}

// The region with that number, counted round, or the one in the middle.
static size_t which(size_t number) {
    return row->how & SPREAD ? number % row->regions : row->regions / 2;
}

// `n` bytes in it.
static uint64_t place(size_t number, size_t n) {
    size_t   i = which(number), each = RAM / row->regions;
    uint64_t gpa = i * each + taken[i];
    taken[i] += (n + 63) / 64 * 64;
    if (taken[i] > each / 4 * 3) {
        abort();
    }
    return gpa;
}

// A sector in its last quarter. Nothing is moved, so they may overlap.
static uint64_t sector(size_t number) {
    size_t each = RAM / row->regions;
    return which(number) * each + each / 4 * 3 + 512 * number % (each / 4);
}

static void put(uint64_t gpa, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        at(gpa)[i] = (uint8_t)(value >> 8 * i);
    }
}

static void desc(uint64_t table, unsigned i, uint64_t gpa, size_t n,
                 int flags) {
    put(table + 16 * i, gpa, 8);
    put(table + 16 * i + 8, n, 4);
    put(table + 16 * i + 12, (uint64_t)flags, 2);
    put(table + 16 * i + 14, i + 1, 2);
}

static void lay_chains(void) {
    unsigned next = 0;
    for (unsigned i = 0; i < CHAINS; i++) {
        uint64_t head = place(i, 16), status = place(i, 1);
        size_t   bytes = 16 * (row->segs + 2);
        uint64_t table = (row->how & INDIRECT) ? place(i, bytes) : desc_gpa;
        unsigned d = (row->how & INDIRECT) ? 0 : next, first = d;
        int      flags = row->type == VBLK_T_IN ? 3 : 1;
        put(head, row->type, 8);
        put(head + 8, 0, 8);
        desc(table, d++, head, 16, 1);
        for (unsigned k = 0; k < row->segs; k++) {
            desc(table, d++, sector(37 * k + i), 512, flags);
        }
        desc(table, d++, status, 1, 2);
        head_of[i] = (uint16_t)first;
        if ((row->how & INDIRECT)) {
            desc(desc_gpa, i, table, bytes, 4);
            head_of[i] = (uint16_t)i;
        }
        next = d;
        status_gpa = status;
    }
}

static void *map(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    (void)user, (void)writable;
    if (gpa >= RAM) {
        return NULL;
    }
    *n = *n < RAM - gpa ? *n : RAM - gpa;
    return ram + gpa;
}

static void up(void) {
    static const vblk_limits wide = {.iops = 1u << 30, .bps = 1u << 30};
    vblk_options o;
    memset(&o, 0, sizeof o);
    o.memory = vblk_regions_memory(&guest);
    o.memory.map = row->how & NO_MAP    ? NULL
                   : row->how & FOREIGN ? map
                                        : o.memory.map;
    o.backend.read = o.backend.write = move;
    o.backend.flush = flush;
    o.backend.size = size;
    o.queue = row->queues > 1 ? queues : NULL;
    o.queues = row->queues;
    o.limits = row->how & LIMITS ? wide : o.limits;
    int err = vblk_init(&dev, &o);
    if (err) {
        fprintf(stderr, "count: %s\n", vblk_strerror(err));
        exit(1);
    }
    vblk_set_status(&dev, 1);
    vblk_set_status(&dev, 3);
    vblk_set_driver_features(&dev, vblk_device_features(&dev));
    vblk_set_status(&dev, 0xb);
    for (unsigned i = 0; i < row->queues; i++) {
        vblk_ring ring = {.size = QUEUE};
        ring.desc = place(i, 16 * QUEUE);
        ring.avail = place(i, 2 * QUEUE + 6);
        ring.used = place(i, 8 * QUEUE + 6);
        if (i == 0) {
            desc_gpa = ring.desc;
            avail_gpa = ring.avail;
            used_gpa = ring.used;
        }
        vblk_queue_start(&dev, i, &ring);
    }
    vblk_set_status(&dev, 0xf);
}

int main(int argc, char **argv) {
    size_t number = argc > 2 ? strtoul(argv[1], NULL, 10) : 0;
    size_t requests = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
    if (requests == 0) {
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            puts(rows[i].name);
        }
        return 0;
    }
    row = &rows[number];
    ram = calloc(1, RAM);
    lay_regions();
    up();
    lay_chains();
    uint8_t *avail = at(avail_gpa);
    uint64_t now = 0;
    uint16_t idx = 0;
    for (size_t done = 0; done < requests; done += row->batch) {
        for (unsigned k = 0; k < row->batch; k++, idx++) {
            memcpy(avail + 4 + 2 * (idx % QUEUE), &head_of[idx % CHAINS], 2);
        }
        memcpy(avail + 2, &idx, 2);
        now += 1000000;
        if (row->queues > 1) {
            vblk_notify(&dev, VBLK_ALL_QUEUES);
            vblk_poll(&dev, now);
        } else {
            vblk_drain(&dev, 0, now);
        }
    }
    uint16_t used;
    memcpy(&used, at(used_gpa) + 2, 2);
    if (used != idx || *at(status_gpa) != VBLK_S_OK) {
        fprintf(stderr, "count: the device did not do the work\n");
        return 1;
    }
    return 0;
}
