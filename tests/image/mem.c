// All of a libc that the device needs.
#include "device.h"

void *memcpy(void *dst, const void *src, size_t n) {
    for (size_t i = 0; i < n; i++) {
        ((uint8_t *)dst)[i] = ((const uint8_t *)src)[i];
    }
    return dst;
}

void *memset(void *dst, int byte, size_t n) {
    for (size_t i = 0; i < n; i++) {
        ((uint8_t *)dst)[i] = (uint8_t)byte;
    }
    return dst;
}
