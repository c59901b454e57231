// vblk-serve: a disk image for any virtual machine monitor that speaks
// vhost-user: QEMU, cloud-hypervisor, crosvm, User-Mode Linux.
//
//     cc -O2 -I.. vhost_user_blk.c -o vblk-serve -lpthread
//     ./vblk-serve --socket disk.sock --image disk.img
//     qemu-system-x86_64 ... -m 1G -machine q35,memory-backend=m
//         -object memory-backend-memfd,id=m,size=1G,share=on
//         -chardev socket,id=c,path=disk.sock,reconnect=1
//         -device vhost-user-blk-pci,chardev=c
//
// With reconnect=1 the guest waits for a daemon that was restarted, and loses
// nothing. disable-legacy=on makes it a device of VIRTIO 1 alone. On a machine
// without PCI (virt, microvm) the disk is on virtio-mmio:
//
//         -global virtio-mmio.force-legacy=false
//         -device vhost-user-blk,chardev=c
//
// The front end sends descriptors of the guest's memory and the places of its
// rings over the socket. After that only event descriptors and the rings are
// used: `serve` is all that a request meets. One thread, one front end at a
// time; the next one waits.
//
// A front end is trusted no more than a guest. A message that makes no sense
// ends its connection, with a line that says why; where what makes no sense is
// the guest's, it is that ring alone that does not run. Nothing that either of
// them does holds the daemon for long: between two requests it looks at the
// socket, the signals and the clock.
#define VBLK_MAX_SEGS 1022 // QEMU's own back end takes chains of 1024
#define VBLK_IMPLEMENTATION_THREADED
#include "../vblk.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

// The tests put something worse between the device and the file.
#ifdef VBLK_SERVE_BACKEND
#include VBLK_SERVE_BACKEND
#else
#define serve_backend(file)     vblk_file_backend(file)
#define serve_features(offered) (offered)
#endif


// ---- The protocol: numbers and layouts -------------------------------------

// Name, number, the least bytes that must follow the header. What makes no
// sense is the front end's fault and ends its connection; but for the values
// that come from the guest, through a front end that looks at nothing. Such a
// message is taken, and the ring broken that it is about.
#define REQUESTS(X)                                                            \
    X(GET_FEATURES, 1, 0)                                                      \
    X(SET_FEATURES, 2, 8)      /* the front end masks them */                  \
    X(SET_OWNER, 3, 0)                                                         \
    X(RESET_OWNER, 4, 0)                                                       \
    X(SET_MEM_TABLE, 5, 8)                                                     \
    X(SET_VRING_NUM, 8, 8)     /* the guest's: QueueNum */                     \
    X(SET_VRING_ADDR, 9, 40)   /* the guest's: where its rings are */          \
    X(SET_VRING_BASE, 10, 8)                                                   \
    X(GET_VRING_BASE, 11, 8)                                                   \
    X(SET_VRING_KICK, 12, 8)                                                   \
    X(SET_VRING_CALL, 13, 8)                                                   \
    X(SET_VRING_ERR, 14, 8)                                                    \
    X(GET_PROTOCOL_FEATURES, 15, 0)                                            \
    X(SET_PROTOCOL_FEATURES, 16, 8)                                            \
    X(GET_QUEUE_NUM, 17, 0)                                                    \
    X(SET_VRING_ENABLE, 18, 8) /* the guest's: a queue it may not have */      \
    X(SET_BACKEND_REQ_FD, 21, 0)                                               \
    X(GET_CONFIG, 24, 12)                                                      \
    X(SET_CONFIG, 25, 12)      /* the guest's: a store in config space */      \
    X(RESET_DEVICE, 34, 0)                                                     \
    X(GET_MAX_MEM_SLOTS, 36, 0)                                                \
    X(ADD_MEM_REG, 37, 40)                                                     \
    X(REM_MEM_REG, 38, 40)

#define X(name, number, least) name = number,
enum request { REQUESTS(X) REQUEST_END };
#undef X

#define F_PROTOCOL_FEATURES (UINT64_C(1) << 30) // among the device's features

#define PROTOCOL_MQ           (UINT64_C(1) << 0)
#define PROTOCOL_REPLY_ACK    (UINT64_C(1) << 3)
#define PROTOCOL_BACKEND_REQ  (UINT64_C(1) << 5) // User-Mode Linux insists
#define PROTOCOL_CONFIG       (UINT64_C(1) << 9)
#define PROTOCOL_RESET_DEVICE (UINT64_C(1) << 13)
#define PROTOCOL_MEM_SLOTS    (UINT64_C(1) << 15) // libblkio insists
#define PROTOCOL_OFFERED                                                       \
    (PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ |                 \
     PROTOCOL_CONFIG | PROTOCOL_RESET_DEVICE | PROTOCOL_MEM_SLOTS)

#define FLAGS_VERSION    3u // mask; the version is 1
#define FLAGS_REPLY      4u
#define FLAGS_NEED_REPLY 8u

#define MAX_REGIONS   32u
#define MAX_QUEUES 64 // QEMU asks for one for each vCPU
#define MAX_RING      4096u
#define CONFIG_SPACE  256u
#define CONFIG_HEADER 12u    // bytes in front of the data
#define NO_FD         0x100u // in the index of SET_VRING_KICK, CALL and ERR

typedef struct header {
    uint32_t request, flags, size;
} header;

typedef struct mem_region {
    uint64_t gpa, bytes, user, offset;
} mem_region;

typedef union payload { // in the byte order of the machine
    uint64_t u64;
    struct {
        uint32_t index, num;
    } state;
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr;
    struct {
        uint32_t   count, padding;
        mem_region region[MAX_REGIONS];
    } memory;
    struct {
        uint64_t   padding;
        mem_region region;
    } slot;
    struct {
        uint32_t offset, size, flags;
        uint8_t  data[CONFIG_SPACE];
    } config;
} payload;


// ---- State -----------------------------------------------------------------

