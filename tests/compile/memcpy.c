// The Linux part of a program with a memcpy of its own. Only compiled.
#include <stddef.h>
void *other_copy(void *dst, const void *src, size_t n);
void *other_fill(void *dst, int c, size_t n);
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"
