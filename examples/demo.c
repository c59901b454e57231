// A disk image in a file, the device, and a driver that talks to it: the whole
// of a bind, some I/O, some requests that must be refused, a reset.
//
//     make demo
//
// The driver here is a few functions that do what a guest's kernel does, by
// register accesses and by stores into guest memory. In a VMM the register
// accesses arrive as exits of a vCPU; what stands in rd() and wr() is all that
// a host needs.
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTORS = 8192, QUEUE = 8 };

// Guest memory: 64 KiB at 0x80000000.
#define RAM    0x80000000u
#define DESC   (RAM + 0x0000)
#define AVAIL  (RAM + 0x1000)
#define USED   (RAM + 0x2000)
#define HEADER (RAM + 0x3000)
#define STATUS (RAM + 0x3010)
#define DATA   (RAM + 0x4000)

static uint64_t ram_words[0x10000 / 8];
static uint8_t *const ram = (uint8_t *)ram_words;
static vblk_dev dev;
static int failures, interrupts;


// ---- The host: two calls, an interrupt, a line for each event ---------------

static uint32_t rd(uint32_t offset) {
    return (uint32_t)vblk_mmio_read(&dev, offset, 4);
}

static void wr(uint32_t offset, uint32_t value) {
    vblk_mmio_write(&dev, offset, 4, value);
    while (vblk_poll(&dev, 0) == 0) { // no limit, so no clock
    }
}

static void interrupt(void *user, int queue, bool fire) {
    (void)user, (void)queue;
    interrupts += fire;
}

static void event(void *user, const vblk_event *e) {
    (void)user;
    char line[400];
    printf("           event: %s\n", vblk_event_line(e, line, sizeof line));
}


// ---- The driver -------------------------------------------------------------

static void put(uint32_t gpa, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        ram[gpa - RAM + i] = (uint8_t)(value >> 8 * i);
    }
}

static uint16_t get16(uint32_t gpa) {
    return (uint16_t)(ram[gpa - RAM] | ram[gpa - RAM + 1] << 8);
}

static void expect(bool ok, const char *what) {
    printf("  %-6s %s\n", ok ? "ok" : "WRONG", what);
    failures += !ok;
}

static void bind(void) {
    wr(VBLK_REG_STATUS, 0);
    wr(VBLK_REG_STATUS, VBLK_STATUS_ACKNOWLEDGE);
    wr(VBLK_REG_STATUS, VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER);
    for (uint32_t page = 0; page < 2; page++) {
        wr(VBLK_REG_DEVICE_FEATURES_SEL, page);
        uint32_t offered = rd(VBLK_REG_DEVICE_FEATURES);
        uint32_t taken = offered & ~(uint32_t)(page ? 0 : VBLK_F_EVENT_IDX);
        printf("           features %u: offered %08x, accepted %08x\n", page,
               offered, taken);
        wr(VBLK_REG_DRIVER_FEATURES_SEL, page);
        wr(VBLK_REG_DRIVER_FEATURES, taken);
    }
    wr(VBLK_REG_STATUS, 0xb);
    expect(rd(VBLK_REG_STATUS) == 0xb, "the device took FEATURES_OK");
    memset(ram, 0, 0x3000);
    wr(VBLK_REG_QUEUE_SEL, 0);
    wr(VBLK_REG_QUEUE_NUM, QUEUE);
    wr(VBLK_REG_QUEUE_DESC_LOW, DESC);
    wr(VBLK_REG_QUEUE_DRIVER_LOW, AVAIL);
    wr(VBLK_REG_QUEUE_DEVICE_LOW, USED);
    wr(VBLK_REG_QUEUE_READY, 1);
    wr(VBLK_REG_STATUS, 0xf);
    expect(rd(VBLK_REG_STATUS) == 0xf, "the device is live");
}

static void describe(uint32_t i, uint64_t gpa, uint32_t bytes, uint32_t flags) {
    uint32_t d = DESC + 16 * i;
    put(d, gpa, 8);
    put(d + 8, bytes, 4);
    put(d + 12, flags, 2);
    put(d + 14, i + 1, 2);
}

// One request of header, data and status, and what an interrupt handler does
// afterwards. Returns the status byte.
static unsigned request(uint32_t type, uint64_t sector, uint64_t data,
                        uint32_t bytes) {
    static const char *const status[] = {"OK", "IOERR", "UNSUPP"};
    uint16_t idx = get16(AVAIL + 2);
    put(HEADER, type, 8);
    put(HEADER + 8, sector, 8);
    put(STATUS, 0xff, 1);
    describe(0, HEADER, 16, 1);
    describe(1, data, bytes, type == VBLK_T_OUT ? 1 : 3);
    describe(bytes ? 2 : 1, STATUS, 1, 2);
    put(AVAIL + 4 + 2 * (idx % QUEUE), 0, 2);
    put(AVAIL + 2, idx + 1u, 2);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    wr(VBLK_REG_INTERRUPT_ACK, rd(VBLK_REG_INTERRUPT_STATUS));
    unsigned got = ram[STATUS - RAM];
    uint32_t used = USED + 4 + 8 * (idx % QUEUE) + 4;
    printf("           type %u, sector %" PRIu64 ", %u bytes: %s, used length "
           "%u\n", type, sector, bytes,
           got < 3 ? status[got] : "no answer", get16(used));
    return got;
}


