#include "model.h"

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };


// ---- Guest memory and the disk ---------------------------------------------

uint8_t *model_at(model *m, uint64_t gpa) {
    if (gpa < RAM_END) {
        return &m->memory[gpa];
    }
    if (gpa >= HIGH) {
        return &m->memory[RAM_END + (gpa - HIGH)];
    }
    return NULL;
}

static bool mapped(uint64_t gpa, uint64_t n) {
    if (n == 0) {
        return true;
    }
    if (gpa < RAM_END) {
        return n <= RAM_END - gpa;
    }
    return gpa >= HIGH && n - 1 <= UINT64_MAX - gpa;
}

// True if [gpa, gpa + n) goes on at 0 after the last address there is.
static bool wraps(uint64_t gpa, uint64_t n) {
    return n > 0 && n - 1 > UINT64_MAX - gpa;
}

static bool load(model *m, uint64_t gpa, unsigned bytes, uint64_t *value) {
    *value = 0;
    if (!mapped(gpa, bytes)) {
        return false;
    }
    for (unsigned i = 0; i < bytes; i++) {
        *value |= (uint64_t)*model_at(m, gpa + i) << 8 * i;
    }
    return true;
}

static bool store(model *m, uint64_t gpa, unsigned bytes, uint64_t value) {
    if (!mapped(gpa, bytes)) {
        return false;
    }
    for (unsigned i = 0; i < bytes; i++) {
        *model_at(m, gpa + i) = (uint8_t)(value >> 8 * i);
    }
    return true;
}

// The byte at `gpa` may also be `other`, or anything.
static void leave_open(model *m, uint64_t gpa, uint8_t how, uint8_t other) {
    uint8_t *p = model_at(m, gpa);
    size_t   i = p ? (size_t)(p - m->memory) : 0;
    if (!p || (!m->loose[i] && m->loose_count == COUNT(m->loose_at))) {
        return;
    }
    if (!m->loose[i]) {
        m->loose_at[m->loose_count++] = i;
    }
    m->loose[i] = how;
    m->other[i] = other;
}

void model_note(model_effects *e, char what, uint64_t offset,
                uint64_t bytes) {
    if (what != 'f' && bytes == 0) {
        return;
    }
    if (e->count > 0 && what != 'f') {
        model_effect *last = &e->list[e->count - 1];
        if (last->what == what && last->offset + last->bytes == offset) {
            last->bytes += bytes;
            return;
        }
    }
    if (e->count < COUNT(e->list)) {
        model_effect *next = &e->list[e->count];
        next->what = what;
        next->offset = offset;
        next->bytes = bytes;
    }
    e->count++;
}


// ---- Set-up ----------------------------------------------------------------

// A disk of so many bytes: whole blocks of it (B4).
static uint64_t sectors_of(const model *m, uint64_t bytes) {
    return (bytes - bytes % m->backend.block_size) / 512;
}

void model_init(model *m, const vblk_options *o) {
    memset(m, 0, offsetof(model, loose_at));
    m->standard = o->profile == VBLK_STANDARD;
    m->read_only = !o->backend.write;
    m->can_flush = o->backend.flush != NULL;
    m->memory_given = o->memory.read != NULL;
    m->backend = o->backend;
    m->backend.block_size = o->backend.block_size ? o->backend.block_size : 512;
    if (m->backend.physical_size == 0) {
        m->backend.physical_size = m->backend.block_size;
    }
    m->capacity = o->capacity ? o->capacity
                              : sectors_of(m, o->backend.size(o->backend.user));
    m->queues = o->queues ? o->queues : 1;
    m->queue_size = o->queue_size ? o->queue_size : 256;
    m->seg_max = o->seg_max;
    if (m->seg_max == 0) {
        m->seg_max = m->queue_size > 2 ? m->queue_size - 2 : 1;
        if (m->seg_max > MAX_SEGS) {
            m->seg_max = MAX_SEGS;
        }
    }
    m->size_max = o->size_max || m->standard ? o->size_max : 1u << 20;
    m->vendor = o->vendor_id || !m->standard ? o->vendor_id : 0x554d4551;
    m->offered = VBLK_F_VERSION_1 | VBLK_F_BLK_SIZE | VBLK_F_SEG_MAX |
                 VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC |
                 VBLK_F_RING_RESET;
    if (m->can_flush || m->read_only) { // nothing to flush
        m->offered |= VBLK_F_FLUSH;
    }
    if (m->standard && !o->size_max) { // P12
        m->offered &= ~VBLK_F_SIZE_MAX;
    }
    m->offered |= m->read_only ? VBLK_F_RO : 0;
    m->offered |= m->can_flush && !m->read_only ? VBLK_F_CONFIG_WCE : 0;
    m->offered |= m->queues > 1 ? VBLK_F_MQ : 0;
    if (!m->read_only) {
        m->offered |= o->backend.discard ? VBLK_F_DISCARD : 0;
        m->offered |= o->backend.write_zeroes ? VBLK_F_WRITE_ZEROES : 0;
        m->offered |= o->backend.secure_erase ? VBLK_F_SECURE_ERASE : 0;
    }
    m->offered |= o->backend.lifetime ? VBLK_F_LIFETIME : 0;
    m->offered |= o->access_platform ? VBLK_F_ACCESS_PLATFORM : 0;
    if (m->backend.physical_size > m->backend.block_size ||
        o->backend.align_offset || o->backend.min_io || o->backend.opt_io) {
        m->offered |= VBLK_F_TOPOLOGY;
    }
    m->range_max = o->range_max;
    if (m->range_max == 0) {
        m->range_max = m->seg_max + 2 < VBLK_TEST_RANGES ? m->seg_max + 2
                                                         : VBLK_TEST_RANGES;
    }
    m->range_sectors = o->range_sectors ? o->range_sectors : 65536;
    m->offered &= ~o->features_off;
    for (size_t i = 0; o->id && i < 20 && o->id[i]; i++) {
        m->id[i] = (uint8_t)o->id[i];
    }
    model_set_limits(m, &o->limits, 0);
    for (unsigned i = 0; i < m->queues; i++) { // that is no notification
        m->queue[i].due = false;
    }
    m->again = VBLK_NEVER;
    m->reach = o->backend.size ? o->backend.size(o->backend.user)
                               : m->capacity * 512;
}


// ---- Interrupts and poison -------------------------------------------------

static void interrupt(model *m, uint32_t bit, bool fire) {
    m->interrupt |= bit;
    if (fire) {
        m->fired++;
        m->line = true;
    }
}

static void acknowledge(model *m, uint32_t bits) {
    m->interrupt &= ~bits;
    if (m->interrupt == 0) {
        m->line = false;
    }
}

void model_needs_reset(model *m) {
    m->status |= VBLK_STATUS_NEEDS_RESET;
    if (m->status & VBLK_STATUS_DRIVER_OK) {
        interrupt(m, VBLK_INTERRUPT_CONFIG, true);
    }
}

void model_resize(model *m, uint64_t sectors, uint64_t backing) { // B7
    uint64_t capacity = sectors ? sectors : sectors_of(m, backing);
    m->reach = backing;
    if (capacity != m->capacity) {
        m->capacity = capacity;
        m->resizes++;
        if (m->status & VBLK_STATUS_DRIVER_OK) {
            interrupt(m, VBLK_INTERRUPT_CONFIG, true);
        }
    }
}

