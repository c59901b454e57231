// front SOCKET abuse: one broken rule after the other.
#include "front.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define NO (REFUSED | CLOSED)

// The daemon is a 32-bit program.
#ifdef SMALL
#define LARGE NO
#else
#define LARGE ACCEPTED
#endif


// ---- Wrong messages ---------------------------------------------------------

// An `early` case comes before memory is shared and the ring is started.
static const struct {
    const char *name;
    bool        early;
    uint32_t    request, bytes, word[2];
    unsigned    nfds, allowed;
} message_cases[] = {
    {"unknown-request", 0, 999, 0, {0, 0}, 0, NO},
    {"short-payload", 0, SET_VRING_NUM, 4, {0, 0}, 0, NO},
    {"ring-1000", 0, SET_VRING_NUM, 8, {1000, 128}, 0, NO},
    {"enable-ring-1000", 0, SET_VRING_ENABLE, 8, {1000, 1}, 0, NO},
    {"size-of-running-ring", 0, SET_VRING_NUM, 8, {0, 64}, 0, NO},
    {"kick-without-descriptor", 0, SET_VRING_KICK, 8, {0, 0}, 0, NO},
    {"kick-of-ring-200", 0, SET_VRING_KICK, 8, {200, 0}, 1, NO},
    {"kick-is-a-file", 0, SET_VRING_KICK, 8, {0, 0}, 1, NO},
    {"call-with-3-descriptors", 0, SET_VRING_CALL, 8, {0, 0}, 3, NO},
    {"30-stray-descriptors", 0, SET_OWNER, 0, {0, 0}, 30, ACCEPTED | NO},
    {"60-stray-descriptors", 0, SET_OWNER, 0, {0, 0}, 60, ACCEPTED | NO},
    {"memory-table-cut-off", 0, SET_MEM_TABLE, 8, {1, 0}, 1, NO},
    {"features-not-offered", 1, SET_FEATURES, 8, {0, 1u << 31}, 0, NO},
    {"config-write", 0, SET_CONFIG, 12, {0, 0}, 0, ACCEPTED},
    {"config-write-of-nothing-there", 0, SET_CONFIG, 12, {0, 1}, 0, NO},
    {"channel-is-a-file", 0, SET_BACKEND_REQ_FD, 0, {0, 0}, 1, NO},
    {"channel-without-descriptor", 0, SET_BACKEND_REQ_FD, 0, {0, 0}, 0, NO},
    {"config-write-too-far", 0, SET_CONFIG, 12, {257, 0}, 0, NO},
};

static unsigned message_case(size_t k) {
    uint32_t payload[3] = {message_cases[k].word[0], message_cases[k].word[1]};
    int      fds[64];
    for (unsigned i = 0; i < message_cases[k].nfds; i++) {
        fds[i] = m.memory_fd;
    }
    return message(message_cases[k].request, payload, message_cases[k].bytes,
                   fds, message_cases[k].nfds);
}

// All memory is one file of 4 MiB; a table repeats its region.
static const struct {
    const char *name;
    region      region;
    uint32_t    count;
    unsigned    nfds;
    bool        not_a_file;
} memory_cases[] = {
    {"200-regions", {LOW, 4096, LOW, 0}, 200, 8, 0},
    {"regions-without-descriptors", {LOW, 4096, LOW, 0}, 2, 0, 0},
    {"regions-overlap", {LOW, 4096, LOW, 0}, 2, 2, 0},
    {"region-of-0-bytes", {LOW, 0, LOW, 0}, 1, 1, 0},
    {"region-wraps", {LOW, UINT64_MAX - 4095, LOW, 8192}, 1, 1, 0},
    {"region-past-its-file", {LOW, 4 << 20, LOW, 4096}, 1, 1, 0},
    {"region-of-no-file", {LOW, 4096, LOW, 0}, 1, 1, 1},
};

static unsigned memory_case(size_t k) {
    memory_table t = {.count = memory_cases[k].count};
    int          fds[8];
    for (unsigned i = 0; i < 8; i++) {
        t.region[i] = memory_cases[k].region;
        fds[i] = memory_cases[k].not_a_file ? m.kick : m.memory_fd;
    }
    return message(SET_MEM_TABLE, &t, sizeof t, fds, memory_cases[k].nfds);
}

static unsigned send_bytes(const void *bytes, size_t n) {
    uint8_t byte;
    send(m.socket, bytes, n, MSG_NOSIGNAL);
    shutdown(m.socket, SHUT_WR);
    ssize_t got = recv(m.socket, &byte, 1, 0);
    return got == 0 || (got < 0 && errno == ECONNRESET) ? CLOSED : SILENT;
}

static unsigned garbage(void) {
    uint8_t noise[4096];
    fill_random(noise, sizeof noise);
    return send_bytes(noise, sizeof noise);
}

static unsigned half_a_header(void) {
    return send_bytes("\1\0\0\0\1", 5);
}

static unsigned payload_of_2gib(void) {
    const struct {
        header  h;
        uint8_t body[16384];
    } msg = {.h = {SET_VRING_NUM, VERSION, 0x7fffffff}};
    return send_bytes(&msg, sizeof msg);
}

static unsigned version_2(void) {
    const header h = {SET_OWNER, 2, 0};
    return send_bytes(&h, sizeof h);
}

static unsigned config_far_out(void) {
    uint64_t data;
    return get_config(0xffffff00, 8, &data);
}

static unsigned config_of_4gib(void) {
    uint64_t data;
    return get_config(0, UINT32_MAX, &data);
}


// ---- Wrong chains -----------------------------------------------------------

