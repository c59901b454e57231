// The harness: checks that print what they saw, and the counters behind them.
#ifndef TEST_H
#define TEST_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern int      test_failed; // checks that failed in the running test
extern uint64_t test_seed;

void test_fail(const char *file, int line, const char *text);

#define CHECK(cond)                                                            \
    do {                                                                       \
        if (!(cond)) {                                                         \
            test_fail(__FILE__, __LINE__, #cond);                              \
        }                                                                      \
    } while (0)

#define CHECK_EQ(want, got)                                                    \
    do {                                                                       \
        uint64_t want_ = (uint64_t)(want), got_ = (uint64_t)(got);             \
        if (want_ != got_) {                                                   \
            char text_[256];                                                   \
            snprintf(text_, sizeof text_,                                      \
                     "%s: want %" PRIu64 " (%#" PRIx64 "), got %" PRIu64       \
                     " (%#" PRIx64 ")",                                        \
                     #got, want_, want_, got_, got_);                          \
            test_fail(__FILE__, __LINE__, text_);                              \
        }                                                                      \
    } while (0)

#define CHECK_MEM(want, got, n)                                                \
    do {                                                                       \
        if (memcmp(want, got, n) != 0) {                                       \
            test_fail(__FILE__, __LINE__, #got " differs from " #want);        \
        }                                                                      \
    } while (0)

// What row of a table a failure belongs to.
#define ROW(...)                                                               \
    do {                                                                       \
        if (test_failed != row_before_) {                                      \
            printf("    in row: ");                                            \
            printf(__VA_ARGS__);                                               \
            printf("\n");                                                      \
        }                                                                      \
    } while (0)
#define ROW_BEGIN() int row_before_ = test_failed

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

// Calls of the Linux part to `call` fail with `err`: the first `skip` do not,
// the `times` after them do. Only for calls that this thread makes.
void     test_calls_fail(const char *call, int err, unsigned skip,
                         unsigned times);
unsigned test_calls_left(void); // those that did not happen yet
bool     test_call_fails(const char *call); // one is made: whether it fails

// Whether `call` fails an assertion, in a process of its own.
bool test_asserts(void (*call)(void));

// Monotonic, in nanoseconds.
#define SECOND UINT64_C(1000000000)
uint64_t clock_ns(void);

// Wait for what another thread brings about. It may need our processor.
void test_wait(unsigned round);

// TEST_PATIENCE seconds mean that it never comes.
#ifndef TEST_PATIENCE
#define TEST_PATIENCE 20
#endif
#define EVENTUALLY(cond)                                                       \
    do {                                                                       \
        uint64_t end_ = clock_ns() + TEST_PATIENCE * SECOND;                   \
        for (unsigned round_ = 0; !(cond); round_++) {                         \
            if (clock_ns() > end_) {                                           \
                test_fail(__FILE__, __LINE__, "never: " #cond);                \
                break;                                                         \
            }                                                                  \
            test_wait(round_);                                                 \
        }                                                                      \
    } while (0)

// Loads and stores that race by design; the thread sanitizer looks away.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNWATCHED __attribute__((no_sanitize("thread")))
#endif
#endif
#ifndef UNWATCHED
#define UNWATCHED
#endif

// Reproducible: the same seed gives the same run.
void     test_random_from(uint64_t seed);
uint32_t test_random(void);
uint32_t test_below(uint32_t n); // 0 of none

// A fuzzer's choices: test_below() takes them from these bytes, and has nothing
// but 0 to say when they are used up. test_fed() tells how many are left.
void     test_feed(const uint8_t *in, size_t n);
size_t   test_fed(void);

#endif