static void poison(model *m, model_queue *q) { // Q4
    q->poisoned = true;
    q->session++;
    m->counts.broken_queues++;
    model_needs_reset(m);
}


// ---- Registers (M, F, R, P2, P8) -------------------------------------------

// MQ tells how many queues there are; a driver that declined it has one.
static uint32_t queues_there_are(const model *m) {
    bool settled = m->status & VBLK_STATUS_FEATURES_OK;
    return settled && !(m->accepted & VBLK_F_MQ) ? 1 : m->queues;
}

static void lay(uint8_t *space, unsigned at, unsigned bytes, uint64_t value) {
    for (unsigned i = 0; i < bytes; i++) {
        space[at + i] = (uint8_t)(value >> 8 * i);
    }
}

static uint64_t config(const model *m, uint64_t at) {
    uint8_t space[80] = {0};
    uint32_t block = m->backend.block_size;
    lay(space, 0, 8, m->capacity);
    if (m->offered & VBLK_F_SIZE_MAX) {
        lay(space, 8, 4, m->size_max);
    }
    if (m->offered & VBLK_F_SEG_MAX) {
        lay(space, 12, 4, m->seg_max);
    }
    if (m->offered & VBLK_F_BLK_SIZE) {
        lay(space, 20, 4, block);
    }
    if (m->offered & VBLK_F_TOPOLOGY) {
        while (block << space[24] < m->backend.physical_size) {
            space[24]++;
        }
        lay(space, 25, 1, m->backend.align_offset / block);
        lay(space, 26, 2, m->backend.min_io / block);
        lay(space, 28, 4, m->backend.opt_io / block);
    }
    space[32] = m->offered & VBLK_F_CONFIG_WCE && !m->write_through;
    if (m->offered & VBLK_F_MQ) {
        lay(space, 34, 2, m->queues);
    }
    static const struct {
        uint64_t feature;
        unsigned at;
    } ranges[] = {{VBLK_F_DISCARD, 36}, {VBLK_F_WRITE_ZEROES, 48},
                  {VBLK_F_SECURE_ERASE, 60}};
    for (unsigned i = 0; i < 3; i++) {
        if (m->offered & ranges[i].feature) {
            lay(space, ranges[i].at, 4, m->range_sectors);
            lay(space, ranges[i].at + 4, 4, m->range_max);
            if (i == 1) {
                space[56] = m->backend.unmaps;
            } else {
                lay(space, ranges[i].at + 8, 4, m->backend.physical_size / 512);
            }
        }
    }
    return at < sizeof space ? space[at] : 0;
}

uint64_t model_read(model *m, uint64_t offset, unsigned bytes) {
    uint64_t value = 0;
    if (offset >= VBLK_REG_CONFIG) { // M3
        for (unsigned i = 0; i < bytes; i++) {
            value |= config(m, offset - VBLK_REG_CONFIG + i) << 8 * i;
        }
        return value;
    }
    if (bytes != 4) { // M2
        for (unsigned i = 0; i < bytes; i++) {
            value |= UINT64_C(0xff) << 8 * i;
        }
        return value;
    }
    bool exists = m->queue_sel < queues_there_are(m);
    switch (offset) {
    case VBLK_REG_MAGIC_VALUE:       return 0x74726976;
    case VBLK_REG_VERSION:           return 2;
    case VBLK_REG_DEVICE_ID:         return 2;
    case VBLK_REG_VENDOR_ID:         return m->vendor;
    case VBLK_REG_DEVICE_FEATURES:
        return m->device_sel == 0   ? m->offered & 0xffffffff
               : m->device_sel == 1 ? m->offered >> 32
                                    : 0;
    case VBLK_REG_QUEUE_NUM_MAX:     return exists ? m->queue_size : 0;
    case VBLK_REG_QUEUE_READY:
        return exists && m->queue[m->queue_sel].ready;
    case VBLK_REG_INTERRUPT_STATUS:  return m->interrupt;
    case VBLK_REG_STATUS:            return m->status;
    case VBLK_REG_SHM_LEN_LOW:
    case VBLK_REG_SHM_LEN_HIGH:
    case VBLK_REG_SHM_BASE_LOW:
    case VBLK_REG_SHM_BASE_HIGH:     return 0xffffffff;
    case VBLK_REG_CONFIG_GENERATION: return m->resets + m->resizes;
    default:                         return 0;
    }
}

static void end_turn(model *m, const model_queue *q) {
    if (m->turn != q) {
        return;
    }
    m->turn = NULL;
    m->again = 0;
    for (unsigned i = 1; i < m->queues && !m->turn; i++) {
        model_queue *next = &m->queue[((unsigned)(q - m->queue) + i) %
                                      m->queues];
        if (next->stalled) {
            m->turn = next;
            m->turn_bytes = next->stalled_bytes;
            m->turn_ops = next->stalled_ops;
            next->due = true;
        }
    }
}

static void start_over(model *m, model_queue *q) {
    end_turn(m, q);
    q->next = q->seen = q->done = q->shown = q->decided = 0;
    q->switch_failed = q->due = q->adopt = false;
    q->under_way = 0;
    q->session++;
    if (q->stalled) {
        q->stalled = false;
        m->counts.currently_throttled--;
    }
}

static void forget(model *m, model_queue *q) {
    start_over(m, q);
    unsigned session = q->session;
    memset(q, 0, sizeof *q);
    q->session = session;
}

static void reset_all(model *m) { // R1
    m->device_sel = m->driver_sel = m->queue_sel = 0;
    m->accepted = 0;
    m->write_through = false;
    m->status = 0;
    acknowledge(m, 3);
    m->resets++;
    m->again = VBLK_NEVER;
    m->turn = NULL;
    for (unsigned i = 0; i < MODEL_QUEUES; i++) {
        forget(m, &m->queue[i]);
    }
}

// True if one bit more is in order (F2 to F7, P2).
static bool status_step(const model *m, uint32_t old, uint32_t bit) {
    if (bit == VBLK_STATUS_FAILED) {
        return true;
    }
    if (old & (VBLK_STATUS_NEEDS_RESET | VBLK_STATUS_FAILED)) {
        return false;
    }
    switch (bit) {
    case VBLK_STATUS_ACKNOWLEDGE:
        return !(old & VBLK_STATUS_DRIVER);
    case VBLK_STATUS_DRIVER:
        return m->standard || old & VBLK_STATUS_ACKNOWLEDGE;
    case VBLK_STATUS_FEATURES_OK:
        return old & VBLK_STATUS_DRIVER &&
               (m->standard || m->accepted & VBLK_F_VERSION_1) && // P10
               !(m->offered & ~m->accepted & VBLK_F_ACCESS_PLATFORM) &&
               !(m->accepted & ~m->offered);
    case VBLK_STATUS_DRIVER_OK:
        return old & VBLK_STATUS_FEATURES_OK;
    default:
        return false;
    }
}

