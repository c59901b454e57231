// A driver that can be wrong on purpose, its memory, a disk that can fail on
// purpose, and the rules that hold whatever either of them does.
#ifndef GUEST_H
#define GUEST_H

#include "test.h"
#define VBLK_THREADED
#include "../vblk.h"

// Guest memory: two regions that touch at SEAM but lie apart in the host, a
// hole, and one that ends at 2^64.
#ifndef SEAM // less is faster
#define SEAM      0x100000u
#define RAM_END   0x200000u
#define SECTORS   2048u
#endif
#define HIGH      0xffffffffffff0000u
#define HIGH_SIZE 0x10000u
#define GAP       4096u // host bytes between regions, filled with CANARY
#define CANARY    0xc7
#define DIRT      0xa5 // what memory holds before anybody wrote it
#define MOVED     0xdd // what is left where it was

enum { OFFERED = 1, RING = 2, READABLE = 4 }; // guest.mark bits

// The implementation has its defaults.
#define MAX_SEGS 128
#define SCRATCH  4096

typedef struct guest_op {
    char     what; // 'r', 'w', 'f'
    uint64_t offset, bytes;
    unsigned segs;
} guest_op;

typedef struct guest_access {
    bool     write;
    uint64_t gpa, n;
} guest_access;

typedef struct guest_queue {
    uint32_t size;
    uint64_t desc, avail, used;
    uint16_t avail_idx, used_idx; // free-running, the driver's own
    uint16_t next_desc;
} guest_queue;

typedef struct guest {
    vblk_dev     dev;
    vblk_queue   vq[16]; // where there is more than one
    vblk_options o; // what the device was made from
    bool         mapped;
    uint64_t     features; // accepted

    bool         moved;
    uint8_t     *base; // of guest memory: ram, unless it moved
    // Memory, at an even address. `truth` is what the driver wrote; `mark` what
    // the device may do.
    uint8_t     ram[RAM_END + HIGH_SIZE + 2 * GAP];
    uint8_t     truth[RAM_END + HIGH_SIZE + 2 * GAP];
    uint8_t     mark[RAM_END + HIGH_SIZE + 2 * GAP];
    uint8_t     offers[RAM_END + HIGH_SIZE + 2 * GAP];
    uint8_t     writes[RAM_END + HIGH_SIZE + 2 * GAP]; // without map
    vblk_region region[3];
    vblk_regions    vram;
    uint64_t    bump;              // next free guest address
    uint64_t    hole, hole_bytes;  // refused from now on
    int         fail_access;       // the nth access from now is refused
    bool        keep_failing;      // and all after it
    unsigned    tripped;           // how many failed, calls included
    unsigned    ambush;            // before the nth access from now ...
    void      (*strike)(void);     // ... this happens
    unsigned    accesses;
    guest_access trace[4096];      // ring, without map
    unsigned     traced;

    // Disk.
    uint8_t  disk[SECTORS * 512];
    uint64_t backing;       // bytes the backend has; the rest is missing
    int      fail_call;     // the nth backend call from now fails
    bool     keep_failing_calls;
    uint64_t most;          // bytes a call moves at most; 0: all
    uint64_t stuck;         // writes move this much in all, then nothing
    uint64_t written;
    unsigned calls, flushes;
    guest_op op[64];        // ring
    bool     no_size;

    guest_queue queue[8];
    unsigned    fired;      // interrupt(true)
    int         fired_queue;
    unsigned    lowered;    // interrupt(false)
    int         notified;   // by the last store
    unsigned    events[VBLK_EV_END];
    vblk_event  last;
    bool        broken_rule;   // the backend was asked what it may not be
    bool        mapped_for_writing; // what is only to be read
    bool        read_offered;  // SPLIT-04: what is only to be written
} guest;

extern guest g;
extern bool  guest_use_map;
extern vblk_profile guest_profile; // unless the test chooses

