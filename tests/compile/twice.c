// The header may come again, in any order, after the implementation.
#include "vblk.h"
#define VBLK_IMPLEMENTATION
#include "vblk.h"
#include "vblk.h"
#define VBLK_IMPLEMENTATION_THREADED
#define VBLK_THREADED
#include "vblk.h"

int main(void) {
    return vblk_strerror(VBLK_OK) ? 0 : 1;
}