// A chain whose header, data and status are in one of these places, from
// descriptor 0 on. `table` is the size of the indirect table that it is in.
#define IN          VIRTIO_BLK_T_IN
#define OUT         VIRTIO_BLK_T_OUT
#define INDIRECTLY  VRING_DESC_F_INDIRECT
#define TO(next)    (NEXT | ((next) + 1u) << 16)
#define END_OF_DISK BIT(62) // in a sector: the capacity
#define DATA        HIGH
#define TAIL        (LOW + LOW_BYTES - 512)
#define HEAD        {CONTROL(0), 16, R}
#define LAST        {CONTROL(0) + STATUS, 1, W}
#define SECTOR_IN   {DATA, 512, W}
#define SECTOR_OUT  {DATA, 512, R}

static const struct {
    const char *name;
    uint32_t    type;
    uint64_t    sector;
    struct {
        uint64_t gpa;
        uint32_t bytes, flags;
    } d[3]; // as many as are not at 0
    uint32_t table;
    unsigned allowed;
} chain_cases[] = {
    {"header-unmapped", IN, 0, {{UNMAPPED, 16, R}, SECTOR_IN, LAST}, 0, IOERR},
    {"header-of-8-bytes", IN, 0, {{CONTROL(0), 8, R}, SECTOR_IN, LAST}, 0,
     IOERR},
    {"header-alone", IN, 0, {HEAD}, 0, UNJUDGED},
    {"data-unmapped", IN, 0, {HEAD, {UNMAPPED, 512, W}, LAST}, 0, IOERR},
    {"data-wraps", IN, 0, {HEAD, {UINT64_MAX - 255, 512, W}, LAST}, 0, IOERR},
    {"data-past-region", OUT, 0, {HEAD, {TAIL, 1024, R}, LAST}, 0, IOERR},
    {"data-of-4GiB", IN, 0, {HEAD, {DATA, UINT32_MAX, W}, LAST}, 0, IOERR},
    {"data-of-513-bytes", IN, 0, {HEAD, {DATA, 513, W}, LAST}, 0, IOERR},
    {"data-read-only", IN, 0, {HEAD, SECTOR_OUT, LAST}, 0, IOERR},
    {"writable-first", OUT, 0, {SECTOR_IN, HEAD, LAST}, 0, IOERR},
    {"status-unmapped", IN, 0, {HEAD, SECTOR_IN, {UNMAPPED, 1, W}}, 0, SILENT},
    {"status-read-only", IN, 0, {HEAD, SECTOR_OUT, SECTOR_OUT}, 0, UNJUDGED},
    {"unknown-type", 0x7777, 0, {HEAD, SECTOR_IN, LAST}, 0, UNSUPP},
    {"read-at-end", IN, END_OF_DISK, {HEAD, SECTOR_IN, LAST}, 0, IOERR},
    {"read-across-end", IN, END_OF_DISK - 1, {HEAD, {DATA, 1024, W}, LAST}, 0,
     IOERR},
    {"write-across-end", OUT, END_OF_DISK - 1, {HEAD, {DATA, 1024, R}, LAST},
     0, IOERR},
    {"read-sector-2^55", IN, BIT(55), {HEAD, SECTOR_IN, LAST}, 0, IOERR},
    {"write-sector-2^55", OUT, BIT(55), {HEAD, SECTOR_OUT, LAST}, 0, IOERR},
    {"read-sector-2^64-1", IN, UINT64_MAX, {HEAD, SECTOR_IN, LAST}, 0, IOERR},

    {"next-outside", IN, 0, {HEAD, {DATA, 512, W | TO(128)}, LAST}, 0,
     UNJUDGED},
    {"loop-of-one", IN, 0, {HEAD, {DATA, 512, W | TO(1)}, LAST}, 0, UNJUDGED},
    {"loop-to-head", IN, 0, {HEAD, {DATA, 512, R | TO(0)}, LAST}, 0, UNJUDGED},
    {"loop-of-no-bytes", IN, 0, {HEAD, {DATA, 0, W | TO(1)}, LAST}, 0,
     UNJUDGED},
    {"table-unmapped", IN, 0, {{UNMAPPED, 48, INDIRECTLY}}, 0, UNJUDGED},
    {"table-of-0-bytes", IN, 0, {HEAD, SECTOR_IN, LAST}, UINT32_MAX, UNJUDGED},
    {"table-of-47-bytes", IN, 0, {HEAD, SECTOR_IN, LAST}, 47, UNJUDGED},
    {"table-too-short", IN, 0, {HEAD, SECTOR_IN, LAST}, 32, UNJUDGED},
    {"table-of-4GiB", IN, 0, {HEAD, {DATA, 512, W | TO(65000)}, LAST},
     0xfffffff0, UNJUDGED},
    {"table-in-itself", IN, 0, {{TABLE, 48, INDIRECTLY}}, 48, UNJUDGED},
    {"table-loops", IN, 0, {HEAD, {DATA, 512, W | TO(1)}, LAST}, 48, UNJUDGED},
};

static unsigned await(uint32_t head) {
    for (uint64_t end = now_ns() + 1000000000u; now_ns() < end; usleep(50)) {
        eventfd_t n;
        while (any_used()) {
            uint8_t status = *(uint8_t *)at(CONTROL(0) + STATUS);
            if (take_used() == head) {
                return status == VIRTIO_BLK_S_OK    ? DONE
                     : status == VIRTIO_BLK_S_IOERR ? IOERR
                     : status == 0xee               ? UNJUDGED : UNSUPP;
            }
        }
        if (eventfd_read(m.err, &n) == 0) {
            return STOPPED;
        }
        if (hung_up()) {
            return CLOSED;
        }
    }
    return SILENT;
}

static unsigned go(unsigned head) {
    offer(head);
    publish();
    return await(head);
}

