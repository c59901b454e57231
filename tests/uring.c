// See uring.h. The rings are a memfd, which the engine maps as it would the
// kernel's; transfers are made with the file itself.
#include "uring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES 256u
#define ARRAY   64u
#define CQ_HEAD 2048u
#define CQ_TAIL 2052u
#define CQES    4096u
#define RING    (CQES + 2 * ENTRIES * sizeof(struct io_uring_cqe))

typedef struct op {
    struct io_uring_sqe sqe;
    struct iovec        iov[140]; // as the kernel has them from the call on
    bool                held, gone;
} op;

fake_kernel kernel;

static uint8_t *ring, *sqes;
static int      ring_fd = -1, event_fd = -1;
static op       pending[300];

static uint32_t *word(unsigned at) {
    return (uint32_t *)(void *)(ring + at);
}

uint64_t uring_now(void) {
    return kernel.now += kernel.tick;
}

void uring_start(int file) {
    memset(&kernel, 0, sizeof kernel);
    kernel.on = true;
    kernel.file = file;
    kernel.now = 1000 * SECOND;
    kernel.ends = 50;
}

void uring_stop(void) {
    kernel.on = false;
    if (ring) {
        munmap(ring, RING);
        munmap(sqes, ENTRIES * sizeof(struct io_uring_sqe));
        ring = NULL;
    }
    event_fd = -1;
}

static long set_up(struct io_uring_params *p) {
    if (kernel.setup_errno) {
        errno = kernel.setup_errno;
        return -1;
    }
    uring_stop();
    kernel.on = true;
    ring_fd = memfd_create("ring", MFD_CLOEXEC);
    size_t bytes = ENTRIES * sizeof(struct io_uring_sqe);
    CHECK_EQ(0, ftruncate(ring_fd, (off_t)(IORING_OFF_SQES + bytes)));
    ring = mmap(NULL, RING, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
    sqes = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd,
                (off_t)IORING_OFF_SQES);
    p->features = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_EXT_ARG;
    p->sq_entries = ENTRIES;
    p->cq_entries = 2 * ENTRIES;
    p->sq_off.tail = 4;
    p->sq_off.flags = 16;
    p->sq_off.array = ARRAY;
    p->cq_off.head = CQ_HEAD;
    p->cq_off.tail = CQ_TAIL;
    p->cq_off.cqes = CQES;
    kernel.under_way = 0;
    return ring_fd;
}

static void end(unsigned i, int result) {
    struct io_uring_cqe *c = (struct io_uring_cqe *)(void *)(ring + CQES);
    uint32_t             tail = *word(CQ_TAIL);
    CHECK(tail - *word(CQ_HEAD) < 2 * ENTRIES);
    c[tail % (2 * ENTRIES)].user_data = pending[i].sqe.user_data;
    c[tail % (2 * ENTRIES)].res = result;
    __atomic_store_n(word(CQ_TAIL), tail + 1, __ATOMIC_RELEASE);
    pending[i] = pending[--kernel.under_way];
    if (event_fd >= 0) {
        eventfd_write(event_fd, 1);
    }
}

// Of the kernel's own calls: whether it is a transfer, which way, and how far.
static int transfer(op *o) {
    const struct io_uring_sqe *s = &o->sqe;
    bool write = s->opcode == IORING_OP_WRITE || s->opcode == IORING_OP_WRITEV;
    if (s->opcode == IORING_OP_READ || write) {
        o->iov[0].iov_base = s->opcode == IORING_OP_WRITEV
                                 ? o->iov[0].iov_base
                                 : (void *)(uintptr_t)s->addr;
    }
    unsigned n = s->opcode == IORING_OP_READ || s->opcode == IORING_OP_WRITE
                     ? 1 : s->len;
    if (n == 1 && s->opcode != IORING_OP_READV &&
        s->opcode != IORING_OP_WRITEV) {
        o->iov[0].iov_len = s->len;
    }
    if (kernel.error) {
        int err = kernel.error;
        kernel.error = 0;
        return -err;
    }
    if (test_below(100) < kernel.shorts) {
        n = 1 + test_below(n);
        size_t *last = &o->iov[n - 1].iov_len;
        *last = 1 + test_below((uint32_t)*last);
    }
    ssize_t moved = write ? pwritev(kernel.file, o->iov, (int)n, (off_t)s->off)
                          : preadv(kernel.file, o->iov, (int)n, (off_t)s->off);
    return moved < 0 ? -errno : (int)moved;
}

