// How long requests took, from when they were taken out of the ring to when the
// guest could see their end: counted in classes that are an eighth wide.
#include "serve.h"

#define CLASSES (64 * 8)

static uint64_t since[MAX_QUEUES][MAX_RING]; // each head's; 0: not under way
static uint64_t times[CLASSES]; // atomic
static uint64_t seen[CLASSES];  // when they were printed last
static uint64_t longest;        // atomic; ns, from then on

static unsigned class_of(uint64_t ns) {
    unsigned log = 63 - (unsigned)__builtin_clzll(ns | 8);
    return log * 8 + (unsigned)(ns >> (log - 3) & 7);
}

static double end_of_class_us(unsigned class) {
    return (double)((UINT64_C(9) + class % 8) << (class / 8)) / 8e3;
}

void latency_taken(unsigned ring, unsigned head) {
    since[ring][head % MAX_RING] = now_ns();
}

void latency_shown(unsigned ring, unsigned head, uint64_t now) {
    uint64_t *from = &since[ring][head % MAX_RING];
    uint64_t  ns = now - *from;
    if (*from == 0) {
        return;
    }
    *from = 0;
    __atomic_fetch_add(&times[class_of(ns)], 1, __ATOMIC_RELAXED);
    if (ns > __atomic_load_n(&longest, __ATOMIC_RELAXED)) {
        __atomic_store_n(&longest, ns, __ATOMIC_RELAXED);
    }
}

// The rest of a line: of what ended since `from`, which is brought up to date.
static void print_percentiles(uint64_t *from) {
    static const double parts[] = {.5, .9, .99, .999};
    uint64_t n[CLASSES], all = 0, sum = 0;
    for (unsigned i = 0; i < CLASSES; i++) {
        uint64_t now = __atomic_load_n(&times[i], __ATOMIC_RELAXED);
        n[i] = now - from[i];
        from[i] = now;
        all += n[i];
    }
    unsigned class = 0;
    sum = n[0];
    for (unsigned i = 0; i < 4; i++) {
        while (class < CLASSES - 1 && (double)sum < parts[i] * (double)all) {
            sum += n[++class];
        }
        printf(" p%g %.3g", parts[i] * 100, all ? end_of_class_us(class) : 0.);
    }
}

void print_latency(void) {
    printf(" us");
    print_percentiles(seen);
    printf(" max %.3g",
           (double)__atomic_exchange_n(&longest, 0, __ATOMIC_RELAXED) / 1e3);
}

void print_all_latency(void) {
    memset(seen, 0, sizeof seen);
    printf("latency_us");
    print_percentiles(seen);
    putchar('\n');
}