// What Status becomes, if the write takes. Standard: what is new in it and is
// a driver's to set, each bit in order.
static uint32_t status_after(const model *m, uint32_t value) {
    static const uint32_t order[] = {1, 2, 8, 4, 0x80};
    uint32_t old = m->status, now = old, added = value & ~old;
    unsigned bits = 0;
    if (m->standard) {
        added &= 0x8f;
    } else if (old & ~value || added & ~UINT32_C(0x8f)) {
        return old;
    }
    if (old & VBLK_STATUS_NEEDS_RESET && added != VBLK_STATUS_FAILED) {
        return old;
    }
    for (unsigned i = 0; i < COUNT(order); i++) {
        if (added & order[i]) {
            bits++;
            if (!status_step(m, now, order[i])) {
                return old;
            }
            now |= order[i];
        }
    }
    return bits > 1 && !m->standard ? old : now;
}

static int write_status(model *m, uint32_t value) {
    if (value == 0) {
        reset_all(m);
        return VBLK_NO_QUEUE;
    }
    uint32_t old = m->status;
    m->status = status_after(m, value);
    if (m->status & ~old & VBLK_STATUS_FEATURES_OK) {
        m->write_through = m->can_flush && !(m->accepted & VBLK_F_FLUSH);
    }
    return m->status & ~old & VBLK_STATUS_DRIVER_OK ? VBLK_ALL_QUEUES
                                                    : VBLK_NO_QUEUE;
}

static void set_half(uint64_t *address, bool high, uint32_t value) { // M8
    if (high) {
        *address = (*address & 0xffffffff) | (uint64_t)value << 32;
    } else {
        *address = (*address & ~UINT64_C(0xffffffff)) | value;
    }
}

// The queue whose turn it is now, if that was not so before.
static int new_turn(const model *m, const model_queue *before) {
    return m->turn && m->turn != before ? (int)(m->turn - m->queue)
                                        : VBLK_NO_QUEUE;
}

static int reset_queue(model *m, uint32_t value) { // M13
    if (value != 1 || !(m->accepted & VBLK_F_RING_RESET) ||
        !(m->status & VBLK_STATUS_DRIVER_OK) ||
        m->queue_sel >= queues_there_are(m)) {
        return VBLK_NO_QUEUE;
    }
    model_queue       *q = &m->queue[m->queue_sel];
    const model_queue *turn = m->turn;
    bool               poisoned = q->poisoned;
    forget(m, q);
    q->poisoned = poisoned;
    return new_turn(m, turn);
}

static int write_queue(model *m, uint64_t offset, uint32_t value) { // M7, P8
    uint32_t from = m->standard ? VBLK_STATUS_DRIVER // P13
                                : VBLK_STATUS_FEATURES_OK;
    if (m->queue_sel >= queues_there_are(m) || !(m->status & from)) {
        return VBLK_NO_QUEUE;
    }
    model_queue *q = &m->queue[m->queue_sel];
    bool live = m->status & VBLK_STATUS_DRIVER_OK;
    if (live && !m->standard &&
        (!(m->accepted & VBLK_F_RING_RESET) || // M13
         (offset == VBLK_REG_QUEUE_READY && value != 1))) {
        return VBLK_NO_QUEUE;
    }
    if (live && offset == VBLK_REG_QUEUE_READY && value != 1) { // P8
        const model_queue *turn = m->turn;
        start_over(m, q);
        q->ready = false;
        return new_turn(m, turn);
    }
    if (live && q->ready) {
        return VBLK_NO_QUEUE;
    }
    bool high = offset & 4;
    switch (offset) {
    case VBLK_REG_QUEUE_NUM:
        if (value > 0 && value <= m->queue_size && !(value & (value - 1))) {
            q->size = value;
        }
        break;
    case VBLK_REG_QUEUE_DESC_LOW:
    case VBLK_REG_QUEUE_DESC_HIGH:
        set_half(&q->desc, high, value);
        break;
    case VBLK_REG_QUEUE_DRIVER_LOW:
    case VBLK_REG_QUEUE_DRIVER_HIGH:
        set_half(&q->avail, high, value);
        break;
    case VBLK_REG_QUEUE_DEVICE_LOW:
    case VBLK_REG_QUEUE_DEVICE_HIGH:
        set_half(&q->used, high, value);
        break;
    default: // QueueReady
        q->ready = value == 1;
        if (live && q->ready) {
            return (int)m->queue_sel;
        }
        break;
    }
    return VBLK_NO_QUEUE;
}

static int write_register(model *m, uint64_t offset, unsigned bytes,
                          uint64_t wide) {
    uint32_t value = (uint32_t)wide;
    if (offset >= VBLK_REG_CONFIG) {
        uint64_t writeback = VBLK_REG_CONFIG + 32 - offset;
        if (writeback < bytes && m->accepted & VBLK_F_CONFIG_WCE &&
            m->status & VBLK_STATUS_FEATURES_OK) { // M3
            m->write_through = (wide >> 8 * writeback & 0xff) == 0;
        }
        return VBLK_NO_QUEUE;
    }
    if (bytes != 4) {
        return VBLK_NO_QUEUE;
    }
    switch (offset) {
    case VBLK_REG_DEVICE_FEATURES_SEL: m->device_sel = value; break;
    case VBLK_REG_DRIVER_FEATURES_SEL: m->driver_sel = value; break;
    case VBLK_REG_QUEUE_SEL:           m->queue_sel = value;  break;
    case VBLK_REG_DRIVER_FEATURES: // M5
        if (m->status & VBLK_STATUS_DRIVER &&
            !(m->status & VBLK_STATUS_FEATURES_OK) && m->driver_sel < 2) {
            set_half(&m->accepted, m->driver_sel == 1, value);
        }
        break;
    case VBLK_REG_QUEUE_NOTIFY: // M10
        if (value < queues_there_are(m) && m->queue[value].ready &&
            m->status & VBLK_STATUS_DRIVER_OK) {
            return (int)value;
        }
        break;
    case VBLK_REG_INTERRUPT_ACK:
        acknowledge(m, value);
        break;
    case VBLK_REG_STATUS:
        return write_status(m, value);
    case VBLK_REG_QUEUE_RESET:
        return reset_queue(m, value);
    case VBLK_REG_QUEUE_NUM:
    case VBLK_REG_QUEUE_READY:
    case VBLK_REG_QUEUE_DESC_LOW:
    case VBLK_REG_QUEUE_DESC_HIGH:
    case VBLK_REG_QUEUE_DRIVER_LOW:
    case VBLK_REG_QUEUE_DRIVER_HIGH:
    case VBLK_REG_QUEUE_DEVICE_LOW:
    case VBLK_REG_QUEUE_DEVICE_HIGH:
        return write_queue(m, offset, value);
    default:
        break;
    }
    return VBLK_NO_QUEUE;
}

int model_write(model *m, uint64_t offset, unsigned bytes, uint64_t wide) {
    int queue = write_register(m, offset, bytes, wide);
    model_notify(m, queue);
    return queue;
}


// ---- A chain, then what is in it (V1 to V3, P1) -----------------------------

