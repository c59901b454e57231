// The one test binary: vblk_test [-l] [-v] [-p] [-s SEED] [part of a name]
//
//     -l  list the tests       -v  a line for each that passes
//     -p  the standard profile, where a test does not choose
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define URING_HOOKS
#include "uring.h"

// Calls of the Linux part that tests make fail, see test_calls_fail().
static bool fails(const char *call);
static int  returned(void); // for calls that leave errno alone
#define calloc(...)    (fails("calloc") ? NULL : calloc(__VA_ARGS__))
#define eventfd(...)   (fails("eventfd") ? -1 : eventfd(__VA_ARGS__))
#define fdatasync(...) (fails("fdatasync") ? -1 : fdatasync(__VA_ARGS__))
#define fallocate(...) (fails("fallocate") ? -1 : fallocate(__VA_ARGS__))
#define pread(...)     (fails("pread") ? -1 : pread(__VA_ARGS__))
#define preadv(...)    (fails("preadv") ? -1 : preadv(__VA_ARGS__))
#define pwrite(...)    (fails("pwrite") ? -1 : pwrite(__VA_ARGS__))
#define pwritev(...)   (fails("pwritev") ? -1 : pwritev(__VA_ARGS__))
#define lseek(...)     (fails("lseek") ? -1 : lseek(__VA_ARGS__))
#define pthread_create(...)                                                    \
    (fails("pthread_create") ? returned() : pthread_create(__VA_ARGS__))
#define pthread_cond_timedwait(...)                                            \
    (fails("pthread_cond_timedwait") ? returned()                              \
                                     : pthread_cond_timedwait(__VA_ARGS__))
#define pthread_mutex_init(...)                                                \
    (fails("pthread_mutex_init") ? returned() : pthread_mutex_init(__VA_ARGS__))

#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include "guest.h"
#include "tests.h"

static const char *call_to_fail;
static int         call_errno;
static unsigned    call_skip, call_times; // written before call_times is

void test_calls_fail(const char *call, int err, unsigned skip,
                     unsigned times) {
    __atomic_store_n(&call_times, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&call_to_fail, call, __ATOMIC_RELAXED);
    call_errno = err;
    call_skip = skip;
    __atomic_store_n(&call_times, times, __ATOMIC_RELEASE);
}

unsigned test_calls_left(void) {
    return call_times;
}

bool test_call_fails(const char *call) {
    return fails(call);
}

static bool fails(const char *call) {
    if (!__atomic_load_n(&call_times, __ATOMIC_ACQUIRE) ||
        strcmp(call, __atomic_load_n(&call_to_fail, __ATOMIC_RELAXED)) != 0) {
        return false;
    }
    if (call_skip) {
        call_skip--;
        return false;
    }
    __atomic_fetch_sub(&call_times, 1, __ATOMIC_RELEASE);
    errno = call_errno;
    return true;
}

static int returned(void) {
    errno = 0;
    return call_errno;
}

// Private functions that tests look at.
bool test_crosses(uint16_t event, uint16_t now, uint16_t old);

bool test_crosses(uint16_t event, uint16_t now, uint16_t old) {
    return vblk__crosses(event, now, old);
}

static uint64_t number(const vblk_event *e, unsigned field) {
    const uint64_t by_field[] = {
        0,        e->address, e->bytes,   e->sector,
        e->index, e->value,   e->against, (uint64_t)e->error};
    return by_field[field];
}

uint64_t event_a(const vblk_event *e) {
    return number(e, vblk__event_row(e->code)->a);
}

uint64_t event_b(const vblk_event *e) {
    return number(e, vblk__event_row(e->code)->b);
}

const char *event_text(int code) {
    const char *text = vblk__event_text((vblk_event_code)code);
    return strcmp(text, "unknown event code") ? text : NULL;
}

// How a test wants to run: with a guest, with map and without; the same, and in
// the strict profile whatever is asked for; or once.
enum { GUEST, STRICT, ONCE };

static const struct test {
    const char *name;
    void (*run)(void);
    int how;
} tests[] = {
#define X(name, how) {#name, name, how},
    TESTS(X)
#undef X
};

static bool run_one(const struct test *t, bool map) {
    test_failed = 0;
    test_random_from(test_seed);
    guest_use_map = map;
    vblk_profile asked = guest_profile;
    guest_profile = t->how == STRICT ? VBLK_STRICT : asked;
    if (t->how != ONCE) {
        guest_init();
    }
    t->run();
    if (t->how != ONCE) {
        guest_check();
    }
    guest_profile = asked;
    if (test_failed) {
        printf("FAILED %s%s (seed %" PRIu64 ")\n", t->name,
               t->how == ONCE ? "" : map ? " with map" : " without map",
               test_seed);
    }
    return test_failed == 0;
}

int main(int argc, char **argv) {
    const char *filter = "";
    bool list = false, verbose = false;
    int passed = 0, failed = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-l")) {
            list = true;
        } else if (!strcmp(argv[i], "-v")) {
            verbose = true;
        } else if (!strcmp(argv[i], "-p")) {
            guest_profile = VBLK_STANDARD;
        } else if (!strcmp(argv[i], "-s") && i + 1 < argc) {
            test_seed = strtoull(argv[++i], NULL, 0);
        } else if (argv[i][0] == '-') {
            fprintf(stderr,
                    "usage: %s [-l] [-v] [-p] [-s SEED] [part of a name]\n",
                    argv[0]);
            return 2;
        } else {
            filter = argv[i];
        }
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < COUNT(tests); i++) {
        if (!strstr(tests[i].name, filter)) {
            continue;
        }
        if (list) {
            printf("%s\n", tests[i].name);
            continue;
        }
        bool ok = run_one(&tests[i], true);
        if (tests[i].how != ONCE) {
            ok = run_one(&tests[i], false) && ok;
        }
        if (ok && verbose) {
            printf("ok %s\n", tests[i].name);
        }
        passed += ok;
        failed += !ok;
    }
    if (!list) {
        printf("%d passed, %d failed\n", passed, failed);
    }
    return failed || (!list && passed == 0);
}
