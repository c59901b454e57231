// The device as firmware holds it: the register window, a drain and a disk in
// memory; no libc but memcpy and memset, and of the events the codes, so that
// no sentence is linked. size.sh measures it, m3.c drives it.
#include "device.h"

#define VBLK_IMPLEMENTATION
#define VBLK_STATIC
#define VBLK_SINGLE_THREADED
#define VBLK_MEMCPY        memcpy
#define VBLK_MEMSET        memset
#define VBLK_ASSERT(truth) ((void)0)
#include "../../vblk.h"

static const vblk_region region = {RAM_GPA, RAM_BYTES, ram, false};
static const vblk_regions guest = {&region, 1};
static vblk_ramdisk image = {disk, DISK_BYTES};
static vblk_dev dev;

static void event(void *user, const vblk_event *e) {
    (void)user;
    say((unsigned)e->code);
}

int device_begin(void) {
    vblk_options o;
    memset(&o, 0, sizeof o);
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.event = event;
    return vblk_init(&dev, &o);
}

uint32_t device_load(uint32_t offset) {
    return (uint32_t)vblk_mmio_read(&dev, offset, 4);
}

void device_store(uint32_t offset, uint32_t value) {
    vblk_mmio_write(&dev, offset, 4, value);
}

void device_run(void) {
    vblk_poll(&dev, 0);
}
