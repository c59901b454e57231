// A unit that sees the header by macros of its own, and one of another version:
// what it allocates has the layout of the implementation in layout_b.c, or it
// is told.
#define VBLK_MAX_SEGS 2
#define VBLK_SCRATCH 512
#define VBLK_SINGLE_THREADED
#define VBLK_THREADED
#include "vblk.h"

size_t size_there(int what);
int    next_there(vblk_dev *dev, vblk_request *r, vblk_seg *seg, unsigned room);

static uint8_t ram[1 << 16], disk[1 << 16];

static void put(unsigned at, uint32_t value) {
    for (unsigned i = 0; i < 4; i++) {
        ram[at + i] = (uint8_t)(value >> 8 * i);
    }
}

int main(void) {
    static struct {
        vblk_dev     dev;
        uint8_t      behind_dev[4096];
        vblk_queue   queue[2];
        uint8_t      behind_queue[4096];
        vblk_request r;
        vblk_seg     seg[256];
        uint8_t      behind_seg[4096];
    } my;
    static vblk_worker w;
    static const uint32_t steps[][2] = {
        {0x70, 1},  {0x70, 3},      {0x24, 1},      {0x20, 1},
        {0x70, 11}, {0x38, 256},    {0x90, 0x2000}, {0xa0, 0x3000},
        {0x44, 1},  {0x70, 15}};
    const size_t here[] = {sizeof(vblk_dev),     sizeof(vblk_queue),
                           sizeof(vblk_request), sizeof(vblk_seg),
                           sizeof(vblk_options), sizeof(vblk_event),
                           sizeof(vblk_worker),  sizeof(vblk_file),
                           sizeof(vblk_engine)};
    vblk_region  region = {.bytes = sizeof ram, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    for (unsigned i = 0; i < sizeof here / sizeof here[0]; i++) {
        if (here[i] != size_there((int)i)) {
            return 1;
        }
    }
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.queue = my.queue;
    o.queues = 2;
    if (vblk_init_checked(&my.dev, &o, VBLK_VERSION + 100,
                          sizeof my.dev) != VBLK_ERR_LAYOUT ||
        vblk_init_checked(&my.dev, &o, VBLK_VERSION, sizeof my.dev - 8) !=
            VBLK_ERR_LAYOUT ||
        vblk_worker_init_checked(&w, &o, NULL, VBLK_VERSION,
                                 sizeof w + 1536) != VBLK_ERR_LAYOUT ||
        vblk_init(&my.dev, &o) != VBLK_OK) {
        return 2;
    }
    for (unsigned i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        vblk_mmio_write(&my.dev, steps[i][0], 4, steps[i][1]);
    }
    for (unsigned i = 0; i < 128; i++) { // a chain as long as a guest likes
        put(16 * i, 0x4000 + 16 * i);
        put(16 * i + 8, 16);
        put(16 * i + 12, (i + 1) << 16 | (i ? 3 : 1));
    }
    put(16 * 127 + 12, 2);
    put(0x2000, 1 << 16);
    put(0x4000, VBLK_T_IN);
    for (unsigned i = 0; i < 4096; i++) {
        my.behind_dev[i] = my.behind_queue[i] = my.behind_seg[i] = 0x5a;
    }
    vblk_drain(&my.dev, 0, 0);
    if (next_there(&my.dev, &my.r, my.seg, 256)) {
        return 3; // the drain has answered it
    }
    for (unsigned i = 0; i < 4096; i++) {
        if (my.behind_dev[i] != 0x5a || my.behind_queue[i] != 0x5a ||
            my.behind_seg[i] != 0x5a) {
            return 4;
        }
    }
    return ram[0x3002] == 1 ? 0 : 5;
}
