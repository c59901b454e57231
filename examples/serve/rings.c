// The device and its rings: set up as the front end says, and served.
#define VBLK_MAX_SEGS 1022 // QEMU's own back end takes chains of 1024
#define VBLK_IMPLEMENTATION_THREADED
#include "serve.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

// The tests put something worse between the device and the file.
#ifdef VBLK_SERVE_BACKEND
#include VBLK_SERVE_BACKEND
#else
#define serve_backend(file)     vblk_file_backend(file)
#define serve_features(offered) (offered)
#endif

#define WRITEBACK 32 // in config space

// A ring runs from when it is enabled and has a size, addresses and a kick
// descriptor. GET_VRING_BASE takes the kick descriptor away. It is broken by
// what the guest does there, or said of it, and then does not run.
typedef struct ring {
    uint32_t  size;
    bool      sized;             // what was said of it; size may be 0 still
    uint16_t  base;              // position, while it does not run
    uint16_t  left;              // the same; to be taken before that
    const uint16_t *again;       // their heads, of `under_way`
    uint16_t  measured;          // so far in the used ring latency is
    bool      placed, enabled;
    bool      running, broken;
    uint64_t  desc, avail, used; // in the address space of the front end
    int       fd[3];             // of each enum ring_fd, or -1
} ring;

static vblk_dev    device;
static vblk_queue  queues[MAX_QUEUES];
static ring        rings[MAX_QUEUES];
static uint16_t    under_way[MAX_QUEUES][MAX_RING]; // when we came
static unsigned    count;  // of them, --queues
static uint32_t    seg_max; // --seg-max, or 0
static vblk_file  *image;
static bool        cache_off; // as the front end said last
static bool        measures; // latency, for --stats
static bool        blocks; // atomic; the front end made a call of ours block
static const vblk_regions *memory; // of the guest; NULL: never had any

unsigned ring_count(void) {
    return count;
}

// A descriptor that is full has been signalled; one without a reader is gone.
// The front end may have made it block meanwhile: then the watchdog's signal
// comes in between.
static void signal_guest(int fd) {
    const uint64_t one = 1;
    if (fd >= 0 && !__atomic_load_n(&blocks, __ATOMIC_RELAXED) &&
        write(fd, &one, sizeof one) < 0 && errno == EINTR) {
        __atomic_store_n(&blocks, true, __ATOMIC_RELAXED);
        call_loop();
    }
}

static void interrupt(void *user, int queue, bool fire) {
    (void)user;
    if (fire && queue != VBLK_NO_QUEUE) {
        signal_guest(rings[queue].fd[RING_CALL]);
    }
}

static void event(void *user, const vblk_event *e) {
    char line[400];
    (void)user;
    if (e->queue == VBLK_NO_QUEUE) {
        say("the disk: %s", vblk_event_line(e, line, sizeof line));
        return;
    }
    unsigned n = count_event();
    if (n <= MAX_EVENTS) {
        say("%s%s", vblk_event_line(e, line, sizeof line),
            n == MAX_EVENTS ? "; no more until the next front end" : "");
    }
}


// ---- Rings -----------------------------------------------------------------

// False: something is under way that still points to what it was.
bool memory_changed(const vblk_regions *now) {
    memory = now;
    return !vblk_set_memory(&device, vblk_regions_memory(memory)) ||
           refuse("its guest's memory is in use");
}

// What the device writes to: QEMU maps it in one piece too.
static bool find_used(const ring *r, uint64_t *gpa, uint8_t **host) {
    return find(r->used, 6 + 8 * (uint64_t)r->size, gpa, host);
}

// False: what is under way there does not end, and the ring runs on.
static bool stop_ring(ring *r) {
    unsigned  index = (unsigned)(r - rings);
    vblk_ring v;
    if (r->running) {
        if (vblk_queue_stop(&device, index, &v)) {
            return say("the image does not answer");
        }
        r->base = v.position;
        r->left = v.agains;
        r->again = v.again;
        if (!r->left) {
            end_inflight(index);
        }
    }
    r->running = r->broken = false;
    return true;
}

// Not the front end's doing: the guest hears of it by its own time-out.
static void break_ring(ring *r) {
    r->broken = true;
    signal_guest(r->fd[RING_ERR]);
}