// V1: false if the chain loops, leaves its table or has a bad indirect table;
// strict: or is too long.
static bool walk(model *m, const model_queue *q, uint32_t head,
                 model_chain *c) {
    uint64_t table = q->desc, entries = q->size, i = head, seen = 0;
    bool inside = false;
    c->ordered = true;
    for (unsigned all = 0;; all++) {
        uint64_t gpa, n, flags, next;
        c->too_long |= c->count == m->seg_max + 2;
        if (i >= entries || seen++ == entries || all > 40000 ||
            (c->too_long && !m->standard) || wraps(table, entries * 16) ||
            !mapped(table + 16 * i, 16)) {
            return false;
        }
        load(m, table + 16 * i, 8, &gpa);
        load(m, table + 16 * i + 8, 4, &n);
        load(m, table + 16 * i + 12, 2, &flags);
        load(m, table + 16 * i + 14, 2, &next);
        if (flags & DESC_INDIRECT) {
            if (inside || flags & DESC_NEXT || n == 0 || n % 16 != 0 ||
                !(m->accepted & VBLK_F_INDIRECT_DESC)) {
                return false;
            }
            inside = true;
            table = gpa;
            entries = n / 16;
            i = seen = 0;
            continue;
        }
        model_piece p = {gpa, n, flags & DESC_WRITE, wraps(gpa, n)};
        if (!c->too_long) {
            c->all[c->count++] = p;
        }
        if (n > 0) {
            c->ordered &= p.write || c->room == 0;
            c->room += p.write ? n : 0;
            c->end = p.write ? p : c->end;
        }
        if (!(flags & DESC_NEXT)) {
            return true;
        }
        i = next;
    }
}

static void add_data(model_chain *c, model_piece p) {
    if (p.n > 0) {
        c->data[c->datas++] = p;
        c->bytes += p.n;
        c->space += p.write ? p.n : 0;
    }
}

static void read_header(model *m, model_chain *c, const uint64_t *address) {
    uint8_t header[16];
    for (unsigned i = 0; i < 16; i++) {
        const uint8_t *p = model_at(m, address[i]);
        if (!p) {
            c->header_readable = false;
            return;
        }
        header[i] = *p;
    }
    for (unsigned i = 0; i < 4; i++) {
        c->type |= (uint32_t)header[i] << 8 * i;
    }
    c->barrier = c->type >> 31;
    c->type &= 0x7fffffff;
    for (unsigned i = 0; i < 8; i++) {
        c->sector |= (uint64_t)header[8 + i] << 8 * i;
    }
}

// Strict: header first, status last. False by V2.
static bool frame_strict(model *m, model_chain *c) {
    const model_piece *first = &c->all[0], *last = &c->all[c->count - 1];
    if (c->count < 2 || !last->write || last->n == 0 || last->wrapped) {
        return false;
    }
    c->status = last->gpa + (last->n - 1);
    c->header_there = !first->write && first->n >= 16;
    c->header_readable = !first->wrapped;
    if (c->header_there && c->header_readable) {
        uint64_t address[16];
        for (unsigned i = 0; i < 16; i++) {
            address[i] = first->gpa + i;
        }
        read_header(m, c, address);
    }
    for (unsigned i = 1; i + 1 < c->count; i++) {
        add_data(c, c->all[i]);
    }
    return true;
}

// Standard: the first 16 readable bytes, the last writable one (P1).
static bool frame_standard(model *m, model_chain *c) {
    unsigned last = c->count;
    for (unsigned i = 0; i < c->count; i++) {
        if (c->all[i].write && c->all[i].n > 0) {
            last = i;
        }
    }
    if (last == c->count || c->all[last].wrapped) {
        return false;
    }
    c->status = c->all[last].gpa + (c->all[last].n - 1);
    c->header_readable = true;
    uint64_t address[16];
    unsigned have = 0;
    for (unsigned i = 0; i < c->count; i++) {
        model_piece p = c->all[i];
        while (!p.write && p.n > 0 && have < 16) {
            c->header_readable &= !p.wrapped;
            address[have++] = p.gpa;
            p.gpa++;
            p.n--;
        }
        if (i == last) {
            p.n--;
        }
        add_data(c, p);
    }
    c->header_there = have == 16;
    if (c->header_there && c->header_readable) {
        read_header(m, c, address);
    }
    return true;
}


// ---- Throttle (T) ----------------------------------------------------------

static const model_wide billion = 1000000000;

static void refill(model_bucket *b, uint64_t now_ns) {
    model_wide full = (model_wide)b->burst * billion;
    model_wide rate = (model_wide)b->rate;
    if (now_ns > b->then_ns && rate > 0) {
        model_wide elapsed = (model_wide)(now_ns - b->then_ns);
        bool       enough = elapsed > (full - b->balance) / rate;
        b->balance = enough ? full : b->balance + elapsed * rate;
    }
    b->then_ns = now_ns > b->then_ns ? now_ns : b->then_ns;
    b->balance = b->balance < full ? b->balance : full;
}

// Nanoseconds until `n` tokens pass; 0: they do.
static uint64_t wait_for(model_bucket *b, uint64_t n, uint64_t now_ns) {
    if (b->rate == 0 || n == 0) {
        return 0;
    }
    refill(b, now_ns);
    // More than it ever holds passes as soon as there is no debt (T3).
    model_wide need = n > b->burst ? 0 : (model_wide)n * billion;
    model_wide rate = (model_wide)b->rate;
    if (b->balance >= need) {
        return 0;
    }
    return (uint64_t)((need - b->balance + rate - 1) / rate);
}

static void pay(model_bucket *b, uint64_t n) {
    if (b->rate > 0) {
        b->balance -= (model_wide)n * billion;
    }
}

// For the request whose turn it is.
static uint64_t wait_of_turn(model *m, uint64_t now_ns) {
    uint64_t a = wait_for(&m->ops, m->turn_ops, now_ns);
    uint64_t b = wait_for(&m->bytes, m->turn_bytes, now_ns);
    return a > b ? a : b;
}

// Whether the request passes, and has paid (T2); if not, nanoseconds until it
// does, or until the queue that stalled first may.
static bool throttle(model *m, const model_queue *q, uint64_t ops,
                     uint64_t bytes, uint64_t now_ns, uint64_t *wait) {
    if (m->ops.rate == 0 && (m->bytes.rate == 0 || bytes == 0)) {
        return true; // costs nothing
    }
    bool mine = !m->turn || m->turn == q;
    m->asked_bytes = bytes;
    m->asked_ops = ops;
    if (mine) {
        m->turn_bytes = bytes;
        m->turn_ops = ops;
    }
    *wait = wait_of_turn(m, now_ns);
    if (!mine || *wait > 0) {
        m->again = m->turn ? m->again : 0;
        m->turn = mine ? q : m->turn;
        return false;
    }
    pay(&m->ops, ops);
    pay(&m->bytes, bytes);
    return true;
}

static void set_limit(model_bucket *b, uint64_t rate, uint64_t burst,
                      uint64_t now_ns) {
    bool unlimited = b->rate == 0;
    refill(b, now_ns);
    b->rate = rate;
    b->burst = burst ? burst : rate;
    b->then_ns = now_ns;
    if (unlimited || b->balance > (model_wide)b->burst * billion) {
        b->balance = (model_wide)b->burst * billion;
    }
}

static void stall_ends(model *m, model_queue *q, uint64_t now_ns) { // T5
    end_turn(m, q);
    if (q->stalled) {
        q->stalled = false;
        m->counts.currently_throttled--;
        m->counts.throttled_ns += now_ns - q->stalled_ns;
    }
}

