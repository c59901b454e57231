// A VMM for x86-64 on KVM: Linux, a serial console, virtio-mmio disks.
//     make build/kvm
//     build/kvm vmlinuz --disk disk.img --initrd initrd.img
//
// Where the calls of the library go:
//     attach()    vblk_file_open(), vblk_worker_init(); to KVM go kick_fd, as
//                 ioeventfd of QueueNotify, and irq_fd, as irqfd
//     window()    at any vCPU's KVM_EXIT_MMIO: vblk_mmio_read(), and
//                 vblk_worker_mmio_write(); if that fails, Status shows it
//     resample()  at the EOI of a level interrupt: vblk_interrupt_line()
//     detach()    vblk_worker_close(), after resample() where it is not the end
// ACPI tells the guest where the disks are. A kernel without it may know
// --append virtio_mmio.device=4K@0xd0000000:5, of three disks at most.
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <asm/bootparam.h>
#include <err.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <termios.h>

enum { DISKS = 8, IRQ = 5, LINE = 2048 };
enum { COM1 = 0x3f8, COM1_IRQ = 4, CMOS = 0x71, I8042 = 0x64, PM = 0x600 };
// Guest-physical addresses. ACPI is looked for from 0xe0000 to 0xfffff.
enum { GDT = 0x500, PARAMS = 0x7000, PAGES = 0x8000, COMMAND = 0x20000 };
enum { LOW_END = 0x9f000, TABLES = 0xe0000, KERNEL = 0x100000 };
#define HOLE    0xc0000000u // without memory, until 4 GiB
#define WINDOWS 0xd0000000u // of 0x1000 bytes, one for each disk
#define ABOVE   0x100000000u

static struct disk {
    const char *path;
    vblk_file   file;
    vblk_worker worker;
    int         resample_fd;
    uint64_t    notifies; // that were exits; ioeventfd leaves none
} disks[DISKS];

static unsigned        disk_count;
static int             vm;
static uint8_t        *ram;
static uint64_t        below, above, iops; // bytes on either side of the hole
static bool            level;
static struct kvm_run *run;

#define ASK(fd, request, with) answer(ioctl(fd, request, with), #request)
static int answer(int value, const char *request) {
    if (value < 0) err(1, "%s", request);
    return value;
}

// ---- Disks ------------------------------------------------------------------
static void event(void *user, const vblk_event *e) {
    char line[400];
    warnx("%s: %s", (const char *)user, vblk_event_line(e, line, sizeof line));
}

// At each EOI KVM lowers the line, and tells by this descriptor.
static void *resample(void *argument) {
    struct disk *d = (struct disk *)argument;
    eventfd_t    n;
    sigset_t     all;
    if (sigfillset(&all) || pthread_sigmask(SIG_BLOCK, &all, NULL)) return NULL;
    while (eventfd_read(d->resample_fd, &n) == 0) {
        bool high = vblk_interrupt_line(vblk_worker_dev(&d->worker));
        if (high) eventfd_write(d->worker.irq_fd, 1);
    }
    return NULL;
}

static void attach(struct disk *d, vblk_memory memory) {
    uint32_t     n = (uint32_t)(d - disks);
    pthread_t    thread;
    vblk_options o = {.memory = memory, .limits.iops = iops, .event = event};
    int          error = vblk_file_open(&d->file, d->path, 0);
    if (error == VBLK_ERR_FILE) err(1, "%s", d->path);
    struct flock lock = {.l_type = F_WRLCK}; // of all, against a second VMM
    if (fcntl(d->file.fd, F_OFD_SETLK, &lock)) err(1, "%s: in use", d->path);
    o.backend = vblk_file_backend(&d->file);
    o.user = (void *)(uintptr_t)d->path;
    error = error ? error : vblk_worker_init(&d->worker, &o, NULL);
    if (error) errx(1, "%s: %s", d->path, vblk_strerror(error));
    struct kvm_ioeventfd notify = {.len = 4, .fd = d->worker.kick_fd};
    struct kvm_irqfd irq = {.fd = (uint32_t)d->worker.irq_fd, .gsi = IRQ + n};
    notify.addr = WINDOWS + 0x1000 * n + VBLK_REG_QUEUE_NOTIFY;
    if (level) {
        d->resample_fd = eventfd(0, EFD_CLOEXEC);
        irq.flags = KVM_IRQFD_FLAG_RESAMPLE;
        irq.resamplefd = (uint32_t)d->resample_fd;
        if (pthread_create(&thread, NULL, resample, d)) errx(1, "no thread");
    }
    ASK(vm, KVM_IOEVENTFD, &notify); // without DATAMATCH: all queues
    ASK(vm, KVM_IRQFD, &irq);
}

