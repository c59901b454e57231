// An emulator's loop, without threads: a CPU that executes a step at a time, a
// bus with RAM and the disk's window, a level interrupt line, and a limit of
// 50 requests a second that the loop keeps by looking at its clock.
//
//     make emulator
//
// The CPU here knows four instructions, enough for a driver that binds and then
// reads 75 sectors. Yours knows more; bus_load(), bus_store() and the loop in
// main() stay as they are.
#define _POSIX_C_SOURCE 200809L
#define VBLK_IMPLEMENTATION
#include "../vblk.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RAM    0x80000000u // guest addresses
#define DESC   RAM
#define AVAIL  (RAM + 0x1000)
#define USED   (RAM + 0x2000)
#define HEADER (RAM + 0x3000)
#define STATUS (RAM + 0x3010)
#define DATA   (RAM + 0x4000)
#define WINDOW 0x10001000u
#define READS  75

static uint64_t ram_words[1 << 13];
static uint8_t *const ram = (uint8_t *)ram_words;
static uint8_t  disk[1 << 20];
static vblk_dev dev;

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

// 1, 2 or 4 bytes, as the instruction says: config space may be read by bytes.
static uint32_t bus_load(uint32_t address, unsigned bytes) {
    uint32_t value = 0;
    if (address >= WINDOW && address < WINDOW + 0x200) {
        return (uint32_t)vblk_mmio_read(&dev, address - WINDOW, bytes);
    }
    for (unsigned i = 0; i < bytes; i++) {
        value |= (uint32_t)ram[address - RAM + i] << 8 * i;
    }
    return value;
}

static void bus_store(uint32_t address, unsigned bytes, uint32_t value) {
    if (address >= WINDOW && address < WINDOW + 0x200) {
        vblk_mmio_write(&dev, address - WINDOW, bytes, value);
        return;
    }
    for (unsigned i = 0; i < bytes; i++) {
        ram[address - RAM + i] = (uint8_t)(value >> 8 * i);
    }
}

// EXPECT stops the machine unless `bytes` at `address` are `value`; WAIT holds
// it until the line is high; NOTIFY makes the next entry of the ring available,
// stores to QueueNotify, and goes back by `value` as long as there are reads.
enum { STORE, EXPECT, WAIT, NOTIFY };
static const struct {
    uint8_t  op, bytes;
    uint32_t address, value;
} program[] = {
    {EXPECT, 4, WINDOW, 0x74726976},    {EXPECT, 4, WINDOW + 8, 2},
    {EXPECT, 2, WINDOW + 0x100, 2048},  {EXPECT, 1, WINDOW + 0x101, 8},
    {STORE, 4, WINDOW + 0x70, 1},       {STORE, 4, WINDOW + 0x70, 3},
    {STORE, 4, WINDOW + 0x24, 1},       {STORE, 4, WINDOW + 0x20, 1},
    {STORE, 4, WINDOW + 0x70, 0xb},     {EXPECT, 4, WINDOW + 0x70, 0xb},
    {STORE, 4, WINDOW + 0x38, 16},      {STORE, 4, WINDOW + 0x80, DESC},
    {STORE, 4, WINDOW + 0x90, AVAIL},   {STORE, 4, WINDOW + 0xa0, USED},
    {STORE, 4, DESC, HEADER},           {STORE, 4, DESC + 8, 16},
    {STORE, 4, DESC + 12, 0x10001},     {STORE, 4, DESC + 16, DATA},
    {STORE, 4, DESC + 24, 512},         {STORE, 4, DESC + 28, 0x20003},
    {STORE, 4, DESC + 32, STATUS},      {STORE, 4, DESC + 40, 1},
    {STORE, 2, DESC + 44, 2},           {STORE, 1, HEADER + 8, 7}, // sector 7
    {STORE, 4, WINDOW + 0x44, 1},       {STORE, 4, WINDOW + 0x70, 0xf},
    {STORE, 1, STATUS, 0xff},           {NOTIFY, 4, WINDOW + 0x50, 0},
    {WAIT, 0, 0, 0},                    {STORE, 4, WINDOW + 0x64, 3},
    {EXPECT, 1, STATUS, VBLK_S_OK},     {NOTIFY, 0, 0, 5},
};

static unsigned pc, reads;

// One instruction. False: it was the last.
static bool step(bool line) {
    uint32_t address = program[pc].address, value = program[pc].value;
    unsigned bytes = program[pc].bytes;
    switch (program[pc].op) {
    case STORE: bus_store(address, bytes, value); break;
    case WAIT:  pc -= !line;                      break;
    case EXPECT:
        if (bus_load(address, bytes) != value) {
            fprintf(stderr, "emulator: step %u failed\n", pc);
            exit(1);
        }
        break;
    case NOTIFY:
        if (bytes) {
            bus_store(AVAIL + 2, 2, ++reads);
            bus_store(address, bytes, 0);
        } else if (reads < READS) {
            pc -= value + 1;
        } else {
            return false;
        }
    }
    pc++;
    return true;
}

int main(void) {
    vblk_region  region = {.gpa = RAM, .bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_ramdisk image = {.data = disk, .bytes = sizeof disk};
    vblk_options o = {0};
    strcpy((char *)disk + 7 * 512, "what the guest reads");
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_ramdisk_backend(&image);
    o.limits.iops = 50;
    int err = vblk_init(&dev, &o);
    if (err) {
        fprintf(stderr, "emulator: %s\n", vblk_strerror(err));
        return 1;
    }
    uint64_t start = clock_ns();
    bool     line = false; // to the interrupt controller
    while (step(line)) {
        vblk_poll(&dev, clock_ns()); // a CPU that sleeps: until what it answers
        line = vblk_interrupt_line(&dev);
    }
    uint64_t ms = (clock_ns() - start) / 1000000;
    printf("%u reads of \"%s\" in %llu ms at 50 a second, of which the first "
           "second's worth was saved up\n", reads, (char *)ram + (DATA - RAM),
           (unsigned long long)ms);
    return ms < 450 || ms > 5000;
}
