// The harness, but for main() and the calls that are made to fail.
#include "test.h"

#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int      test_failed;
uint64_t test_seed = 1;

static uint64_t       random_state;
static const uint8_t *fed;
static size_t         fed_bytes;

void test_fail(const char *file, int line, const char *text) {
    test_failed++;
    if (test_failed <= 10) {
        printf("  %s:%d: %s\n", file, line, text);
    }
}

bool test_asserts(void (*call)(void)) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        close(2); // the assertion speaks
        call();
        _exit(0);
    }
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status) &&
           WTERMSIG(status) == SIGABRT;
}

uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

void test_wait(unsigned round) {
    struct timespec t = {0, 100000};
    if (round < 100) {
        sched_yield();
    } else {
        nanosleep(&t, NULL);
    }
}

void test_random_from(uint64_t seed) {
    random_state = seed;
    fed = NULL;
    fed_bytes = 0;
}

void test_feed(const uint8_t *in, size_t n) {
    test_random_from(1);
    fed = in;
    fed_bytes = n;
}

size_t test_fed(void) {
    return fed_bytes;
}

// splitmix64
uint32_t test_random(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

uint32_t test_below(uint32_t n) {
    uint32_t value = 0;
    if (!fed || n == 0) {
        return (uint32_t)((uint64_t)test_random() * n >> 32);
    }
    for (uint32_t most = n - 1; most > 0 && fed_bytes > 0; most >>= 8) {
        value = value << 8 | *fed++;
        fed_bytes--;
    }
    return value % n;
}