static void window(uint64_t address, uint8_t *data, uint32_t n, bool store) {
    uint64_t     value = 0, slot = (address - WINDOWS) / 0x1000;
    uint64_t     offset = address % 0x1000;
    struct disk *d = slot < disk_count ? &disks[slot] : NULL;
    if (!store) memset(data, 0xff, n); // as nobody answers
    if (d && store) {
        memcpy(&value, data, n);
        vblk_worker_mmio_write(&d->worker, offset, n, value);
        d->notifies += offset == VBLK_REG_QUEUE_NOTIFY;
    } else if (d) {
        value = vblk_mmio_read(vblk_worker_dev(&d->worker), offset, n);
        memcpy(data, &value, n);
    }
}

static void detach(struct disk *d) {
    vblk_counts c = vblk_counters(vblk_worker_dev(&d->worker));
    if (vblk_worker_close(&d->worker)) warnx("%s does not answer", d->path);
    else vblk_file_close(&d->file);
    warnx("%s: %lu reads, %lu writes, %lu flushes, %lu discards, %lu waited, "
          "%lu failed, %lu exits to notify", d->path, c.reads, c.writes,
          c.flushes, c.discards, c.throttled, c.io_errors, d->notifies);
}

// ---- Serial console: an 8250, on standard input and output ------------------
static uint8_t        uart[8], input, cause = 1; // as written; IIR
static bool           arrived, sent; // input waits; output's interrupt does
static struct termios terminal;
static volatile sig_atomic_t stopped;

static void uart_poll(void) {
    struct pollfd p = {.events = POLLIN};
    bool wanted = !arrived && uart[1] & 1 && uart[4] & 8; // not by a probe
    if (wanted && poll(&p, 1, 0) > 0) arrived = read(0, &input, 1) > 0;
    cause = (uart[1] & 1) && arrived ? 4 : (uart[1] & 2) && sent ? 2 : 1;
    struct kvm_irq_level line = {.irq = COM1_IRQ, .level = cause != 1};
    ASK(vm, KVM_IRQ_LINE, &line);
}

static void uart_access(int reg, uint8_t *byte, bool store) {
    const uint8_t load[8] = {input, uart[1], cause, uart[3], uart[4],
                             (uint8_t)(0x60 | arrived), 0xb0, uart[7]};
    bool divisor = reg < 2 && uart[3] & 0x80; // any speed will do
    if (!store) {
        *byte = divisor ? reg == 0 : load[reg];
        if (reg == 0 && !divisor) arrived = false;
        if (reg == 2 && *byte == 2) sent = false;
    } else if (!divisor) {
        if (reg == 0 && write(1, byte, 1) < 0) warn("console");
        if (reg == 0 || (reg == 1 && *byte & ~uart[1] & 2)) sent = true;
        uart[reg] = *byte;
    }
    uart_poll();
}

// Input waits (SIGIO), or the end: KVM_RUN returns, or does not begin.
static void on_signal(int number) {
    if (number != SIGIO) stopped = 1;
    run->immediate_exit = 1;
}

static void restore_terminal(void) {
    tcsetattr(0, TCSANOW, &terminal);
}

static void open_console(void) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGIO, on_signal);
    if (tcgetattr(0, &terminal) == 0) {
        struct termios raw = terminal;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        atexit(restore_terminal);
        tcsetattr(0, TCSANOW, &raw);
    }
    fcntl(0, F_SETOWN, getpid());
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_ASYNC);
}

// ---- ACPI: disks, console, how to power off ---------------------------------
static void number(uint8_t *to, uint64_t value, size_t bytes) {
    memcpy(to, &value, bytes); // little-endian, as the processor is
}

static void checksum(uint8_t *at, const uint8_t *table, size_t n) {
    uint8_t sum = 0;
    while (n) sum = (uint8_t)(sum + table[--n]);
    *at = (uint8_t)-sum;
}