// A ring runs from when it is enabled and has a size, addresses and a kick
// descriptor. GET_VRING_BASE takes the kick descriptor away. It is broken by
// what the guest does there, or said of it, and then does not run.
typedef struct ring {
    uint32_t  size;
    bool      sized;             // what was said of it; size may be 0 still
    uint16_t  base;              // position, while it does not run
    bool      placed, enabled;
    bool      running, broken;
    uint64_t  desc, avail, used; // in the address space of the front end
    int       kick, call, err;
    uint16_t *avail_idx; // the guest's, or NULL
    uint16_t  seen;      // its value before it was served last
    uint64_t  wake_ns;   // when a stalled ring may go on, else 0
} ring;

typedef struct mapping {
    void    *base;
    size_t   bytes;
    uint64_t user; // address of the region in the front end
} mapping;

static struct {
    const char *socket, *image, *id;
    uint64_t    create;
    bool        read_only, unsafe, stats, no_lock;
    unsigned    queues;
    vblk_limits limits;
} option = {.queues = MAX_QUEUES};

static vblk_dev   device;
static vblk_file  file;
static vblk_region region[MAX_REGIONS];
static mapping    map[MAX_REGIONS];
static mem_region slot[MAX_REGIONS]; // as it was told
static vblk_regions ram = {region, 0};
static vblk_queue queues[MAX_QUEUES];
static vblk_seg   seg[VBLK_MAX_SEGS + 18]; // of the request under way
static ring       rings[MAX_QUEUES];
static uint64_t   pending; // rings to look at, a bit for each
static unsigned   rings_up; // none above this one ran since the front end came
static uint64_t   work_ends_ns, work_bytes; // of this turn, see over()

// The connection, and the message that is arriving on it.
static int      connection = -1, backend_req = -1;
static uint64_t protocol; // features accepted
static header   head;
static payload  body;
static size_t   have; // bytes of both
static uint64_t message_ns; // when the rest of it must be there; 0: none
static bool     blocks;     // the front end made a call of ours block
static int      fds[MAX_REGIONS];
static unsigned nfds;
static unsigned events;

static int         epoll_fd, listen_fd, signal_fd, timer_fd;
static struct stat our_socket;  // in the file system
static uint64_t    accept_ns;   // when to try again; 0: no need
static bool        stopping;

// Where to go on when guest memory turns out to be gone.
static sigjmp_buf            escape;
static volatile sig_atomic_t may_escape;

#define SECOND UINT64_C(1000000000)


// ---- Small things ----------------------------------------------------------

static bool end_line(int printed) {
    (void)printed;
    fputc('\n', stderr);
    return false;
}

#define say(...)    end_line(fprintf(stderr, "vblk-serve: " __VA_ARGS__))
#define refuse(...) say("front end refused: " __VA_ARGS__)
// What a guest can bring about at will is said some times for a connection.
#define grumble(...) ((void)(++events <= 20 && say(__VA_ARGS__)))
#define die(...)    exit((say(__VA_ARGS__), 1))

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

enum tag { TAG_LISTEN, TAG_CONNECTION, TAG_SIGNAL, TAG_TIMER, TAG_RING };

static bool watch(int fd, uint32_t what, uint32_t tag) {
    struct epoll_event e = {.events = what, .data.u32 = tag};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e) == 0;
}

// To close a socket may wait for its peer.
static void close_foreign(int fd) {
    const struct linger none = {0, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    close(fd);
}

// The front end has the same descriptor open: closing ours would leave it in
// the epoll set.
static void let_go(int *fd) {
    if (*fd >= 0) {
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
        close_foreign(*fd);
        *fd = -1;
    }
}

// A descriptor that is full has been signalled; one without a reader is gone.
// The front end may have made it block meanwhile: then the watchdog's signal
// comes in between.
static void signal_guest(int fd) {
    const uint64_t one = 1;
    if (fd >= 0 && !blocks && write(fd, &one, sizeof one) < 0) {
        blocks = errno == EINTR;
    }
}

static void interrupt(void *user, int queue, bool fire) {
    (void)user;
    if (fire && queue != VBLK_NO_QUEUE) {
        signal_guest(rings[queue].call);
    }
}

static void event(void *user, const vblk_event *e) {
    char line[400];
    (void)user;
    if (e->queue == VBLK_NO_QUEUE) {
        say("the disk: %s", vblk_event_line(e, line, sizeof line));
    } else if (++events <= 20) {
        say("%s%s", vblk_event_line(e, line, sizeof line),
            events == 20 ? "; no more until the next front end" : "");
    }
}


// ---- Guest memory ----------------------------------------------------------

static void forget_memory(void) {
    for (unsigned i = 0; i < ram.count; i++) {
        munmap(map[i].base, map[i].bytes);
        map[i].base = NULL;
    }
    ram.count = 0;
    vblk_set_memory(&device, vblk_regions_memory(&ram));
    for (unsigned i = 0; i < option.queues; i++) {
        rings[i].avail_idx = NULL;
    }
}

// Where the front end's address `user` is in the guest; false unless the four
// bytes there, which every part of a ring has, are guest memory.
static bool find(uint64_t user, uint64_t *gpa, uint8_t **host) {
    for (unsigned i = 0; i < ram.count; i++) {
        uint64_t at = user - map[i].user;
        if (user >= map[i].user && at < region[i].bytes &&
            region[i].bytes - at >= 4) {
            *gpa = region[i].gpa + at;
            *host = (uint8_t *)region[i].host + at;
            return true;
        }
    }
    return false;
}

static void find_avail_idx(ring *r) {
    uint64_t gpa;
    uint8_t *host;
    bool     there = find(r->avail, &gpa, &host) && ((uintptr_t)host & 1) == 0;
    r->avail_idx = there ? (uint16_t *)(void *)(host + 2) : NULL;
}

static bool check_region(const mem_region *r, const struct stat *st) {
    unsigned i = ram.count;
    if (r->bytes == 0 || r->bytes > INT64_MAX / 2 ||
        r->offset > INT64_MAX / 2 || r->bytes - 1 > UINT64_MAX - r->gpa ||
        r->bytes - 1 > UINT64_MAX - r->user) {
        return refuse("memory region %u has no valid size: %" PRIu64, i,
                      r->bytes);
    }
    for (unsigned k = 0; k < i; k++) {
        if (r->gpa <= slot[k].gpa + (slot[k].bytes - 1) &&
            slot[k].gpa <= r->gpa + (r->bytes - 1)) {
            return refuse("memory regions %u and %u overlap", k, i);
        }
    }
    if ((size_t)r->bytes != r->bytes || r->bytes > SIZE_MAX / 2) {
        return refuse("memory region %u of %" PRIu64 " bytes is more than this "
                      "program can address", i, r->bytes);
    }
    uint64_t end = r->offset + r->bytes;
    return !S_ISREG(st->st_mode) || end <= (uint64_t)st->st_size ||
           refuse("memory region %u ends at byte %" PRIu64 " of a file of %"
                  PRIu64, i, end, (uint64_t)st->st_size);
}

// One more. Mapped in whole blocks of the file, as huge pages ask for.
static bool map_region(const mem_region *r, int fd) {
    unsigned    i = ram.count;
    struct stat st;
    if (fstat(fd, &st) < 0 || !check_region(r, &st)) {
        return false;
    }
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t block = (uint64_t)st.st_blksize;
    block = block < page || block & (block - 1) ? page : block;
    uint64_t before = r->offset & (block - 1);
    uint64_t bytes = (before + r->bytes + block - 1) & ~(block - 1);
    void    *base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                         MAP_SHARED, fd, (off_t)(r->offset - before));
    if (base == MAP_FAILED) {
        return refuse("memory region %u of %" PRIu64 " bytes: %s", i,
                      r->bytes, strerror(errno));
    }
    map[i] = (mapping){base, (size_t)bytes, r->user};
    region[i] = (vblk_region){r->gpa, r->bytes, (uint8_t *)base + before,
                              false};
    slot[i] = *r;
    ram.count = i + 1;
    return true;
}

