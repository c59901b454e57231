// What the parts of vblk-serve share; main.c says what it is.
#ifndef SERVE_H
#define SERVE_H

// In all parts alike, and so before any other header.
#define _GNU_SOURCE       1  // as with -D
#define _FILE_OFFSET_BITS 64 // a 32-bit program's files over 2 GiB
#define VBLK_THREADED
#include "../../vblk.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_QUEUES  64 // QEMU asks for one for each vCPU
#define MAX_REGIONS 32u
#define MAX_RING    4096u
#define MAX_EVENTS  20u
#define SECOND      UINT64_C(1000000000)

#define F_PROTOCOL_FEATURES (UINT64_C(1) << 30) // among the device's features

enum aio { AIO_SYNC, AIO_AUTO, AIO_URING };

typedef struct options {
    const char *socket, *image, *id;
    uint64_t    create;
    bool        read_only, unsafe, stats, no_lock, direct, threads, no_discard;
    unsigned    queues;
    uint32_t    block_size, size_max, seg_max; // 0: as it is best
    vblk_profile profile;
    enum aio    aio;
    vblk_limits limits;
} options;

typedef struct mem_region { // as in the messages
    uint64_t gpa, bytes, user, offset;
} mem_region;

enum ring_fd { RING_KICK, RING_CALL, RING_ERR };

bool say(const char *format, ...) // false
    __attribute__((format(printf, 1, 2)));
#define refuse(...) say("front end refused: " __VA_ARGS__)
// What a guest can bring about at will is said some times for a connection.
#define grumble(...) ((void)(count_event() <= MAX_EVENTS && say(__VA_ARGS__)))
#define die(...)    exit((say(__VA_ARGS__), 1))

static inline uint64_t sooner(uint64_t a, uint64_t b) { // 0: never
    return a && (!b || a < b) ? a : b;
}

// Where a function can refuse something, false ends the connection.

// options.c
options parse(int argc, char **argv);

// memory.c
bool set_memory(const mem_region *r, const int *fds, unsigned count);
bool add_memory(const mem_region *r, const int *fds, unsigned nfds);
bool remove_memory(const mem_region *r);
void forget_memory(void);
bool find(uint64_t user, uint64_t n, uint64_t *gpa, uint8_t **host);
void catch_escapes(void);      // once, before escaped()
bool escaped(void (*f)(void)); // whether guest memory was gone within `f`

// rings.c
int  make_device(const options *o, vblk_file *file); // as open_engines()
vblk_counts device_counts(void);
uint64_t device_features(void);
bool set_features(uint64_t features);
void read_config(uint8_t *space, size_t bytes);
void write_config(uint32_t offset, const uint8_t *data, uint32_t bytes);
void use_cache_mode(void); // of the daemon before, too
bool resize(void); // the image may have grown; false: it has shrunk
void reset_device(void);
void drop_device(void); // the front end is gone
bool memory_changed(const vblk_regions *now);
unsigned ring_count(void);
bool set_ring_size(unsigned index, uint32_t size);
bool place_ring(unsigned index, uint64_t desc, uint64_t avail, uint64_t used);
bool set_ring_base(unsigned index, uint16_t base);
bool set_ring_fd(unsigned index, enum ring_fd which, int fd); // -1: none
bool enable_ring(unsigned index, bool yes);
bool end_ring(unsigned index, uint32_t *position);
void start_what_is_ready(void);
void look_at_ring(unsigned index); // by whoever serves it
bool blocked(void); // by a descriptor of the front end's

// engines.c
int  open_engines(vblk_dev *dev, const options *o); // to watch: threads call
bool watch_kick(int fd, unsigned ring);
void forget_kick(int fd, unsigned ring);
void make_watchdog(void);
void watch_ourselves(bool busy);
void hold(void);    // until go_on() no thread serves
void go_on(void);
int  quiesce(int queue);
bool settle(void);  // nothing is under way
uint64_t work(void); // for some milliseconds; when to call it next
bool wait_for(int fd, uint64_t until); // to be readable, or for work
void call_loop(void);   // blocked() has changed
bool memory_gone(void); // within a thread
void end_threads(void); // the front end is gone
void close_engines(void);

// inflight.c
int  make_inflight(unsigned rings, unsigned size, uint64_t *n);
bool take_inflight(int fd, uint64_t n, uint64_t offset, unsigned rings,
                   unsigned size);
void forget_inflight(void);
bool in_inflight(uintptr_t at);
int  begin_inflight(unsigned ring, uint32_t size, const uint8_t *used,
                    uint16_t *heads);
void end_inflight(unsigned ring);
void keep_cache_off(bool off); // for the next of us
bool cache_was_off(void);
void track_taken(unsigned ring, unsigned head);
void track_shown(unsigned ring, uint32_t size, const uint8_t *used);

// latency.c
void latency_taken(unsigned ring, unsigned head);
void latency_shown(unsigned ring, unsigned head, uint64_t now);
void print_latency(void);     // the rest of a line, of a second's requests
void print_all_latency(void); // a line

// protocol.c
bool receive(int connection);
bool message_in_time(uint64_t now);
uint64_t message_due_ns(void); // 0: none is arriving
void forget_messages(void);    // the front end is gone
bool tell_of_config(void);     // the front end, that it changed

// loop.c
void run(const char *socket_path, bool stats, int attention);
bool watch_in_loop(int fd, unsigned ring); // a kick
void let_go(int *fd);
void close_foreign(int fd);
unsigned count_event(void); // of this connection, see grumble()
uint64_t now_ns(void);

#endif // SERVE_H