// Where an earlier one of us stopped short, if it did, or this one.
static void go_on_from(const ring *r, const uint8_t *used, vblk_ring *v) {
    unsigned index = (unsigned)(r - rings);
    int n = r->left ? -1 : begin_inflight(index, r->size, used,
                                          under_way[index]);
    v->again = r->again;
    v->agains = r->left;
    if (n >= 0) {
        v->position = (uint16_t)((used[2] | used[3] << 8) + n);
        v->again = under_way[index];
        v->agains = (uint16_t)n;
    }
    if (n > 0) {
        grumble("ring %u: %d requests of the daemon before are begun again",
                index, n);
    }
}

static void start_ring(ring *r) {
    int       index = (int)(r - rings);
    uint8_t  *host;
    vblk_ring v = {.size = r->size, .position = r->base};
    if (r->size == 0) {
        grumble("ring %d does not run: it has no valid size", index);
    } else if (!find(r->desc, 16, &v.desc, &host) ||
               !find(r->avail, 4, &v.avail, &host) ||
               !find_used(r, &v.used, &host)) {
        grumble("ring %d does not run, it is outside guest memory: %#" PRIx64
                ", %#" PRIx64 ", %#" PRIx64, index, r->desc, r->avail,
                r->used);
    } else if (go_on_from(r, host, &v),
               vblk_queue_start(&device, (unsigned)index, &v)) {
        grumble("ring %d does not run: the driver did not accept "
                "VIRTIO_BLK_F_MQ", index);
    } else {
        r->running = true;
        r->left = 0;
        r->measured = (uint16_t)(host[2] | host[3] << 8);
        signal_guest(r->fd[RING_CALL]); // of what was done before a reconnect
        return;
    }
    break_ring(r);
}

void start_what_is_ready(void) {
    if (!(vblk_status(&device) & VBLK_STATUS_DRIVER_OK) ||
        !memory || !memory->count) {
        return;
    }
    for (unsigned i = 0; i < count; i++) {
        ring *r = &rings[i];
        if (!r->running && !r->broken && r->enabled && r->sized &&
            r->placed && r->fd[RING_KICK] >= 0) {
            start_ring(r);
            if (i == 0 && r->running) { // it may know another size
                tell_of_config();
            }
        }
    }
}

static bool is_local_socket(int fd) {
    int       domain = 0;
    socklen_t n = sizeof domain;
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) == 0 &&
           domain == AF_UNIX;
}

// An eventfd, a pipe or a local socket: whatever else might keep whoever writes
// to it, or closes it, waiting. User-Mode Linux sends sockets; who has another
// end of one, or of a pipe, can keep us in write(2) there as long as they live,
// by a fault within theirs.
static bool is_event_fd(int fd) {
    char        path[32], name[32];
    struct stat st;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &st) == 0 && (S_ISFIFO(st.st_mode) || is_local_socket(fd))) {
        return true;
    }
    ssize_t n = readlink(path, name, sizeof name - 1);
    name[n > 0 ? n : 0] = 0;
    return strcmp(name, "anon_inode:[eventfd]") == 0 ||
           refuse("an event descriptor is an eventfd, a pipe or a local "
                  "socket; this is %s", n > 0 ? name : "neither");
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

static void drop_ring_fd(ring *r, enum ring_fd which) {
    if (which == RING_KICK) {
        forget_kick(r->fd[which], (unsigned)(r - rings));
    }
    let_go(&r->fd[which]);
}

bool set_ring_fd(unsigned index, enum ring_fd which, int fd) {
    ring *r = &rings[index];
    drop_ring_fd(r, which);
    r->fd[which] = fd;
    if (fd < 0) {
        return true;
    }
    if (!is_event_fd(fd)) {
        return false;
    }
    if (which == RING_KICK) {
        return watch_kick(fd, index) ||
               refuse("kick descriptor: %s", strerror(errno));
    }
    bool ok = make_nonblocking(fd);
    if (which == RING_CALL && r->running) {
        signal_guest(fd); // for what was completed without one
    }
    return ok;
}