void model_set_limits(model *m, const vblk_limits *l, uint64_t now_ns) {
    set_limit(&m->ops, l->iops, l->iops_burst, now_ns);
    set_limit(&m->bytes, l->bps, l->bps_burst, now_ns);
    if (l->iops == 0 && l->bps == 0) { // nobody waits any more
        m->turn = NULL;
        for (unsigned i = 0; i < m->queues; i++) {
            stall_ends(m, &m->queue[i], now_ns);
        }
    }
    m->again = 0;
    model_notify(m, VBLK_ALL_QUEUES);
}


// ---- Execution (V4 to V16, X) ----------------------------------------------

enum { STALLS = 0x100, DISK }; // no status byte

static bool out_of_range(const model *m, const model_chain *c) { // V13
    uint64_t disk = m->capacity * 512;
    if (c->sector > UINT64_MAX / 512) {
        return true;
    }
    uint64_t offset = c->sector * 512;
    return offset > disk || c->bytes > disk - offset;
}

bool model_has_ranges(uint32_t type) {
    return type == VBLK_T_DISCARD || type == VBLK_T_WRITE_ZEROES ||
           type == VBLK_T_SECURE_ERASE;
}

// What a request moves: all of its data, but no more than an answer has.
static uint64_t moved(const model_chain *c) {
    uint64_t most = c->type == VBLK_T_GET_ID         ? VBLK_ID_BYTES
                    : c->type == VBLK_T_GET_LIFETIME ? 6
                                                     : UINT64_MAX;
    return c->bytes < most ? c->bytes : most;
}

static bool data_mapped(const model_chain *c) { // X5
    uint64_t left = moved(c);
    for (unsigned i = 0; i < c->datas && left > 0; i++) {
        uint64_t n = c->data[i].n < left ? c->data[i].n : left;
        if (wraps(c->data[i].gpa, n) || !mapped(c->data[i].gpa, n)) {
            return false;
        }
        left -= n;
    }
    return true;
}

// V19: whole blocks.
static bool ragged(const model *m, uint64_t sector, uint64_t sectors) {
    uint64_t block = m->backend.block_size / 512;
    return sector % block != 0 || sectors % block != 0;
}

// V20, V21: the status that the first bad one ends in.
static uint8_t read_ranges(model *m, model_chain *c) {
    static uint8_t all[16 * VBLK_TEST_RANGES];
    uint64_t done = 0;
    if (c->bytes == 0 || c->bytes % 16 != 0 ||
        c->bytes / 16 > m->range_max || !data_mapped(c)) {
        return VBLK_S_IOERR;
    }
    for (unsigned i = 0; i < c->datas; i++) {
        for (uint64_t k = 0; k < c->data[i].n; k++) {
            all[done++] = *model_at(m, c->data[i].gpa + k);
        }
    }
    for (const uint8_t *p = all; p < all + done; p += 16) {
        model_range r = {0, 0, 0};
        for (unsigned i = 0; i < 8; i++) {
            r.sector |= (uint64_t)p[i] << 8 * i;
        }
        for (unsigned i = 0; i < 4; i++) {
            r.sectors |= (uint64_t)p[8 + i] << 8 * i;
            r.flags |= (uint64_t)p[12 + i] << 8 * i;
        }
        if (r.flags > (c->type == VBLK_T_WRITE_ZEROES)) {
            return VBLK_S_UNSUPP;
        }
        if (r.sectors > m->range_sectors || r.sector > m->capacity ||
            r.sectors > m->capacity - r.sector ||
            ragged(m, r.sector, r.sectors)) {
            return VBLK_S_IOERR;
        }
        if (r.sectors > 0) {
            c->range[c->ranges++] = r;
        }
    }
    return VBLK_S_OK;
}

static bool offers(const model *m, uint32_t type) {
    switch (type) {
    case VBLK_T_IN: case VBLK_T_OUT: case VBLK_T_GET_ID: return true;
    case VBLK_T_FLUSH:        return m->offered & VBLK_F_FLUSH;
    case VBLK_T_GET_LIFETIME: return m->offered & VBLK_F_LIFETIME;
    case VBLK_T_DISCARD:      return m->offered & VBLK_F_DISCARD;
    case VBLK_T_WRITE_ZEROES: return m->offered & VBLK_F_WRITE_ZEROES;
    case VBLK_T_SECURE_ERASE: return m->offered & VBLK_F_SECURE_ERASE;
    default:                  return false;
    }
}

// The status byte that validation ends in, or OK.
static uint8_t validate(model *m, model_chain *c) {
    bool in = c->type == VBLK_T_IN, out = c->type == VBLK_T_OUT;
    bool flush = c->type == VBLK_T_FLUSH, id = c->type == VBLK_T_GET_ID;
    bool ranges = model_has_ranges(c->type);
    bool lifetime = c->type == VBLK_T_GET_LIFETIME;
    if (!c->header_there || !c->header_readable) {
        return VBLK_S_IOERR; // V3, V4
    }
    if (c->barrier && !m->standard) { // P9
        return VBLK_S_UNSUPP;
    }
    if (!offers(m, c->type)) {
        return VBLK_S_UNSUPP; // V11, V10
    }
    if (flush) {
        return c->datas > 0 && !m->standard ? VBLK_S_IOERR : VBLK_S_OK; // V7
    }
    for (unsigned i = 0; i < c->datas; i++) {
        uint64_t who = m->standard ? m->accepted : m->offered; // P3
        bool binds = who & VBLK_F_SIZE_MAX;
        if (binds && c->data[i].n > m->size_max) {
            return VBLK_S_IOERR; // V5
        }
        if (c->data[i].write == (out || ranges)) {
            return VBLK_S_IOERR; // V12
        }
    }
    if (c->datas == 0 && !m->standard) {
        return VBLK_S_IOERR; // V6
    }
    if (!m->standard && ((id && c->data[0].n < VBLK_ID_BYTES) ||
                         (lifetime && c->data[0].n < 6))) {
        return VBLK_S_IOERR; // V16
    }
    if (ranges) {
        return read_ranges(m, c);
    }
    if ((in || out) && c->bytes % VBLK_SECTOR != 0) {
        return VBLK_S_IOERR; // V8
    }
    if (out && m->read_only) {
        return VBLK_S_IOERR; // V9
    }
    if ((in || out) && (out_of_range(m, c) ||
                        ragged(m, c->sector, c->bytes / 512))) {
        return VBLK_S_IOERR; // V13, V19
    }
    return data_mapped(c) ? VBLK_S_OK : VBLK_S_IOERR;
}

static uint8_t read_data(model *m, const model_chain *c) { // X2, X3
    uint64_t start = c->sector * 512, at = start;
    uint64_t end = start + c->bytes < m->disk.backing ? start + c->bytes
                                                      : m->disk.backing;
    bool fails = m->disk.bad >= start && m->disk.bad < end;
    if (fails) {
        end = m->disk.bad;
    }
    for (unsigned i = 0; i < c->datas; i++) {
        for (uint64_t k = 0; k < c->data[i].n; k++, at++) {
            uint64_t gpa = c->data[i].gpa + k;
            if (at < end) {
                model_note(&m->effects, 'r', at, 1);
            }
            if (!fails) {
                *model_at(m, gpa) = at < end ? m->disk.data[at] : 0;
            } else if (at < end) { // it may have got there, or not
                leave_open(m, gpa, MODEL_EITHER, m->disk.data[at]);
            }
        }
    }
    if (fails) {
        return VBLK_S_IOERR;
    }
    m->counts.reads++;
    m->counts.bytes_read += end > start ? end - start : 0;
    return VBLK_S_OK;
}

