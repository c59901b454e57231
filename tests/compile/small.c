// A firmware rig: no libc, no atomics, small limits. Only compiled.
#include <stddef.h>
void *rig_copy(void *dst, const void *src, size_t n);
void *rig_fill(void *dst, int c, size_t n);
#define VBLK_MEMCPY rig_copy
#define VBLK_MEMSET rig_fill
#define VBLK_ASSERT(x) ((void)0)
#define VBLK_SINGLE_THREADED
#define VBLK_MAX_SEGS 2
#define VBLK_SCRATCH 512
#define VBLK_MAX_RANGES 0
#define VBLK_IMPLEMENTATION
#include "vblk.h"
