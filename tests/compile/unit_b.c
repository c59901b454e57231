#define VBLK_THREADED
#include "vblk.h"

int unit_b(void);

int unit_b(void) {
    static uint8_t data[4096];
    static vblk_ramdisk disk = {data, sizeof data};
    static vblk_dev dev;
    static vblk_options o; // all zero, in C and in C++
    o.backend = vblk_ramdisk_backend(&disk);
    if (vblk_init(&dev, &o)) {
        return 1;
    }
    return vblk_mmio_read(&dev, 0x100, 8) == 8 ? 0 : 1;
}
