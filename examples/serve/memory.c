// Guest memory: the regions that the front end sends, mapped; and what becomes
// of us when it takes one away.
#include "serve.h"

#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct mapping {
    void    *base;
    size_t   bytes;
    uint64_t user; // address of the region in the front end
} mapping;

static vblk_region  region[MAX_REGIONS];
static mapping      map[MAX_REGIONS];
static vblk_regions ram = {region, 0};

// Where to go on when guest memory turns out to be gone.
static __thread sigjmp_buf            escape;
static __thread volatile sig_atomic_t may_escape;

// What a disk that does not answer may still write to stays where it is, until
// all that is under way has ended.
static mapping *kept;
static size_t   kept_count;

static void keep(const mapping *m) {
    mapping *more = realloc(kept, (kept_count + 1) * sizeof *kept);
    if (more) { // else it stays for good
        kept = more;
        kept[kept_count++] = *m;
    }
}

static bool settle_memory(void) {
    if (!settle()) {
        return false;
    }
    while (kept_count > 0) {
        kept_count--;
        munmap(kept[kept_count].base, kept[kept_count].bytes);
    }
    return true;
}

void forget_memory(void) {
    unsigned n = ram.count;
    ram.count = 0;
    bool quiet = settle_memory() && memory_changed(&ram);
    for (unsigned i = 0; i < n; i++) {
        if (quiet) {
            munmap(map[i].base, map[i].bytes);
        } else {
            keep(&map[i]);
        }
        map[i].base = NULL;
    }
}

// Where the front end's address `user` is in the guest; false unless `n` bytes
// there are guest memory, in one region.
bool find(uint64_t user, uint64_t n, uint64_t *gpa, uint8_t **host) {
    for (unsigned i = 0; i < ram.count; i++) {
        uint64_t at = user - map[i].user;
        if (user >= map[i].user && at < region[i].bytes &&
            region[i].bytes - at >= n) {
            *gpa = region[i].gpa + at;
            *host = (uint8_t *)region[i].host + at;
            return true;
        }
    }
    return false;
}

static bool check_region(const mem_region *r, const struct stat *st) {
    unsigned i = ram.count;
    if (r->bytes == 0 || r->bytes > INT64_MAX / 2 ||
        r->offset > INT64_MAX / 2 || r->bytes - 1 > UINT64_MAX - r->gpa ||
        r->bytes - 1 > UINT64_MAX - r->user) {
        return refuse("memory region %u has no valid size: %" PRIu64, i,
                      r->bytes);
    }
    for (unsigned k = 0; k < i; k++) {
        if (r->gpa <= region[k].gpa + (region[k].bytes - 1) &&
            region[k].gpa <= r->gpa + (r->bytes - 1)) {
            return refuse("memory regions %u and %u overlap", k, i);
        }
    }
    if ((size_t)r->bytes != r->bytes || r->bytes > SIZE_MAX / 2) {
        return refuse("memory region %u of %" PRIu64 " bytes is more than this "
                      "program can address", i, r->bytes);
    }
    uint64_t end = r->offset + r->bytes;
    return !S_ISREG(st->st_mode) || end <= (uint64_t)st->st_size ||
           refuse("memory region %u ends at byte %" PRIu64 " of a file of %"
                  PRIu64, i, end, (uint64_t)st->st_size);
}

// One more. Mapped in whole blocks of the file, as huge pages ask for.
static bool map_region(const mem_region *r, int fd) {
    unsigned    i = ram.count;
    struct stat st;
    if (fstat(fd, &st) < 0 || !check_region(r, &st)) {
        return false;
    }
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t block = (uint64_t)st.st_blksize;
    block = block < page || block & (block - 1) ? page : block;
    uint64_t before = r->offset & (block - 1);
    uint64_t bytes = (before + r->bytes + block - 1) & ~(block - 1);
    void    *base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                         MAP_SHARED, fd, (off_t)(r->offset - before));
    if (base == MAP_FAILED) {
        return refuse("memory region %u of %" PRIu64 " bytes: %s", i,
                      r->bytes, strerror(errno));
    }
    map[i] = (mapping){base, (size_t)bytes, r->user};
    region[i] = (vblk_region){r->gpa, r->bytes, (uint8_t *)base + before,
                              false};
    ram.count = i + 1;
    return true;
}

bool add_memory(const mem_region *r, const int *fds, unsigned nfds) {
    if (!settle_memory()) {
        return false;
    }
    if (nfds != 1 || ram.count == MAX_REGIONS) {
        return refuse("a memory region with %u descriptors beside %u others; "
                      "the most is %u regions", nfds, ram.count, MAX_REGIONS);
    }
    return map_region(r, fds[0]) && memory_changed(&ram);
}

bool remove_memory(const mem_region *r) {
    if (!settle_memory()) {
        return false;
    }
    for (unsigned i = 0; i < ram.count; i++) {
        if (r->gpa == region[i].gpa && r->bytes == region[i].bytes &&
            r->user == map[i].user) {
            mapping gone = map[i];
            ram.count--;
            region[i] = region[ram.count];
            map[i] = map[ram.count];
            map[ram.count].base = NULL;
            if (!memory_changed(&ram)) {
                keep(&gone);
                return false;
            }
            munmap(gone.base, gone.bytes);
            return true;
        }
    }
    return refuse("there is no such memory region: %#" PRIx64, r->gpa);
}

// Rings that run keep their guest addresses; the device looks them up anew.
bool set_memory(const mem_region *r, const int *fds, unsigned count) {
    if (!settle_memory()) {
        return false;
    }
    forget_memory();
    for (unsigned i = 0; i < count; i++) {
        if (!map_region(&r[i], fds[i])) {
            return false;
        }
    }
    return memory_changed(&ram);
}

// The front end can shrink the file that is its guest's memory. Anything else
// is a fault of ours, and happens again with what the system does then; what
// another process sends is none.
static void on_sigbus(int number, siginfo_t *info, void *context) {
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    if (info->si_code <= 0) {
        return;
    }
    for (unsigned i = 0; i < MAX_REGIONS && may_escape; i++) {
        if (map[i].base && at - (uintptr_t)map[i].base < map[i].bytes) {
            siglongjmp(escape, 1);
        }
    }
    if (may_escape && in_inflight(at)) {
        siglongjmp(escape, 1);
    }
    signal(number, SIG_DFL);
}

void catch_escapes(void) {
    struct sigaction bus = {.sa_sigaction = on_sigbus,
                            .sa_flags = SA_NODEFER | SA_SIGINFO};
    sigaction(SIGBUS, &bus, NULL);
}

bool escaped(void (*f)(void)) {
    if (sigsetjmp(escape, 0)) {
        may_escape = 0;
        return true;
    }
    may_escape = 1;
    f();
    may_escape = 0;
    return false;
}