static void look_again(void) {
    vblk_set_memory(&device, vblk_regions_memory(&ram));
    for (unsigned i = 0; i < option.queues; i++) {
        if (rings[i].running) {
            find_avail_idx(&rings[i]);
        }
    }
}

static bool add_memory(void) {
    if (nfds != 1 || ram.count == MAX_REGIONS) {
        return refuse("a memory region with %u descriptors beside %u others; "
                      "the most is %u regions", nfds, ram.count,
                      MAX_REGIONS);
    }
    mem_region r = body.slot.region;
    bool       ok = map_region(&r, fds[0]);
    look_again();
    return ok;
}

static bool remove_memory(void) {
    const mem_region *r = &body.slot.region;
    for (unsigned i = 0; i < ram.count; i++) {
        if (r->gpa == slot[i].gpa && r->bytes == slot[i].bytes &&
            r->user == slot[i].user) {
            mapping gone = map[i];
            ram.count--;
            slot[i] = slot[ram.count];
            region[i] = region[ram.count];
            map[i] = map[ram.count];
            map[ram.count].base = NULL;
            look_again();
            munmap(gone.base, gone.bytes);
            return true;
        }
    }
    return refuse("there is no such memory region: %#" PRIx64, r->gpa);
}

// Rings that run keep their guest addresses; the device looks them up anew.
static bool set_memory(void) {
    uint32_t count = body.memory.count;
    if (count == 0 || count > MAX_REGIONS || count != nfds ||
        head.size < 8 + count * sizeof(mem_region)) {
        return refuse("a memory table of %u regions with %u descriptors in %u "
                      "bytes; the most is %u regions", count, nfds, head.size,
                      MAX_REGIONS);
    }
    forget_memory();
    for (unsigned i = 0; i < count; i++) {
        if (!map_region(&body.memory.region[i], fds[i])) {
            return false;
        }
    }
    look_again();
    return true;
}

// The front end can shrink the file that is its guest's memory. Anything else
// is a fault of ours, and happens again with what the system does then; what
// another process sends is none.
static void on_sigbus(int number, siginfo_t *info, void *context) {
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    if (info->si_code <= 0) {
        return;
    }
    for (unsigned i = 0; i < MAX_REGIONS && may_escape; i++) {
        if (map[i].base && at - (uintptr_t)map[i].base < map[i].bytes) {
            siglongjmp(escape, 1);
        }
    }
    signal(number, SIG_DFL);
}


// ---- Rings -----------------------------------------------------------------

static uint64_t ring_bit(unsigned i) {
    return UINT64_C(1) << i;
}

static uint64_t all_rings(void) {
    return ring_bit(option.queues - 1) * 2 - 1;
}

static void stop_ring(ring *r) {
    if (r->running) {
        r->base = (uint16_t)vblk_queue_stop(&device, (unsigned)(r - rings));
        pending |= all_rings(); // who waited behind it need not any more
    }
    r->running = r->broken = false;
    r->avail_idx = NULL;
    r->wake_ns = 0;
}

// Not the front end's doing: the guest hears of it by its own time-out.
static void break_ring(ring *r) {
    r->broken = true;
    pending |= all_rings();
    signal_guest(r->err);
}

static void start_ring(ring *r) {
    int       index = (int)(r - rings);
    uint8_t  *host;
    vblk_ring v = {.size = r->size, .position = r->base};
    if (r->size == 0) {
        grumble("ring %d does not run: it has no valid size", index);
    } else if (!find(r->desc, &v.desc, &host) ||
               !find(r->avail, &v.avail, &host) ||
               !find(r->used, &v.used, &host)) {
        grumble("ring %d does not run, it is outside guest memory: %#" PRIx64
                ", %#" PRIx64 ", %#" PRIx64, index, r->desc, r->avail,
                r->used);
    } else if (vblk_queue_start(&device, (unsigned)index, &v)) {
        grumble("ring %d does not run: the driver did not accept "
                "VIRTIO_BLK_F_MQ", index);
    } else {
        find_avail_idx(r);
        r->running = true;
        rings_up = rings_up > (unsigned)index ? rings_up : (unsigned)index + 1;
        pending |= ring_bit((unsigned)index);
        signal_guest(r->call); // for what was completed before a reconnect
        return;
    }
    break_ring(r);
}

