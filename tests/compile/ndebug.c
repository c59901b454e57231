// Without assertions a caller's mistake is still no harm: a request that is
// completed twice, segments with too little room, copies past a request's end,
// a backend that claims more than it was asked for. And the largest seg_max: a
// chain that never ends is given up there too.
#define NDEBUG
#define VBLK_MAX_SEGS 32768
#define VBLK_IMPLEMENTATION
#include "vblk.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, ENTRIES = 0xe000 };

static uint8_t ram[1 << 20], disk[1 << 16];
static const vblk_region region = {.bytes = sizeof ram, .host = ram};
static const vblk_regions guest = {.region = &region, .count = 1};
static vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
static vblk_dev dev;
static vblk_seg seg[VBLK_MAX_SEGS + 2];
static unsigned flushes;

static int64_t claim(void *user, uint64_t offset, const vblk_seg *s,
                     unsigned segs) {
    (void)user, (void)offset, (void)segs;
    return (int64_t)s[0].n + 1;
}

static int flush(void *user) {
    (void)user;
    flushes++;
    return 0;
}

static void put(unsigned at, uint32_t value) {
    for (unsigned i = 0; i < 4; i++) {
        ram[at + i] = (uint8_t)(value >> 8 * i);
    }
}

static void put_desc(unsigned at, uint32_t gpa, uint32_t n, unsigned flags,
                     unsigned next) {
    put(at, gpa), put(at + 4, 0);
    put(at + 8, n), put(at + 12, flags | next << 16);
}

// With the descriptors at 0, the rings at 0x1000 and 0x2000; nothing optional
// is accepted but `features`, so that a write is durable.
static bool begin(vblk_options *o, uint32_t features) {
    const uint32_t steps[][2] = {
        {0x70, 1},  {0x70, 3},      {0x20, features}, {0x24, 1},
        {0x20, 1},  {0x70, 11},     {0x38, 2},        {0x90, 0x1000},
        {0xa0, 0x2000}, {0x44, 1},  {0x70, 15}};
    o->memory = vblk_regions_memory(&guest);
    o->queue_size = 2;
    o->seg_max = 32768;
    put(0x1000, 1 << 16), put(0x1004, 0), put(0x2000, 0);
    if (vblk_init(&dev, o)) {
        return false;
    }
    for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_mmio_write(&dev, steps[i][0], 4, steps[i][1]);
    }
    return vblk_mmio_read(&dev, 0x70, 4) == 15;
}

static bool mistakes(void) {
    vblk_options o = {0};
    vblk_request r;
    uint8_t byte = 7;
    o.backend = vblk_ramdisk_backend(&image);
    put_desc(0x00, 0x3000, 16, NEXT, 1);
    put_desc(0x10, 0x3010, 1, WRITE, 0);
    put(0x3000, VBLK_T_FLUSH);
    return begin(&o, (uint32_t)VBLK_F_FLUSH) &&
           !vblk_next(&dev, 0, 0, &r, seg, dev.seg_max + 1) && // too little
           vblk_next(&dev, 0, 0, &r, seg, dev.seg_max + 2) &&
           r.seg >= seg && r.seg < seg + dev.seg_max + 2 && r.segs == 0 &&
           vblk_get(&dev, &r, 0, &byte, 1) == VBLK_ERR_REFUSED && byte == 7 &&
           vblk_put(&dev, &r, 1, &byte, 1) == VBLK_ERR_REFUSED &&
           vblk_complete(&dev, &r, 0) == VBLK_OK &&
           vblk_complete(&dev, &r, 0) == VBLK_ERR_STALE &&
           vblk_arm(&dev, 0, 0) == VBLK_NEVER && ram[0x2002] == 1 &&
           vblk_counters(&dev).flushes == 1;
}

// One byte more than was asked for.
static bool claims(bool mapped) {
    vblk_options o = {0};
    o.backend.read = o.backend.write = claim;
    o.backend.flush = flush;
    o.capacity = 128;
    put_desc(0x00, 0x4000, 0x40, INDIRECT, 0);
    put_desc(0x4000, 0x3000, 16, NEXT, 1);
    put_desc(0x4010, 0x5000, 512, NEXT, 2);
    put_desc(0x4020, 0x3010, 1, WRITE, 0);
    flushes = 0;
    for (uint32_t type = VBLK_T_IN; type <= VBLK_T_OUT; type++) {
        put(0x3000, type), put(0x3008, 0), ram[0x3010] = 0xff;
        put_desc(0x4010, 0x5000, 512, NEXT | (type ? 0u : WRITE), 2);
        if (!begin(&o, (uint32_t)VBLK_F_INDIRECT_DESC)) {
            return false;
        }
        dev.memory.map = mapped ? dev.memory.map : NULL;
        if (vblk_drain(&dev, 0, 0) != VBLK_NEVER || ram[0x3010] != 0) {
            return false;
        }
    }
    return flushes == 1; // the write's
}

static bool ends(void) {
    vblk_options o = {0};
    o.backend = vblk_ramdisk_backend(&image);
    put_desc(0x00, 0x10000, 16 * ENTRIES, INDIRECT, 0);
    for (unsigned i = 0; i < ENTRIES; i++) {
        put_desc(0x10000 + 16 * i, 0x3000, 16, NEXT, (i + 1) % ENTRIES);
    }
    return begin(&o, (uint32_t)VBLK_F_INDIRECT_DESC) &&
           vblk_drain(&dev, 0, 0) == VBLK_NEVER && ram[0x2002] == 1 &&
           vblk_counters(&dev).io_errors == 1;
}

int main(void) {
    return !mistakes()      ? 1
           : !claims(true)  ? 2
           : !claims(false) ? 3
           : !ends()        ? 4
                            : 0;
}
