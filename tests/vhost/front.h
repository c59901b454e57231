// What front.c has for abuse.c: a machine, its ring, and the messages.
#ifndef FRONT_H
#define FRONT_H

#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define BIT(n)   (UINT64_C(1) << (n))
#define SECTOR   512u

// Two regions in one file, the upper one first, and nothing at address 0: a
// back end that mixes up guest, user and file addresses does not get far.
#define LOW        UINT64_C(0x100000)
#define LOW_BYTES  UINT64_C(0x200000)
#define HIGH       UINT64_C(0x100000000)
#define UNMAPPED   UINT64_C(0x1000)
#define AVAIL      (LOW + 0x4000)
#define USED       (LOW + 0x5000)
#define CONTROL(i) (LOW + 0x10000 + (uint64_t)(i) * 128)
#define TABLE      (LOW + 0x40000) // room for 65536 descriptors
#define MAX_SIZE   1024u

// In a control block
#define STATUS   16u
#define INDIRECT 32u

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8, SET_VRING_ADDR = 9, SET_VRING_BASE = 10,
    GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18, SET_BACKEND_REQ_FD = 21, GET_CONFIG = 24,
    SET_CONFIG = 25, SET_INFLIGHT_FD = 32, RESET_DEVICE = 34,
    ADD_MEM_REG = 37, REM_MEM_REG = 38
};
enum { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };

#define PROTOCOL_FEATURES BIT(30)
#define PROTOCOL          (BIT(3) | BIT(9) | BIT(15)) // acks, config, slots
#define FEATURES                                                               \
    (BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) |                  \
     BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_BLK_F_FLUSH) |              \
     PROTOCOL_FEATURES)

typedef struct header {
    uint32_t request, flags, bytes;
} header;

typedef struct region {
    uint64_t gpa, bytes, user, offset;
} region;

typedef struct memory_table {
    uint32_t count, padding;
    region   region[8];
} memory_table;

typedef struct ring_place {
    uint32_t index, flags;
    uint64_t desc, used, avail, log;
} ring_place;

typedef struct config {
    uint32_t offset, bytes, flags;
    uint8_t  data[256];
} config;

typedef struct machine {
    int      socket, memory_fd, kick, call, err;
    uint8_t *memory;
    uint64_t high_bytes;
    uint64_t capacity; // in sectors

    struct vring_desc  *desc;
    struct vring_avail *avail;
    struct vring_used  *used;
    uint16_t            size, avail_idx, kicked_idx, used_idx;
} machine;

extern machine m;

// What came of a message or a request; cases of abuse allow sets of these.
enum {
    ACCEPTED = 1, // a message
    REFUSED = 2,
    CLOSED = 4,
    SILENT = 8,
    DONE = 16, // a request; the next three by its status byte
    IOERR = 32,
    UNSUPP = 64,
    UNJUDGED = 128, // used, the status byte as it was
    STOPPED = 256   // the error descriptor was signalled
};

enum { R = 0, W = VRING_DESC_F_WRITE, NEXT = VRING_DESC_F_NEXT };

extern char why[128]; // the last call failed
extern int  ref_fd;

uint64_t now_ns(void);
uint64_t draw(uint64_t *state);
void     fill_random(uint8_t *p, size_t bytes);
bool     fail(const char *format, ...);
bool     in_file(const void *data, uint64_t sector, size_t bytes);

void  power_on(uint64_t high_bytes, uint16_t size);
void  power_off(void);
void *at(uint64_t gpa);

bool send_message(const header *h, const void *payload, const int *fds,
                  unsigned nfds);

// The first seven return an answer.
unsigned   message(uint32_t request, const void *payload, size_t bytes,
                   const int *fds, unsigned nfds);
unsigned   set_pair(uint32_t request, uint32_t index, uint32_t num);
unsigned   set_fd(uint32_t request, int fd);
unsigned   stop_ring(uint16_t *position);
unsigned   share_memory(void);
unsigned   start_ring(const ring_place *place);
unsigned   start_ring_at(const ring_place *place, uint16_t position);
ring_place usual_place(void);
bool       hung_up(void);

// Asks for `bytes` of config space and takes 8; ACCEPTED if all came.
unsigned get_config(uint32_t offset, uint32_t bytes, void *data);

// Connects and negotiates; shares memory and starts the ring if `start`.
bool boot(bool start);

// The header of request `i`, and a status byte of 0xee.
void ask(unsigned i, uint32_t type, uint64_t sector);

// Header, data and status of request `i` in three descriptors of `table`.
void lay_out(struct vring_desc *table, unsigned i, uint64_t data,
             uint32_t bytes, unsigned flags);
struct vring_desc describe(uint64_t gpa, uint32_t bytes, unsigned flags,
                           unsigned next);

void     offer(unsigned head);
void     publish(void); // what was offered, and kicks if that is wanted
bool     any_used(void);
uint32_t take_used(void);

// bare.c: a transfer of `bytes` at `data` is request `i`; with `fixed`, of the
// buffer that was registered.
bool bare_open(int fd, uint8_t *buffer, size_t bytes, bool fixed);
void bare_submit(unsigned i, uint8_t *data, uint32_t bytes, uint64_t offset,
                 bool write, bool fixed);
void bare_enter(unsigned n);      // hands over as many, waits for one
int  bare_take(int32_t *result);  // which has ended; -1: no more

int run_abuse(pid_t pid);

#endif // FRONT_H