static uint8_t flush_disk(model *m) {
    model_note(&m->effects, 'f', 0, 0);
    return m->disk.bad_flush ? VBLK_S_IOERR : VBLK_S_OK;
}

static void reaches(model *m, uint64_t end) {
    m->reach = m->reach > end ? m->reach : end;
}

static uint8_t write_data(model *m, const model_chain *c) { // X3, X4
    uint64_t at = c->sector * 512;
    for (unsigned i = 0; i < c->datas; i++) {
        for (uint64_t k = 0; k < c->data[i].n; k++, at++) {
            if (at >= m->disk.backing || at == m->disk.bad ||
                at == m->disk.stuck) {
                return VBLK_S_IOERR;
            }
            m->disk.data[at] = *model_at(m, c->data[i].gpa + k);
            model_note(&m->effects, 'w', at, 1);
        }
    }
    bool declined = m->write_through;
    if (declined && flush_disk(m) != VBLK_S_OK) {
        return VBLK_S_IOERR;
    }
    m->counts.writes++;
    m->counts.bytes_written += c->bytes;
    reaches(m, c->sector * 512 + c->bytes);
    return VBLK_S_OK;
}

static void write_answer(model *m, const model_chain *c) {
    uint8_t  answer[VBLK_ID_BYTES];
    uint64_t done = 0;
    memcpy(answer, m->id, sizeof answer);
    for (unsigned i = 0; c->type == VBLK_T_GET_LIFETIME && i < 3; i++) {
        uint16_t most = i == 0 ? 3 : 11, n = m->backend.lifetime[i];
        lay(answer, 2 * i, 2, n > most ? 0 : n);
    }
    for (unsigned i = 0; i < c->datas; i++) {
        for (uint64_t k = 0; k < c->data[i].n && done < moved(c); k++) {
            *model_at(m, c->data[i].gpa + k) = answer[done++];
        }
    }
}

bool model_clear(model_disk *disk, char what, uint64_t offset,
                 uint64_t bytes) {
    if (disk->bad >= offset && disk->bad - offset < bytes) {
        return false;
    }
    for (uint64_t at = offset; at - offset < bytes && at < disk->backing;
         at++) { // a discard leaves something
        disk->data[at] = what == 'd' ? (uint8_t)(disk->data[at] * 5 + 1) : 0;
    }
    return true;
}

static bool clear_all(model *m, const model_chain *c, bool note) {
    for (unsigned i = 0; i < c->ranges; i++) {
        const model_range *r = &c->range[i];
        char what = c->type == VBLK_T_DISCARD        ? 'd'
                    : c->type == VBLK_T_SECURE_ERASE ? 'e'
                    : r->flags                       ? 'u'
                                                     : 'z';
        if (note) {
            model_note(&m->effects, what, r->sector * 512, r->sectors * 512);
        }
        if (!model_clear(&m->disk, what, r->sector * 512, r->sectors * 512)) {
            return false;
        }
    }
    return true;
}

static void count_ranges(model *m, const model_chain *c) {
    m->counts.discards += c->type == VBLK_T_DISCARD;
    m->counts.write_zeroes += c->type == VBLK_T_WRITE_ZEROES;
    m->counts.secure_erases += c->type == VBLK_T_SECURE_ERASE;
}

// What a valid chain asks for, if it needs no disk: its status byte; or STALLS
// with `wait`, or DISK.
static uint32_t answer(model *m, const model_queue *q, const model_chain *c,
                       uint64_t now_ns, uint64_t *wait) {
    if (c->type == VBLK_T_FLUSH && m->read_only) { // V10
        m->counts.flushes++;
        return VBLK_S_OK;
    }
    if (model_has_ranges(c->type) && c->ranges == 0) {
        count_ranges(m, c);
        return VBLK_S_OK;
    }
    if (c->type != VBLK_T_FLUSH && c->bytes == 0) { // P4
        m->counts.reads += c->type == VBLK_T_IN;
        m->counts.writes += c->type == VBLK_T_OUT;
        return VBLK_S_OK;
    }
    uint64_t ops = 1, bytes = c->type == VBLK_T_FLUSH ? 0 : moved(c);
    if (model_has_ranges(c->type)) {
        ops = c->ranges;
        bytes = 0;
        for (unsigned i = 0; i < c->ranges; i++) {
            bool pays = c->type == VBLK_T_WRITE_ZEROES;
            bytes += pays ? c->range[i].sectors * 512 : 0;
        }
    }
    if (!throttle(m, q, ops, bytes, now_ns, wait)) {
        return STALLS;
    }
    if (c->type == VBLK_T_GET_ID || c->type == VBLK_T_GET_LIFETIME) {
        write_answer(m, c);
        return VBLK_S_OK;
    }
    return DISK;
}

static uint8_t execute(model *m, const model_chain *c) {
    if (c->type == VBLK_T_IN) {
        return read_data(m, c);
    }
    if (c->type == VBLK_T_OUT) {
        return write_data(m, c);
    }
    bool ranges = model_has_ranges(c->type);
    if (ranges && !clear_all(m, c, true)) {
        return VBLK_S_IOERR;
    }
    if ((!ranges || m->write_through) && flush_disk(m) != VBLK_S_OK) {
        return VBLK_S_IOERR;
    }
    if (ranges) {
        count_ranges(m, c);
    }
    m->counts.flushes += !ranges;
    return VBLK_S_OK;
}

static uint64_t used_length(const model *m, const model_chain *c,
                            uint8_t status) {
    bool     ok = status == VBLK_S_OK;
    uint64_t written = 0; // from the start of the writable area
    if (ok && c->type == VBLK_T_IN) {
        written = c->bytes;
    } else if (ok && (c->type == VBLK_T_GET_ID ||
                      c->type == VBLK_T_GET_LIFETIME)) {
        written = moved(c);
    }
    if (!m->standard) {
        return written + 1; // Q9
    }
    return written == c->space ? written + 1 : written; // P6
}


// ---- One chain, and the host's part in it (Q) -------------------------------

enum { DROPPED, RETURNED, WAITS, HANDED };

// One chain: dropped, or returned with `len` bytes, or to be looked at again,
// or for the host.
static int serve(model *m, model_queue *q, uint32_t head, uint64_t now_ns,
                 uint64_t *len, uint64_t *wait, model_chain *c) {
    memset(c, 0, sizeof *c);
    *len = 0;
    bool ends = walk(m, q, head, c);
    if (m->standard && ends && (c->too_long || !c->ordered) && c->room > 0 &&
        !c->end.wrapped) { // P5
        m->counts.io_errors++;
        if (!store(m, c->end.gpa + (c->end.n - 1), 1, VBLK_S_IOERR)) {
            return DROPPED;
        }
        *len = c->room == 1; // P6
        return RETURNED;
    }
    bool fine = ends && !c->too_long && (c->ordered || !m->standard) &&
                (m->standard ? frame_standard(m, c) : frame_strict(m, c));
    if (!fine) { // V1, V2, P5
        m->counts.io_errors++;
        return m->standard ? RETURNED : DROPPED;
    }
    if (!mapped(c->status, 1)) { // V17
        m->counts.io_errors++;
        return DROPPED;
    }
    uint32_t status = validate(m, c);
    if (status == VBLK_S_OK) {
        status = answer(m, q, c, now_ns, wait);
    }
    if (status == STALLS || status == DISK) {
        return status == STALLS ? WAITS : HANDED;
    }
    m->counts.io_errors += status == VBLK_S_IOERR;
    store(m, c->status, 1, status);
    *len = used_length(m, c, (uint8_t)status);
    return RETURNED;
}