static void start_what_is_ready(void) {
    if (!(vblk_status(&device) & VBLK_STATUS_DRIVER_OK) || !ram.count) {
        return;
    }
    for (unsigned i = 0; i < option.queues; i++) {
        ring *r = &rings[i];
        if (!r->running && !r->broken && r->enabled && r->sized &&
            r->placed && r->kick >= 0) {
            start_ring(r);
        }
    }
}

// Without a word to the guest, whose memory may be gone.
static void drop_device(void) {
    for (unsigned i = 0; i < option.queues; i++) {
        rings[i].running = false;
    }
    vblk_set_status(&device, 0);
}

static void stop_device(void) {
    for (unsigned i = 0; i < option.queues; i++) {
        stop_ring(&rings[i]);
    }
    vblk_set_status(&device, 0);
}

static void clear_rings(void) {
    for (unsigned i = 0; i < option.queues; i++) {
        let_go(&rings[i].kick);
        let_go(&rings[i].call);
        let_go(&rings[i].err);
        rings[i] = (ring){.kick = -1, .call = -1, .err = -1};
    }
}

// There is no device status in vhost-user, so it runs its course here. Rings
// that run go on with the new features.
static bool set_features(uint64_t features) {
    const uint32_t ok = VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER |
                        VBLK_STATUS_FEATURES_OK | VBLK_STATUS_DRIVER_OK;
    stop_device();
    vblk_set_status(&device, VBLK_STATUS_ACKNOWLEDGE);
    vblk_set_status(&device, VBLK_STATUS_ACKNOWLEDGE | VBLK_STATUS_DRIVER);
    vblk_set_driver_features(&device, features & ~F_PROTOCOL_FEATURES);
    vblk_set_status(&device, ok & ~VBLK_STATUS_DRIVER_OK);
    if (vblk_status(&device) & VBLK_STATUS_FEATURES_OK) {
        vblk_set_status(&device, ok);
    }
    for (unsigned i = 0; i < option.queues; i++) {
        rings[i].enabled |= !(features & F_PROTOCOL_FEATURES);
    }
    return vblk_status(&device) == ok ||
           refuse("features %#" PRIx64, features);
}

// An eventfd or a pipe: whatever else might keep whoever writes to it, or
// closes it, waiting.
static bool is_event_fd(int fd) {
    char        path[32], name[32];
    struct stat st;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode)) {
        return true;
    }
    ssize_t n = readlink(path, name, sizeof name - 1);
    name[n > 0 ? n : 0] = 0;
    return strcmp(name, "anon_inode:[eventfd]") == 0 ||
           refuse("an event descriptor is an eventfd or a pipe; this is %s",
                  n > 0 ? name : "neither");
}

// A write may not block. Of a pipe, this descriptor becomes one that the front
// end has no hand on; an eventfd is shared, so that the watchdog has to help.
static bool make_nonblocking(int fd) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int own = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (own >= 0) {
        dup3(own, fd, O_CLOEXEC);
        close(own);
        return true;
    }
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0 ||
           refuse("event descriptor: %s", strerror(errno));
}

static bool set_ring_fd(ring *r, int *fd) {
    bool none = body.u64 & NO_FD;
    bool kick = fd == &r->kick;
    if (nfds != (none ? 0 : 1) || (none && kick)) {
        return refuse("request %u for ring %d with %u descriptors; rings are "
                      "not polled", head.request, (int)(r - rings), nfds);
    }
    let_go(fd);
    if (none) {
        return true;
    }
    *fd = fds[--nfds];
    if (!is_event_fd(*fd)) {
        return false;
    }
    if (!kick) {
        bool ok = make_nonblocking(*fd);
        if (fd == &r->call && r->running) {
            signal_guest(r->call); // for what was completed without one
        }
        return ok;
    }
    // Edge-triggered, every write wakes us and nothing needs to be read.
    return watch(*fd, EPOLLIN | EPOLLET, TAG_RING + (uint32_t)(r - rings)) ||
           refuse("kick descriptor: %s", strerror(errno));
}

static bool set_ring_size(ring *r, uint32_t size) {
    if (r->running && size != r->size) {
        return refuse("another size for a ring that runs");
    }
    r->sized = true;
    r->size = size;
    if (size == 0 || size > MAX_RING || size & (size - 1)) {
        r->size = 0;
        grumble("ring %d of %u entries; a power of two up to %u will do",
                (int)(r - rings), size, MAX_RING);
    }
    return true;
}

static bool place_ring(ring *r) {
    if (r->running && (body.addr.desc != r->desc ||
                       body.addr.avail != r->avail ||
                       body.addr.used != r->used)) {
        return refuse("other addresses for a ring that runs");
    }
    r->desc = body.addr.desc;
    r->avail = body.addr.avail;
    r->used = body.addr.used;
    r->placed = true;
    return true;
}


// ---- Messages --------------------------------------------------------------

static bool reply(uint32_t size) {
    head.flags = 1 | FLAGS_REPLY;
    head.size = size;
    struct iovec  iov[] = {{&head, sizeof head}, {&body, size}};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    return sendmsg(connection, &m, MSG_DONTWAIT | MSG_NOSIGNAL) ==
               (ssize_t)(sizeof head + size) ||
           refuse("it does not take replies: %s", strerror(errno));
}

static bool reply_u64(uint64_t value) {
    body.u64 = value;
    return reply(sizeof value);
}

// What fits the rings of the front end; QEMU's have 128 entries unless it is
// told otherwise. The device itself takes more.
static void put_seg_max(uint8_t *p) {
    uint32_t entries = 0;
    for (unsigned i = 0; i < option.queues; i++) {
        uint32_t size = rings[i].size;
        entries = size > 2 && (!entries || size < entries) ? size : entries;
    }
    entries = entries ? entries : 128;
    entries = entries < VBLK_MAX_SEGS + 2 ? entries : VBLK_MAX_SEGS + 2;
    p[0] = (uint8_t)(entries - 2);
    p[1] = (uint8_t)((entries - 2) >> 8);
    p[2] = p[3] = 0;
}

