// A fuzzer's bytes as the choices of the driver and the host of test_model.c.
// What the model or a rule does not agree to is printed, and aborts.
//
//     -fsanitize=fuzzer   LLVMFuzzerTestOneInput(); the device in a unit of its
//                         own, so that branches are counted there alone
//     -DFUZZ_IN_TESTS     the test fuzz_corpus_replays
#define _FILE_OFFSET_BITS 64
#include "model.h"
#include "tests.h"

#include <dirent.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

// Seen ever: events, by profile and by whether there is map. A fuzzer counts
// them as it counts branches.
#if defined(__clang__) && defined(__linux__)
__attribute__((section("__libfuzzer_extra_counters")))
#endif
static uint8_t events[VBLK_EV_END][2][2];

static bool agrees(const uint8_t *data, size_t n) {
    bool ok = model_session(data, n) && !test_failed;
    for (unsigned i = 0; i < VBLK_EV_END; i++) {
        if (g.events[i]) {
            events[i][g.o.profile == VBLK_STANDARD][g.mapped] = 1;
        }
    }
    return ok;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!agrees(data, n)) {
        fflush(stdout);
        abort();
    }
    return 0;
}

#ifdef FUZZ_IN_TESTS
// With map and without, whatever the file says.
static void replay(const char *path) {
    static uint8_t data[1 << 16];
    FILE *file = fopen(path, "rb");
    size_t n = file ? fread(data, 1, sizeof data, file) : 0;
    CHECK(n > 0);
    for (int map = 0; map < 2 && n > 0; map++) {
        ROW_BEGIN();
        data[0] = (uint8_t)((data[0] & ~2) | map << 1);
        CHECK(agrees(data, n));
        ROW("%s, %s map", path, map ? "with" : "without");
    }
    if (file) {
        fclose(file);
    }
}

// Every file, and every event.
void fuzz_corpus_replays(void) {
    char path[512];
    unsigned files = 0;
    DIR *dir = opendir("tests/corpus");
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (e->d_name[0] != '.') {
            snprintf(path, sizeof path, "tests/corpus/%s", e->d_name);
            replay(path);
            files++;
        }
    }
    if (dir) {
        closedir(dir);
    }
    CHECK(files > 0);
    for (int i = 1; i < VBLK_EV_WORKER_LEFT; i++) {
        ROW_BEGIN();
        CHECK(!event_text(i) || events[i][0][0] || events[i][0][1] ||
              events[i][1][0] || events[i][1][1]);
        ROW("%s", event_text(i));
    }
}
#endif
