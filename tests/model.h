// A second opinion: the device once more, written from the RULES alone, with
// no thought for speed. One byte at a time, everything in the open, nothing
// shared with the implementation but the names of constants.
#ifndef MODEL_H
#define MODEL_H

#include "guest.h"

#define MODEL_BYTES   (RAM_END + HIGH_SIZE) // both pieces of guest memory
#define MODEL_QUEUES  8
#define VBLK_TEST_RANGES 64 // as the implementation has by default
#define MODEL_SECTORS 256u

// What the backend was seen to do. Calls that carry on where the last one
// ended are one effect: how a transfer is cut is the device's own affair.
typedef struct model_effect {
    char     what; // 'r', 'w', 'f'; of ranges 'd', 'z', 'u' (unmapped), 'e'
    uint64_t offset, bytes;
} model_effect;

typedef struct model_effects {
    model_effect list[512];
    unsigned     count;
} model_effects;

void model_note(model_effects *e, char what, uint64_t offset, uint64_t bytes);

// A disk that fails by place and not by call, so that it does not matter how
// often it is called. MODEL_NEVER: not at all.
#define MODEL_NEVER UINT64_MAX
typedef struct model_disk {
    uint8_t  data[MODEL_SECTORS * 512];
    uint64_t backing;   // bytes there are
    uint64_t bad;       // moving this byte is an error
    uint64_t stuck;     // writing gets no further than here
    bool     bad_flush; // flushing is an error
} model_disk;

// A billionth of a token, or that times a billion: wide enough for any limit.
#ifdef __SIZEOF_INT128__
#define MODEL_WIDE true
__extension__ typedef __int128 model_wide;
#else
#define MODEL_WIDE false // the driver sets small limits alone
typedef int64_t model_wide;
#endif

typedef struct model_bucket {
    uint64_t   rate, burst;
    model_wide balance; // billionths of a token
    uint64_t   then_ns; // when it was that
} model_bucket;

typedef struct model_queue {
    uint32_t size;
    bool     ready, due;
    bool     adopt; // take the position in the used ring from there
    uint64_t desc, avail, used;
    bool     poisoned, stalled;
    bool     switch_failed; // the driver could not be told to notify (Q3)
    uint64_t stalled_ns; // since when
    uint64_t stalled_bytes, stalled_ops;
    uint16_t next; // position in the available ring
    uint16_t seen; // avail.idx, last time it was looked at
    uint16_t done; // position in the used ring
    uint16_t shown, decided; // of that, to the driver; for an interrupt
    unsigned under_way, session;
} model_queue;

enum { MODEL_EITHER = 1, MODEL_ANY };

typedef struct model_piece {
    uint64_t gpa;
    uint64_t n;
    bool     write;
    bool     wrapped; // belongs to a descriptor that wraps: is no memory
} model_piece;

typedef struct model_range {
    uint64_t sector, sectors, flags;
} model_range;

typedef struct model_chain {
    model_piece    all[MAX_SEGS + 2];
    unsigned count;
    bool     too_long;
    model_piece    end;     // the last writable one that is not empty
    uint64_t room;    // bytes in all writable ones
    bool     ordered; // no readable one after a writable one
    // Once framed:
    model_piece    data[MAX_SEGS + 2]; // no empty ones
    unsigned datas;
    uint64_t bytes; // in data
    uint64_t space; // writable bytes before the status byte
    uint64_t status;
    bool     header_there, header_readable;
    uint32_t type;
    bool     barrier; // bit 31 of the type
    uint64_t sector;
    model_range range[VBLK_TEST_RANGES]; // no empty ones
    unsigned ranges;
} model_chain;

// A request in the hands of the host.
typedef struct model_request {
    model_chain c;
    unsigned    queue, session;
    uint32_t    head;
    uint64_t    reach; // how far the backing was known to go
} model_request;

typedef struct model {
    // What it is made from.
    bool     standard, read_only, can_flush, memory_given;
    uint64_t capacity; // sectors
    uint32_t queues, queue_size, seg_max, size_max, vendor;
    uint32_t range_max, range_sectors;
    vblk_backend backend; // its sizes, and what it has
    uint64_t offered;
    uint8_t  id[20];

    // What the driver and the disk can see.
    uint8_t       memory[MODEL_BYTES];
    model_disk    disk;
    model_effects effects;

    // Registers.
    uint32_t    device_sel, driver_sel, queue_sel;
    uint32_t    status, interrupt, resets, resizes;
    bool        write_through;
    uint64_t    accepted;
    const model_queue *turn; // stalled first; NULL: none did
    uint64_t      turn_bytes, asked_bytes, turn_ops, asked_ops;
    uint64_t      reach; // bytes the backing is known to have
    uint64_t      again; // when a poll looks at what is stalled
    model_queue queue[MODEL_QUEUES];

    bool         line;
    unsigned     fired;
    vblk_counts  counts;
    model_bucket ops, bytes;
    uint64_t     requests; // chains taken
    bool         time_unknown; // throttled_ns, since a stalled queue broke

    // Where the rules leave a choice: the byte may be this one as well, or
    // any one.
    uint8_t  other[MODEL_BYTES];
    uint8_t  loose[MODEL_BYTES];
    size_t   loose_count;
    size_t   loose_at[1u << 18]; // not cleared, so the last
} model;

// The device after power-on. Memory and disk are filled in by the caller.
void model_init(model *m, const vblk_options *o);

// What a range does to a disk; false: it fails, and did nothing.
bool model_clear(model_disk *disk, char what, uint64_t offset,
                 uint64_t bytes);
bool model_has_ranges(uint32_t type);

// The guest's memory: NULL where there is none.
uint8_t *model_at(model *m, uint64_t gpa);

uint64_t     model_read(model *m, uint64_t offset, unsigned bytes);
int          model_write(model *m, uint64_t offset, unsigned bytes,
                         uint64_t value);
outcome      model_drain(model *m, unsigned queue, uint64_t now_ns);
uint64_t     model_poll(model *m, uint64_t now_ns);
void         model_notify(model *m, int queue);

// The host's calls, as in vblk.h. What its I/O moves, the host says by the
// result: the model moves as much.
bool         model_next(model *m, unsigned queue, uint64_t now_ns,
                        model_request *r);
int          model_complete(model *m, const model_request *r, int64_t result);
void         model_publish(model *m, unsigned queue);
uint64_t     model_arm(model *m, unsigned queue, uint64_t now_ns);
int          model_stop(model *m, unsigned queue);
int          model_start(model *m, unsigned queue, const vblk_ring *ring);
void         model_needs_reset(model *m);
void         model_resize(model *m, uint64_t sectors, uint64_t backing);
void         model_set_limits(model *m, const vblk_limits *limits,
                              uint64_t now_ns);

// A driver and a host that choose by `in`, against the model: true if the
// device agrees to the end.
bool model_session(const uint8_t *in, size_t n);

#endif
