#ifndef DEVICE_H
#define DEVICE_H

#include <stddef.h>
#include <stdint.h>

enum { RAM_GPA = 0x80000000, RAM_BYTES = 16384, DISK_BYTES = 16384 };

// device.c
int device_begin(void); // a VBLK_ERR_
uint32_t device_load(uint32_t offset);
void device_store(uint32_t offset, uint32_t value);
void device_run(void);

// Of whoever links it.
extern uint8_t ram[RAM_BYTES], disk[DISK_BYTES];
void say(unsigned code);
void *memcpy(void *dst, const void *src, size_t n);
void *memset(void *dst, int byte, size_t n);

#endif