static unsigned chain_case(size_t k) {
    uint64_t sector = chain_cases[k].sector;
    uint32_t table = chain_cases[k].table;
    if (sector >= END_OF_DISK - 1 && sector <= END_OF_DISK) {
        sector = sector - END_OF_DISK + m.capacity;
    }
    ask(0, chain_cases[k].type, sector);
    struct vring_desc *d = table ? at(TABLE) : m.desc;
    for (unsigned i = 0; i < 3 && chain_cases[k].d[i].gpa; i++) {
        bool     more = i < 2 && chain_cases[k].d[i + 1].gpa;
        uint32_t flags = chain_cases[k].d[i].flags | (more ? NEXT : 0);
        uint32_t next = flags >> 16 ? (flags >> 16) - 1 : i + 1;
        d[i] = describe(chain_cases[k].d[i].gpa, chain_cases[k].d[i].bytes,
                        flags & 0xffff, next);
    }
    if (table) {
        m.desc[0] = describe(TABLE, table == UINT32_MAX ? 0 : table,
                             INDIRECTLY, 0);
    }
    return go(0);
}

static unsigned good_read(uint64_t sector) {
    lay_out(m.desc, 0, DATA, SECTOR, W);
    ask(0, IN, sector);
    return go(0);
}


// ---- Wrong rings, and memory that goes --------------------------------------

// Every index that is read there is 1.
static unsigned ring_at(uint64_t desc, uint64_t avail, uint64_t used) {
    const uint16_t ones[] = {1, 1, 1, 1, 1, 1, 1, 1};
    ring_place     p = {.desc = desc, .avail = avail, .used = used};
    unsigned       answer = share_memory();
    memcpy(at(LOW + LOW_BYTES - sizeof ones), ones, sizeof ones);
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    if (answer == ACCEPTED) {
        eventfd_write(m.kick, 1);
        return await(0);
    }
    return answer;
}

static unsigned ring_unmapped(void) {
    return ring_at(0x1000, 0x2000, 0x3000);
}

static unsigned ring_at_the_end(void) {
    uint64_t end = (uintptr_t)at(LOW) + LOW_BYTES;
    return ring_at(end - 16, end - 4, end - 8);
}

static unsigned ring_odd(void) {
    ring_place p = usual_place();
    return ring_at(p.desc + 1, p.avail + 1, p.used + 1);
}

static bool is_called(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    eventfd_t     n;
    return poll(&p, 1, 2000) > 0 && eventfd_read(fd, &n) == 0;
}

// The guest's QueueNum goes through a front end that looks at nothing.
static unsigned ring_of(uint16_t size) {
    ring_place p = usual_place();
    uint16_t   was = m.size;
    unsigned   answer = share_memory();
    m.size = size;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    m.size = was;
    return answer == ACCEPTED ? await(0) : answer;
}

static unsigned ring_size_0(void) {
    return ring_of(0);
}

static unsigned ring_size_12(void) {
    return ring_of(12);
}

static unsigned ring_size_2m(void) {
    ring_place p = usual_place();
    unsigned   answer = share_memory();
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    uint16_t   position;
    return answer == ACCEPTED && stop_ring(&position) == ACCEPTED &&
                   set_pair(SET_VRING_NUM, 0, 1 << 21) == ACCEPTED &&
                   set_fd(SET_VRING_KICK, m.kick) == ACCEPTED
               ? await(0)
               : CLOSED;
}

// The second ring alone is broken: the first goes on.
static unsigned ring_without_mq(void) {
    ring_place     p = usual_place();
    const uint64_t index = 1;
    int            err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p.index = 1;
    bool ok = set_pair(SET_VRING_NUM, 1, 128) == ACCEPTED &&
              message(SET_VRING_ADDR, &p, sizeof p, NULL, 0) == ACCEPTED &&
              message(SET_VRING_ERR, &index, 8, &err, 1) == ACCEPTED &&
              message(SET_VRING_KICK, &index, 8, &err, 1) == ACCEPTED &&
              set_pair(SET_VRING_ENABLE, 1, 1) == ACCEPTED &&
              good_read(0) == DONE;
    ok = ok && is_called(err);
    close(err);
    return ok ? STOPPED : CLOSED;
}

// As viostor sends them, and QEMU's own back end takes.
static unsigned chain_of_515(void) {
    struct vring_desc *table = at(TABLE);
    table[0] = describe(CONTROL(0), 16, NEXT, 1);
    for (unsigned i = 1; i <= 513; i++) {
        table[i] = describe(DATA + 512 * i, 512, W | NEXT, i + 1);
    }
    table[514] = describe(CONTROL(0) + STATUS, 1, W, 0);
    m.desc[0] = describe(TABLE, 16 * 515, INDIRECTLY, 0);
    ask(0, IN, 0);
    unsigned answer = go(0);
    return answer == DONE && !in_file(at(DATA + 512), 0, 513 * 512) ? UNJUDGED
                                                                  : answer;
}

typedef struct memory_slot {
    uint64_t padding;
    region   region;
} memory_slot;

static unsigned put_slot(uint32_t request, region r) {
    const memory_slot slot = {0, r};
    return message(request, &slot, sizeof slot, &m.memory_fd,
                   request == ADD_MEM_REG);
}

static unsigned memory_by_slots(void) {
    const region high = {HIGH, m.high_bytes, (uintptr_t)m.memory, 0};
    const region low = {LOW, LOW_BYTES, (uintptr_t)at(LOW), m.high_bytes};
    ring_place   p = usual_place();
    unsigned     answer = put_slot(ADD_MEM_REG, low);
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, high) : answer;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    answer = answer == ACCEPTED ? good_read(0) : answer;
    // Taken away and given back while the ring runs.
    answer = answer == DONE ? put_slot(REM_MEM_REG, high) : answer;
    answer = answer == ACCEPTED ? good_read(1) : answer;
    answer = answer == IOERR ? put_slot(ADD_MEM_REG, high) : answer;
    return answer == ACCEPTED ? good_read(2) : answer;
}

static unsigned slot_too_many(void) {
    unsigned answer = ACCEPTED;
    for (unsigned i = 0; i < 32 && answer == ACCEPTED; i++) {
        const region r = {HIGH + i * 4096, 4096, HIGH + i * 4096, 0};
        answer = put_slot(ADD_MEM_REG, r);
    }
    if (answer != ACCEPTED) {
        return answer == REFUSED ? SILENT : answer;
    }
    const region r = {LOW, 4096, LOW, 0};
    answer = put_slot(ADD_MEM_REG, r);
    return answer == REFUSED && hung_up() ? CLOSED : answer;
}