static void table(uint8_t *t, const char *name, uint8_t revision, size_t n) {
    memcpy(t, name, 4);
    number(t + 4, n | (uint64_t)revision << 32, 5);
    memcpy(t + 10, "VBLK  EXAMPLE \1\0\0\0VBLK\1\0\0", 26);
    checksum(t + 9, t, n);
}

static const char disk_aml[] =
    "\x5b\x82\x42\4\x5c\x2e_SB_VBD0" // Device (\_SB.VBD0) {
    "\x08_HID\x0dLNRO0005\0"         //     Name (_HID, "LNRO0005")
    "\x08_UID\x0a\0"                 //     Name (_UID, 0)
    "\x08_CRS\x11\x1a\x0a\x17"       //     Name (_CRS, ResourceTemplate () {
    "\x86\x09\0\1\0\0\0\0\0\x10\0\0" //         Memory32Fixed (, 0, 0x1000)
    "\x89\x06\0\3\1\0\0\0\0\x79";    //         Interrupt (, Edge) {0} }) }
static const char rest_aml[] =
    "\x5b\x82\x31\x5c\x2e_SB_COM1"   // Device (\_SB.COM1) {
    "\x08_HID\x0c\x41\xd0\x05\x01"   //     Name (_HID, EisaId ("PNP0501"))
    "\x08_CRS\x11\x16\x0a\x13"       //     Name (_CRS, ResourceTemplate () {
    "\x47\1\xf8\3\xf8\3\1\x08"       //         IO (, 0x3f8, 0x3f8, 1, 8)
    "\x89\x06\0\3\1\4\0\0\0\x79\0"   //         Interrupt (, Edge) {4} }) }
    "\x08_S5_\x12\4\1\x0a";          // Name (_S5, Package () {0})

static void write_acpi(void) {
    uint8_t *rsdp = ram + TABLES, *xsdt = rsdp + 0x40, *fadt = rsdp + 0x80;
    uint8_t *madt = rsdp + 0x200, *dsdt = rsdp + 0x300, *aml = dsdt + 36;
    for (uint8_t i = 0; i < disk_count; i++, aml += sizeof disk_aml) {
        memcpy(aml, disk_aml, sizeof disk_aml);
        aml[13] = (uint8_t)('0' + i);
        aml[35] = i;
        number(aml + 49, WINDOWS + 0x1000u * i, 4);
        aml[60] = level ? 1 : 3;
        aml[62] = (uint8_t)(IRQ + i);
    }
    memcpy(aml, rest_aml, sizeof rest_aml);
    table(dsdt, "DSDT", 2, (size_t)(aml - dsdt) + sizeof rest_aml);
    memcpy(madt + 36, "\0\0\xe0\xfe\1\0\0\0" // local APICs, beside PICs
           "\0\x08\0\0\1\0\0\0"              // one processor
           "\1\x0c\0\0\0\0\xc0\xfe\0\0\0", 28); // one IOAPIC
    table(madt, "APIC", 3, 36 + 28);
    number(fadt + 109, 0x100431000024, 7); // no CMOS clock; reduced hardware
    number(fadt + 140, TABLES + 0x300, 8);
    memcpy(fadt + 116, "\1\x08\0\1\0\6\0\0\0\0\0\0\x20", 13); // resets at PM
    memcpy(fadt + 244, "\1\x08\0\1\0\6\0\0\0\0\0\0\1\x08\0\1\1\6", 18); // off
    table(fadt, "FACP", 5, 268);
    number(xsdt + 36, TABLES + 0x80, 8);
    number(xsdt + 44, TABLES + 0x200, 8);
    table(xsdt, "XSDT", 1, 52);
    memcpy(rsdp, "RSD PTR \0VBLK  \2\0\0\0\0\x24\0\0\0\x40\0\x0e", 27);
    checksum(rsdp + 8, rsdp, 20);
    checksum(rsdp + 32, rsdp, 36);
}

// ---- Kernel and processor ---------------------------------------------------
static uint32_t load(const char *path, uint64_t to) {
    FILE  *f = fopen(path, "rb");
    size_t n = f && to < below ? fread(ram + to, 1, below - to, f) : 0;
    if (!f || ferror(f)) err(1, "%s", path);
    if (to >= below || getc(f) != EOF) errx(1, "%s: needs more --memory", path);
    fclose(f);
    return (uint32_t)n;
}

