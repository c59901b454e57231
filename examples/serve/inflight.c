// What the rings have under way, in memory that the front end keeps when we
// die: the next of us takes it again. A split ring's part of it is laid out as
// the protocol says, but that the used ring tells what was returned last; it is
// believed no more than the rest of the front end.
#include "serve.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct chain {
    uint8_t  inflight, padding[7];
    uint64_t counter; // order in which they were taken
} chain;

#define CACHE_OFF UINT64_C(1) // of the first ring's features; else they are 0

typedef struct part {
    uint64_t features;
    uint16_t version; // 0: nothing is in it
    uint16_t entries, unused, used_idx; // so far in the used ring none is
    chain    of[];
} part;

static uint8_t *memory;
static size_t   bytes, part_bytes;
static unsigned parts, entries;
static uint64_t counter[MAX_QUEUES];

static size_t bytes_of(unsigned n) {
    return (sizeof(part) + n * sizeof(chain) + 63) & ~(size_t)63;
}

// The part of a ring that runs, or NULL.
static part *part_of(unsigned ring) {
    return memory && ring < parts ? (part *)(void *)(memory + ring * part_bytes)
                                  : NULL;
}

bool in_inflight(uintptr_t at) {
    return memory && at - (uintptr_t)memory < bytes;
}

void forget_inflight(void) {
    if (memory) {
        munmap(memory, bytes);
    }
    memory = NULL;
}

// For that many rings of so many entries; a descriptor, or -1.
int make_inflight(unsigned rings, unsigned size, uint64_t *n) {
    *n = rings * bytes_of(size);
    int fd = memfd_create("vblk-inflight", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)*n)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

bool take_inflight(int fd, uint64_t n, uint64_t offset, unsigned rings,
                   unsigned size) {
    forget_inflight();
    if (rings == 0 || rings > MAX_QUEUES || size == 0 || size > 32768 ||
        n < rings * bytes_of(size) || n > INT32_MAX || offset > INT32_MAX) {
        return refuse("%u rings of %u entries under way in %" PRIu64 " bytes",
                      rings, size, n);
    }
    struct stat st = {.st_blksize = 0};
    fstat(fd, &st); // huge pages are mapped and unmapped as a whole
    uint64_t block = st.st_blksize > 4096 ? (uint64_t)st.st_blksize : 4096;
    n = (n + block - 1) / block * block;
    void *p = mmap(NULL, (size_t)n, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                   (off_t)offset);
    if (p == MAP_FAILED) {
        return refuse("memory for what is under way: %s", strerror(errno));
    }
    memory = p;
    bytes = (size_t)n;
    parts = rings;
    entries = size;
    part_bytes = bytes_of(size);
    return true;
}

// What the used ring at `used` shows up to `used_idx` is not under way.
static void forget_shown(part *p, const uint8_t *used, uint32_t size,
                         uint16_t used_idx) {
    uint16_t n = (uint16_t)(used_idx - p->used_idx);
    for (uint16_t i = p->used_idx; n > 0 && n <= size; n--, i++) {
        const uint8_t *element = used + 4 + 8 * (i & (size - 1));
        uint32_t       head = element[0] | (uint32_t)element[1] << 8;
        if (head < entries) {
            p->of[head].inflight = 0;
        }
    }
    __atomic_store_n(&p->used_idx, used_idx, __ATOMIC_RELEASE);
}

typedef struct taken { // read once: the front end may write there
    uint64_t counter;
    uint16_t head;
} taken;

static int by_counter(const void *a, const void *b) {
    uint64_t x = ((const taken *)a)->counter, y = ((const taken *)b)->counter;
    return (x > y) - (x < y);
}

// A ring starts, whose used ring is at `used`: the chains that were under way
// when it ended badly, in order; how many, or -1 if it did not.
int begin_inflight(unsigned ring, uint32_t size, const uint8_t *used,
                   uint16_t *heads) {
    part    *p = part_of(ring);
    uint16_t used_idx = (uint16_t)(used[2] | used[3] << 8);
    int      n = -1;
    counter[ring] = 0;
    if (!p || size > entries) {
        return n;
    }
    if (p->version == 1) {
        forget_shown(p, used, size, used_idx);
        static taken found[MAX_RING];
        n = 0;
        for (unsigned i = 0; i < size; i++) {
            if (p->of[i].inflight) {
                found[n++] = (taken){p->of[i].counter, (uint16_t)i};
            }
        }
        qsort(found, (size_t)n, sizeof *found, by_counter);
        for (int i = 0; i < n; i++) {
            heads[i] = found[i].head;
        }
    } else {
        memset(p->of, 0, part_bytes - sizeof *p);
        p->entries = (uint16_t)size;
    }
    p->used_idx = used_idx;
    __atomic_store_n(&p->version, 1, __ATOMIC_RELEASE);
    return n;
}

// What the driver last said of the write cache, which QEMU does not repeat.
void keep_cache_off(bool off) {
    part *p = part_of(0);
    if (p) {
        p->features = off ? CACHE_OFF : 0;
    }
}

bool cache_was_off(void) {
    const part *p = part_of(0);
    return p && p->features & CACHE_OFF;
}

// It ended well.
void end_inflight(unsigned ring) {
    part *p = part_of(ring);
    if (p) {
        p->version = 0;
    }
}

void track_taken(unsigned ring, unsigned head) {
    part *p = part_of(ring);
    if (p && head < entries) {
        p->of[head].counter = counter[ring]++;
        __atomic_store_n(&p->of[head].inflight, 1, __ATOMIC_RELEASE);
    }
}

void track_shown(unsigned ring, uint32_t size, const uint8_t *used) {
    part *p = part_of(ring);
    if (p && size <= entries) {
        forget_shown(p, used, size, (uint16_t)(used[2] | used[3] << 8));
    }
}