// A fresh guest: dirty memory, patterned disk, default options in g.o.
void guest_init(void);
// Make the device from g.o and bring it up to DRIVER_OK with all offered
// features but `declined`, queue 0 (and all others) of the maximum size.
void guest_up_without(uint64_t declined);
void guest_up(void);
void guest_up_standard(void);
// The steps of that.
void guest_make(void);
void guest_negotiate(uint64_t declined);
void guest_queue_up(unsigned queue, uint32_t size);
void guest_go(void);
void guest_remap(void); // the device looks its rings up again
// Guest memory goes to another place in the host; the device is to be told.
void guest_move(void);
bool guest_left_alone(void); // where it was, nothing was written since
// What Status becomes when `value` is stored over `old`.
uint32_t guest_status_after(bool standard, uint32_t old, uint32_t value);

uint32_t rd(uint32_t offset);
// Does not drain. Returns the queue that has work: one, VBLK_ALL_QUEUES or
// VBLK_NO_QUEUE.
int      wr(uint32_t offset, uint32_t value);
void     wr_drain(uint32_t offset, uint32_t value);
void     reset(void);

// Guest memory as the driver sees it.
uint8_t *at(uint64_t gpa);
uint8_t *truth_at(uint64_t gpa);
void     put(uint64_t gpa, const void *src, size_t n);
void     fill(uint64_t gpa, uint8_t value, size_t n);
void     put16(uint64_t gpa, uint16_t value);
void     put32(uint64_t gpa, uint32_t value);
void     put64(uint64_t gpa, uint64_t value);
uint16_t get16(uint64_t gpa);
uint32_t get32(uint64_t gpa);
uint64_t alloc(size_t n, size_t align);
void     mark(uint64_t gpa, uint64_t n, uint8_t bits);
void     rewritable(uint64_t gpa); // a status byte that many requests share

// Chains. A part is a descriptor to be.
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
typedef struct part {
    uint64_t gpa;
    uint32_t n;
    uint16_t flags; // WRITE, INDIRECT; NEXT is added
} part;

void     put_desc(uint64_t table, unsigned i, part p, uint16_t next);
uint16_t put_chain(unsigned queue, const part *p, unsigned n);
uint64_t put_table(const part *p, unsigned n); // indirect; its address
void     offer(unsigned queue, uint16_t head);
uint16_t submit(unsigned queue, const part *p, unsigned n); // both

// A request in the usual three parts.
typedef struct req {
    uint64_t header, data, status;
    uint32_t bytes;
    bool     out; // the data is the device's to read; OUT's is
    uint16_t head;
} req;

uint64_t put_header(uint32_t type, uint64_t sector);
req      prepare(uint32_t type, uint64_t sector, uint32_t bytes);
uint16_t send(unsigned queue, const req *r); // as a chain of its own
req      request(uint32_t type, uint64_t sector, uint32_t bytes);
void     again(const req *r); // its buffers are offered once more
// The same, kicked; returns the status byte, 0xff if it was not written.
uint8_t  run(uint32_t type, uint64_t sector, uint32_t bytes);
uint8_t  status_of(const req *r);

// What the time that a drain answers with means.
typedef enum came_to { EMPTY, REQUEST, STALLED, MORE, BROKEN } came_to;
typedef struct outcome {
    came_to  state;
    uint64_t wait_ns;
} outcome;

// One drain of a queue, or of VBLK_ALL_QUEUES as if all were notified.
outcome drain_at(int queue, uint64_t now);
// vblk_next(), and vblk_arm() where there is none. The segments of the last 300
// requests stay.
outcome take(int queue, uint64_t now, vblk_request *r);

outcome kick(unsigned queue);
outcome drain(unsigned queue);

// The two numbers of an event, whatever fields they are in.
uint64_t event_a(const vblk_event *e);
uint64_t event_b(const vblk_event *e);
// Its sentence; NULL for a number that is none.
const char *event_text(int code);

// A reset through a worker: false if a thread is left behind.
static inline bool worker_reset(vblk_worker *w) {
    return vblk_worker_mmio_write(w, VBLK_REG_STATUS, 4, 0) == VBLK_OK;
}

// Used ring.
unsigned used_count(unsigned queue); // not yet looked at
bool     used_next(unsigned queue, uint32_t *id, uint32_t *len);
uint32_t used_len(unsigned queue); // of the next one; ~0 if there is none

vblk_counts counts(void);

// The rules that hold after every test.
void guest_check(void);

#endif