// As Linux's 64-bit boot protocol has it.
static void boot(const char *path, const char *initrd, const char *append) {
    struct boot_params  *p = (struct boot_params *)(void *)(ram + PARAMS);
    struct setup_header *h = &p->hdr;
    uint32_t n = load(path, KERNEL), setup = 512u + 512u * ram[KERNEL + 0x1f1];
    memcpy(h, ram + KERNEL + 0x1f1, sizeof *h);
    if (n < setup || h->header != 0x53726448 || h->version < 0x20c ||
        !(h->xloadflags & XLF_KERNEL_64)) {
        errx(1, "%s: no bzImage of a 64-bit kernel, 3.8 or later", path);
    }
    memmove(ram + KERNEL, ram + KERNEL + setup, n - setup);
    uint64_t end = (h->pref_address + h->init_size + 0xfff) & ~UINT64_C(0xfff);
    if (end > below) errx(1, "%s: needs more --memory", path);
    h->type_of_loader = 0xff; // not on the list
    h->cmd_line_ptr = COMMAND;
    snprintf((char *)ram + COMMAND, LINE, "console=ttyS0 reboot=a %s", append);
    h->ramdisk_image = (uint32_t)end;
    h->ramdisk_size = initrd ? load(initrd, end) : 0;
    p->e820_entries = 3;
    p->e820_table[0] = (struct boot_e820_entry){0, LOW_END, 1};
    p->e820_table[1] = (struct boot_e820_entry){KERNEL, below - KERNEL, 1};
    p->e820_table[2] = (struct boot_e820_entry){ABOVE, above, 1};
}

static int make_processor(int kvm) {
    static uint64_t    room[641]; // a head, 128 entries
    struct kvm_cpuid2 *id = (struct kvm_cpuid2 *)room;
    struct kvm_segment code = {0, ~0u, 0x10, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0};
    struct kvm_segment data = {0, ~0u, 0x18, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0};
    struct kvm_regs    r = {.rip = KERNEL + 0x200, .rsi = PARAMS, .rflags = 2};
    struct kvm_sregs   s;
    int                cpu = ASK(vm, KVM_CREATE_VCPU, NULL);
    id->nent = 128;
    ASK(kvm, KVM_GET_SUPPORTED_CPUID, id);
    for (uint32_t i = 0; i < id->nent; i++) {
        struct kvm_cpuid_entry2 *e = &id->entries[i];
        if (e->function == 1) e->ecx |= 0x81000000; // kvmclock, its timer
        if (e->function == 1) e->ebx &= 0xffffff;   // the number of its APIC
        if (e->function == 11 || e->function == 31) e->edx = 0; // the same
        if (e->function == 13 && !e->index) e->eax &= ~0x60000u; // no AMX ...
        if (e->function == 0x8000001f) e->eax = 0; // ... and no SEV
    }
    ASK(cpu, KVM_SET_CPUID2, id);
    // Long mode; 4 GiB of addresses are what they are.
    number(ram + GDT + 0x10, 0x00af9b000000ffff, 8);
    number(ram + GDT + 0x18, 0x00cf93000000ffff, 8);
    number(ram + PAGES, PAGES + 0x1003, 8);
    for (uint32_t i = 0; i < 2048; i++) {
        uint8_t *entry = ram + PAGES + 0x1000 + 8 * i;
        if (i < 4) number(entry, PAGES + 0x2003 + 0x1000 * i, 8);
        number(entry + 0x1000, ((uint64_t)i << 21) + 0x83, 8);
    }
    ASK(cpu, KVM_GET_SREGS, &s);
    s.gdt = (struct kvm_dtable){.base = GDT, .limit = 0x1f};
    s.cs = code;
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cr0 = 0x80000031;
    s.cr3 = PAGES;
    s.cr4 |= 0x20;
    s.efer |= 0x500;
    ASK(cpu, KVM_SET_SREGS, &s);
    ASK(cpu, KVM_SET_REGS, &r);
    return cpu;
}