// What the ring has under way, as an earlier daemon left it: one part of 16
// bytes, with its version and the used index so far, and 16 for each chain.
static int inflight_fd;

static uint8_t *inflight(uint16_t used_idx) {
    size_t bytes = 4096;
    inflight_fd = memfd_create("inflight", MFD_CLOEXEC);
    uint8_t *p = ftruncate(inflight_fd, (off_t)bytes)
                     ? MAP_FAILED
                     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                            inflight_fd, 0);
    p[8] = 1;
    p[10] = (uint8_t)m.size;
    memcpy(p + 14, &used_idx, 2);
    return p;
}

static unsigned give_inflight(uint8_t *p, uint64_t bytes, uint16_t rings,
                              uint16_t size) {
    struct {
        uint64_t bytes, offset;
        uint16_t rings, size;
        uint32_t padding;
    } t = {bytes, 0, rings, size, 0};
    munmap(p, 4096);
    return message(SET_INFLIGHT_FD, &t, sizeof t, &inflight_fd, 1);
}

// A used ring whose end is in nobody's memory, where the in-flight region says
// that all of it is to be read.
static unsigned used_at_the_end(void) {
    const region other = {BIT(28), LOW_BYTES, BIT(28), m.high_bytes};
    const region low = {LOW, LOW_BYTES, (uintptr_t)at(LOW), m.high_bytes};
    ring_place   p = usual_place();
    uint16_t    *end = at(LOW + LOW_BYTES - 4);
    uint8_t     *under_way = inflight(0);
    p.used = (uintptr_t)end;
    end[1] = m.size;
    unsigned answer = give_inflight(under_way, 4096, 1, m.size);
    close(inflight_fd);
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, other) : answer;
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, low) : answer;
    answer = answer == ACCEPTED ? put_slot(REM_MEM_REG, other) : answer;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    return answer == ACCEPTED ? await(0) : answer;
}

// One side by side for the front end, and not elsewhere.
static unsigned used_in_two_regions(void) {
    const uint64_t half = LOW_BYTES / 2;
    const region   low = {LOW, half, (uintptr_t)at(LOW), m.high_bytes};
    const region   next = {LOW + half, half, (uintptr_t)at(LOW + half),
                           m.high_bytes + half};
    ring_place     p = usual_place();
    p.used = (uintptr_t)at(LOW + half - 8);
    m.used = at(LOW + half - 8);
    unsigned answer = put_slot(ADD_MEM_REG, next);
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, low) : answer;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    return answer == ACCEPTED ? good_read(0) : answer;
}

static pid_t server;

static unsigned wait_until_closed(int ms) {
    for (int i = 0; i < ms && !hung_up(); i++) {
        usleep(1000);
    }
    return hung_up() ? CLOSED : SILENT;
}

// Data goes while a thread copies, then the region of the ring.
static unsigned memory_goes_twice(void) {
    const uint64_t user = (uintptr_t)at(LOW), file = m.high_bytes;
    const uint64_t there = 0x180000, gone = 0x40000;
    const region   high = {HIGH, m.high_bytes, (uintptr_t)m.memory, 0};
    const region   low = {LOW, there, user, file};
    const region   gone1 = {LOW + there, gone, user + there, file + there};
    const region   gone2 = {LOW + there + gone, gone, user + there + gone,
                            file + there + gone};
    ring_place     p = usual_place();
    unsigned       answer = put_slot(ADD_MEM_REG, low);
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, high) : answer;
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, gone1) : answer;
    answer = answer == ACCEPTED ? put_slot(ADD_MEM_REG, gone2) : answer;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    if (answer != ACCEPTED || ftruncate(m.memory_fd, (off_t)(file + there))) {
        return answer;
    }
    struct vring_desc *table = at(TABLE);
    const unsigned     pieces = 1000;
    table[0] = describe(CONTROL(0), 16, NEXT, 1);
    for (unsigned i = 1; i <= pieces; i++) {
        table[i] = i <= 110
                       ? describe(DATA, 2 << 20, W | NEXT, i + 1)
                       : describe(gone2.gpa - 512, 1024, W | NEXT, i + 1);
    }
    table[pieces + 1] = describe(CONTROL(0) + STATUS, 1, W, 0);
    m.desc[0] = describe(TABLE, 16 * (pieces + 2), INDIRECTLY, 0);
    ask(0, IN, 0);
    offer(0);
    publish();
    usleep(5000);
    answer = put_slot(REM_MEM_REG, low);
    return answer == ACCEPTED ? wait_until_closed(3000) : answer;
}

static unsigned start_with_inflight(uint8_t *p) {
    ring_place place = usual_place();
    unsigned   answer = give_inflight(p, 4096, 1, m.size);
    answer = answer == ACCEPTED ? share_memory() : answer;
    return answer == ACCEPTED ? start_ring(&place) : answer;
}

// Descriptor `i` is a read of as much.
static void lay_out_252_mib(unsigned i) {
    struct vring_desc *table = at(TABLE);
    const unsigned     pieces = 126;
    table[0] = describe(CONTROL(0), 16, NEXT, 1);
    for (unsigned k = 1; k <= pieces; k++) {
        table[k] = describe(DATA, 2 << 20, W | NEXT, k + 1);
    }
    table[pieces + 1] = describe(CONTROL(0) + STATUS, 1, W, 0);
    m.desc[i] = describe(TABLE, 16 * (pieces + 2), INDIRECTLY, 0);
}

