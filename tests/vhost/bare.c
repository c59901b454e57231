// The limit: the same transfers without a device, by io_uring, `depth` of them
// under way. Bare system calls, and nothing is checked that cannot go wrong
// between two benchmarks.
#include "front.h"

#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define ENTRIES 1024u // as many as requests

static struct {
    int       fd;
    uint32_t *sq_tail, *cq_head, *cq_tail, cq_mask, tail;
    struct io_uring_sqe *sqe;
    struct io_uring_cqe *cqe;
} ring = {.fd = -1};

static bool registered(unsigned what, const void *arg, unsigned count) {
    return syscall(SYS_io_uring_register, ring.fd, what, arg, count) == 0;
}

bool bare_open(int fd, uint8_t *buffer, size_t bytes, bool fixed) {
    struct io_uring_params p = {0};
    struct iovec           iov = {buffer, bytes};
    p.flags = 1u << 12 | 1u << 13; // SINGLE_ISSUER, DEFER_TASKRUN
    ring.fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
    if (ring.fd < 0) {
        return fail("a bare io_uring is not to be had");
    }
    size_t n = p.cq_off.cqes + p.cq_entries * sizeof *ring.cqe;
    size_t k = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    char  *at = mmap(NULL, n > k ? n : k, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
    ring.sqe = mmap(NULL, ENTRIES * sizeof *ring.sqe, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES);
    ring.sq_tail = (void *)(at + p.sq_off.tail);
    ring.cq_head = (void *)(at + p.cq_off.head);
    ring.cq_tail = (void *)(at + p.cq_off.tail);
    ring.cqe = (void *)(at + p.cq_off.cqes);
    ring.cq_mask = p.cq_entries - 1;
    for (uint32_t i = 0; i < ENTRIES; i++) {
        ((uint32_t *)(void *)(at + p.sq_off.array))[i] = i;
    }
    return registered(IORING_REGISTER_FILES, &fd, 1) &&
           (!fixed || registered(IORING_REGISTER_BUFFERS, &iov, 1));
}

void bare_submit(unsigned i, uint8_t *data, uint32_t bytes, uint64_t offset,
                 bool write, bool fixed) {
    struct io_uring_sqe *s = &ring.sqe[ring.tail++ % ENTRIES];
    memset(s, 0, sizeof *s);
    s->opcode = write ? fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE
                      : fixed ? IORING_OP_READ_FIXED : IORING_OP_READ;
    s->flags = IOSQE_FIXED_FILE;
    s->addr = (uintptr_t)data;
    s->len = bytes;
    s->off = offset;
    s->user_data = i;
}

// Hands over `n`, waits for one; -1 when all that ended is taken.
void bare_enter(unsigned n) {
    __atomic_store_n(ring.sq_tail, ring.tail, __ATOMIC_RELEASE);
    syscall(SYS_io_uring_enter, ring.fd, n, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}

int bare_take(int32_t *result) {
    uint32_t head = *ring.cq_head;
    if (head == __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE)) {
        return -1;
    }
    struct io_uring_cqe *c = &ring.cqe[head & ring.cq_mask];
    int                  i = (int)c->user_data;
    *result = c->res;
    __atomic_store_n(ring.cq_head, head + 1, __ATOMIC_RELEASE);
    return i;
}
