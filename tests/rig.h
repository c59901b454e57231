// A worker over 64 KiB of memory with a queue of 16, for the tests of its
// edges: the ring areas at 0, 0x1000 and 0x2000, one chain from descriptor 0.
#ifndef RIG_H
#define RIG_H

#include "guest.h"

static vblk_worker         w;
static vblk_options        o;
static vblk_queue          queues[4];
static vblk_worker_options wo;
static uint8_t             ram[1 << 16];
static vblk_region         region = {.bytes = sizeof ram, .host = ram};
static vblk_regions            guest_ram = {.region = &region, .count = 1};
static uint8_t             disk[1 << 16];
static vblk_ramdisk        image = {.data = disk, .bytes = sizeof disk};

static void rig_options(void) {
    memset(&o, 0, sizeof o);
    memset(&wo, 0, sizeof wo);
    memset(ram, 0, sizeof ram);
    o.memory = vblk_regions_memory(&guest_ram);
    o.backend = vblk_ramdisk_backend(&image);
    o.queue_size = 16;
    o.queue = queues;
    o.profile = VBLK_STRICT;
}

static void store(uint32_t offset, uint32_t value) {
    vblk_worker_mmio_write(&w, offset, 4, value);
}

static uint32_t load(uint32_t offset) {
    return (uint32_t)vblk_mmio_read(&w.dev, offset, 4);
}

static void bind_driver(void) {
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    store(VBLK_REG_DRIVER_FEATURES_SEL, 0);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)VBLK_F_FLUSH);
    store(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    store(VBLK_REG_DRIVER_FEATURES, 1);
    store(VBLK_REG_STATUS, 0xb);
    store(VBLK_REG_QUEUE_NUM, 16);
    store(VBLK_REG_QUEUE_DRIVER_LOW, 0x1000);
    store(VBLK_REG_QUEUE_DEVICE_LOW, 0x2000);
    store(VBLK_REG_QUEUE_READY, 1);
    store(VBLK_REG_STATUS, 0xf);
}

static void offer_up_to(uint8_t idx, bool notify) {
    uint8_t le[2] = {idx, 0};
    uint16_t word;
    memcpy(&word, le, 2);
    __atomic_store_n((uint16_t *)(void *)(ram + 0x1002), word,
                     __ATOMIC_RELEASE);
    if (notify) {
        store(VBLK_REG_QUEUE_NOTIFY, 0);
    }
}

// A request of a header and a status byte at 0x3000.
static void put_flush(uint8_t idx) {
    ram[1] = 0x30, ram[8] = 16, ram[12] = NEXT, ram[14] = 1;
    ram[16] = 16, ram[17] = 0x30, ram[24] = 1, ram[28] = WRITE;
    ram[0x3000] = VBLK_T_FLUSH;
    ram[0x3010] = 0xff;
    offer_up_to(idx, true);
}

static bool used_is(uint8_t idx) {
    uint8_t  le[2] = {idx, 0};
    uint16_t word;
    memcpy(&word, le, 2);
    return __atomic_load_n((uint16_t *)(void *)(ram + 0x2002),
                           __ATOMIC_ACQUIRE) == word;
}

#endif