// A chain that is nowhere in the ring is served, as it was taken before; then
// those that are.
static unsigned inflight_is_taken_again(void) {
    uint8_t *p = inflight(0);
    p[16 + 16 * 3] = 1;
    lay_out(m.desc + 3, 0, DATA, SECTOR, W);
    m.desc[3].next = 4;
    m.desc[4].next = 5;
    ask(0, IN, 7);
    m.avail->idx = m.avail_idx = m.kicked_idx = 1; // it was there
    unsigned answer = start_with_inflight(p);
    answer = answer == ACCEPTED ? await(3) : answer;
    close(inflight_fd);
    return answer == DONE && in_file(at(DATA), 7, SECTOR) ? good_read(1)
                                                          : answer;
}

// Six large chains of a daemon before; a stop leaves some of them, which are
// taken when the ring starts again, each of them once.
static unsigned inflight_over_stops(void) {
    ring_place place = usual_place();
    uint8_t   *p = inflight(0);
    unsigned   seen = 0, starts = 1;
    uint16_t   position;
    for (unsigned i = 0; i < 6; i++) {
        p[16 + 16 * i] = 1;
        p[24 + 16 * i] = (uint8_t)(6 - i); // the last one came first
        lay_out_252_mib(i);
        m.avail->ring[i] = (uint16_t)(5 - i);
    }
    ask(0, IN, 0);
    m.avail->idx = m.avail_idx = m.kicked_idx = 6;
    unsigned answer = start_with_inflight(p);
    close(inflight_fd);
    for (; answer == ACCEPTED && seen != 0x3f && starts < 20; starts++) {
        usleep(30000);
        answer = stop_ring(&position);
        while (any_used()) {
            uint32_t head = take_used();
            if (head > 5 || seen & 1u << head) {
                return UNJUDGED;
            }
            seen |= 1u << head;
        }
        if (answer == ACCEPTED) {
            answer = start_ring_at(&place, position);
        }
    }
    return answer != ACCEPTED ? answer : seen != 0x3f ? SILENT : good_read(1);
}

// The driver turned its cache off: the daemon that comes next finds it so, and
// one that follows another driver does not.
static unsigned cache_stays_off(void) {
    const uint64_t features = FEATURES | BIT(VIRTIO_BLK_F_CONFIG_WCE);
    const config   off = {.offset = 32, .bytes = 1};
    uint8_t       *p = inflight(0), seen[3][8];
    unsigned       answer = ACCEPTED;
    for (unsigned i = 0; i < 3 && answer == ACCEPTED; i++) {
        if (i > 0) {
            close(m.socket);
            answer = boot(false) ? ACCEPTED : CLOSED;
        }
        if (i < 2 && answer == ACCEPTED) {
            uint8_t *again = i ? mmap(NULL, 4096, PROT_READ, MAP_SHARED,
                                      inflight_fd, 0) : p;
            answer = give_inflight(again, 4096, 1, m.size);
        }
        if (answer == ACCEPTED) {
            answer = message(SET_FEATURES, &features, 8, NULL, 0);
        }
        if (i == 0 && answer == ACCEPTED) {
            answer = message(SET_CONFIG, &off, 13, NULL, 0);
        }
        if (answer == ACCEPTED) { // also where features are set once more
            answer = message(SET_FEATURES, &features, 8, NULL, 0);
        }
        if (answer == ACCEPTED) {
            answer = get_config(32, 8, seen[i]);
        }
    }
    close(inflight_fd);
    bool ok = !seen[0][0] && !seen[1][0] && seen[2][0] == 1;
    return answer != ACCEPTED ? answer : ok ? DONE : UNJUDGED;
}

// QEMU says it once, and keeps it: over a driver that has neither that nor
// FLUSH, which itself has no cache; over a reset; before any features; and
// where a daemon hears of it by what is under way alone.
static unsigned cache_stays_off_for_qemu(void) {
    const uint64_t features = FEATURES | BIT(VIRTIO_BLK_F_CONFIG_WCE);
    const uint64_t none = features & ~(BIT(VIRTIO_BLK_F_CONFIG_WCE) |
                                       BIT(VIRTIO_BLK_F_FLUSH));
    config         set = {.offset = 32, .bytes = 1};
    uint8_t        seen[5][8] = {{9}, {9}, {9}, {9}, {9}};
    bool ok = message(SET_FEATURES, &none, 8, NULL, 0) == ACCEPTED &&
              message(SET_FEATURES, &features, 8, NULL, 0) == ACCEPTED &&
              get_config(32, 8, seen[0]) == ACCEPTED && seen[0][0] == 1 &&
              message(SET_FEATURES, &none, 8, NULL, 0) == ACCEPTED &&
              message(SET_CONFIG, &set, 13, NULL, 0) == ACCEPTED &&
              message(SET_FEATURES, &features, 8, NULL, 0) == ACCEPTED &&
              get_config(32, 8, seen[1]) == ACCEPTED && !seen[1][0] &&
              message(RESET_DEVICE, NULL, 0, NULL, 0) == ACCEPTED &&
              message(SET_FEATURES, &features, 8, NULL, 0) == ACCEPTED &&
              get_config(32, 8, seen[2]) == ACCEPTED && !seen[2][0];
    set.data[0] = 1;
    ok = ok && message(SET_CONFIG, &set, 13, NULL, 0) == ACCEPTED &&
         message(RESET_DEVICE, NULL, 0, NULL, 0) == ACCEPTED &&
         message(SET_FEATURES, &features, 8, NULL, 0) == ACCEPTED &&
         get_config(32, 8, seen[3]) == ACCEPTED && seen[3][0] == 1;
    uint8_t *p = inflight(0);
    p[0] = 1;
    ok = ok && give_inflight(p, 4096, 1, m.size) == ACCEPTED &&
         get_config(32, 8, seen[4]) == ACCEPTED && !seen[4][0];
    close(inflight_fd);
    return ok ? DONE : UNJUDGED;
}

