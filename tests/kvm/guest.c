// A guest without an operating system, in long mode, for examples/kvm.c: binds
// the first disk, writes 64 sectors, reads them back and compares, first by
// polling, then by interrupt: irqfd, PIC, IDT. It says on the serial port how
// that went, and powers off. Of its command line it knows "level"; "sleep", and
// it does nothing more; "crash", and it does so; "echo", and what comes in by
// the serial port goes out again, after a "+", up to a newline.
#include <stdbool.h>
#include <stdint.h>

enum { SECTORS = 64, SIZE = 8, SECTOR = 512 };
enum { VECTOR = 0x20, IRQ = 5, SERIAL_IRQ = 4 };
enum { IN, OUT };
#define WINDOW 0xd0000000u

__asm__(".pushsection .entry, \"ax\"\n"
        "   mov $0x90000, %esp\n" // below LOW_END
        "   mov %rsi, %rdi\n"
        "   call start\n"
        ".popsection\n");

// Counts those with an InterruptStatus, acknowledges the last that is awaited,
// and ends the interrupt. A level's last is its second: after the first, which
// is not acknowledged, the line must rise again.
void on_interrupt(void);
volatile uint32_t interrupts, awaited;
__asm__("on_interrupt:\n"
        "   push %rax\n"
        "   push %rbx\n"
        "   mov $0xd0000000, %ebx\n"
        "   mov 0x60(%rbx), %eax\n"
        "   test %eax, %eax\n"
        "   jz 1f\n"
        "   incl interrupts(%rip)\n"
        "   decl awaited(%rip)\n"
        "   jnz 1f\n"
        "   mov %eax, 0x64(%rbx)\n"
        "1: cmpq $halt, 16(%rsp)\n" // not after the sti: emulators slip there
        "   jne 2f\n"
        "   incq 16(%rsp)\n"
        "2: mov $0x20, %al\n"
        "   out %al, $0x20\n"
        "   pop %rbx\n"
        "   pop %rax\n"
        "   iretq\n");

static struct {
    uint64_t address;
    uint32_t bytes;
    uint16_t flags, next;
} descriptor[SIZE] __attribute__((aligned(16)));
static struct {
    uint16_t flags, idx, ring[SIZE];
} available;
static struct {
    uint16_t flags, idx;
    struct {
        uint32_t id, bytes;
    } ring[SIZE];
} volatile used __attribute__((aligned(4)));
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} header;
static uint8_t data[SECTOR];
static volatile uint8_t status;
static uint16_t seen;
static bool by_interrupt, level;

static struct gate {
    uint16_t low, segment, attributes, middle;
    uint32_t high, reserved;
} idt[256];

