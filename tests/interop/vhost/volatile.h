// A disk with a volatile cache, for powerloss.sh: built into
// examples/serve by -DVBLK_SERVE_BACKEND='"volatile.h"'.
//
// Writes stay in memory until a flush has put them into the file. SIGUSR1 is
// the loss of power: some steps later a random part of what is not flushed is
// gone, the rest is in the file, and the process ends with status 3. SIGUSR2
// makes all I/O fail. In the environment:
//
//     VOLATILE_FLUSH=none    a flush does nothing: the tests must notice
//     VOLATILE_OFFER=none    front ends are not offered FLUSH
//     VOLATILE_SEED=N        of the random numbers
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct unflushed {
    uint64_t offset;
    size_t   bytes;
    uint8_t *data;
} unflushed;

static struct {
    vblk_file *file;
    uint8_t   *now; // what a read sees
    uint64_t   bytes;
    unflushed *entry;
    size_t     entries, room, done; // done: of a flush under way
    uint64_t   random;
    bool       flushes, offers;
} cache;

static volatile sig_atomic_t power_failing, disk_failing;

static void on_volatile_signal(int number) {
    if (number == SIGUSR1) {
        power_failing = 1;
    } else {
        disk_failing = 1;
    }
}

static uint64_t random_below(uint64_t n) {
    cache.random ^= cache.random << 13;
    cache.random ^= cache.random >> 7;
    cache.random ^= cache.random << 17;
    return cache.random % n;
}

static void put_into_file(const unflushed *u, size_t bytes) {
    if (pwrite(cache.file->fd, u->data, bytes, (off_t)u->offset) !=
        (ssize_t)bytes) {
        perror("volatile.h: pwrite");
        abort();
    }
}

// Half of the writes are lost, some of the others torn at a sector.
static void lose_power(void) {
    size_t kept = 0, torn = 0;
    for (size_t i = cache.done; i < cache.entries; i++) {
        const unflushed *u = &cache.entry[i];
        if (random_below(2)) {
            continue;
        }
        kept++;
        size_t bytes = u->bytes;
        if (random_below(4) == 0) {
            bytes = random_below(bytes / 512 + 1) * 512;
            torn += bytes < u->bytes;
        }
        put_into_file(u, bytes);
    }
    printf("unflushed %zu\nlost %zu\ntorn %zu\n", cache.entries - cache.done,
           cache.entries - cache.done - kept, torn);
    fflush(stdout);
    _exit(3);
}

// Between any two of these the power may go.
static void step(void) {
    static uint64_t steps_left;
    if (power_failing) {
        steps_left = steps_left ? steps_left : 1 + random_below(100);
        if (--steps_left == 0) {
            lose_power();
        }
    }
}

static int64_t volatile_read(void *user, uint64_t offset, const vblk_seg *seg,
                             unsigned segs) {
    int64_t done = 0;
    (void)user;
    for (unsigned i = 0; i < segs && !disk_failing; i++) {
        memcpy(seg[i].ptr, cache.now + offset + (uint64_t)done, seg[i].n);
        done += (int64_t)seg[i].n;
    }
    return disk_failing ? -EIO : done;
}

static void remember(uint64_t offset, const vblk_seg *s) {
    if (cache.entries == cache.room) {
        cache.room = cache.room ? 2 * cache.room : 64;
        cache.entry = realloc(cache.entry, cache.room * sizeof *cache.entry);
    }
    unflushed u = {offset, s->n, malloc(s->n)};
    memcpy(u.data, s->ptr, s->n);
    memcpy(cache.now + offset, u.data, s->n);
    cache.entry[cache.entries++] = u;
}

static int64_t volatile_write(void *user, uint64_t offset, const vblk_seg *seg,
                              unsigned segs) {
    int64_t done = 0;
    (void)user;
    if (disk_failing) {
        return -EIO;
    }
    for (unsigned i = 0; i < segs; i++) {
        step();
        remember(offset + (uint64_t)done, &seg[i]);
        done += (int64_t)seg[i].n;
    }
    step();
    return done;
}

static int volatile_flush(void *user) {
    (void)user;
    if (disk_failing) {
        return -EIO;
    }
    step();
    if (!cache.flushes) {
        return 0;
    }
    for (cache.done = 0; cache.done < cache.entries; cache.done++) {
        unflushed *u = &cache.entry[cache.done];
        put_into_file(u, u->bytes);
        step();
    }
    for (size_t i = 0; i < cache.entries; i++) {
        free(cache.entry[i].data);
    }
    cache.entries = cache.done = 0;
    step();
    return 0;
}

static uint64_t volatile_size(void *user) {
    (void)user;
    return cache.bytes;
}

static vblk_backend serve_backend(vblk_file *image) {
    const char  *flush = getenv("VOLATILE_FLUSH");
    const char  *offer = getenv("VOLATILE_OFFER");
    const char  *seed = getenv("VOLATILE_SEED");
    vblk_backend b = {.read = volatile_read, .write = volatile_write,
                      .flush = volatile_flush, .size = volatile_size};
    b.write = image->read_only ? NULL : b.write;
    cache.file = image;
    cache.bytes = (uint64_t)lseek(image->fd, 0, SEEK_END);
    cache.now = malloc(cache.bytes);
    cache.random = seed ? strtoull(seed, NULL, 10) * 2 + 1 : 1;
    cache.flushes = !flush || strcmp(flush, "none") != 0;
    cache.offers = !offer || strcmp(offer, "none") != 0;
    if (!cache.now || pread(image->fd, cache.now, cache.bytes, 0) !=
                          (ssize_t)cache.bytes) {
        perror("volatile.h: the image");
        exit(1);
    }
    signal(SIGUSR1, on_volatile_signal);
    signal(SIGUSR2, on_volatile_signal);
    return b;
}

// The device itself offers FLUSH: to it, this is a driver that declines.
static uint64_t serve_features(uint64_t offered) {
    return cache.offers ? offered
                        : offered & ~(VBLK_F_FLUSH | VBLK_F_CONFIG_WCE);
}