bool set_ring_size(unsigned index, uint32_t size) {
    ring *r = &rings[index];
    if (r->running && size != r->size) {
        return refuse("another size for a ring that runs");
    }
    r->sized = true;
    r->size = size;
    if (size == 0 || size > MAX_RING || size & (size - 1)) {
        r->size = 0;
        grumble("ring %u of %u entries; a power of two up to %u will do",
                index, size, MAX_RING);
    }
    return true;
}

bool place_ring(unsigned index, uint64_t desc, uint64_t avail, uint64_t used) {
    ring *r = &rings[index];
    if (r->running && (desc != r->desc || avail != r->avail ||
                       used != r->used)) {
        return refuse("other addresses for a ring that runs");
    }
    r->desc = desc;
    r->avail = avail;
    r->used = used;
    r->placed = true;
    return true;
}

bool set_ring_base(unsigned index, uint16_t base) {
    if (rings[index].running) {
        return refuse("another position for a ring that runs");
    }
    if (rings[index].left && base != rings[index].base) {
        rings[index].left = 0; // of another driver
        end_inflight(index);
    }
    rings[index].base = base;
    return true;
}

bool end_ring(unsigned index, uint32_t *position) {
    if (!stop_ring(&rings[index])) {
        return false;
    }
    drop_ring_fd(&rings[index], RING_KICK);
    *position = rings[index].base;
    return true;
}

bool enable_ring(unsigned index, bool yes) {
    rings[index].enabled = yes;
    return yes || stop_ring(&rings[index]);
}


// ---- The device ------------------------------------------------------------

static void measure(ring *r, const uint8_t *used) {
    unsigned index = (unsigned)(r - rings);
    uint64_t now = now_ns();
    uint16_t end = (uint16_t)(used[2] | used[3] << 8);
    for (; r->measured != end; r->measured++) {
        const uint8_t *e = used + 4 + 8 * (r->measured & (r->size - 1));
        latency_shown(index, e[0] | (unsigned)e[1] << 8, now);
    }
}

static void track(void *user, int queue, int head) {
    ring       *r = &rings[queue];
    uint64_t    gpa;
    uint8_t    *used;
    (void)user;
    if (head != VBLK_NO_HEAD) {
        track_taken((unsigned)queue, (unsigned)head);
        if (measures) {
            latency_taken((unsigned)queue, (unsigned)head);
        }
    } else if (find_used(r, &gpa, &used)) {
        track_shown((unsigned)queue, r->size, used);
        if (measures) {
            measure(r, used);
        }
    }
}

static int on_quiesce(void *user, int queue) {
    (void)user;
    return quiesce(queue);
}

int make_device(const options *o, vblk_file *file) {
    vblk_options v = {0};
    image = file;
    v.backend = serve_backend(file);
    v.id = o->id;
    v.backend.flush = o->unsafe ? NULL : v.backend.flush;
    if (o->block_size && o->block_size < v.backend.block_size) {
        die("--block-size %u: with --direct FILE needs %u", o->block_size,
            v.backend.block_size);
    }
    v.backend.block_size = o->block_size ? o->block_size
                                         : v.backend.block_size;
    if (v.backend.physical_size < v.backend.block_size) {
        v.backend.physical_size = v.backend.block_size;
    }
    if (o->no_discard) {
        v.backend.discard = NULL;
        v.backend.write_zeroes = NULL;
    }
    v.profile = o->profile;
    v.size_max = o->size_max;
    v.queues = o->queues;
    v.queue = queues;
    v.queue_size = MAX_RING;
    v.seg_max = VBLK_MAX_SEGS; // of what is told see read_config()
    v.limits = o->limits;
    v.interrupt = interrupt;
    v.event = event;
    v.quiesce = on_quiesce;
    v.track = track;
    int err = vblk_init(&device, &v);
    if (err) {
        die("%s", vblk_strerror(err));
    }
    count = o->queues;
    seg_max = o->seg_max;
    measures = o->stats;
    for (unsigned i = 0; i < count; i++) {
        rings[i] = (ring){.fd = {-1, -1, -1}};
    }
    return open_engines(&device, o);
}

static void clear_rings(void) {
    for (unsigned i = 0; i < count; i++) {
        for (enum ring_fd k = RING_KICK; k <= RING_ERR; k++) {
            drop_ring_fd(&rings[i], k);
        }
        rings[i] = (ring){.fd = {-1, -1, -1}};
    }
}

