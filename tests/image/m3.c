// A firmware image for QEMU's Cortex-M3 board, mps2-an385, that is both: a
// driver, here, and the device, in device.c. It prints `ok`, or what was not,
// by semihosting.
#include "device.h"

#include "../../vblk.h"

enum {
    QUEUE = 8, // entries
    DESC = 0x0000,
    AVAIL = 0x0100,
    USED = 0x0200,
    HEADER = 0x0300,
    STATUS = 0x0310,
    DATA = 0x0400,
    SECTORS = DISK_BYTES / 512,
    NEXT = 1,
    WRITE = 2
};

uint8_t ram[RAM_BYTES], disk[DISK_BYTES];
static unsigned last_event, events;
static uint16_t position; // in the rings

static uint32_t host(uint32_t operation, const void *argument) {
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void print(const char *text) {
    host(0x04, text); // SYS_WRITE0
}

static void print_number(unsigned n) {
    char digits[12], *p = digits + sizeof digits;
    *--p = 0;
    do {
        *--p = (char)('0' + n % 10);
        n /= 10;
    } while (n > 0);
    print(p);
}

static void end(uint32_t status) {
    const uint32_t reason[2] = {0x20026, status}; // the application ended
    for (;;) {
        host(0x20, reason); // SYS_EXIT_EXTENDED
    }
}

static void check(int truth, const char *what, unsigned got) {
    if (!truth) {
        print("FAILED: ");
        print(what);
        print(": got ");
        print_number(got);
        print("\n");
        end(1);
    }
}

void say(unsigned code) {
    last_event = code;
    events++;
}

static void put(uint32_t at, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        ram[at + i] = (uint8_t)value;
        value >>= 8;
    }
}

static uint32_t get(uint32_t at, unsigned bytes) {
    uint32_t value = 0;
    for (unsigned i = bytes; i > 0; i--) {
        value = value << 8 | ram[at + i - 1];
    }
    return value;
}

static void put_desc(unsigned i, uint32_t at, uint32_t n, unsigned flags) {
    put(DESC + 16 * i, (uint64_t)RAM_GPA + at, 8);
    put(DESC + 16 * i + 8, n, 4);
    put(DESC + 16 * i + 12, flags, 2);
    put(DESC + 16 * i + 14, i + 1, 2);
}

// [3.1.1]
static void bring_up(void) {
    static const uint32_t areas[3] = {DESC, AVAIL, USED};
    device_store(VBLK_REG_STATUS, 0);
    device_store(VBLK_REG_STATUS, 1);
    device_store(VBLK_REG_STATUS, 3);
    device_store(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    device_store(VBLK_REG_DRIVER_FEATURES, 1); // VERSION_1
    device_store(VBLK_REG_DRIVER_FEATURES_SEL, 0);
    device_store(VBLK_REG_DRIVER_FEATURES, (uint32_t)VBLK_F_FLUSH);
    device_store(VBLK_REG_STATUS, 11);
    check(device_load(VBLK_REG_STATUS) == 11, "Status after FEATURES_OK",
          device_load(VBLK_REG_STATUS));
    device_store(VBLK_REG_QUEUE_SEL, 0);
    device_store(VBLK_REG_QUEUE_NUM, QUEUE);
    for (unsigned i = 0; i < 3; i++) {
        device_store(VBLK_REG_QUEUE_DESC_LOW + 0x10 * i, RAM_GPA + areas[i]);
        device_store(VBLK_REG_QUEUE_DESC_HIGH + 0x10 * i, 0);
    }
    memset(ram, 0, HEADER);
    position = 0;
    device_store(VBLK_REG_QUEUE_READY, 1);
    device_store(VBLK_REG_STATUS, 15);
}

// One request, and its status byte; in `written` what the used element says.
static unsigned request(uint32_t type, uint32_t sector, uint32_t bytes,
                        uint32_t *written) {
    unsigned last = bytes ? 2 : 1;
    put(HEADER, type, 8);
    put(HEADER + 8, sector, 8);
    ram[STATUS] = 0xff;
    put_desc(0, HEADER, 16, NEXT);
    put_desc(1, DATA, bytes, type == VBLK_T_OUT ? NEXT : NEXT | WRITE);
    put_desc(last, STATUS, 1, WRITE);
    put(AVAIL + 4 + 2 * (position % QUEUE), 0, 2);
    position++;
    put(AVAIL + 2, position, 2);
    device_store(VBLK_REG_QUEUE_NOTIFY, 0);
    device_run();
    check(get(USED + 2, 2) == position, "used.idx", get(USED + 2, 2));
    check(device_load(VBLK_REG_INTERRUPT_STATUS) == VBLK_INTERRUPT_USED,
          "InterruptStatus", device_load(VBLK_REG_INTERRUPT_STATUS));
    device_store(VBLK_REG_INTERRUPT_ACK, VBLK_INTERRUPT_USED);
    *written = get(USED + 4 + 8 * ((position - 1u) % QUEUE) + 4, 4);
    return ram[STATUS];
}

static uint8_t pattern(unsigned sector, unsigned i, unsigned round) {
    return (uint8_t)(31 * sector + i + round);
}

static void write_and_read(unsigned round) {
    uint32_t n;
    for (unsigned s = 0; s < SECTORS; s++) {
        for (unsigned i = 0; i < 512; i++) {
            ram[DATA + i] = pattern(s, i, round);
        }
        check(request(VBLK_T_OUT, s, 512, &n) == VBLK_S_OK && n == 1, "OUT", n);
    }
    check(request(VBLK_T_FLUSH, 0, 0, &n) == VBLK_S_OK && n == 1, "FLUSH", n);
    for (unsigned s = 0; s < SECTORS; s += 4) {
        memset(ram + DATA, 0, 2048);
        check(request(VBLK_T_IN, s, 2048, &n) == VBLK_S_OK && n == 2049, "IN",
              n);
        for (unsigned i = 0; i < 2048; i++) {
            check(ram[DATA + i] == pattern(s + i / 512, i % 512, round) &&
                      disk[512 * s + i] == ram[DATA + i],
                  "a byte that was read", ram[DATA + i]);
        }
    }
}

static void refusals(void) {
    uint32_t n;
    check(events == 0, "an event", last_event);
    check(request(VBLK_T_IN, SECTORS, 512, &n) == VBLK_S_IOERR,
          "past the end", ram[STATUS]);
    check(last_event == VBLK_EV_OUT_OF_RANGE, "its event", last_event);
    check(request(77, 0, 512, &n) == VBLK_S_UNSUPP, "type 77", ram[STATUS]);
    check(last_event == VBLK_EV_TYPE_UNKNOWN, "its event", last_event);
    events = 0;
}

static void run(void) {
    int err = device_begin();
    check(err == VBLK_OK, "vblk_init", (unsigned)-err);
    check(device_load(VBLK_REG_MAGIC_VALUE) == 0x74726976, "the magic number",
          device_load(VBLK_REG_MAGIC_VALUE));
    check(device_load(VBLK_REG_CONFIG) == SECTORS, "capacity",
          device_load(VBLK_REG_CONFIG));
    for (unsigned round = 0; round < 3; round++) { // a reset before each
        bring_up();
        write_and_read(round);
        refusals();
    }
    print("ok\n");
    end(0);
}

void fault(void);
void fault(void) {
    print("FAILED: a fault\n");
    end(1);
}

extern uint32_t stack_top[];
void start(void);
void start(void) {
    run();
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] =
    {stack_top, (const void *)start, (const void *)fault, (const void *)fault,
     (const void *)fault, (const void *)fault, (const void *)fault};
