// All of it private to this file, and mostly unused: no warning.
#define VBLK_STATIC
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

int main(void) {
    return vblk_strerror(VBLK_OK) ? 0 : 1;
}
