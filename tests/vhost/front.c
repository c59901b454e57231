// A vhost-user front end for tests: the half of a virtual machine monitor that
// speaks the protocol, and a driver that fills a split virtqueue.
//
//     front SOCKET load  --ref FILE --pid PID [--rw randread|randwrite|read]
//                        [--bs BYTES] [--depth N] [--secs S] [--poll]
//                        [--direct] [--cold]
//     front SOCKET abuse --ref FILE --pid PID
//     front - pingpong --ref FILE --pid PID
//
// FILE is the image behind the socket, PID the process that serves it.
//
// `load` takes turns with two loops over FILE, of preadv or pwritev and of bare
// io_uring with as many requests under way, and prints requests a second, their
// ratio to the better loop's, the 50th and 99th percentile of the latency and
// the processor time of PID for a request, both in us, and how often that is
// the better loop's. It overwrites the image if told to write. With --poll the
// driver never sleeps; --direct: the loops go around the page cache, as the
// server does; --cold: it is emptied before each turn.
//
// `pingpong` prints how long an eventfd takes there and back, in us.
//
// `abuse`, in abuse.c, breaks one rule after the other. After each, a new
// connection has to read a sector as it is in FILE.
#include "front.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a virtqueue is little-endian, and nothing here swaps bytes"
#endif

static struct {
    const char *socket, *ref, *rw;
    uint32_t    bs;
    unsigned    depth;
    double      secs;
    pid_t       pid;
    bool        poll, direct, cold;
} option = {.rw = "randread", .bs = 4096, .depth = 1, .secs = 1};



// ---- Small things -----------------------------------------------------------

static void die(const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    fputs("front: ", stderr);
    vfprintf(stderr, format, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(2);
}

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Of all threads of the process, those that have ended too.
static uint64_t processor_ns(pid_t pid) {
    struct timespec t;
    clockid_t       clock;
    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &t)) {
        die("process %d has no clock", (int)pid);
    }
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// splitmix64
uint64_t draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void fill_random(uint8_t *p, size_t bytes) {
    uint64_t state = 1;
    for (size_t i = 0; i < bytes; i++) {
        p[i] = (uint8_t)draw(&state);
    }
}

static int new_eventfd(void) {
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fd < 0) {
        die("eventfd: %s", strerror(errno));
    }
    return fd;
}

bool in_file(const void *data, uint64_t sector, size_t bytes) {
    static uint8_t *is;
    static size_t   room;
    if (bytes > room) {
        is = realloc(is, room = bytes);
    }
    return is && pread(ref_fd, is, bytes, (off_t)(sector * SECTOR)) ==
                     (ssize_t)bytes && memcmp(data, is, bytes) == 0;
}


// ---- The machine ------------------------------------------------------------

machine m;
int     ref_fd;
char why[128]; // the last call failed

bool fail(const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(why, sizeof why, format, ap);
    va_end(ap);
    return false;
}

void *at(uint64_t gpa) {
    return gpa >= HIGH ? m.memory + (gpa - HIGH)
                       : m.memory + m.high_bytes + (gpa - LOW);
}

void power_on(uint64_t high_bytes, uint16_t size) {
    uint64_t bytes = high_bytes + LOW_BYTES;
    m.memory_fd = memfd_create("guest", MFD_CLOEXEC);
    if (m.memory_fd < 0 || ftruncate(m.memory_fd, (off_t)bytes)) {
        die("memory: %s", strerror(errno));
    }
    m.memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                    m.memory_fd, 0);
    if (m.memory == MAP_FAILED) {
        die("memory: %s", strerror(errno));
    }
    m.high_bytes = high_bytes;
    m.size = size;
    m.desc = at(LOW);
    m.avail = at(AVAIL);
    m.used = at(USED);
    m.avail_idx = m.kicked_idx = m.used_idx = 0;
    m.kick = new_eventfd();
    m.call = new_eventfd();
    m.err = new_eventfd();
}

void power_off(void) {
    munmap(m.memory, m.high_bytes + LOW_BYTES);
    close(m.memory_fd);
    close(m.socket);
    close(m.kick);
    close(m.call);
    close(m.err);
}


// ---- Messages ---------------------------------------------------------------