// One of what is under way ends, if it can.
static bool act(unsigned i) {
    op *o = &pending[i];
    struct pollfd p = {o->sqe.fd, POLLIN, 0};
    switch (o->sqe.opcode) {
    case IORING_OP_POLL_ADD:
        if (!o->gone && poll(&p, 1, 0) == 0) {
            return false;
        }
        end(i, o->gone ? -ECANCELED : p.revents);
        return true;
    case IORING_OP_ASYNC_CANCEL:
        CHECK_EQ(1u << 0 | 1u << 2, o->sqe.cancel_flags); // ALL, ANY
        for (unsigned j = 0; j < kernel.under_way; j++) {
            bool polls = pending[j].sqe.opcode == IORING_OP_POLL_ADD;
            pending[j].gone = polls || (kernel.cancels && pending[j].held);
        }
        end(i, 0);
        return true;
    default: break;
    }
    CHECK(o->sqe.flags & IOSQE_FIXED_FILE);
    CHECK_EQ(o->sqe.opcode == IORING_OP_FSYNC, o->sqe.fd);
    if (o->gone) {
        kernel.cancelled++;
        end(i, -ECANCELED);
        return true;
    }
    if (o->held && !__atomic_load_n(&kernel.let_go, __ATOMIC_ACQUIRE)) {
        return false;
    }
    if (o->sqe.opcode == IORING_OP_FSYNC) {
        CHECK_EQ(IORING_FSYNC_DATASYNC, o->sqe.fsync_flags);
        end(i, -kernel.sync_error);
    } else {
        end(i, transfer(o));
    }
    return true;
}

static void take(const struct io_uring_sqe *s) {
    op *o = &pending[kernel.under_way++];
    memset(o, 0, sizeof *o);
    o->sqe = *s;
    bool vector = s->opcode == IORING_OP_READV ||
                  s->opcode == IORING_OP_WRITEV;
    bool moves = vector || s->opcode == IORING_OP_READ ||
                 s->opcode == IORING_OP_WRITE;
    if (vector) {
        CHECK(s->len <= COUNT(o->iov));
        memcpy(o->iov, (void *)(uintptr_t)s->addr, s->len * sizeof *o->iov);
    }
    if (moves) {
        __atomic_fetch_add(&kernel.transfers, 1, __ATOMIC_RELEASE);
        o->held = kernel.hold > 0;
        kernel.hold -= kernel.hold > 0;
        uint64_t bytes = vector ? 0 : s->len;
        for (unsigned i = 0; vector && i < s->len; i++) {
            bytes += o->iov[i].iov_len;
        }
        kernel.largest = bytes > kernel.largest ? bytes : kernel.largest;
    } else if (s->opcode == IORING_OP_FSYNC) {
        kernel.syncs++;
        o->held = kernel.hold_syncs;
    }
}

// With DEFER_TASKRUN what has ended shows when the engine comes for it.
static void tell_of_work(void) {
    uint32_t work = 0;
    for (unsigned i = 0; i < kernel.under_way; i++) {
        const op *o = &pending[i];
        bool      polls = o->sqe.opcode == IORING_OP_POLL_ADD;
        work |= !polls && (!o->held || o->gone) ? 1u << 2 : 0;
    }
    __atomic_store_n(word(16), work, __ATOMIC_RELAXED);
}

static long enter(unsigned n, unsigned wait, const uint64_t *timeout) {
    uint32_t head = *word(0), tail = __atomic_load_n(word(4), __ATOMIC_ACQUIRE);
    CHECK_EQ(n, tail - head);
    kernel.calls++;
    for (; head != tail; head++) {
        uint32_t i = word(ARRAY)[head % ENTRIES];
        take((const struct io_uring_sqe *)(void *)sqes + i);
    }
    *word(0) = head;
    for (int idle = 0; idle < 3; idle++) {
        for (unsigned i = kernel.under_way; i-- > 0;) {
            bool may = i < kernel.under_way && test_below(100) < kernel.ends;
            idle = may && act(i) ? 0 : idle;
        }
        if (*word(CQ_TAIL) - *word(CQ_HEAD) >= wait) {
            return (long)n;
        }
    }
    for (unsigned i = kernel.under_way; i-- > 0;) { // whatever can
        act(i);
    }
    if (*word(CQ_TAIL) - *word(CQ_HEAD) < wait) {
        kernel.now += timeout[0] * SECOND + timeout[1];
        errno = ETIME;
        return n ? (long)n : -1;
    }
    return (long)n;
}

// Asked whether the file does without waiting: it does.
ssize_t uring_preadv2(int fd, const struct iovec *iov, int n, off_t offset,
                      int flags) {
    errno = EFAULT;
    return kernel.on ? -1 : preadv2(fd, iov, n, offset, flags);
}

ssize_t uring_pwritev2(int fd, const struct iovec *iov, int n, off_t offset,
                       int flags) {
    errno = EFAULT;
    return kernel.on ? -1 : pwritev2(fd, iov, n, offset, flags);
}

long uring_syscall(long number, ...) {
    long    a[6];
    va_list ap;
    va_start(ap, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(ap, long);
    }
    va_end(ap);
    if (!kernel.on) {
        return syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    }
    switch (number) {
    case SYS_io_uring_setup: return set_up((struct io_uring_params *)a[1]);
    case SYS_io_uring_register:
        if (a[1] == IORING_REGISTER_EVENTFD) {
            event_fd = *(int *)a[2];
        }
        return 0;
    default: {
        const uint64_t *arg = (const uint64_t *)a[4]; // its third word
        long n = enter((unsigned)a[1], (unsigned)a[2],
                       (const uint64_t *)(uintptr_t)arg[2]);
        tell_of_work();
        return n;
    }
    }
}