// ---- The story --------------------------------------------------------------

static void use_the_disk(void) {
    puts("\nThe driver reads the serial, writes, flushes, reads back:");
    expect(request(VBLK_T_GET_ID, 0, DATA, 20) == VBLK_S_OK &&
               !memcmp(ram + (DATA - RAM), "demo-disk\0", 10),
           "the serial is demo-disk");
    memset(ram + (DATA - RAM), 0, 1024);
    strcpy((char *)ram + (DATA - RAM), "hello from the guest");
    expect(request(VBLK_T_OUT, 42, DATA, 1024) == VBLK_S_OK,
           "two sectors written at 42");
    expect(request(VBLK_T_FLUSH, 0, 0, 0) == VBLK_S_OK, "and made durable");
    memset(ram + (DATA - RAM), 0xee, 1024);
    expect(request(VBLK_T_IN, 42, DATA, 512) == VBLK_S_OK &&
               !strcmp((char *)ram + (DATA - RAM), "hello from the guest"),
           "they read back the same");
    expect(ram[DATA - RAM + 512] == 0xee, "and not a byte more was touched");
}

static void be_refused(void) {
    puts("\nIt is refused what must be refused, and the device goes on:");
    expect(request(VBLK_T_IN, SECTORS, DATA, 512) == VBLK_S_IOERR,
           "a read past the end");
    expect(request(VBLK_T_OUT, UINT64_C(1) << 55, DATA, 512) == VBLK_S_IOERR,
           "a sector whose offset would wrap to 0");
    expect(request(VBLK_T_IN, 0, DATA, 100) == VBLK_S_IOERR,
           "a length of no whole sectors");
    expect(request(VBLK_T_IN, 0, 0x1000, 512) == VBLK_S_IOERR,
           "a buffer outside guest memory");
    expect(request(99, 0, 0, 0) == VBLK_S_UNSUPP, "an unknown request type");
    expect(request(VBLK_T_IN, 0, DATA, 512) == VBLK_S_OK,
           "a good request still works");
    put(AVAIL + 2, get16(AVAIL + 2) + 1000u, 2);
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    expect(rd(VBLK_REG_STATUS) == 0x4f,
           "a nonsensical ring index: the device asks for a reset");
}

static bool image_is_right(const char *path) {
    char text[32] = {0};
    FILE *f = fopen(path, "rb");
    bool ok = f && fseek(f, 42 * 512, SEEK_SET) == 0 &&
              fread(text, 1, 21, f) == 21 &&
              !strcmp(text, "hello from the guest");
    rewind(f);
    for (int i = 0; ok && i < 42 * 512; i++) {
        ok = fgetc(f) == 0;
    }
    if (f) {
        fclose(f);
    }
    return ok;
}

int main(void) {
    char path[] = "/tmp/vblk_demo_XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, SECTORS * 512)) {
        perror(path);
        return 1;
    }
    close(fd);

    vblk_region region = {.gpa = RAM, .bytes = sizeof ram_words, .host = ram};
    vblk_regions guest = {.region = &region, .count = 1};
    vblk_file file;
    vblk_options o = {0};
    int err = vblk_file_open(&file, path, false);
    o.memory = vblk_regions_memory(&guest);
    o.backend = vblk_file_backend(&file);
    o.id = "demo-disk";
    o.interrupt = interrupt;
    o.event = event;
    err = err ? err : vblk_init(&dev, &o);
    if (err) {
        if (err == VBLK_ERR_FILE) {
            perror(path);
        }
        fprintf(stderr, "demo: %s\n", vblk_strerror(err));
        return 1;
    }

    printf("A driver probes the register window. The image is %s.\n", path);
    expect(rd(VBLK_REG_MAGIC_VALUE) == 0x74726976 &&
               rd(VBLK_REG_VERSION) == 2 && rd(VBLK_REG_DEVICE_ID) == 2,
           "magic \"virt\", version 2, device 2: a virtio block device");
    expect(rd(VBLK_REG_CONFIG) == SECTORS, "its capacity is 8192 sectors");
    puts("\nIt binds: status, features, queue, DRIVER_OK:");
    bind();
    use_the_disk();
    be_refused();
    puts("\nA reset, and it binds again:");
    bind();
    memset(ram + (DATA - RAM), 0, 1024);
    expect(request(VBLK_T_IN, 42, DATA, 512) == VBLK_S_OK &&
               !strcmp((char *)ram + (DATA - RAM), "hello from the guest"),
           "the data is still there");

    vblk_counts c = vblk_counters(&dev);
    printf("\nCounters: %" PRIu64 " reads, %" PRIu64 " bytes; %" PRIu64
           " writes, %" PRIu64 " bytes; %" PRIu64 " flushes; %" PRIu64
           " errors (an unknown type is none); %" PRIu64 " broken queue; %d "
           "interrupts\n",
           c.reads, c.bytes_read, c.writes, c.bytes_written, c.flushes,
           c.io_errors, c.broken_queues, interrupts);
    expect(c.reads == 3 && c.writes == 1 && c.flushes == 1 &&
               c.io_errors == 4 && c.broken_queues == 1,
           "the counters show just this traffic");
    vblk_file_close(&file);
    expect(image_is_right(path), "the image file holds what was written");
    remove(path);
    printf("\n%s\n", failures ? "Something differs: see WRONG above."
                              : "All as it should be.");
    return failures != 0;
}