static bool well_placed(const model_queue *q) {
    return q->size > 0 && q->desc % 16 == 0 && q->avail % 2 == 0 &&
           q->used % 4 == 0 && !wraps(q->desc, 16 * (uint64_t)q->size) &&
           !wraps(q->avail, 6 + 2 * (uint64_t)q->size) &&
           !wraps(q->used, 6 + 8 * (uint64_t)q->size);
}

static bool wants_interrupt(model *m, const model_queue *q, uint16_t before) {
    uint64_t word;
    if (m->accepted & VBLK_F_EVENT_IDX) {
        if (!load(m, q->avail + 4 + 2 * (uint64_t)q->size, 2, &word)) {
            return true;
        }
        for (uint16_t idx = before; idx != q->done; idx++) {
            if (idx == word) {
                return true;
            }
        }
        return false;
    }
    return !load(m, q->avail, 2, &word) || !(word & 1);
}

// Tell the driver to notify. False if the used ring cannot be written (Q3).
static bool switch_on(model *m, const model_queue *q) {
    if (m->accepted & VBLK_F_EVENT_IDX) {
        return store(m, q->used, 2, 0) &&
               store(m, q->used + 4 + 8 * (uint64_t)q->size, 2, q->next);
    }
    return store(m, q->used, 2, 0);
}

// The queue is left in the middle: the switch may be either way.
static void leave_switch_open(model *m, const model_queue *q) {
    uint64_t event = q->used + 4 + 8 * (uint64_t)q->size;
    uint64_t flags;
    if (!well_placed(q) || !load(m, q->used, 2, &flags) ||
        m->loose[model_at(m, q->used) - m->memory]) {
        return;
    }
    store(m, q->used, 2, 0);
    if (m->accepted & VBLK_F_EVENT_IDX) {
        leave_open(m, q->used, MODEL_EITHER, (uint8_t)flags);
        leave_open(m, event, MODEL_ANY, 0);
        leave_open(m, event + 1, MODEL_ANY, 0);
    } else {
        leave_open(m, q->used, MODEL_EITHER, 1);
    }
}

// A used element; false: the queue breaks.
static bool give_back(model *m, model_queue *q, uint32_t head, uint64_t len) {
    uint64_t element = q->used + 4 + 8 * (uint64_t)(q->done % q->size);
    if (!mapped(element, 8)) {
        return false;
    }
    store(m, element, 4, head);
    store(m, element + 4, 4, len);
    q->done++;
    return true;
}

// The queue breaks, and its stall ends with no time to count.
static void breaks(model *m, model_queue *q) {
    if (q->stalled) {
        q->stalled = false;
        m->counts.currently_throttled--;
        end_turn(m, q);
    }
    poison(m, q);
    leave_switch_open(m, q);
}

static bool may_drain(const model *m, const model_queue *q) {
    return m->status & VBLK_STATUS_DRIVER_OK && q->ready && m->memory_given &&
           (uint32_t)(q - m->queue) < queues_there_are(m);
}

static void show(model *m, model_queue *q) {
    if (q->done != q->shown) {
        if (!store(m, q->used + 2, 2, q->done) && !q->poisoned) {
            poison(m, q);
        }
        q->shown = q->done;
    }
}

static void decide(model *m, model_queue *q) { // Q7, P7
    if (q->shown != q->decided) {
        bool fire = q->switch_failed || wants_interrupt(m, q, q->decided);
        q->decided = q->shown;
        if (fire || !m->standard) {
            interrupt(m, VBLK_INTERRUPT_USED, fire);
        }
    }
}

// The next request for the disk, past `budget` chains that need none. REQUEST,
// or what a drain comes to.
static came_to pull(model *m, model_queue *q, uint64_t now_ns,
                    uint32_t *budget, model_request *r) {
    for (;;) {
        uint64_t head, len, idx, wait = 0;
        bool     was_stalled = q->stalled;
        if (q->poisoned) {
            return BROKEN;
        }
        if (q->next == q->seen) { // all that was there is taken: look again
            if (!load(m, q->avail + 2, 2, &idx) ||
                (uint16_t)(idx - q->next) > q->size) {
                breaks(m, q);
                return BROKEN;
            }
            if (q->next == idx) {
                return EMPTY;
            }
            q->seen = (uint16_t)idx;
        }
        if (*budget == 0) { // Q11
            return MORE;
        }
        --*budget;
        uint64_t slot = q->next % q->size;
        if (q->under_way >= q->size ||
            !load(m, q->avail + 4 + 2 * slot, 2, &head) || head >= q->size) {
            breaks(m, q);
            return BROKEN;
        }
        leave_switch_open(m, q); // off, until the host waits
        int end = serve(m, q, (uint32_t)head, now_ns, &len, &wait, &r->c);
        if (end == WAITS) {
            if (!q->stalled) {
                m->counts.throttled++;
                m->counts.currently_throttled++;
                q->stalled = true;
                q->stalled_ns = now_ns;
            }
            q->stalled_bytes = m->asked_bytes;
            q->stalled_ops = m->asked_ops;
            return STALLED;
        }
        m->requests++;
        q->next++;
        stall_ends(m, q, now_ns);
        if (end == RETURNED && !give_back(m, q, (uint32_t)head, len)) {
            m->time_unknown |= was_stalled; // it passed, and it broke
            breaks(m, q);
            return BROKEN;
        }
        if (end == HANDED) {
            r->head = (uint32_t)head;
            r->queue = (unsigned)(q - m->queue);
            r->session = q->session;
            r->reach = m->reach;
            q->under_way++;
            return REQUEST;
        }
    }
}

// Its status and its place in the used ring.
static void finish(model *m, const model_request *r, uint8_t status) {
    model_queue *q = &m->queue[r->queue];
    q->under_way--;
    m->counts.io_errors += status == VBLK_S_IOERR;
    store(m, r->c.status, 1, status);
    if (!give_back(m, q, r->head, used_length(m, &r->c, status))) {
        breaks(m, q);
    }
}

// Ready to be drained, or, where no ring can be, broken.
static bool ready(model *m, model_queue *q) {
    if (!may_drain(m, q)) {
        return false;
    }
    if (!q->poisoned && !well_placed(q)) {
        breaks(m, q);
    }
    if (!q->poisoned && q->adopt) { // a position that could not be read yet
        uint64_t idx = 0;
        q->adopt = !load(m, q->used + 2, 2, &idx);
        q->done = q->shown = q->decided = (uint16_t)idx;
        if (q->adopt) {
            breaks(m, q);
        }
    }
    if (q->poisoned) {
        show(m, q);
        decide(m, q);
    }
    return !q->poisoned;
}