static bool get_config(void) {
    uint32_t offset = body.config.offset;
    uint32_t size = body.config.size;
    if (offset > CONFIG_SPACE || size > CONFIG_SPACE - offset ||
        head.size < CONFIG_HEADER + size) {
        return reply(0); // the protocol's way to say no
    }
    uint8_t space[CONFIG_SPACE];
    vblk_read_config(&device, 0, space, sizeof space);
    put_seg_max(space + 12);
    memcpy(body.config.data, space + offset, size);
    return reply(CONFIG_HEADER + size);
}

// True if the message was taken; false ends the connection. What has a reply
// of its own sets *replied.
static bool act_on_ring(bool *replied) {
    bool     has_fd = head.request >= SET_VRING_KICK &&
                  head.request <= SET_VRING_ERR;
    uint64_t index = has_fd ? body.u64 & ~(uint64_t)NO_FD : body.state.index;
    if (index >= option.queues) {
        return refuse("request %u for ring %" PRIu64 " of %u", head.request,
                      index, option.queues);
    }
    ring *r = &rings[index];
    switch (head.request) {
    case SET_VRING_NUM:  return set_ring_size(r, body.state.num);
    case SET_VRING_ADDR: return place_ring(r);
    case SET_VRING_KICK: return set_ring_fd(r, &r->kick);
    case SET_VRING_CALL: return set_ring_fd(r, &r->call);
    case SET_VRING_ERR:  return set_ring_fd(r, &r->err);
    case SET_VRING_BASE:
        if (r->running) {
            return refuse("another position for a ring that runs");
        }
        r->base = (uint16_t)body.state.num;
        return true;
    case GET_VRING_BASE:
        stop_ring(r);
        let_go(&r->kick);
        body.state.num = r->base;
        *replied = true;
        return reply(sizeof body.state);
    default: // SET_VRING_ENABLE
        r->enabled = body.state.num != 0;
        if (!r->enabled) {
            stop_ring(r);
        }
        return true;
    }
}

static bool act(bool *replied) {
    *replied = head.request == GET_FEATURES || head.request == GET_CONFIG ||
               head.request == GET_PROTOCOL_FEATURES ||
               head.request == GET_QUEUE_NUM ||
               head.request == GET_MAX_MEM_SLOTS;
    switch (head.request) {
    case SET_OWNER:
    case RESET_OWNER: // deprecated, and best ignored
        return true;
    case GET_FEATURES:
        return reply_u64(serve_features(vblk_device_features(&device)) |
                         F_PROTOCOL_FEATURES);
    case SET_FEATURES:          return set_features(body.u64);
    case GET_PROTOCOL_FEATURES: return reply_u64(PROTOCOL_OFFERED);
    case SET_PROTOCOL_FEATURES:
        protocol = body.u64;
        return !(protocol & ~PROTOCOL_OFFERED) ||
               refuse("protocol features %#" PRIx64, protocol);
    case GET_QUEUE_NUM:         return reply_u64(option.queues);
    case SET_MEM_TABLE:         return set_memory();
    case GET_CONFIG:            return get_config();
    case SET_CONFIG:
        grumble("a write to config space at %u is ignored: it is read-only",
                body.config.offset);
        return true;
    case GET_MAX_MEM_SLOTS:     return reply_u64(MAX_REGIONS);
    case ADD_MEM_REG:           return add_memory();
    case REM_MEM_REG:           return remove_memory();
    case RESET_DEVICE:
        stop_device();
        clear_rings();
        return true;
    case SET_BACKEND_REQ_FD: // nothing is sent there
        if (nfds != 1) {
            return refuse("a back-end channel without a descriptor");
        }
        let_go(&backend_req);
        backend_req = fds[--nfds];
        return true;
    default:
        return act_on_ring(replied);
    }
}

static void close_message(void) {
    while (nfds > 0) {
        close_foreign(fds[--nfds]);
    }
    have = 0;
    message_ns = 0;
}

static int least_payload(uint32_t request) {
    switch (request) {
#define X(name, number, least) case name: return least;
        REQUESTS(X)
#undef X
    default: return -1;
    }
}

// User-Mode Linux asks with the message that negotiates REPLY_ACK.
static bool asks_for_reply(void) {
    return head.flags & FLAGS_NEED_REPLY && protocol & PROTOCOL_REPLY_ACK;
}

static bool take_message(void) {
    bool replied = false;
    int  least = least_payload(head.request);
    bool taken = false;
    if (least < 0) {
        refuse("unknown request %u", head.request);
    } else if (head.size < (uint32_t)least) {
        refuse("request %u with %u bytes; it has %d", head.request, head.size,
               least);
    } else {
        taken = act(&replied);
        start_what_is_ready();
    }
    bool slots = !taken && head.request == ADD_MEM_REG && asks_for_reply();
    close_message();
    if (slots) { // one too many is an answer, and not the end
        return reply_u64(1);
    }
    return asks_for_reply() && !replied ? reply_u64(!taken) && taken : taken;
}

static bool keep_fds(struct msghdr *m) {
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        size_t n = c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS
                       ? (c->cmsg_len - CMSG_LEN(0)) / sizeof(int)
                       : 0;
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (nfds < MAX_REGIONS) {
                fds[nfds++] = fd;
            } else {
                close_foreign(fd);
                m->msg_flags |= MSG_CTRUNC;
            }
        }
    }
    return !(m->msg_flags & MSG_CTRUNC) ||
           refuse("a message with more descriptors than %u, or than the limit "
                  "of open files allows", MAX_REGIONS);
}

#define MESSAGE_NS (5 * SECOND) // from its first byte to its last

// What there is of a message: its header first, then the rest.
static bool receive(void) {
    union {
        struct cmsghdr align;
        char           bytes[CMSG_SPACE(MAX_REGIONS * sizeof(int))];
    } control;
    size_t        at = have < sizeof head ? 0 : sizeof head;
    struct iovec  iov = {at ? (char *)&body : (char *)&head,
                         at ? head.size : sizeof head};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof control};
    iov.iov_base = (char *)iov.iov_base + (have - at);
    iov.iov_len -= have - at;
    ssize_t n = recvmsg(connection, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return true;
    }
    if (n <= 0) {
        return have > 0 && refuse("it left within a message");
    }
    have += (size_t)n;
    message_ns = message_ns ? message_ns : now_ns() + MESSAGE_NS;
    if (!keep_fds(&m)) {
        return false;
    }
    if (have < sizeof head) {
        return true;
    }
    if ((head.flags & FLAGS_VERSION) != 1 || head.flags & FLAGS_REPLY ||
        head.size > sizeof body) {
        return refuse("request %u with flags %#x and %u bytes", head.request,
                      head.flags, head.size);
    }
    return have < sizeof head + head.size || take_message();
}


