// A kernel that can be wrong on purpose: io_uring as the engine sees it, which
// ends what is under way in any order, in parts, with errors, or not at all.
#ifndef URING_H
#define URING_H

#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

long    uring_syscall(long number, ...);
ssize_t uring_preadv2(int fd, const struct iovec *iov, int n, off_t offset,
                      int flags);
ssize_t uring_pwritev2(int fd, const struct iovec *iov, int n, off_t offset,
                       int flags);

#ifdef URING_HOOKS // what the engine of this unit calls
#define syscall  uring_syscall
#define preadv2  uring_preadv2
#define pwritev2 uring_pwritev2
#endif

#include "test.h"

typedef struct fake_kernel {
    bool     on;         // else calls go to the kernel
    int      file;       // that io_uring works on
    int      setup_errno; // io_uring_setup() fails
    uint64_t now;        // nanoseconds; a wait in vain goes on to its end
    uint64_t tick;       // ns, at each look at the clock
    unsigned ends;       // percent of what is under way, at each call
    unsigned shorts;     // percent of transfers that are cut
    unsigned hold;       // this many more transfers do not end at all
    bool     hold_syncs;
    uint32_t let_go;     // atomic: nothing is held any more
    bool     cancels;    // else what is held stays so
    int      error;      // of the next transfer
    int      sync_error; // of each fdatasync
    unsigned under_way, calls, transfers, syncs, cancelled;
    uint64_t largest; // transfer, in bytes
} fake_kernel;

extern fake_kernel kernel;

void     uring_start(int file);           // from here on
void     uring_stop(void);
uint64_t uring_now(void);

#endif