static void out(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void say(const char *text) {
    while (*text) {
        while (!(in(0x3fd) & 0x20)) {}
        out(0x3f8, (uint8_t)*text++);
    }
}

static void say_number(unsigned n) {
    if (n >= 10) say_number(n / 10);
    const char digit[2] = {(char)('0' + n % 10), 0};
    say(digit);
}

static void power_off(void) {
    out(0x600, 0x20);
    for (;;) __asm__ volatile("cli; hlt");
}

static void expect(bool good, const char *what, unsigned sector) {
    if (good) return;
    say("FAIL ");
    say(what);
    say(", sector ");
    say_number(sector);
    say("\n");
    power_off();
}

static uint32_t load(uint32_t offset) {
    return *(volatile uint32_t *)(uintptr_t)(WINDOW + offset);
}

static void store(uint32_t offset, uint32_t value) {
    *(volatile uint32_t *)(uintptr_t)(WINDOW + offset) = value;
}

static void store_address(uint32_t offset, const volatile void *pointer) {
    store(offset, (uint32_t)(uintptr_t)pointer);
    store(offset + 4, 0);
}

static void bind(void) {
    expect(load(0) == 0x74726976 && load(4) == 2 && load(8) == 2,
           "no block device in the window", 0);
    store(0x070, 0);
    store(0x070, 1); // ACKNOWLEDGE
    store(0x070, 3); // DRIVER
    store(0x024, 1);
    store(0x020, 1); // VERSION_1
    store(0x024, 0);
    store(0x020, 0);
    store(0x070, 0xb); // FEATURES_OK
    expect(load(0x070) == 0xb, "FEATURES_OK is refused", 0);
    available.idx = used.idx = seen = 0;
    store(0x030, 0);
    expect(load(0x034) >= SIZE, "QueueNumMax", 0);
    store(0x038, SIZE);
    store_address(0x080, descriptor);
    store_address(0x090, &available);
    store_address(0x0a0, &used);
    store(0x044, 1);
    store(0x070, 0xf); // DRIVER_OK
}

__attribute__((noinline)) static void sleep(void) {
    __asm__ volatile("sti\nhalt: hlt\ncli" ::: "memory");
}

static void describe(unsigned i, const volatile void *at, uint32_t bytes,
                     uint16_t flags) {
    descriptor[i].address = (uintptr_t)at;
    descriptor[i].bytes = bytes;
    descriptor[i].flags = flags;
    descriptor[i].next = (uint16_t)(i + 1);
}

static void request(uint32_t type, unsigned sector) {
    header.type = type;
    header.sector = sector;
    status = 0xff;
    describe(0, &header, 16, 1);
    describe(1, data, SECTOR, (uint16_t)(type == IN ? 3 : 1));
    describe(2, &status, 1, 2);
    available.flags = !by_interrupt; // NO_INTERRUPT
    awaited = by_interrupt ? 1 + level : 0;
    available.ring[available.idx % SIZE] = 0;
    __atomic_store_n(&available.idx, (uint16_t)(available.idx + 1),
                     __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!(used.flags & 1)) store(0x050, 0);
    do {
        if (by_interrupt) sleep();
        else __asm__ volatile("pause");
    } while (used.idx == seen || awaited);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    expect(used.ring[seen % SIZE].bytes == (type == IN ? SECTOR + 1 : 1),
           "the used length", sector);
    seen++;
    expect(status == 0, "the status", sector);
}

static uint8_t pattern(unsigned sector, unsigned i) {
    return (uint8_t)(sector * 31 + i * 7 + i / 256 + by_interrupt * 101);
}

static void round(const char *name) {
    interrupts = 0;
    bind();
    for (unsigned sector = 0; sector < SECTORS; sector++) {
        for (unsigned i = 0; i < SECTOR; i++) data[i] = pattern(sector, i);
        request(OUT, sector);
    }
    for (unsigned sector = 0; sector < SECTORS; sector++) {
        for (unsigned i = 0; i < SECTOR; i++) data[i] = 0;
        request(IN, sector);
        for (unsigned i = 0; i < SECTOR; i++) {
            expect(data[i] == pattern(sector, i), "the data", sector);
        }
    }
    expect(interrupts == (by_interrupt ? (1u + level) * 2 * SECTORS : 0),
           "the number of interrupts", interrupts);
    say("ok ");
    say(name);
    say(": 64 sectors, interrupts ");
    say_number(interrupts);
    say("\n");
}

// Whether the command line, of which the boot parameters tell, has the word.
static bool told(const uint8_t *parameters, const char *word) {
    const char *line = (const char *)(uintptr_t)
        (parameters[0x229] << 8 | parameters[0x22a] << 16);
    for (; *line; line++) {
        unsigned n = 0;
        while (word[n] && line[n] == word[n]) n++;
        if (!word[n]) return true;
    }
    return false;
}

static void set_interrupts(void) {
    static struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) idtr;
    uint64_t to = (uintptr_t)on_interrupt;
    for (struct gate *g = &idt[VECTOR]; g < &idt[VECTOR + 8]; g++) {
        g->low = (uint16_t)to;
        g->segment = 0x10;
        g->attributes = 0x8e00;
        g->middle = (uint16_t)(to >> 16);
    }
    idtr.limit = sizeof idt - 1;
    idtr.base = (uintptr_t)idt;
    __asm__ volatile("lidt %0" : : "m"(idtr));
    static const uint8_t words[] = {0x11, VECTOR, 4, 1}; // ICW1 to ICW4
    for (unsigned i = 0; i < 4; i++) out(i ? 0x21 : 0x20, words[i]);
    out(0x21, (uint8_t)~(1u << IRQ | 1u << SERIAL_IRQ));
    out(0x4d0, (uint8_t)(level << IRQ));
}

static void crash(void) {
    static const uint64_t none[2];
    __asm__ volatile("lidt %0; int3" : : "m"(none));
}

static void echo(void) {
    char text[3] = "+";
    set_interrupts();
    out(0x3fc, 8); // OUT2
    out(0x3f9, 1);
    say("listening\n");
    while (text[1] != '\n') {
        while (!(in(0x3fd) & 1)) sleep();
        text[1] = (char)in(0x3f8);
        say(text);
    }
}

void start(const uint8_t *parameters) {
    if (told(parameters, "crash")) crash();
    if (told(parameters, "echo")) {
        echo();
        power_off();
    }
    if (told(parameters, "sleep")) {
        say("sleeping\n");
        for (;;) __asm__ volatile("cli; hlt");
    }
    round("by polling");
    level = told(parameters, "level");
    set_interrupts();
    by_interrupt = true;
    round(level ? "by level" : "by edge");
    power_off();
}
