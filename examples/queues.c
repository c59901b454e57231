// A host with a thread of its own for each queue: notify() wakes it, a gate
// keeps it out where the driver takes its queue away. A driver resets the
// device while all queues work, again and again.
//
//     make queues
//
// With limits there would be one gate for all queues, and a thread would wait
// for its semaphore until the time that vblk_drain() answers.
#define VBLK_IMPLEMENTATION
#include "../vblk.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>

enum { QUEUES = 3, SIZE = 16, BYTES = 4096, ROUNDS = 300 };

static uint64_t   ram_words[1 << 16]; // 512 KiB at 0
static uint8_t *const ram = (uint8_t *)ram_words;
static uint8_t    disk[1 << 20];
static vblk_dev   dev;
static vblk_queue queues[QUEUES];
static bool       over; // atomic


// ---- The host ---------------------------------------------------------------

static struct lane {
    pthread_mutex_t gate; // held while the queue is drained, or taken away
    sem_t           wake;
    bool            shut; // under `registers`: by quiesce()
    pthread_t       thread;
} lane[QUEUES];

static pthread_mutex_t registers = PTHREAD_MUTEX_INITIALIZER;

static void *serve(void *arg) {
    struct lane *l = (struct lane *)arg;
    while (!__atomic_load_n(&over, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&l->gate);
        uint64_t again = vblk_drain(&dev, (unsigned)(l - lane), 0);
        pthread_mutex_unlock(&l->gate);
        if (again == VBLK_NEVER) {
            sem_wait(&l->wake);
        }
    }
    return NULL;
}

// Takes no lock: it may come while gates are shut.
static void notify(void *user, int queue) {
    (void)user;
    for (int i = 0; i < QUEUES; i++) {
        if (queue == i || queue == VBLK_ALL_QUEUES) {
            sem_post(&lane[i].wake);
        }
    }
}

// Nothing is under way outside of vblk_drain(), so to be in front is enough.
static int quiesce(void *user, int queue) {
    (void)user;
    for (int i = 0; i < QUEUES; i++) {
        if (queue == i || queue == VBLK_ALL_QUEUES) {
            pthread_mutex_lock(&lane[i].gate);
            lane[i].shut = true;
        }
    }
    return 0;
}

// From a vCPU. The gates that quiesce() shut open when the call is over.
static void store(uint32_t offset, uint32_t value) {
    if (offset == VBLK_REG_QUEUE_NOTIFY || offset == VBLK_REG_INTERRUPT_ACK) {
        vblk_mmio_write(&dev, offset, 4, value); // these wait for nobody
        return;
    }
    pthread_mutex_lock(&registers);
    vblk_mmio_write(&dev, offset, 4, value);
    for (int i = 0; i < QUEUES; i++) {
        if (lane[i].shut) {
            lane[i].shut = false;
            pthread_mutex_unlock(&lane[i].gate);
        }
    }
    pthread_mutex_unlock(&registers);
}


// ---- A driver ---------------------------------------------------------------

static void put(uint32_t gpa, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        ram[gpa + i] = (uint8_t)(value >> 8 * i);
    }
}

// Each queue has 64 KiB: descriptors, available ring at 0x1000, used ring at
// 0x2000, a header and a status byte at 0x3000, data at 0x4000.
static void start(void) {
    store(VBLK_REG_STATUS, 1);
    store(VBLK_REG_STATUS, 3);
    store(VBLK_REG_DRIVER_FEATURES_SEL, 0);
    store(VBLK_REG_DRIVER_FEATURES, (uint32_t)VBLK_F_MQ);
    store(VBLK_REG_STATUS, 0xb);
    for (uint32_t i = 0; i < QUEUES; i++) {
        uint32_t at = i << 16;
        memset(ram + at, 0, 0x4000);
        put(at, at + 0x3000, 8), put(at + 8, 16, 4), put(at + 12, 0x10001, 4);
        put(at + 16, at + 0x4000, 8), put(at + 24, BYTES, 4);
        put(at + 28, 0x20003, 4), put(at + 32, at + 0x3010, 8);
        put(at + 40, 1, 4), put(at + 44, 2, 4);
        put(at + 0x1002, SIZE, 2); // the same chain, over and over
        store(VBLK_REG_QUEUE_SEL, i);
        store(VBLK_REG_QUEUE_NUM, SIZE);
        store(VBLK_REG_QUEUE_DESC_LOW, at);
        store(VBLK_REG_QUEUE_DRIVER_LOW, at + 0x1000);
        store(VBLK_REG_QUEUE_DEVICE_LOW, at + 0x2000);
        store(VBLK_REG_QUEUE_READY, 1);
    }
    store(VBLK_REG_STATUS, 0xf);
    for (uint32_t i = 0; i < QUEUES; i++) {
        store(VBLK_REG_QUEUE_NOTIFY, i);
    }
}

static unsigned used(uint32_t queue) {
    const uint16_t *idx = &((uint16_t *)ram_words)[(queue << 15) + 0x1001];
    return __atomic_load_n(idx, __ATOMIC_ACQUIRE); // on a little-endian host
}

int main(void) {
    vblk_region  region = {.bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.queues = QUEUES;
    o.queue = queues;
    o.notify = notify;
    o.quiesce = quiesce;
    int err = vblk_init(&dev, &o);
    if (err) {
        fprintf(stderr, "queues: %s\n", vblk_strerror(err));
        return 1;
    }
    for (int i = 0; i < QUEUES; i++) {
        pthread_mutex_init(&lane[i].gate, NULL);
        sem_init(&lane[i].wake, 0, 0);
        if (pthread_create(&lane[i].thread, NULL, serve, &lane[i])) {
            return 1;
        }
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        start();
        while (used(round % QUEUES) == 0) { // some is done
        }
        store(VBLK_REG_STATUS, 0);
        memset(ram_words, 0x5a, sizeof ram_words); // its own, as of now
        for (size_t i = 0; i < sizeof ram_words; i++) {
            if (ram[i] != 0x5a) {
                fprintf(stderr, "queues: written after a reset\n");
                return 1;
            }
        }
    }
    __atomic_store_n(&over, true, __ATOMIC_RELEASE);
    notify(NULL, VBLK_ALL_QUEUES);
    for (int i = 0; i < QUEUES; i++) {
        pthread_join(lane[i].thread, NULL);
    }
    vblk_counts c = vblk_counters(&dev);
    printf("%d resets under work, %llu reads, %llu errors\n", ROUNDS,
           (unsigned long long)c.reads, (unsigned long long)c.io_errors);
    return c.reads < ROUNDS || c.io_errors != 0;
}