// A front end that was there before may know the disk by another size.
static unsigned config_change_is_told(void) {
    int        channel[2];
    header     h = {0, 0, 0};
    ring_place p = usual_place();
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, channel)) {
        return CLOSED;
    }
    unsigned answer = message(SET_BACKEND_REQ_FD, NULL, 0, &channel[1], 1);
    answer = answer == ACCEPTED ? share_memory() : answer;
    answer = answer == ACCEPTED ? start_ring(&p) : answer;
    bool told = recv(channel[0], &h, sizeof h, MSG_DONTWAIT) == sizeof h &&
                h.request == 2 && h.flags == VERSION && h.bytes == 0;
    close(channel[0]);
    close(channel[1]);
    return answer != ACCEPTED ? answer : told ? DONE : SILENT;
}

static unsigned inflight_of_nonsense(void) {
    uint8_t *p = inflight(0x1234);
    fill_random(p + 16, 4080);
    memset(m.desc, 0, 16 * (size_t)m.size);
    unsigned answer = start_with_inflight(p);
    close(inflight_fd);
    return answer == ACCEPTED ? good_read(0) : answer;
}

static unsigned inflight_of_no_rings(void) {
    unsigned answer = give_inflight(inflight(0), 4096, 0, m.size);
    close(inflight_fd);
    return answer;
}

static unsigned inflight_too_small(void) {
    unsigned answer = give_inflight(inflight(0), 4096, 64, 32768);
    close(inflight_fd);
    return answer;
}

static unsigned inflight_truncated(void) {
    unsigned answer = start_with_inflight(inflight(0));
    if (answer == ACCEPTED) {
        answer = ftruncate(inflight_fd, 0) ? SILENT : good_read(0);
    }
    close(inflight_fd);
    return answer;
}

// Two descriptors less than the ring has, and what QEMU has before it says so.
static unsigned seg_max_fits(void) {
    uint32_t before[2] = {0, 0}, after[2] = {0, 0};
    get_config(12, 8, before);
    bool ok = set_pair(SET_VRING_NUM, 0, 64) == ACCEPTED &&
              get_config(12, 8, after) == ACCEPTED;
    return ok && before[0] == 126 && after[0] == 62 ? DONE : UNJUDGED;
}

static unsigned slot_that_is_none(void) {
    const region r = {LOW + 4096, 4096, LOW, 0};
    return put_slot(REM_MEM_REG, r);
}

static unsigned head_outside(void) {
    return go(60000);
}

static unsigned idx_jump(unsigned by) {
    m.avail_idx = (uint16_t)(m.avail_idx + by);
    publish();
    eventfd_write(m.kick, 1);
    return await(0);
}

static unsigned idx_ahead(void) {
    return idx_jump(m.size + 1u);
}

static unsigned idx_back(void) {
    return idx_jump(UINT16_MAX);
}

static unsigned many_kicks(void) {
    for (int i = 0; i < 1000; i++) {
        eventfd_write(m.kick, 1);
    }
    return good_read(0);
}

static unsigned call_is_full(void) {
    int      fd = eventfd(0, EFD_CLOEXEC); // blocks its writer
    unsigned answer = set_fd(SET_VRING_CALL, fd);
    eventfd_write(fd, UINT64_MAX - 1);
    answer = answer == ACCEPTED ? good_read(0) : answer;
    // A second one shows that the first signal did not block.
    answer = answer == DONE ? good_read(1) : answer;
    close(fd);
    return answer;
}

// The daemon made it not block; the front end has the same descriptor.
static unsigned call_blocks(void) {
    int      fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    unsigned answer = set_fd(SET_VRING_CALL, fd);
    fcntl(fd, F_SETFL, 0);
    eventfd_t had = 0;
    answer = answer == ACCEPTED && eventfd_read(fd, &had) ? SILENT : answer;
    eventfd_write(fd, UINT64_MAX - 1);
    if (answer == ACCEPTED) {
        lay_out(m.desc, 0, DATA, SECTOR, W);
        ask(0, IN, 0);
        offer(0);
        publish();
        answer = wait_until_closed(5000);
    }
    close(fd);
    return answer;
}

// Whoever closes it last waits a minute for a peer that takes nothing.
static unsigned call_lingers(void) {
    const struct linger minute = {1, 60};
    struct sockaddr_in  a = {.sin_family = AF_INET};
    socklen_t           n = sizeof a;
    static uint8_t      data[1 << 16];
    int                 listener = socket(AF_INET, SOCK_STREAM, 0);
    int                 fd = socket(AF_INET, SOCK_STREAM, 0);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (const void *)&a, sizeof a) || listen(listener, 1) ||
        getsockname(listener, (void *)&a, &n) ||
        connect(fd, (const void *)&a, sizeof a)) {
        return ACCEPTED;
    }
    while (send(fd, data, sizeof data, MSG_DONTWAIT) > 0) {
    }
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &minute, sizeof minute);
    const uint64_t index = 0;
    header         h = {SET_VRING_CALL, VERSION, sizeof index};
    bool           sent = send_message(&h, &index, &fd, 1);
    close(fd);
    unsigned answer = sent ? wait_until_closed(3000) : CLOSED;
    close(listener);
    return answer;
}

// What was completed before there was a descriptor is announced on it.
static unsigned call_comes_late(void) {
    ring_place p = usual_place();
    int        late = m.call;
    share_memory();
    m.call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (start_ring(&p) != ACCEPTED) {
        return REFUSED;
    }
    const uint64_t none = 0x100; // take the other away
    message(SET_VRING_CALL, &none, sizeof none, NULL, 0);
    unsigned answer = good_read(0);
    if (answer == DONE) {
        answer = set_fd(SET_VRING_CALL, late);
        answer = answer != ACCEPTED ? answer : is_called(late) ? DONE : SILENT;
    }
    close(late);
    return answer;
}