static void stop_device(void) {
    for (unsigned i = 0; i < count && stop_ring(&rings[i]); i++) {
    }
    vblk_set_status(&device, 0);
}

void reset_device(void) {
    stop_device();
    for (unsigned i = 0; i < count; i++) {
        if (rings[i].left) {
            end_inflight(i);
        }
    }
    clear_rings();
}

// Without a word to the guest, whose memory may be gone.
void drop_device(void) {
    for (unsigned i = 0; i < count; i++) {
        rings[i].running = false;
        rings[i].left = 0;
    }
    reset_device();
    forget_inflight();
    blocks = cache_off = false;
}

vblk_counts device_counts(void) {
    return vblk_counters(&device);
}

// The protocol has no word for the reset of a queue: QEMU would do it behind
// our back.
uint64_t device_features(void) {
    return serve_features(vblk_device_features(&device)) & ~VBLK_F_RING_RESET;
}

// Where the driver that there is now can turn the cache on. QEMU says once what
// it was told of it, and keeps to that as long as it runs: whoever drives the
// disk then, and whichever of us serves it.
void use_cache_mode(void) {
    cache_off |= cache_was_off();
    keep_cache_off(cache_off);
    if (cache_off) {
        vblk_write_config(&device, WRITEBACK, &(uint8_t){0}, 1);
    }
}

void write_config(uint32_t offset, const uint8_t *data, uint32_t bytes) {
    vblk_write_config(&device, offset, data, bytes);
    if (offset <= WRITEBACK && bytes > WRITEBACK - offset) {
        cache_off = !data[WRITEBACK - offset];
        keep_cache_off(cache_off);
    }
}

// There is no device status in vhost-user, so it runs its course here. Rings
// that run go on with the new features.
bool set_features(uint64_t features) {
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
    use_cache_mode();
    for (unsigned i = 0; i < count; i++) {
        rings[i].enabled |= !(features & F_PROTOCOL_FEATURES);
    }
    return vblk_status(&device) == ok ||
           refuse("features %#" PRIx64, features);
}

// seg_max is what fits the rings of the front end; QEMU's have 128 entries
// unless it is told otherwise. The device itself takes more.
void read_config(uint8_t *space, size_t bytes) {
    uint32_t entries = 0;
    for (unsigned i = 0; i < count; i++) {
        uint32_t size = rings[i].size;
        entries = size > 2 && (!entries || size < entries) ? size : entries;
    }
    entries = entries ? entries : 128;
    entries = entries < VBLK_MAX_SEGS + 2 ? entries : VBLK_MAX_SEGS + 2;
    entries = seg_max && seg_max + 2 < entries ? seg_max + 2 : entries;
    vblk_read_config(&device, 0, space, bytes);
    space[12] = (uint8_t)(entries - 2);
    space[13] = (uint8_t)((entries - 2) >> 8);
    space[14] = space[15] = 0;
}

static uint64_t capacity(void) {
    uint8_t b[8];
    uint64_t sectors = 0;
    vblk_read_config(&device, 0, b, sizeof b);
    for (unsigned i = 8; i-- > 0;) {
        sectors = sectors << 8 | b[i];
    }
    return sectors;
}

// An image that was cut has lost data: whoever cuts it ends us first.
bool resize(void) {
    uint64_t was = capacity();
    off_t    end = lseek(image->fd, 0, SEEK_END);
    uint64_t now = end < 0 ? 0 : (uint64_t)end / VBLK_SECTOR;
    if (now < was || vblk_resize(&device, 0)) {
        return say("the image has %" PRIu64 " sectors, it had %" PRIu64 ": it "
                   "can only grow", now, was);
    }
    say("the image has %s %" PRIu64 " sectors",
        now > was ? "grown to" : "still", now);
    return true;
}

void look_at_ring(unsigned index) {
    ring *r = &rings[index];
    if (r->running && !r->broken && vblk_queue_broken(&device, index)) {
        break_ring(r);
    }
}

bool blocked(void) {
    return __atomic_load_n(&blocks, __ATOMIC_RELAXED) &&
           !refuse("its event descriptor blocks whoever signals it");
}
