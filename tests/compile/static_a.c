// Two units, each with all of the header to itself: this one makes a worker,
// the other drives it. A reset is bounded though the thread is in a callback
// that only this unit's code knows of.
#define VBLK_STATIC
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

void drive(vblk_worker *w, uint8_t *ram);
bool reset(vblk_worker *w);

static uint32_t inside, may_go, released; // atomic

static void interrupt(void *user, int queue, bool fire) {
    (void)user, (void)queue;
    if (fire) {
        __atomic_store_n(&inside, 1, __ATOMIC_RELEASE);
        while (!__atomic_load_n(&may_go, __ATOMIC_ACQUIRE)) {
            sched_yield();
        }
    }
}

static void on_released(void *user) {
    (void)user;
    __atomic_store_n(&released, 1, __ATOMIC_RELEASE);
}

static void wait_for(const uint32_t *flag) {
    while (!__atomic_load_n(flag, __ATOMIC_ACQUIRE)) {
        sched_yield();
    }
}

int main(void) {
    static uint8_t ram[1 << 16], disk[1 << 16];
    static vblk_worker w;
    vblk_region region = {.bytes = sizeof ram, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    vblk_worker_options wo = {0};
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.interrupt = interrupt;
    wo.stop_ms = 20;
    wo.released = on_released;
    if (vblk_worker_init(&w, &o, &wo)) {
        return 1;
    }
    drive(&w, ram);
    wait_for(&inside);
    if (reset(&w)) {
        return 2; // it cannot be, with the thread in there
    }
    __atomic_store_n(&may_go, 1, __ATOMIC_RELEASE);
    wait_for(&released);
    return reset(&w) && vblk_worker_close(&w) == VBLK_OK ? 0 : 3;
}