// The front end comes again, with a request that was completed and not
// announced: the guest sleeps for its interrupt.
static unsigned call_after_a_reconnect(void) {
    unsigned answer = good_read(0);
    if (answer != DONE) {
        return answer;
    }
    eventfd_t n;
    while (eventfd_read(m.call, &n) == 0) {
    }
    close(m.socket);
    if (!boot(false) || share_memory() != ACCEPTED) {
        return CLOSED;
    }
    ring_place p = usual_place();
    answer = start_ring_at(&p, m.avail_idx);
    return answer != ACCEPTED ? answer : is_called(m.call) ? DONE : SILENT;
}

// 128 reads of 252 MiB each: a second or ten before all are done.
static unsigned held_for_long(void) {
    uint16_t position;
    lay_out_252_mib(0);
    ask(0, IN, 0);
    for (unsigned i = 0; i < m.size; i++) {
        offer(0);
    }
    publish();
    usleep(20000);
    uint64_t start = now_ns();
    stop_ring(&position);
    return now_ns() - start < 500000000u ? DONE : SILENT;
}

// The same by one in each of 64 rings; whoever comes next does not wait.
static unsigned held_by_all_rings(void) {
    const uint64_t features = FEATURES | BIT(VIRTIO_BLK_F_MQ);
    unsigned answer = message(SET_FEATURES, &features, 8, NULL, 0);
    answer = answer == ACCEPTED ? share_memory() : answer;
    lay_out_252_mib(0);
    ask(0, IN, 0);
    m.avail->idx = 1;
    for (uint32_t i = 0; i < 64 && answer == ACCEPTED; i++) {
        ring_place p = usual_place();
        uint64_t   index = i;
        p.index = i;
        p.used = (uintptr_t)at(LOW + 0x150000 + 0x800 * i);
        bool ok = set_pair(SET_VRING_NUM, i, m.size) == ACCEPTED &&
                  message(SET_VRING_ADDR, &p, sizeof p, NULL, 0) == ACCEPTED &&
                  message(SET_VRING_KICK, &index, 8, &m.kick, 1) == ACCEPTED &&
                  set_pair(SET_VRING_ENABLE, i, 1) == ACCEPTED;
        answer = ok ? ACCEPTED : REFUSED;
    }
    eventfd_write(m.kick, 1);
    usleep(20000);
    close(m.socket);
    uint64_t start = now_ns();
    bool     ok = boot(false);
    return answer != ACCEPTED                         ? answer
         : ok && now_ns() - start < UINT64_C(1000000000) ? DONE : SILENT;
}

static unsigned half_a_message(void) {
    send(m.socket, "\1\0\0", 3, MSG_NOSIGNAL);
    return wait_until_closed(8000);
}

// Larger than what a 32-bit program can address.
static unsigned region_of_5_gib(void) {
    const uint64_t bytes = UINT64_C(5) << 30;
    memory_table   t = {1, 0, {{HIGH, bytes, HIGH, 0}}};
    int            fd = memfd_create("large", MFD_CLOEXEC);
    if (ftruncate(fd, (off_t)bytes)) {
        return NO;
    }
    unsigned answer = message(SET_MEM_TABLE, &t, sizeof t, &fd, 1);
    close(fd);
    return answer;
}

static unsigned memory_replaced(void) {
    const memory_table t = {1, 0, {{HIGH, m.high_bytes, (uintptr_t)m.memory,
                                    0}}};
    unsigned answer = message(SET_MEM_TABLE, &t, sizeof t, &m.memory_fd, 1);
    return answer == ACCEPTED ? good_read(0) : answer;
}

static unsigned memory_truncated(void) {
    unsigned answer = good_read(0);
    if (answer != DONE || ftruncate(m.memory_fd, 0)) {
        return answer;
    }
    eventfd_write(m.kick, 1);
    return wait_until_closed(3000);
}

static void put_to_work(void) {
    lay_out(m.desc, 0, DATA, 1 << 20, W);
    ask(0, IN, 0);
    for (unsigned i = 0; i < m.size; i++) {
        offer(0);
    }
    publish();
}

static unsigned left_at_work(void) {
    put_to_work();
    return CLOSED;
}

// What was completed by then cannot be shown to the guest.
static unsigned truncated_at_work(void) {
    put_to_work();
    while (!any_used()) {
        usleep(10);
    }
    return ftruncate(m.memory_fd, 0) ? ACCEPTED : wait_until_closed(3000);
}

// A signal from elsewhere, and then a real one.
static unsigned truncated_after_a_signal(void) {
    kill(server, SIGBUS);
    usleep(10000);
    return memory_truncated();
}