// The end of a round: completions out, notifications on, and one more look.
static came_to arm(model *m, model_queue *q) {
    came_to  out = q->stalled ? STALLED : EMPTY;
    uint64_t idx;
    if (!q->poisoned) {
        show(m, q);
    }
    if (!q->poisoned) {
        q->switch_failed = !switch_on(m, q);
    }
    if (!q->poisoned && !q->switch_failed && !q->stalled) {
        if (q->next != q->seen) {
            out = MORE;
        } else if (!load(m, q->avail + 2, 2, &idx) ||
                   (uint16_t)(idx - q->next) > q->size) {
            breaks(m, q);
        } else if (q->next != idx) {
            q->seen = (uint16_t)idx;
            out = MORE;
        }
    }
    show(m, q);
    decide(m, q);
    return q->poisoned ? BROKEN : out;
}

// Another's turn is looked for once in a while.
static uint64_t wait_of(model *m, const model_queue *q, uint64_t now_ns) {
    uint64_t wait = wait_of_turn(m, now_ns);
    return m->turn == q || wait > 1000000 ? wait : 1000000;
}

static outcome drain_one(model *m, model_queue *q, uint64_t now_ns) {
    outcome out = {EMPTY, 0};
    static model_request r;
    uint32_t budget = q->size;
    if (!ready(m, q)) {
        out.state = q->poisoned ? BROKEN : EMPTY;
        return out;
    }
    do {
        while (pull(m, q, now_ns, &budget, &r) == REQUEST) {
            uint8_t status = execute(m, &r.c);
            if (r.session == q->session) {
                finish(m, &r, status);
            }
        }
        out.state = arm(m, q);
    } while (out.state == MORE && budget > 0);
    if (out.state != EMPTY) {
        leave_switch_open(m, q);
    }
    out.wait_ns = out.state == STALLED ? wait_of(m, q, now_ns) : 0;
    return out;
}

outcome model_drain(model *m, unsigned queue, uint64_t now_ns) {
    return drain_one(m, &m->queue[queue], now_ns);
}

bool model_next(model *m, unsigned queue, uint64_t now_ns, model_request *r) {
    model_queue *q = &m->queue[queue];
    uint32_t     budget = q->size;
    return ready(m, q) &&
           pull(m, q, now_ns, &budget, r) == REQUEST;
}

// The first `n` bytes of the data, from the disk or to it.
static void move_data(model *m, const model_chain *c, uint64_t n) {
    uint64_t at = c->sector * 512, done = 0;
    for (unsigned i = 0; i < c->datas; i++) {
        for (uint64_t k = 0; k < c->data[i].n && done < n; k++, done++) {
            uint8_t *p = model_at(m, c->data[i].gpa + k);
            if (c->type == VBLK_T_IN) {
                *p = m->disk.data[at + done];
            } else {
                m->disk.data[at + done] = *p;
            }
        }
    }
}

int model_complete(model *m, const model_request *r, int64_t result) {
    const model_chain *c = &r->c;
    model_queue *q = &m->queue[r->queue];
    if (r->session != q->session) {
        bool broke = q->poisoned && r->session + 1 == q->session;
        q->under_way -= broke && q->under_way > 0;
        return VBLK_ERR_STALE;
    }
    uint64_t n = result < 0 ? 0 : (uint64_t)result, end = c->sector * 512 + n;
    bool     flush = c->type == VBLK_T_FLUSH, in = c->type == VBLK_T_IN;
    bool     ok = result >= 0, ranges = model_has_ranges(c->type);
    if (ranges && ok) {
        clear_all(m, c, false);
        count_ranges(m, c);
    }
    if (!flush && !ranges) {
        move_data(m, c, n);
        ok = ok && (n == c->bytes || (in && end >= r->reach)); // X2, X3
    }
    if (ok && in) { // what is beyond the end reads as zeroes
        uint64_t done = 0;
        for (unsigned i = 0; i < c->datas; i++) {
            for (uint64_t k = 0; k < c->data[i].n; k++, done++) {
                if (done >= n) {
                    *model_at(m, c->data[i].gpa + k) = 0;
                }
            }
        }
    }
    m->counts.reads += ok && in;
    m->counts.bytes_read += ok && in ? n : 0;
    m->counts.flushes += ok && flush;
    if (ok && c->type == VBLK_T_OUT) {
        m->counts.writes++;
        m->counts.bytes_written += n;
        reaches(m, end);
    }
    finish(m, r, ok ? VBLK_S_OK : VBLK_S_IOERR);
    return VBLK_OK;
}

void model_publish(model *m, unsigned queue) {
    show(m, &m->queue[queue]);
    decide(m, &m->queue[queue]);
}

uint64_t model_arm(model *m, unsigned queue, uint64_t now_ns) {
    model_queue *q = &m->queue[queue];
    if (!ready(m, q)) {
        return VBLK_NEVER;
    }
    came_to out = arm(m, q);
    if (out != EMPTY) {
        leave_switch_open(m, q);
    }
    if (out == STALLED) {
        uint64_t wait = wait_of(m, q, now_ns);
        return wait < VBLK_NEVER - now_ns ? now_ns + wait : VBLK_NEVER - 1;
    }
    return out == MORE ? now_ns : VBLK_NEVER;
}

int model_stop(model *m, unsigned queue) {
    model_queue *q = &m->queue[queue];
    int          position = q->next;
    model_publish(m, queue);
    forget(m, q);
    return position;
}

int model_start(model *m, unsigned queue, const vblk_ring *ring) {
    uint64_t     idx;
    model_queue *q = &m->queue[queue];
    if (queue >= queues_there_are(m) || q->ready || ring->size == 0 ||
        !(m->status & VBLK_STATUS_FEATURES_OK) ||
        ring->size > m->queue_size || ring->size & (ring->size - 1)) {
        return VBLK_ERR_RING;
    }
    q->size = ring->size;
    q->desc = ring->desc;
    q->avail = ring->avail;
    q->used = ring->used;
    q->ready = true;
    q->next = q->seen = ring->position;
    q->done = 0;
    q->adopt = ring->used % 4 || !load(m, ring->used + 2, 2, &idx);
    if (!q->adopt) {
        q->done = (uint16_t)idx;
    }
    q->shown = q->decided = q->done;
    model_notify(m, (int)queue);
    return VBLK_OK;
}

void model_notify(model *m, int queue) {
    for (int i = 0; i < (int)m->queues; i++) {
        m->queue[i].due |= queue == i || queue == VBLK_ALL_QUEUES;
    }
}

// The queue that stalled first goes first; the rest by their numbers, from
// there on.
uint64_t model_poll(model *m, uint64_t now_ns) {
    bool     timed = now_ns >= m->again, more = false, due = false;
    unsigned first = m->turn ? (unsigned)(m->turn - m->queue) : 0;
    for (unsigned i = 0; i < m->queues; i++) {
        due |= m->queue[i].due;
    }
    if (!due && !timed) {
        return m->again;
    }
    for (unsigned i = 0; i < m->queues; i++) {
        model_queue *q = &m->queue[(first + i) % m->queues];
        bool         look = q->stalled ? timed : q->due;
        q->due = false;
        if (look && drain_one(m, q, now_ns).state == MORE) {
            q->due = more = true;
        }
    }
    m->again = VBLK_NEVER;
    if (m->turn && m->status & VBLK_STATUS_DRIVER_OK && m->memory_given) {
        uint64_t wait = wait_of_turn(m, now_ns);
        m->again = wait < VBLK_NEVER - now_ns ? now_ns + wait : VBLK_NEVER - 1;
    }
    return more ? now_ns : m->again;
}
