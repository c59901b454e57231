// Small spaces, all of them: status sequences, descriptor shapes, config
// reads, the EVENT_IDX formula.
#include "guest.h"

bool test_crosses(uint16_t event, uint16_t now, uint16_t old);


// ---- Status ---------------------------------------------------------------

static uint64_t sequences;

static void walk_status(uint32_t state, int depth) {
    static const uint8_t values[] = {0x00, 0x01, 0x03, 0x0b, 0x0f, 0x02,
                                     0x0a, 0x0e, 0x80, 0x83, 0x8f, 0x40,
                                     0x07};
    vblk_dev before = g.dev;
    for (size_t v = 0; v < COUNT(values); v++) {
        uint32_t want = guest_status_after(g.o.profile == VBLK_STANDARD, state,
                                           values[v]);
        wr(VBLK_REG_STATUS, values[v]);
        wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
        wr(VBLK_REG_DRIVER_FEATURES, 1);
        uint32_t got = rd(VBLK_REG_STATUS);
        sequences++;
        if (got != want) {
            ROW_BEGIN();
            CHECK_EQ(want, got);
            ROW("%#x written over %#x", values[v], state);
        }
        if (depth > 1 && !test_failed) {
            walk_status(got, depth - 1);
        }
        g.dev = before;
    }
}

void all_status_sequences(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.event = NULL;
        g.o.profile = (vblk_profile)profile;
        g.o.queues = 1;
        guest_make();
        sequences = 0;
        walk_status(0, guest_use_map ? 5 : 4);
        CHECK(sequences > 30000);
    }
}

// The sixth write, from every state that five can reach.
void all_status_writes_from_every_state(void) {
    static const uint8_t states[] = {0x02, 0x0a, 0x0e, 0x82, 0x8a, 0x8e,
                                     0x01, 0x03, 0x0b, 0x0f, 0x80, 0x81,
                                     0x83, 0x8b, 0x8f};
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.event = NULL;
        g.o.profile = (vblk_profile)profile;
        size_t skip = profile == VBLK_STRICT ? 6 : 0; // no ACKNOWLEDGE
        for (size_t i = skip; i < COUNT(states); i++) {
            guest_make();
            uint32_t first = states[i] & 1;
            uint32_t steps[] = {first, first | 2, first | 0xa, first | 0xe,
                                states[i]};
            for (size_t k = 0; k < COUNT(steps); k++) {
                if (steps[k] && !(steps[k] & ~(uint32_t)states[i])) {
                    wr(VBLK_REG_STATUS, steps[k]);
                    wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
                    wr(VBLK_REG_DRIVER_FEATURES, 1);
                }
            }
            CHECK_EQ(states[i], rd(VBLK_REG_STATUS));
            walk_status(states[i], 1);
        }
    }
}


// ---- Descriptor shapes ----------------------------------------------------

// What the rules say of a chain: returned or not, used length, status byte.
typedef struct verdict {
    bool     returned, error;
    uint32_t len;
    int      status; // -1: none written
} verdict;

typedef struct shape {
    bool     write;
    uint32_t n;
} shape;

static verdict say(bool returned, bool error, uint32_t len, int status) {
    verdict v = {returned, error, len, status};
    return v;
}

static verdict judge_by_type(uint32_t type, bool strict, uint64_t out,
                             uint64_t in, uint32_t first) {
    uint32_t bad = !strict && in > 0 ? 0 : 1; // P6
    verdict error = say(true, true, bad, VBLK_S_IOERR);
    if (type > VBLK_T_OUT && type != VBLK_T_FLUSH && type != VBLK_T_GET_ID) {
        return say(true, false, bad, VBLK_S_UNSUPP);
    }
    if (type == VBLK_T_FLUSH) {
        return strict && in + out > 0 ? error
                                      : say(true, false, bad, VBLK_S_OK);
    }
    if (type == VBLK_T_OUT ? in > 0 : out > 0) {
        return error;
    }
    if (strict && in + out == 0) {
        return error;
    }
    if (type == VBLK_T_GET_ID) {
        if (strict) {
            return first < 20 ? error : say(true, false, 21, VBLK_S_OK);
        }
        uint32_t n = in < 20 ? (uint32_t)in : 20;
        return say(true, false, n + (n == in), VBLK_S_OK);
    }
    if ((in + out) % 512) {
        return error;
    }
    return say(true, false, type == VBLK_T_IN ? (uint32_t)in + 1 : 1,
               VBLK_S_OK);
}

static verdict judge(const shape *s, unsigned n, uint32_t type, bool strict) {
    uint64_t out = 0, in = 0;
    uint32_t first = 0; // bytes of the first data that is not empty
    bool mixed = false;
    for (unsigned i = 0; i < n; i++) {
        mixed |= !s[i].write && s[i].n && in > 0;
        *(s[i].write ? &in : &out) += s[i].n;
    }
    if (strict) {
        const shape *last = &s[n - 1];
        if (n == 1 || !last->write || last->n == 0) {
            return say(false, true, 0, -1);
        }
        if (s[0].write || s[0].n < 16) {
            return say(true, true, 1, VBLK_S_IOERR);
        }
        for (unsigned i = 1; i + 1 < n && first == 0; i++) {
            first = s[i].n;
        }
        return judge_by_type(type, strict, out - s[0].n, in - last->n, first);
    }
    if (in == 0) {
        return say(true, true, 0, -1);
    }
    if (mixed || out < 16) { // P5, V3
        return say(true, true, in > 1 ? 0 : 1, VBLK_S_IOERR);
    }
    return judge_by_type(type, strict, out - 16, in - 1, first);
}

