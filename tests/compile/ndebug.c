// Without assertions a caller's mistake is still no harm: a request that is
// completed twice, segments with too little room.
#define NDEBUG
#define VBLK_IMPLEMENTATION
#include "vblk.h"

static uint8_t ram[1 << 16], disk[1 << 16];
static vblk_dev dev;

static void put(unsigned at, uint32_t value) {
    for (unsigned i = 0; i < 4; i++) {
        ram[at + i] = (uint8_t)(value >> 8 * i);
    }
}

int main(void) {
    static const uint32_t steps[][2] = {
        {0x70, 1},  {0x70, 3},      {0x24, 1},      {0x20, 1},
        {0x70, 11}, {0x38, 16},     {0x90, 0x1000}, {0xa0, 0x2000},
        {0x44, 1},  {0x70, 15}};
    vblk_region region = {.bytes = sizeof ram, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    vblk_request r;
    vblk_seg seg[130];
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    if (vblk_init(&dev, &o)) {
        return 1;
    }
    for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_mmio_write(&dev, steps[i][0], 4, steps[i][1]);
    }
    put(0x0, 0x3000), put(0x8, 16), put(0xc, 0x10001);
    put(0x10, 0x3010), put(0x18, 1), put(0x1c, 2);
    put(0x3000, VBLK_T_FLUSH), put(0x1000, 1 << 16);
    if (vblk_next(&dev, 0, 0, &r, seg, dev.seg_max + 1) || // too little room
        !vblk_next(&dev, 0, 0, &r, seg, dev.seg_max + 2) ||
        vblk_complete(&dev, &r, 0) != VBLK_OK ||
        vblk_complete(&dev, &r, 0) != VBLK_ERR_STALE) {
        return 2;
    }
    vblk_publish(&dev, 0);
    return vblk_drain(&dev, 0, 0) == VBLK_NEVER && ram[0x2002] == 1 &&
                   vblk_counters(&dev).flushes == 1
               ? 0
               : 3;
}
