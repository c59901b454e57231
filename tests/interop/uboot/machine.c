/*
    machine.c - a RISC-V computer that runs U-Boot over a vblk.h disk

    usage: machine u-boot.bin machine.dtb disk.img <commands >transcript

    Unicorn is the processor; around it stand RAM, a serial port, a clock and
    one virtio-mmio slot, where machine.dts says. Every line of the input is
    typed at one prompt of U-Boot. The output is the console, and at each
    prompt a line of what the device did since the last one:

        device reads=1 bytes_read=512 writes=0 ...

    Events of the device go to stderr. The status is 0 if the input was typed
    to its end and U-Boot came back to its prompt.

    Time moves when it is read and not otherwise, so that nothing waits and
    all runs are alike.
*/
#define VBLK_IMPLEMENTATION_THREADED
#include "vblk.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unicorn/unicorn.h>

#define RAM_GPA    0x80000000u // and where U-Boot starts
#define RAM_BYTES  (128u << 20)
#define FDT_GPA    0x82000000u
#define UART_GPA   0x10000000u
#define SLOT_GPA   0x10001000u
#define CLINT_GPA  0x02000000u
#define PAGE_BYTES 0x1000u

#define CLINT_BYTES 0x10000u
#define CLINT_MTIME 0xbff8u
#define READ_TICKS  100u // 10 us of timebase-frequency

#define UART_DATA 0u // or the low byte of the divisor, with LCR_DLAB
#define UART_LCR  3u
#define UART_LSR  5u
#define LCR_DLAB  0x80u
#define LSR_READY 0x01u // a byte to read
#define LSR_EMPTY 0x60u // nothing waits to be sent

#define PROMPT "\n=> "

typedef struct machine {
    uc_engine   *cpu;
    uint8_t     *ram;
    uint64_t     mtime;
    uint8_t      uart_lcr;
    char         line[256];       // typed, up to a NUL
    const char  *typed;           // next byte that U-Boot reads
    char         said[sizeof PROMPT];
    bool         finished;
    vblk_file    file;
    vblk_backend disk;            // of file
    uint64_t     backend_flushes; // in time for the write they belong to
    vblk_region  region;
    vblk_regions guest;
    vblk_dev     dev;
    uint64_t     used_gpa;        // the driver's used ring
    uint32_t     used_size;
    uint16_t     used_seen;
    uint64_t     used_bytes;      // sum of the lengths in it
} machine;

static machine m;

static void die(const char *what, const char *why) {
    fprintf(stderr, "machine: %s: %s\n", what, why);
    exit(1);
}

static void cpu_check(const char *what, uc_err err) {
    if (err) {
        die(what, uc_strerror(err));
    }
}


// ---- Clock ------------------------------------------------------------------

static uint64_t clint_load(uc_engine *cpu, uint64_t offset, unsigned bytes,
                           void *user) {
    (void)cpu, (void)bytes, (void)user;
    if (offset < CLINT_MTIME || offset > CLINT_MTIME + 7) {
        return 0;
    }
    if (offset == CLINT_MTIME) {
        m.mtime += READ_TICKS;
    }
    return m.mtime >> 8 * (offset - CLINT_MTIME);
}

static void clint_store(uc_engine *cpu, uint64_t offset, unsigned bytes,
                        uint64_t value, void *user) {
    (void)cpu, (void)offset, (void)bytes, (void)value, (void)user;
}


// ---- Console ----------------------------------------------------------------

static void show_counters(void) {
    static vblk_counts was;
    vblk_counts now = vblk_counters(&m.dev);
    printf("\ndevice reads=%" PRIu64 " bytes_read=%" PRIu64
           " writes=%" PRIu64 " bytes_written=%" PRIu64
           " flushes=%" PRIu64 " io_errors=%" PRIu64
           " backend_flushes=%" PRIu64 " used_bytes=%" PRIu64 "\n",
           now.reads - was.reads, now.bytes_read - was.bytes_read,
           now.writes - was.writes, now.bytes_written - was.bytes_written,
           now.flushes - was.flushes, now.io_errors - was.io_errors,
           m.backend_flushes, m.used_bytes);
    was = now;
    m.backend_flushes = m.used_bytes = 0;
}

static void console_put(char c) {
    putchar(c);
    memmove(m.said, m.said + 1, sizeof m.said - 2);
    m.said[sizeof m.said - 2] = c;
    if (strcmp(m.said, PROMPT) == 0) {
        show_counters();
        m.typed = m.line;
        if (!fgets(m.line, sizeof m.line, stdin)) {
            m.line[0] = 0;
            m.finished = true;
            uc_emu_stop(m.cpu);
        }
    }
}

static uint64_t uart_load(uc_engine *cpu, uint64_t offset, unsigned bytes,
                          void *user) {
    (void)cpu, (void)bytes, (void)user;
    switch (offset) {
    case UART_DATA: return *m.typed ? (uint8_t)*m.typed++ : 0;
    case UART_LCR:  return m.uart_lcr;
    case UART_LSR:  return *m.typed ? LSR_EMPTY | LSR_READY : LSR_EMPTY;
    default:        return 0;
    }
}

static void uart_store(uc_engine *cpu, uint64_t offset, unsigned bytes,
                       uint64_t value, void *user) {
    (void)cpu, (void)bytes, (void)user;
    if (offset == UART_DATA && !(m.uart_lcr & LCR_DLAB) && value != '\r') {
        console_put((char)value);
    } else if (offset == UART_LCR) {
        m.uart_lcr = (uint8_t)value;
    }
}