static const struct {
    const char *name;
    bool        early;
    unsigned    (*run)(void);
    unsigned    allowed;
} other_cases[] = {
    {"garbage", 0, garbage, CLOSED},
    {"half-a-header", 0, half_a_header, CLOSED},
    {"payload-of-2GiB", 0, payload_of_2gib, CLOSED},
    {"version-2", 0, version_2, CLOSED},
    {"config-far-out", 0, config_far_out, NO},
    {"config-of-4GiB", 0, config_of_4gib, NO},
    {"ring-unmapped", 1, ring_unmapped, STOPPED},
    {"ring-at-the-end", 1, ring_at_the_end, STOPPED},
    {"ring-odd", 1, ring_odd, STOPPED},
    {"ring-size-0", 1, ring_size_0, STOPPED},
    {"ring-size-12", 1, ring_size_12, STOPPED},
    {"ring-size-2M", 1, ring_size_2m, STOPPED},
    {"ring-1-without-mq", 0, ring_without_mq, STOPPED},
    {"chain-of-515", 0, chain_of_515, DONE},
    {"inflight-is-taken-again", 1, inflight_is_taken_again, DONE},
    {"inflight-over-stops", 1, inflight_over_stops, DONE},
    {"cache-stays-off", 1, cache_stays_off, DONE},
    {"cache-stays-off-for-qemu", 1, cache_stays_off_for_qemu, DONE},
    {"config-change-is-told", 1, config_change_is_told, DONE},
    {"inflight-of-nonsense", 1, inflight_of_nonsense, DONE | STOPPED | SILENT},
    {"inflight-of-no-rings", 1, inflight_of_no_rings, NO},
    {"inflight-too-small", 1, inflight_too_small, NO},
    {"inflight-truncated", 1, inflight_truncated, CLOSED},
    {"used-ring-at-the-end", 1, used_at_the_end, STOPPED},
    {"used-ring-in-two-regions", 1, used_in_two_regions, STOPPED},
    {"memory-goes-twice", 1, memory_goes_twice, CLOSED},
    {"memory-by-slots", 1, memory_by_slots, DONE},
    {"slot-too-many", 1, slot_too_many, REFUSED},
    {"slot-that-is-none", 0, slot_that_is_none, NO},
    {"seg-max-fits-the-ring", 1, seg_max_fits, DONE},
    {"head-outside", 0, head_outside, STOPPED},
    {"avail-idx-ahead", 0, idx_ahead, STOPPED},
    {"avail-idx-back", 0, idx_back, STOPPED},
    {"many-kicks", 0, many_kicks, DONE},
    {"call-is-full", 0, call_is_full, DONE},
    {"memory-replaced", 0, memory_replaced, NO | STOPPED},
    {"memory-truncated", 0, memory_truncated, CLOSED},
    {"left-at-work", 0, left_at_work, CLOSED},
    {"memory-truncated-at-work", 0, truncated_at_work, CLOSED},
    {"memory-truncated-after-a-signal", 0, truncated_after_a_signal, CLOSED},
    {"call-blocks", 0, call_blocks, CLOSED},
    {"call-lingers", 0, call_lingers, CLOSED},
    {"call-comes-late", 1, call_comes_late, DONE},
    {"call-after-a-reconnect", 0, call_after_a_reconnect, DONE},
    {"held-for-long", 0, held_for_long, DONE},
    {"held-by-all-rings", 1, held_by_all_rings, DONE},
    {"half-a-message", 0, half_a_message, CLOSED},
    {"region-of-5-GiB", 1, region_of_5_gib, LARGE},
};


// ---- Judging ----------------------------------------------------------------

static int failures;

static void judge(const char *name, bool ok, const char *seen) {
    if (ok) {
        printf("ok %s\n", name);
    } else {
        printf("FAIL %s: %s\n", name, seen);
    }
    fflush(stdout);
    failures += !ok;
}

static const char *answer_text(unsigned answer) {
    static const char *const text[] = {
        "accepted", "refused", "the connection was closed", "nothing happened",
        "status OK", "status IOERR", "status UNSUPP", "used without a status",
        "the ring was stopped"};
    return text[__builtin_ctz(answer)];
}

static bool fresh_read(uint64_t number) {
    power_on(2 << 20, 128);
    bool ok = boot(true);
    if (ok) {
        uint64_t sector = number % m.capacity;
        unsigned answer = good_read(sector);
        ok = answer != DONE ? fail("%s", answer_text(answer))
                            : in_file(at(DATA), sector, SECTOR) ||
                                  fail("wrong data");
    }
    power_off();
    return ok;
}

static unsigned run_other(size_t k) {
    return other_cases[k].run();
}

static void try_case(const char *name, bool early, unsigned (*run)(size_t),
                     size_t k, unsigned allowed) {
    static uint64_t state;
    char            seen[160];
    power_on(2 << 20, 128);
    bool ok = boot(!early);
    snprintf(seen, sizeof seen, "no connection: %s", why);
    if (ok) {
        unsigned answer = run(k);
        ok = answer & allowed;
        snprintf(seen, sizeof seen, "%s", answer_text(answer));
    }
    power_off();
    if (!fresh_read(draw(&state))) {
        ok = false;
        snprintf(seen, sizeof seen, "then a good read: %s", why);
    }
    judge(name, ok, seen);
}

static int open_descriptors(pid_t pid) {
    char name[64];
    int  n = 0;
    snprintf(name, sizeof name, "/proc/%d/fd", (int)pid);
    DIR *d = opendir(name);
    while (d && readdir(d)) {
        n++;
    }
    if (d) {
        closedir(d);
    }
    return n;
}

// Of files that a front end sent.
static int mapped(pid_t pid) {
    char  line[512];
    int   n = 0;
    snprintf(line, sizeof line, "/proc/%d/maps", (int)pid);
    FILE *f = fopen(line, "r");
    while (f && fgets(line, sizeof line, f)) {
        n += strstr(line, "/memfd:") != NULL;
    }
    if (f) {
        fclose(f);
    }
    return n;
}

int run_abuse(pid_t pid) {
    server = pid;
    int before = open_descriptors(pid), after = 0, maps = -1;
    judge("a-good-read", fresh_read(0), why);
    for (size_t k = 0; k < COUNT(message_cases); k++) {
        try_case(message_cases[k].name, message_cases[k].early, message_case,
                 k, message_cases[k].allowed);
    }
    for (size_t k = 0; k < COUNT(memory_cases); k++) {
        try_case(memory_cases[k].name, true, memory_case, k, NO);
    }
    for (size_t k = 0; k < COUNT(other_cases); k++) {
        try_case(other_cases[k].name, other_cases[k].early, run_other, k,
                 other_cases[k].allowed);
    }
    for (size_t k = 0; k < COUNT(chain_cases); k++) {
        try_case(chain_cases[k].name, false, chain_case, k,
                 chain_cases[k].allowed);
    }
    // It may not have seen the last connection end.
    for (int i = 0; i < 1000 && (after != before || maps != 0); i++) {
        usleep(1000);
        after = open_descriptors(pid);
        maps = mapped(pid);
    }
    char seen[64];
    snprintf(seen, sizeof seen, "%d, before %d", after, before);
    judge("the-process-lives", after > 2, "it has no descriptors");
    judge("no-descriptor-leaks", after == before, seen);
    snprintf(seen, sizeof seen, "%d mappings", maps);
    judge("no-memory-of-guests-stays", maps == 0, seen);
    return failures > 0;
}