bool send_message(const header *h, const void *payload, const int *fds,
                  unsigned nfds) {
    union {
        struct cmsghdr align;
        char           bytes[CMSG_SPACE(64 * sizeof(int))];
    } control;
    struct iovec  iov[] = {{(void *)(uintptr_t)h, sizeof *h},
                           {(void *)(uintptr_t)payload, h->bytes}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};
    if (nfds > 0) {
        memset(&control, 0, sizeof control);
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    return sendmsg(m.socket, &msg, MSG_NOSIGNAL) ==
               (ssize_t)(sizeof *h + h->bytes) ||
           fail("request %u: %s", h->request, strerror(errno));
}

bool hung_up(void) {
    struct pollfd p = {.fd = m.socket, .events = POLLIN};
    char          c;
    return poll(&p, 1, 0) > 0 &&
           recv(m.socket, &c, 1, MSG_PEEK | MSG_DONTWAIT) <= 0;
}

// The bytes of the reply to `request`, -1 if there is none that is right.
static int receive(uint32_t request, void *payload, size_t room) {
    header h;
    if (recv(m.socket, &h, sizeof h, MSG_WAITALL) != sizeof h) {
        fail("request %u: no reply", request);
        return -1;
    }
    if (h.request != request || (h.flags & 7) != (VERSION | REPLY) ||
        h.bytes > room ||
        (h.bytes > 0 && recv(m.socket, payload, h.bytes, MSG_WAITALL) !=
                            (ssize_t)h.bytes)) {
        fail("request %u: reply to %u with flags %#x and %u bytes", request,
             h.request, h.flags, h.bytes);
        return -1;
    }
    return (int)h.bytes;
}

unsigned message(uint32_t request, const void *payload, size_t bytes,
                        const int *fds, unsigned nfds) {
    header   h = {request, VERSION | NEED_REPLY, (uint32_t)bytes};
    uint64_t refused;
    if (!send_message(&h, payload, fds, nfds) ||
        receive(request, &refused, sizeof refused) != sizeof refused) {
        return hung_up() ? CLOSED : SILENT;
    }
    if (refused) {
        fail("request %u refused", request);
    }
    return refused ? REFUSED : ACCEPTED;
}

static bool get(uint32_t request, uint64_t *value) {
    header h = {request, VERSION, 0};
    return send_message(&h, NULL, NULL, 0) &&
           receive(request, value, sizeof *value) == sizeof *value;
}

unsigned set_pair(uint32_t request, uint32_t index, uint32_t num) {
    const uint32_t pair[] = {index, num};
    return message(request, pair, sizeof pair, NULL, 0);
}

unsigned set_fd(uint32_t request, int fd) {
    const uint64_t index = 0;
    return message(request, &index, sizeof index, &fd, 1);
}

unsigned stop_ring(uint16_t *position) {
    uint32_t pair[] = {0, 0};
    header   h = {GET_VRING_BASE, VERSION, sizeof pair};
    if (!send_message(&h, pair, NULL, 0) ||
        receive(GET_VRING_BASE, pair, sizeof pair) != sizeof pair) {
        return hung_up() ? CLOSED : SILENT;
    }
    *position = (uint16_t)pair[1];
    return ACCEPTED;
}

unsigned get_config(uint32_t offset, uint32_t bytes, void *data) {
    config c = {.offset = offset, .bytes = bytes};
    header h = {GET_CONFIG, VERSION, offsetof(config, data) + 8};
    int    n = send_message(&h, &c, NULL, 0)
                   ? receive(GET_CONFIG, &c, sizeof c) : -1;
    memcpy(data, c.data, 8);
    return n == (int)h.bytes ? ACCEPTED
         : n >= 0            ? REFUSED
         : hung_up()         ? CLOSED : SILENT;
}

unsigned share_memory(void) {
    const memory_table t = {2, 0, {
        {HIGH, m.high_bytes, (uintptr_t)m.memory, 0},
        {LOW, LOW_BYTES, (uintptr_t)at(LOW), m.high_bytes}}};
    const int fds[] = {m.memory_fd, m.memory_fd};
    return message(SET_MEM_TABLE, &t, 8 + 2 * sizeof(region), fds, 2);
}

static bool negotiate(void) {
    const uint64_t protocol = PROTOCOL;
    uint64_t       features, offered;
    header         h = {SET_PROTOCOL_FEATURES, VERSION, sizeof protocol};
    if (!get(GET_FEATURES, &features) ||
        !get(GET_PROTOCOL_FEATURES, &offered)) {
        return false;
    }
    if (FEATURES & ~features || PROTOCOL & ~offered) {
        return fail("features %#" PRIx64 ", protocol features %#" PRIx64,
                    features, offered);
    }
    features = FEATURES;
    return send_message(&h, &protocol, NULL, 0) &&
           message(SET_OWNER, NULL, 0, NULL, 0) == ACCEPTED &&
           get_config(0, sizeof m.capacity, &m.capacity) == ACCEPTED &&
           message(SET_FEATURES, &features, sizeof features, NULL, 0) ==
               ACCEPTED;
}

unsigned start_ring(const ring_place *place) {
    return start_ring_at(place, 0);
}

unsigned start_ring_at(const ring_place *place, uint16_t position) {
    unsigned answer = set_pair(SET_VRING_NUM, 0, m.size);
    if (answer == ACCEPTED) {
        answer = set_pair(SET_VRING_BASE, 0, position);
    }
    if (answer == ACCEPTED) {
        answer = message(SET_VRING_ADDR, place, sizeof *place, NULL, 0);
    }
    const uint32_t request[] = {SET_VRING_ERR, SET_VRING_CALL, SET_VRING_KICK};
    const int      fds[] = {m.err, m.call, m.kick};
    for (unsigned i = 0; i < 3 && answer == ACCEPTED; i++) {
        answer = set_fd(request[i], fds[i]);
    }
    return answer == ACCEPTED ? set_pair(SET_VRING_ENABLE, 0, 1) : answer;
}

ring_place usual_place(void) {
    return (ring_place){.desc = (uintptr_t)m.desc, .avail = (uintptr_t)m.avail,
                        .used = (uintptr_t)m.used};
}

bool boot(bool start) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct timeval     patience = {5, 0};
    strncpy(a.sun_path, option.socket, sizeof a.sun_path - 1);
    m.socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(m.socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(m.socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(m.socket, (const void *)&a, sizeof a)) {
        return fail("%s: %s", option.socket, strerror(errno));
    }
    ring_place place = usual_place();
    return negotiate() && (!start || (share_memory() == ACCEPTED &&
                                      start_ring(&place) == ACCEPTED));
}


// ---- The ring ---------------------------------------------------------------

void ask(unsigned i, uint32_t type, uint64_t sector) {
    struct virtio_blk_outhdr h = {.type = type, .sector = sector};
    memcpy(at(CONTROL(i)), &h, sizeof h);
    *(uint8_t *)at(CONTROL(i) + STATUS) = 0xee;
}

struct vring_desc describe(uint64_t gpa, uint32_t bytes, unsigned flags,
                                  unsigned next) {
    return (struct vring_desc){gpa, bytes, (uint16_t)flags, (uint16_t)next};
}

void lay_out(struct vring_desc *table, unsigned i, uint64_t data,
                    uint32_t bytes, unsigned flags) {
    table[0] = describe(CONTROL(i), 16, NEXT, 1);
    table[1] = describe(data, bytes, flags | NEXT, 2);
    table[2] = describe(CONTROL(i) + STATUS, 1, W, 0);
}

void offer(unsigned head) {
    m.avail->ring[m.avail_idx++ % m.size] = (uint16_t)head;
}

void publish(void) {
    uint16_t from = m.kicked_idx;
    if (from == m.avail_idx) {
        return;
    }
    __atomic_store_n(&m.avail->idx, m.avail_idx, __ATOMIC_RELEASE);
    // The device stores avail_event and then looks at idx again.
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n(
        (uint16_t *)(void *)&m.used->ring[m.size], __ATOMIC_RELAXED);
    m.kicked_idx = m.avail_idx;
    if (vring_need_event(event, m.avail_idx, from)) {
        eventfd_write(m.kick, 1);
    }
}

bool any_used(void) {
    return __atomic_load_n(&m.used->idx, __ATOMIC_ACQUIRE) != m.used_idx;
}

uint32_t take_used(void) {
    return m.used->ring[m.used_idx++ % m.size].id;
}

// Outside this function used_event lies behind, and the device does not call.
static void sleep_until_used(void) {
    struct pollfd p[] = {{.fd = m.call, .events = POLLIN},
                         {.fd = m.socket, .events = POLLIN}};
    if (option.poll) {
        for (uint64_t end = now_ns() + 5000000000u; !any_used();) {
            if (now_ns() > end) {
                die("no request was completed in 5 s");
            }
        }
        return;
    }
    while (!any_used()) {
        __atomic_store_n(&m.avail->ring[m.size], m.used_idx, __ATOMIC_RELAXED);
        // The device stores idx and then looks at used_event.
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (any_used()) {
            return;
        }
        eventfd_t calls;
        if (poll(p, 2, 5000) <= 0) {
            die("no request was completed in 5 s");
        }
        if (p[1].revents) {
            die("the connection was closed");
        }
        eventfd_read(m.call, &calls);
    }
}


// ---- Load: latencies --------------------------------------------------------

// 64 linear steps in every power of two, which is 1.6 %.
static struct {
    uint64_t n[59 * 64], count;
} latency;

static void note(uint64_t ns) {
    unsigned e = ns < 64 ? 0 : 63u - (unsigned)__builtin_clzll(ns);
    latency.n[ns < 64 ? ns : (e - 5) * 64 + ((ns >> (e - 6)) & 63)]++;
    latency.count++;
}

static double percentile_us(unsigned percent) {
    uint64_t rest = latency.count * percent / 100;
    unsigned i = 0;
    while (i < COUNT(latency.n) - 1 && rest >= latency.n[i]) {
        rest -= latency.n[i++];
    }
    return i < 64 ? i / 1e3
                  : (64.5 + i % 64) * (double)BIT(i / 64 - 1) / 1e3;
}


// ---- Load: the back end and the loop in turns -------------------------------

#define TURNS 5

static struct {
    bool     random, write;
    uint64_t blocks, next, state;
    uint64_t done; // by the back end, in all
} load;

typedef struct request {
    uint64_t started, sector;
} request;

static request under_way[MAX_SIZE];
static int     loop_fd; // as ref_fd, or with O_DIRECT

static uint64_t data_of(unsigned i) {
    return HIGH + (uint64_t)i * option.bs;
}

static uint64_t next_block(void) {
    return load.random ? draw(&load.state) % load.blocks
                       : load.next++ % load.blocks;
}

// Descriptor `i` stands for request `i`, always: there is no free list.
static void prepare(unsigned i) {
    lay_out(at(CONTROL(i) + INDIRECT), i, data_of(i), option.bs,
            load.write ? R : W);
    m.desc[i] = describe(CONTROL(i) + INDIRECT, 48, VRING_DESC_F_INDIRECT, 0);
    fill_random(at(data_of(i)), option.bs);
}

static void submit(unsigned i, uint64_t block, uint64_t now) {
    under_way[i] = (request){now, block * (option.bs / SECTOR)};
    ask(i, load.write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
        under_way[i].sector);
    if (load.write) {
        memcpy(at(data_of(i)), &now, sizeof now);
    }
    offer(i);
}

static void check_status(uint32_t i) {
    if (i >= option.depth || !under_way[i].started) {
        die("request %u was completed and is not under way", i);
    }
    uint8_t status = *(uint8_t *)at(CONTROL(i) + STATUS);
    if (status != VIRTIO_BLK_S_OK) {
        die("sector %" PRIu64 ": status %u", under_way[i].sector, status);
    }
}

static void check_data(uint32_t i) {
    if (!in_file(at(data_of(i)), under_way[i].sector, option.bs)) {
        die("sector %" PRIu64 " is not in the file as %s",
            under_way[i].sector, load.write ? "written" : "read");
    }
}

// Keeps `depth` requests under way for a time; returns the rate.
static double load_turn(double secs) {
    uint64_t start = now_ns(), now = start, done = 0;
    uint64_t end = start + (uint64_t)(secs * 1e9);
    unsigned left = option.depth;
    for (unsigned i = 0; i < option.depth; i++) {
        submit(i, next_block(), now);
    }
    publish();
    while (left > 0) {
        sleep_until_used();
        now = now_ns();
        while (any_used()) {
            uint32_t i = take_used();
            check_status(i);
            note(now - under_way[i].started);
            under_way[i].started = 0;
            done++;
            if (now < end) {
                submit(i, next_block(), now);
            } else {
                left--;
            }
        }
        publish();
    }
    load.done += done;
    return (double)done * 1e9 / (double)(now - start);
}

// Every transfer of this turn is compared. Its blocks are all different, so
// that no write under way spoils another.
static void verified_turn(void) {
    uint64_t batches = 256 / option.depth + 1;
    for (uint64_t k = 0; k < batches; k++) {
        uint64_t from = draw(&load.state) % load.blocks;
        for (unsigned i = 0; i < option.depth; i++) {
            submit(i, (from + i) % load.blocks, now_ns());
        }
        publish();
        for (unsigned left = option.depth; left > 0; left--) {
            sleep_until_used();
            uint32_t i = take_used();
            check_status(i);
            check_data(i);
            under_way[i].started = 0;
        }
    }
}

// Of this process.
static uint64_t own_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

typedef struct pace {
    double rate, cpu_us; // requests a second, processor time for one
} pace;

static pace pace_of(uint64_t done, uint64_t ns, uint64_t cpu_ns) {
    return (pace){(double)done * 1e9 / (double)ns,
                  (double)cpu_ns / 1e3 / (double)done};
}

static void check_move(ssize_t n) {
    if (n != (ssize_t)option.bs) {
        die("%s: %s", option.ref, n < 0 ? strerror(errno) : "its end");
    }
}

static pace loop_turn(double secs, uint8_t *buffer) {
    uint64_t start = now_ns(), now = start, done = 0, cpu = own_ns();
    uint64_t end = start + (uint64_t)(secs * 1e9);
    for (; now < end; now = now_ns()) {
        struct iovec iov = {buffer + done % option.depth * option.bs,
                            option.bs};
        off_t   off = (off_t)(next_block() * option.bs);
        check_move(load.write ? pwritev(loop_fd, &iov, 1, off)
                              : preadv(loop_fd, &iov, 1, off));
        done++;
    }
    return pace_of(done, now - start, own_ns() - cpu);
}

static pace bare_turn(double secs, uint8_t *buffer) {
    uint64_t start = now_ns(), now = start, done = 0, cpu = own_ns();
    uint64_t end = start + (uint64_t)(secs * 1e9);
    unsigned queued = option.depth, left = option.depth;
    for (unsigned i = 0; i < option.depth; i++) {
        bare_submit(i, buffer + (size_t)i * option.bs, option.bs,
                    next_block() * option.bs, load.write, option.direct);
    }
    while (left > 0) {
        int32_t n;
        bare_enter(queued);
        now = now_ns();
        queued = 0;
        for (int i; (i = bare_take(&n)) >= 0;) {
            errno = n < 0 ? -n : 0;
            check_move(n);
            done++;
            if (now < end) {
                bare_submit((unsigned)i, buffer + (size_t)i * option.bs,
                            option.bs, next_block() * option.bs, load.write,
                            option.direct);
                queued++;
            } else {
                left--;
            }
        }
    }
    return pace_of(done, now - start, own_ns() - cpu);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *of) {
    qsort(of, TURNS, sizeof *of, ascending);
    return of[TURNS / 2];
}

static void prepare_load(void) {
    uint64_t bytes = (uint64_t)option.depth * option.bs;
    uint16_t size = 128;
    while (size < option.depth) {
        size = (uint16_t)(size * 2);
    }
    power_on((bytes | 0x1fffff) + 1, size);
    if (!boot(true)) {
        die("%s", why);
    }
    load.random = strncmp(option.rw, "rand", 4) == 0;
    load.write = strcmp(option.rw, "randwrite") == 0;
    load.blocks = m.capacity / (option.bs / SECTOR);
    if (load.blocks < option.depth) {
        die("a disk of %" PRIu64 " sectors is too small", m.capacity);
    }
    for (unsigned i = 0; i < option.depth; i++) {
        prepare(i);
    }
}

static void empty_cache(void) {
    if (option.cold) {
        posix_fadvise(ref_fd, 0, 0, POSIX_FADV_DONTNEED);
    }
}

static pace better_loop(double secs, uint8_t *buffer) {
    empty_cache();
    pace a = loop_turn(secs / 2, buffer);
    empty_cache();
    pace b = bare_turn(secs / 2, buffer);
    return a.rate > b.rate ? a : b;
}

static int run_load(void) {
    prepare_load();
    size_t   bytes = (size_t)option.depth * option.bs;
    uint8_t *buffer = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    loop_fd = open(option.ref, (load.write ? O_RDWR : O_RDONLY) | O_CLOEXEC |
                                   (option.direct ? O_DIRECT : 0));
    if (!buffer || loop_fd < 0 ||
        !bare_open(loop_fd, buffer, bytes, option.direct)) {
        die("no memory, or %s: %s %s", option.ref, strerror(errno), why);
    }
    fill_random(buffer, bytes);
    verified_turn();
    load_turn(option.secs / 20);
    better_loop(option.secs / 20, buffer);
    memset(&latency, 0, sizeof latency);
    load.done = 0;

    double   rate[TURNS], ratio[TURNS], cpu[TURNS], cost[TURNS];
    for (unsigned i = 0; i < TURNS; i++) {
        empty_cache();
        uint64_t before = processor_ns(option.pid), done = load.done;
        rate[i] = load_turn(option.secs * 0.5 / TURNS);
        cpu[i] = (double)(processor_ns(option.pid) - before) / 1e3 /
                 (double)(load.done - done);
        pace limit = better_loop(option.secs * 0.5 / TURNS, buffer);
        ratio[i] = rate[i] / limit.rate;
        cost[i] = cpu[i] / limit.cpu_us;
    }
    verified_turn();
    printf("%8.0f %6.3f %8.1f %8.1f %8.2f %6.2f\n", median(rate),
           median(ratio), percentile_us(50), percentile_us(99), median(cpu),
           median(cost));
    free(buffer);
    power_off();
    return 0;
}

static int run_pingpong(void) {
    enum { ROUNDS = 2000 };
    eventfd_t n;
    int       there = eventfd(0, 0), back = eventfd(0, 0);
    if (fork() == 0) {
        for (int i = 0; i < ROUNDS; i++) {
            eventfd_read(there, &n);
            eventfd_write(back, 1);
        }
        _exit(0);
    }
    uint64_t start = now_ns();
    for (int i = 0; i < ROUNDS; i++) {
        eventfd_write(there, 1);
        eventfd_read(back, &n);
    }
    printf("%.1f\n", (double)(now_ns() - start) / 1e3 / ROUNDS);
    return 0;
}


// ---- Options ----------------------------------------------------------------

static void parse(int argc, char **argv) {
    static const struct option longs[] = {
        {"rw", 1, 0, 'w'},    {"bs", 1, 0, 'b'},  {"depth", 1, 0, 'd'},
        {"secs", 1, 0, 's'},  {"ref", 1, 0, 'r'}, {"pid", 1, 0, 'p'},
        {"poll", 0, 0, 'P'},  {"direct", 0, 0, 'D'}, {"cold", 0, 0, 'C'},
        {0, 0, 0, 0}};
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'w': option.rw = optarg;                                    break;
        case 'b': option.bs = (uint32_t)strtoul(optarg, NULL, 10);       break;
        case 'd': option.depth = (unsigned)strtoul(optarg, NULL, 10);    break;
        case 's': option.secs = strtod(optarg, NULL);                    break;
        case 'r': option.ref = optarg;                                   break;
        case 'p': option.pid = (pid_t)strtol(optarg, NULL, 10);          break;
        case 'P': option.poll = true;                                    break;
        case 'D': option.direct = true;                                  break;
        case 'C': option.cold = true;                                    break;
        default: exit(2);
        }
    }
    if (argc - optind != 2 || !option.ref || option.pid <= 0) {
        die("usage: front SOCKET load|abuse --ref FILE --pid PID [options]");
    }
    if (option.bs == 0 || option.bs % SECTOR || option.bs > 1 << 20 ||
        option.depth == 0 || option.depth > MAX_SIZE || option.secs <= 0) {
        die("a --bs of sectors up to 1 MiB, a --depth up to %u and --secs "
            "above 0 are needed", MAX_SIZE);
    }
    option.socket = argv[optind];
}

int main(int argc, char **argv) {
    parse(argc, argv);
    bool abuse = strcmp(argv[optind + 1], "abuse") == 0;
    bool write = !abuse && strcmp(option.rw, "randwrite") == 0;
    ref_fd = open(option.ref, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (ref_fd < 0) {
        die("%s: %s", option.ref, strerror(errno));
    }
    if (strcmp(argv[optind + 1], "pingpong") == 0) {
        return run_pingpong();
    }
    return abuse ? run_abuse(option.pid) : run_load();
}