// ---- Disk -------------------------------------------------------------------

static uint32_t ram_word(uint64_t gpa) {
    const uint8_t *p = m.ram + (gpa - RAM_GPA);
    if (gpa < RAM_GPA || gpa > RAM_GPA + RAM_BYTES - 4) {
        die("used ring", "not in RAM");
    }
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 |
           (uint32_t)p[3] << 24;
}

static uint16_t used_idx(void) {
    return (uint16_t)(ram_word(m.used_gpa) >> 16);
}

// Add up the lengths, which U-Boot does not look at.
static void watch_used_ring(uint64_t offset, uint64_t value) {
    if (offset == VBLK_REG_QUEUE_NUM) {
        m.used_size = (uint32_t)value;
    } else if (offset == VBLK_REG_QUEUE_DEVICE_LOW) {
        m.used_gpa = value;
        m.used_seen = 0;
    } else if (offset == VBLK_REG_QUEUE_NOTIFY) {
        for (; m.used_seen != used_idx(); m.used_seen++) {
            m.used_bytes += ram_word(m.used_gpa + 8 +
                                     8u * (m.used_seen % m.used_size));
        }
    }
}

static uint64_t slot_load(uc_engine *cpu, uint64_t offset, unsigned bytes,
                          void *user) {
    (void)cpu, (void)user;
    return vblk_mmio_read(&m.dev, offset, bytes);
}

static void slot_store(uc_engine *cpu, uint64_t offset, unsigned bytes,
                       uint64_t value, void *user) {
    (void)cpu, (void)user;
    vblk_mmio_write(&m.dev, offset, bytes, value);
    while (vblk_poll(&m.dev, 0) == 0) {
    }
    watch_used_ring(offset, value);
}

// A flush after the driver was told that its write is done would be too late.
static int counted_flush(void *user) {
    m.backend_flushes += used_idx() == m.used_seen;
    return m.disk.flush(user);
}

static void event(void *user, const vblk_event *e) {
    char line[400];
    (void)user;
    fprintf(stderr, "event: %s\n", vblk_event_line(e, line, sizeof line));
}

static void disk_start(const char *path) {
    int err = vblk_file_open(&m.file, path, false);
    if (err) {
        die(path, vblk_strerror(err));
    }
    m.disk = vblk_file_backend(&m.file);
    m.region = (vblk_region){.gpa = RAM_GPA, .bytes = RAM_BYTES, .host = m.ram};
    m.guest = (vblk_regions){.region = &m.region, .count = 1};

    vblk_options o = {0};
    o.memory = vblk_regions_memory(&m.guest);
    o.backend = m.disk;
    o.backend.flush = counted_flush;
    o.event = event;
    err = vblk_init(&m.dev, &o);
    if (err) {
        die("vblk_init", vblk_strerror(err));
    }
}


// ---- Processor and RAM ------------------------------------------------------

static void load(const char *path, uint64_t gpa) {
    uint8_t *at = m.ram + (gpa - RAM_GPA);
    size_t room = RAM_BYTES - (size_t)(gpa - RAM_GPA);
    FILE *f = fopen(path, "rb");
    if (!f || fread(at, 1, room, f) == 0) {
        die(path, "cannot be read");
    }
    fclose(f);
}

static void cpu_start(void) {
    m.ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m.ram == MAP_FAILED) {
        die("RAM", "no memory");
    }
    cpu_check("uc_open", uc_open(UC_ARCH_RISCV, UC_MODE_RISCV64, &m.cpu));
    cpu_check("RAM", uc_mem_map_ptr(m.cpu, RAM_GPA, RAM_BYTES, UC_PROT_ALL,
                                    m.ram));
    cpu_check("CLINT", uc_mmio_map(m.cpu, CLINT_GPA, CLINT_BYTES, clint_load,
                                   NULL, clint_store, NULL));
    cpu_check("UART", uc_mmio_map(m.cpu, UART_GPA, PAGE_BYTES, uart_load, NULL,
                                  uart_store, NULL));
    cpu_check("slot", uc_mmio_map(m.cpu, SLOT_GPA, PAGE_BYTES, slot_load, NULL,
                                  slot_store, NULL));
}

// As a prior stage does: the hart's number in a0, the device tree in a1.
static uc_err cpu_run(void) {
    uint64_t hart = 0, fdt = FDT_GPA;
    uc_reg_write(m.cpu, UC_RISCV_REG_A0, &hart);
    uc_reg_write(m.cpu, UC_RISCV_REG_A1, &fdt);
    return uc_emu_start(m.cpu, RAM_GPA, UINT64_MAX, 0, 0);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        die("usage", "machine u-boot.bin machine.dtb disk.img");
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    cpu_start();
    load(argv[1], RAM_GPA);
    load(argv[2], FDT_GPA);
    disk_start(argv[3]);
    m.typed = " "; // stops the countdown to autoboot

    uc_err err = cpu_run();
    if (!m.finished) {
        uint64_t pc = 0;
        uc_reg_read(m.cpu, UC_RISCV_REG_PC, &pc);
        fprintf(stderr, "machine: stopped at 0x%" PRIx64 ": %s\n", pc,
                uc_strerror(err));
    }
    vblk_file_close(&m.file);
    uc_close(m.cpu);
    munmap(m.ram, RAM_BYTES);
    return m.finished ? 0 : 1;
}
