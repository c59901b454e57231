// Files on a system that has POSIX alone: written, cut, read.
#define VBLK_IMPLEMENTATION_FILES
#include "vblk.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    static char a[600] = "first", b[424] = "second", back[1024];
    vblk_seg out[2] = {{(uint8_t *)a, sizeof a, 0}, {(uint8_t *)b, sizeof b, 0}};
    vblk_seg in = {.ptr = (uint8_t *)back, .n = sizeof back};
    vblk_file file;
    int64_t n = 0, done = 0;
    FILE *made = argc == 2 ? fopen(argv[1], "w") : NULL;
    if (!made || fclose(made) || vblk_file_open(&file, argv[1], false)) {
        return 1;
    }
    vblk_backend disk = vblk_file_backend(&file);
    for (unsigned i = 0; i < 2; i += n < (int64_t)sizeof back ? 1 : 2) {
        n = disk.write(disk.user, (uint64_t)done, out + i, 2 - i);
        done += n;
    }
    bool same = done == 1024 &&
                disk.read(disk.user, 0, &in, 1) == (int64_t)sizeof back &&
                !strcmp(back, "first") &&
                !strcmp(back + sizeof a, "second");
    bool durable = disk.flush(disk.user) == 0 && disk.size(disk.user) == 1024;
    vblk_file_close(&file);
    return same && durable ? 0 : 3;
}