static void port(int at, uint8_t *data, uint8_t bytes, bool store) {
    if (at >= COM1 && at < COM1 + 8) uart_access(at - COM1, data, store);
    else if (!store) memset(data, at == CMOS ? 0 : 0xff, bytes);
    else if (*data == (at == PM ? 0x20 : at == I8042 ? 0xfe : -1)) stopped = 1;
}

static void run_guest(int cpu) {
    while (!stopped) {
        bool broken = ioctl(cpu, KVM_RUN, 0) < 0;
        if (broken && errno != EINTR) err(1, "KVM_RUN");
        if (broken) {
            run->immediate_exit = 0;
            uart_poll();
        } else if (run->exit_reason == KVM_EXIT_IO) {
            uint8_t *data = (uint8_t *)run + run->io.data_offset;
            for (uint32_t i = 0; i < run->io.count; i++) {
                port(run->io.port, data + i * run->io.size, run->io.size,
                     run->io.direction == KVM_EXIT_IO_OUT);
            }
        } else if (run->exit_reason == KVM_EXIT_MMIO) {
            window(run->mmio.phys_addr, run->mmio.data, run->mmio.len,
                   run->mmio.is_write);
        } else if (run->exit_reason == KVM_EXIT_SHUTDOWN) {
            warnx("a triple fault: the guest crashed, or has reboot=t");
            return;
        } else {
            errx(1, "KVM gives up: exit reason %u", run->exit_reason);
        }
    }
}

int main(int argc, char **argv) {
    const char *kernel = NULL, *initrd = NULL, *append = "";
    uint64_t    mib = 256;
    char       *end = "";
    bool        bad = false;
    for (int i = 1; i < argc; bad |= *end != 0, i++) {
        const char *option = argv[i];
        if (option[0] != '-' && !kernel) kernel = option;
        else if (!strcmp(option, "--level")) level = true;
        else if (++i >= argc) bad = true;
        else if (!strcmp(option, "--initrd")) initrd = argv[i];
        else if (!strcmp(option, "--append")) append = argv[i];
        else if (!strcmp(option, "--memory")) mib = strtoull(argv[i], &end, 0);
        else if (!strcmp(option, "--iops")) iops = strtoull(argv[i], &end, 0);
        else if (strcmp(option, "--disk") || disk_count == DISKS) bad = true;
        else disks[disk_count++].path = argv[i];
    }
    if (!kernel || bad || mib < 2 || mib > 1 << 20 || strlen(append) > 2000) {
        errx(1, "bzImage [--disk FILE (at most %d)] [--initrd FILE] [--append "
             "UP-TO-2000-BYTES] [--memory MiB] [--iops N] [--level]", DISKS);
    }
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) err(1, "/dev/kvm (module kvm_intel or kvm_amd, group kvm)");
    vm = ASK(kvm, KVM_CREATE_VM, NULL);
    ASK(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000); // Intel's need that
    ASK(vm, KVM_CREATE_IRQCHIP, NULL);
    ASK(vm, KVM_CREATE_PIT2, &(struct kvm_pit_config){0}); // if no ACPI
    below = mib << 20 < HOLE ? mib << 20 : HOLE;
    above = (mib << 20) - below;
    ram = mmap(NULL, below + above, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED) err(1, "--memory %lu", mib);
    vblk_region  region[] = {{.gpa = 0, .bytes = below, .host = ram},
                             {ABOVE, above, ram + below, false}};
    vblk_regions guest = {.region = region, .count = above ? 2 : 1};
    vblk_memory  memory = vblk_regions_memory(&guest);
    for (uint32_t i = 0; i < guest.count; i++) {
        struct kvm_userspace_memory_region slot = {
            i, 0, region[i].gpa, region[i].bytes, (uintptr_t)region[i].host};
        ASK(vm, KVM_SET_USER_MEMORY_REGION, &slot);
    }
    boot(kernel, initrd, append);
    write_acpi();
    int cpu = make_processor(kvm);
    run = mmap(NULL, (size_t)ASK(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL),
               PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
    if (run == MAP_FAILED) err(1, "a processor");
    for (unsigned i = 0; i < disk_count; i++) attach(&disks[i], memory);
    open_console();
    run_guest(cpu);
    for (unsigned i = 0; i < disk_count; i++) detach(&disks[i]);
    return run->exit_reason == KVM_EXIT_SHUTDOWN;
}
