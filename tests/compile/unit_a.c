// The unit with the implementation; unit_b.c has the plain include.
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

int unit_b(void);

int main(void) {
    return unit_b();
}