// ---- Connections -----------------------------------------------------------

// A change needs no memory, so this cannot fail.
static void listen_again(bool yes) {
    struct epoll_event e = {.events = yes ? EPOLLIN : 0,
                            .data.u32 = TAG_LISTEN};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, listen_fd, &e);
}

static void disconnect(void) {
    forget_memory();
    drop_device();
    clear_rings();
    close_message();
    let_go(&backend_req);
    let_go(&connection);
    pending = 0;
    rings_up = 0;
    protocol = 0;
    events = 0;
    blocks = false;
    listen_again(true);
}

// Where descriptors or memory are short, the next one waits a second.
static void connect_next(void) {
    connection = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (connection >= 0 && watch(connection, EPOLLIN, TAG_CONNECTION)) {
        listen_again(false);
        return;
    }
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) {
        return;
    }
    say("a front end cannot be taken: %s; trying again every second",
        strerror(errno));
    let_go(&connection);
    listen_again(false);
    accept_ns = now_ns() + SECOND;
}

// A socket in the file system that nobody listens at.
static bool left_over(const struct sockaddr_un *a) {
    int  fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool left = connect(fd, (const void *)a, sizeof *a) < 0 &&
                errno == ECONNREFUSED;
    close(fd);
    return left;
}

static void listen_at(const char *path) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path) {
        die("--socket %s: a path of up to %zu characters is needed", path,
            sizeof a.sun_path - 1);
    }
    strcpy(a.sun_path, path);
    listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int err = bind(listen_fd, (const void *)&a, sizeof a);
    if (err && errno == EADDRINUSE) {
        struct stat st;
        if (lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode)) {
            die("--socket %s: there is something else than a socket", path);
        }
        if (!left_over(&a)) {
            die("--socket %s: another process listens there", path);
        }
        unlink(path);
        err = bind(listen_fd, (const void *)&a, sizeof a);
    }
    if (err || listen(listen_fd, 8) || lstat(path, &our_socket)) {
        die("--socket %s: %s", path, strerror(errno));
    }
}

static void remove_socket(const char *path) {
    struct stat st;
    if (lstat(path, &st) == 0 && st.st_dev == our_socket.st_dev &&
        st.st_ino == our_socket.st_ino) {
        unlink(path);
    }
}


// ---- Work ------------------------------------------------------------------

// A turn of work, after which we look at socket, signals and timer.
#define WORK_NS    10000000u
#define WORK_BYTES (64u << 20)