// Chain of `n` shapes at fixed addresses: direct, in a table, or half of each.
static void try_shape(const shape *s, unsigned n, uint32_t type, int link) {
    static const uint32_t base = 0x40000;
    guest_queue *q = &g.queue[0];
    uint64_t table = 0x3f000;
    uint8_t header[16] = {(uint8_t)type};
    unsigned written = 0, direct = link == 0 ? n : link == 1 ? 0 : n / 2;
    uint64_t status = 0;
    for (unsigned i = 0; i < n; i++) {
        uint64_t gpa = base + 1024 * i;
        bool in_table = i >= direct;
        unsigned k = in_table ? i - direct : i;
        uint8_t d[16] = {0};
        for (unsigned b = 0; b < 8; b++) {
            d[b] = (uint8_t)(gpa >> 8 * b);
        }
        d[8] = (uint8_t)s[i].n;
        d[9] = (uint8_t)(s[i].n >> 8);
        d[12] = (uint8_t)((s[i].write ? WRITE : 0) | (i + 1 < n ? NEXT : 0));
        d[14] = (uint8_t)(k + 1);
        memcpy(at((in_table ? table : q->desc) + 16 * k), d, 16);
        if (s[i].write && s[i].n) {
            status = gpa + s[i].n - 1;
        } else if (!s[i].write && written < 16) {
            uint32_t some = s[i].n < 16 - written ? s[i].n : 16 - written;
            memcpy(at(gpa), header + written, some);
            written += some;
        }
    }
    if (direct < n) {
        put_desc(q->desc, direct,
                 (part){table, 16 * (n - direct), INDIRECT}, 0);
    }
    if (status) {
        *at(status) = 0xee;
    }
    uint64_t errors = counts().io_errors;
    verdict want = judge(s, n, type, g.o.profile == VBLK_STRICT);
    offer(0, 0);
    kick(0);
    uint32_t len = used_len(0);
    int got = status && *at(status) != 0xee ? *at(status) : -1;
    if (want.returned != (len != UINT32_MAX) ||
        (want.returned && len != want.len) || got != want.status ||
        counts().io_errors - errors != want.error) {
        ROW_BEGIN();
        CHECK_EQ(want.returned ? want.len : UINT32_MAX, len);
        CHECK_EQ((uint64_t)want.status, (uint64_t)got);
        CHECK_EQ(want.error, counts().io_errors - errors);
        for (unsigned i = 0; i < n; i++) {
            printf("    %c%u\n", s[i].write ? 'W' : 'R', s[i].n);
        }
        ROW("type %u, link %d", type, link);
    }
}

void all_descriptor_shapes(void) {
    static const uint32_t lengths[] = {0, 1, 16, 512};
    static const uint32_t types[] = {VBLK_T_IN, VBLK_T_OUT, VBLK_T_FLUSH,
                                     VBLK_T_GET_ID, 3};
    uint64_t tried = 0;
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.event = NULL;
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (unsigned n = 1; n <= 4; n++) {
            for (uint32_t code = 0; code < 1u << 3 * n; code++) {
                shape s[4];
                for (unsigned i = 0; i < n; i++) {
                    s[i].write = code >> 3 * i & 4;
                    s[i].n = lengths[code >> 3 * i & 3];
                }
                for (size_t t = 0; t < COUNT(types); t++) {
                    try_shape(s, n, types[t], (int)((code + t) % 3));
                    tried++;
                }
                if (test_failed) {
                    return;
                }
            }
        }
        memset(g.mark, RING, SEAM); // the shapes wrote past the bookkeeping
        memset(g.writes, 0, SEAM);
        g.read_offered = false;
    }
    CHECK_EQ(2 * 5 * (8 + 64 + 512 + 4096), tried);
}


// ---- Config space, notification -------------------------------------------

void all_config_reads(void) {
    uint8_t whole[128];
    g.o.queues = 5;
    guest_make();
    vblk_read_config(&g.dev, 0, whole, sizeof whole);
    for (unsigned bytes = 1; bytes <= 8; bytes++) {
        for (uint64_t at_ = 0; at_ + bytes <= sizeof whole; at_++) {
            uint64_t want = 0;
            for (unsigned i = 0; i < bytes; i++) {
                want |= (uint64_t)whole[at_ + i] << 8 * i;
            }
            CHECK_EQ(want, vblk_mmio_read(&g.dev, 0x100 + at_, bytes));
        }
    }
    for (size_t i = 36; i < sizeof whole; i++) {
        CHECK_EQ(0, whole[i]);
    }
}

// On a ring of 64 positions around the wrap: an interrupt if, and only if, one
// of the indices that were passed is the one asked for.
void all_event_idx_triples(void) {
    for (unsigned o = 0; o < 64; o++) {
        for (unsigned moved = 0; moved < 64; moved++) {
            for (unsigned e = 0; e < 128; e++) {
                uint16_t old = (uint16_t)(o - 32);
                uint16_t event = (uint16_t)(e - 64);
                bool want = false;
                for (unsigned i = 0; i < moved; i++) {
                    want |= (uint16_t)(old + i) == event;
                }
                CHECK_EQ(want, test_crosses(event, (uint16_t)(old + moved),
                                            old));
            }
        }
    }
}