static uint64_t coarse_ns(void) { // some milliseconds old, and cheap
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static bool over(uint64_t bytes) {
    work_bytes += bytes;
    return work_bytes > WORK_BYTES || coarse_ns() > work_ends_ns || blocks;
}

static void serve(ring *r, uint64_t now) {
    unsigned     index = (unsigned)(r - rings);
    const unsigned room = sizeof seg / sizeof seg[0];
    vblk_request req;
    if (!r->running || r->broken) {
        return;
    }
    if (r->avail_idx) {
        r->seen = __atomic_load_n(r->avail_idx, __ATOMIC_RELAXED);
    }
    r->wake_ns = 0;
    while (vblk_next(&device, index, now, &req, seg, room)) {
        vblk_execute(&device, &req);
        if (over(req.bytes)) {
            vblk_publish(&device, index);
            pending |= ring_bit(index);
            return;
        }
    }
    uint64_t again = vblk_arm(&device, index, now);
    if (again == now) {
        pending |= ring_bit(index);
    } else if (again != VBLK_NEVER) {
        r->wake_ns = again;
    } else if (vblk_queue_broken(&device, index)) {
        break_ring(r);
    }
}

static void serve_pending(void) {
    static unsigned first;
    bool     limited = option.limits.iops || option.limits.bps;
    uint64_t now = limited ? now_ns() : 0;
    uint64_t todo = pending;
    pending &= rings_up ? ring_bit(rings_up - 1) * 2 - 1 : 0;
    for (unsigned i = 0; i < rings_up && !over(0); i++) {
        unsigned k = (first + i) % rings_up;
        if (todo & ring_bit(k)) {
            pending &= ~ring_bit(k);
            serve(&rings[k], now);
        }
    }
    first++; // who came last comes first
}

// A guest that waits for every request is slowed down most by our falling
// asleep in between. So look on a little, where the last wait was that short.
#define LOOK_ON_NS 50000

static bool new_work(void) {
    for (unsigned i = 0; i < rings_up; i++) {
        const ring *r = &rings[i];
        if (r->avail_idx && !r->broken && !r->wake_ns &&
            __atomic_load_n(r->avail_idx, __ATOMIC_RELAXED) != r->seen) {
            pending |= ring_bit(i);
        }
    }
    return pending != 0;
}

static void work(void) {
    static uint64_t idle_since;
    bool            look_on = now_ns() - idle_since < LOOK_ON_NS;
    work_ends_ns = coarse_ns() + WORK_NS;
    work_bytes = 0;
    while (pending && !over(0)) {
        serve_pending();
        idle_since = now_ns();
        while (look_on && !new_work()) {
            look_on = now_ns() - idle_since < LOOK_ON_NS;
        }
    }
}


// ---- The loop --------------------------------------------------------------

static uint64_t tick_ns; // when --stats says something next

static void print_rates(void) {
    static vblk_counts last;
    vblk_counts c = vblk_counters(&device);
    printf("reads %" PRIu64 " (%.1f MB) writes %" PRIu64 " (%.1f MB) flushes %"
           PRIu64 " errors %" PRIu64 " stalls %" PRIu64 "\n",
           c.reads - last.reads, (double)(c.bytes_read - last.bytes_read) / 1e6,
           c.writes - last.writes,
           (double)(c.bytes_written - last.bytes_written) / 1e6,
           c.flushes - last.flushes, c.io_errors - last.io_errors,
           c.throttled - last.throttled);
    fflush(stdout);
    last = c;
}

static void print_counters(void) {
    vblk_counts c = vblk_counters(&device);
    printf("reads %" PRIu64 "\nbytes_read %" PRIu64 "\nwrites %" PRIu64 "\n"
           "bytes_written %" PRIu64 "\nflushes %" PRIu64 "\nio_errors %" PRIu64
           "\nstalls %" PRIu64 "\nbroken_rings %" PRIu64 "\n",
           c.reads, c.bytes_read, c.writes, c.bytes_written, c.flushes,
           c.io_errors, c.throttled, c.broken_queues);
}

static void on_timer(void) {
    uint64_t now = now_ns();
    if (message_ns && message_ns <= now) {
        refuse("%zu bytes of a message, and no more for %d s", have,
               (int)(MESSAGE_NS / SECOND));
        disconnect();
    }
    if (accept_ns && accept_ns <= now) {
        accept_ns = 0;
        listen_again(connection < 0);
    }
    for (unsigned i = 0; i < option.queues; i++) {
        if (rings[i].wake_ns && rings[i].wake_ns <= now) {
            pending |= ring_bit(i);
        }
    }
    if (option.stats && now >= tick_ns) {
        print_rates();
        tick_ns += SECOND;
    }
}

static uint64_t sooner(uint64_t a, uint64_t b) { // 0: never
    return a && (!b || a < b) ? a : b;
}

static uint64_t set_to; // the timer; 0: to nothing

static void set_timer(void) {
    uint64_t next = option.stats ? tick_ns : 0;
    next = sooner(sooner(next, message_ns), accept_ns);
    for (unsigned i = 0; i < option.queues; i++) {
        next = sooner(next, rings[i].wake_ns);
    }
    if (next != set_to) {
        struct itimerspec t = {{0, 0}, {(time_t)(next / SECOND),
                                        (long)(next % SECOND)}};
        timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
        set_to = next;
    }
}

// While there is something to do, a signal comes every second and interrupts
// whatever the front end may have made to block.
static void watch_ourselves(bool yes) {
    static bool watching;
    if (yes != watching) {
        struct itimerval t = {{yes, 0}, {yes, 0}};
        setitimer(ITIMER_REAL, &t, NULL);
        watching = yes;
    }
}

static void on_alarm(int number) {
    (void)number;
}

static void turn(void) {
    struct epoll_event e[MAX_QUEUES + TAG_RING];
    set_timer();
    int n = epoll_wait(epoll_fd, e, MAX_QUEUES + TAG_RING,
                       pending ? 0 : -1);
    watch_ourselves(n >= 0);
    may_escape = 1;
    for (int i = 0; i < n; i++) {
        switch (e[i].data.u32) {
        case TAG_LISTEN: connect_next();  break;
        case TAG_SIGNAL: stopping = true; break;
        case TAG_TIMER:  on_timer();      break;
        case TAG_CONNECTION:
            if (!receive()) {
                disconnect();
            }
            break;
        default: pending |= ring_bit(e[i].data.u32 - TAG_RING); break;
        }
    }
    work();
    may_escape = 0;
    if (blocks) {
        refuse("its event descriptor blocks whoever signals it");
        disconnect();
    }
}

static void run(void) {
    while (!stopping) {
        if (sigsetjmp(escape, 0)) {
            may_escape = 0;
            refuse("its guest's memory is gone");
            disconnect();
            set_to = 0; // what came with it is forgotten, the timer perhaps
        }
        turn();
    }
}


// ---- Options and set-up ----------------------------------------------------

static const char usage[] =
    "usage: vblk-serve --socket PATH --image FILE [options]\n"
    "  --socket PATH   where front ends connect, one at a time\n"
    "  --image FILE    the disk: a raw image or a block device\n"
    "  --create SIZE   make FILE, of SIZE bytes; it must not exist\n"
    "  --read-only     offer a disk that cannot be written\n"
    "  --id TEXT       the serial number that the guest sees, up to 20 bytes\n"
    "  --queues N      up to %u (all of them)\n"
    "  --iops N        requests a second, all queues together (no limit)\n"
    "  --bps N         bytes a second (no limit)\n"
    "  --cache MODE    writeback: the guest may flush; unsafe: it may not\n"
    "  --stats         a line every second\n"
    "  --no-lock       do not ask whether others use FILE\n"
    "Sizes and rates take K, M, G or T for powers of 1024. SIGINT or SIGTERM\n"
    "end it.\n";

static uint64_t number(const char *name, const char *text) {
    static const char units[] = "KMGT";
    char    *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end))
                            : NULL;
    unsigned    shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (errno || text[0] < '0' || text[0] > '9' || n == 0 ||
        n > UINT64_MAX >> shift || (*end && (!unit || end[1]))) {
        die("--%s %s: a number above 0 is needed, like 100 or 64M", name, text);
    }
    return n << shift;
}

static void parse(int argc, char **argv) {
    static const struct option longs[] = {
        {"socket", 1, 0, 's'}, {"image", 1, 0, 'f'},  {"create", 1, 0, 'n'},
        {"read-only", 0, 0, 'r'}, {"id", 1, 0, 'i'},  {"queues", 1, 0, 'q'},
        {"iops", 1, 0, 'o'},   {"bps", 1, 0, 'b'},    {"cache", 1, 0, 'c'},
        {"stats", 0, 0, 't'},  {"no-lock", 0, 0, 'l'}, {"help", 0, 0, 'h'},
        {0, 0, 0, 0}};
    int      c, which;
    uint64_t n;
    while ((c = getopt_long(argc, argv, "", longs, &which)) != -1) {
        switch (c) {
        case 's': option.socket = optarg;                        break;
        case 'f': option.image = optarg;                         break;
        case 'n': option.create = number("create", optarg);      break;
        case 'r': option.read_only = true;                       break;
        case 'i': option.id = optarg;                            break;
        case 'o': option.limits.iops = number("iops", optarg);   break;
        case 'b': option.limits.bps = number("bps", optarg);     break;
        case 't': option.stats = true;                           break;
        case 'l': option.no_lock = true;                         break;
        case 'q':
            n = number("queues", optarg);
            if (n > MAX_QUEUES) {
                die("--queues %s: up to %d are possible", optarg,
                    MAX_QUEUES);
            }
            option.queues = (unsigned)n;
            break;
        case 'c':
            option.unsafe = strcmp(optarg, "unsafe") == 0;
            if (!option.unsafe && strcmp(optarg, "writeback") != 0) {
                die("--cache %s: writeback or unsafe is needed", optarg);
            }
            break;
        case 'h':
            printf(usage, MAX_QUEUES);
            exit(0);
        default: die("--help lists the options");
        }
    }
    if (!option.socket || !option.image || optind < argc) {
        die("--socket PATH and --image FILE are needed; --help says more");
    }
    if (option.id && strlen(option.id) > VBLK_ID_BYTES) {
        die("--id %s: up to %u bytes are possible", option.id, VBLK_ID_BYTES);
    }
}

static void locked(int err) {
    if (err && (errno == EWOULDBLOCK || errno == EACCES)) {
        die("--image %s: in use by another process", option.image);
    }
    if (err) {
        die("--image %s: cannot be locked: %s; --no-lock goes on without",
            option.image, strerror(errno));
    }
}

// Bytes that QEMU locks for reading: from 100 on for what it does itself, from
// 200 on for what it lets nobody else do, one each for reading (0), writing
// (1) and resizing (3). Then each looks for the other's. A lock of the whole
// file, as of cloud-hypervisor, meets them too.
static void lock_as_qemu(void) {
    const short own[] = {100, 101}, others[] = {201, 203};
    short       held[4];
    unsigned    n = 0;
    for (unsigned i = 0; i < (option.read_only ? 1u : 2u); i++) {
        held[n++] = own[i];
    }
    for (unsigned i = 0; i < 2; i++) {
        held[n++] = others[i];
    }
    for (unsigned i = 0; i < n; i++) {
        struct flock l = {.l_type = F_RDLCK, .l_whence = SEEK_SET,
                          .l_start = held[i], .l_len = 1};
        locked(fcntl(file.fd, F_OFD_SETLK, &l));
    }
    for (unsigned i = 0; i < n; i++) {
        struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET,
                          .l_start = held[i] < 200 ? held[i] + 100
                                                   : held[i] - 100,
                          .l_len = 1};
        locked(fcntl(file.fd, F_OFD_GETLK, &l));
        errno = EWOULDBLOCK;
        locked(l.l_type != F_UNLCK);
    }
}

static void lock_image(void) {
    locked(flock(file.fd, (option.read_only ? LOCK_SH : LOCK_EX) | LOCK_NB));
    lock_as_qemu();
}

static void open_image(void) {
    if (option.create) {
        int fd = open(option.image, O_RDWR | O_CREAT | O_EXCL, 0666);
        if (fd < 0) {
            die("--create %s: %s", option.image, strerror(errno));
        }
        if (option.create > INT64_MAX ||
            ftruncate(fd, (off_t)option.create)) {
            unlink(option.image);
            die("--create %s: %" PRIu64 " bytes are not to be had: %s",
                option.image, option.create, strerror(errno));
        }
        close(fd);
    }
    if (vblk_file_open(&file, option.image, option.read_only)) {
        bool may_read = errno == EACCES || errno == EROFS || errno == EPERM;
        die("--image %s: %s%s", option.image, strerror(errno),
            option.read_only ? "" : may_read ? "; --read-only may do" :
            errno == ENOENT ? "; --create SIZE makes it" : "");
    }
    uint64_t bytes = vblk_file_backend(&file).size(&file);
    if (bytes < VBLK_SECTOR) {
        die("--image %s: %" PRIu64 " bytes are no disk; a sector has %u",
            option.image, bytes, VBLK_SECTOR);
    }
    if (!option.no_lock) {
        lock_image();
    }
}

static void make_device(void) {
    vblk_options o = {0};
    o.backend = serve_backend(&file);
    o.id = option.id;
    o.backend.flush = option.unsafe ? NULL : o.backend.flush;
    o.queues = option.queues;
    o.queue = queues;
    o.queue_size = MAX_RING;
    o.seg_max = VBLK_MAX_SEGS; // of what is told see put_seg_max()
    o.limits = option.limits;
    o.interrupt = interrupt;
    o.event = event;
    int err = vblk_init(&device, &o);
    if (err) {
        die("%s", vblk_strerror(err));
    }
    for (unsigned i = 0; i < option.queues; i++) {
        rings[i] = (ring){.kick = -1, .call = -1, .err = -1};
    }
}

// What is opened is none of the standard descriptors, or messages would go
// there.
static void fill_standard_descriptors(void) {
    int fd;
    do {
        fd = open("/dev/null", O_RDWR);
    } while (fd >= 0 && fd <= 2);
    close(fd);
}

int main(int argc, char **argv) {
    fill_standard_descriptors();
    signal(SIGPIPE, SIG_IGN); // what fails says so
    signal(SIGXFSZ, SIG_IGN);
    parse(argc, argv);
    open_image();
    make_device();

    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    struct sigaction bus = {.sa_sigaction = on_sigbus,
                            .sa_flags = SA_NODEFER | SA_SIGINFO};
    struct sigaction alarm = {.sa_handler = on_alarm}; // interrupts
    sigaction(SIGBUS, &bus, NULL);
    sigaction(SIGALRM, &alarm, NULL);

    listen_at(option.socket);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    signal_fd = signalfd(-1, &ends, SFD_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (!watch(listen_fd, EPOLLIN, TAG_LISTEN) ||
        !watch(signal_fd, EPOLLIN, TAG_SIGNAL) ||
        !watch(timer_fd, EPOLLIN | EPOLLET, TAG_TIMER)) {
        die("epoll: %s", strerror(errno));
    }
    tick_ns = now_ns() + SECOND;
    run();

    remove_socket(option.socket);
    if (connection >= 0) {
        disconnect();
    }
    vblk_file_close(&file);
    print_counters();
    return 0;
}
