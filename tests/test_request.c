// Group V (request validation) and the profile rows P1, P3 to P6.
#include "guest.h"

// What came of a chain of `n` parts: the status byte, the used length (~0 if
// it was not returned), and how many errors were counted.
typedef struct fate {
    uint8_t  status;
    uint32_t len;
    uint64_t errors;
} fate;

static fate send_parts(const part *p, unsigned n, uint64_t status) {
    fate f;
    uint64_t before = counts().io_errors;
    submit(0, p, n);
    CHECK_EQ(EMPTY, kick(0).state);
    f.status = status ? *at(status) : 0;
    f.len = used_len(0);
    f.errors = counts().io_errors - before;
    return f;
}

static fate send_request(uint32_t type, uint64_t sector, uint32_t bytes) {
    uint64_t before = counts().io_errors;
    req r = request(type, sector, bytes);
    kick(0);
    fate f = {status_of(&r), used_len(0), counts().io_errors - before};
    return f;
}

// IOERR, counted once, returned, and the backend was not asked.
static void refused(fate f, vblk_event_code code) {
    CHECK_EQ(VBLK_S_IOERR, f.status);
    CHECK_EQ(1, f.errors);
    CHECK_EQ(1, g.events[code]);
    CHECK_EQ(0, g.calls);
    CHECK(f.len == 1 || (g.o.profile == VBLK_STANDARD && f.len == 0));
    g.events[code] = 0;
}

// Dropped (P5: returned with length 0): no status byte, counted once.
static void dropped(fate f, vblk_event_code code) {
    bool standard = g.o.profile == VBLK_STANDARD;
    CHECK_EQ(standard ? 0 : UINT32_MAX, f.len);
    CHECK_EQ(1, f.errors);
    CHECK_EQ(1, g.events[code]);
    CHECK_EQ(0, g.calls);
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    g.events[code] = 0;
}

static fate segments(unsigned count) {
    part p[MAX_SEGS + 4];
    req r = prepare(VBLK_T_IN, 0, count * 512);
    p[0] = (part){r.header, 16, 0};
    for (unsigned i = 0; i < count; i++) {
        p[1 + i] = (part){r.data + 512 * i, 512, WRITE};
    }
    p[1 + count] = (part){r.status, 1, WRITE};
    fate f = send_parts(p, count + 2, r.status);
    if (f.status == VBLK_S_OK) {
        CHECK_MEM(g.disk, at(r.data), count * 512);
    }
    return f;
}

static void chain_limit(vblk_profile profile) {
    static const uint32_t seg_max[] = {1, 2, 7, MAX_SEGS};
    for (size_t i = 0; i < COUNT(seg_max); i++) {
        guest_init();
        g.o.profile = profile;
        g.o.seg_max = seg_max[i];
        guest_up();
        CHECK_EQ(VBLK_S_OK, segments(seg_max[i]).status);
        CHECK_EQ(1, g.op[0].segs ? 1 : 0);
        g.calls = 0;
        fate f = segments(seg_max[i] + 1);
        if (profile == VBLK_STANDARD) { // P5
            refused(f, VBLK_EV_CHAIN_LONG);
        } else {
            dropped(f, VBLK_EV_CHAIN_LONG);
            CHECK_EQ(0xff, f.status);
        }
        CHECK_EQ(seg_max[i] + 2, event_a(&g.last));
        CHECK_EQ(VBLK_S_OK, segments(seg_max[i]).status);
        guest_check();
    }
}

void v1_chain_limit_strict(void) {
    chain_limit(VBLK_STRICT);
}

void v1_p5_chain_limit_standard(void) {
    chain_limit(VBLK_STANDARD);
}

// However often the guest has written it anew: what a table holds is read once.
void v1_a_loop_in_a_small_table_ends_there(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 512);
    part p[4] = {{r.header, 16, 0}, {r.data, 256, WRITE},
                 {r.data + 256, 256, WRITE}, {r.status, 1, WRITE}};
    part table = {put_table(p, 4), 64, INDIRECT};
    p[3].flags |= NEXT;
    put_desc(table.gpa, 3, p[3], 1);
    unsigned before = g.accesses;
    dropped(send_parts(&table, 1, r.status), VBLK_EV_CHAIN_LONG);
    CHECK_EQ(4, event_a(&g.last));
    CHECK(g.accesses - before < 20);
}

// Windows' viostor: 513 segments in a table, whatever seg_max says, a status
// byte that says OK beforehand, and no look at anything else.
void p5_a_chain_that_is_much_too_long_is_an_error(void) {
    enum { SEGMENTS = 513 };
    static part p[SEGMENTS + 2];
    g.o.profile = VBLK_STANDARD;
    guest_up();
    for (uint32_t type = 0; type < 2; type++) {
        req r = prepare(type, 0, SEGMENTS * 512);
        p[0] = (part){r.header, 16, 0};
        for (unsigned i = 0; i < SEGMENTS; i++) {
            p[1 + i] = (part){r.data + 512 * i, 512, type ? 0 : WRITE};
        }
        p[1 + SEGMENTS] = (part){r.status, 1, WRITE};
        part table = {put_table(p, SEGMENTS + 2), 16 * (SEGMENTS + 2),
                      INDIRECT};
        fill(r.status, 0, 1);
        fate f = send_parts(&table, 1, r.status);
        refused(f, VBLK_EV_CHAIN_LONG);
        CHECK_EQ(type ? 1 : 0, f.len); // P6
        CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
        // Without an end there is no place to tell it.
        put_desc(table.gpa, SEGMENTS + 1, (part){r.status, 1, WRITE | NEXT},
                 7);
        mark(r.status, 1, OFFERED);
        fill(r.status, 0x5a, 1);
        f = send_parts(&table, 1, r.status);
        dropped(f, VBLK_EV_CHAIN_LONG);
        CHECK_EQ(0x5a, f.status);
        // Nor is there one outside guest memory (V17).
        put_desc(table.gpa, SEGMENTS + 1, (part){RAM_END, 1, WRITE}, 0);
        f = send_parts(&table, 1, r.status);
        CHECK_EQ(UINT32_MAX, f.len);
        CHECK_EQ(1, f.errors);
        CHECK_EQ(1, g.events[VBLK_EV_STATUS_UNWRITABLE]);
        g.events[VBLK_EV_STATUS_UNWRITABLE] = 0;
        CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 512).status);
        g.calls = 0;
    }
}

// It goes on in a table that is longer than any request may be.
void p5_a_long_chain_goes_on_in_a_table(void) {
    enum { OWN = 200, SEGMENTS = 513 };
    static part p[SEGMENTS + 1], q[OWN + 1];
    g.o.profile = VBLK_STANDARD;
    guest_up();
    for (unsigned own = 125; own <= OWN; own++) { // 130 is the limit
        req r = prepare(VBLK_T_IN, 0, 512);
        for (unsigned i = 0; i < SEGMENTS; i++) {
            p[i] = (part){r.data, 512, WRITE};
        }
        p[SEGMENTS] = (part){r.status, 1, WRITE};
        q[0] = (part){r.header, 16, 0};
        for (unsigned i = 1; i < own; i++) {
            q[i] = (part){r.data, 512, WRITE};
        }
        q[own] = (part){put_table(p, SEGMENTS + 1), 16 * (SEGMENTS + 1),
                        INDIRECT};
        refused(send_parts(q, own + 1, r.status), VBLK_EV_CHAIN_LONG);
        CHECK_EQ(vblk_seg_max(&g.dev) + 2, event_a(&g.last));
        guest_init();
        g.o.profile = VBLK_STANDARD;
        guest_up();
    }
}

// A table is as long as the guest says: the work on it is bounded.
void p5_a_table_of_4_gib_is_not_followed_for_ever(void) {
    g.o.profile = VBLK_STANDARD;
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 512);
    uint64_t table = alloc(16, 16);
    part loop = {r.status, 1, WRITE | NEXT};
    put_desc(table, 0, loop, 0);
    mark(table, 16, READABLE);
    part whole = {table, 0xfffffff0u & ~15u, INDIRECT};
    unsigned before = g.accesses;
    fate f = send_parts(&whole, 1, r.status);
    CHECK_EQ(0, f.len);
    CHECK_EQ(1, f.errors);
    CHECK(g.accesses - before < 40000);
}

void v2_p5_no_place_for_the_status(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        req r = prepare(VBLK_T_OUT, 0, 512);
        part p[3] = {{r.header, 16, 0}, {r.data, 512, 0}, {r.status, 1, 0}};
        dropped(send_parts(p, 3, 0), VBLK_EV_STATUS_MISSING);
        dropped(send_parts(p, 1, 0), VBLK_EV_STATUS_MISSING);
        p[2] = (part){UINT64_MAX, 2, WRITE};
        dropped(send_parts(p, 3, 0), VBLK_EV_STATUS_WRAPS);
        // A readable descriptor after a writable one: nobody can say what is
        // the data, but an error has a place.
        part q[3] = {{r.header, 16, 0}, {r.status, 1, WRITE},
                     {r.data, 512, 0}};
        fate f = send_parts(q, 3, r.status);
        if (profile == VBLK_STANDARD) {
            refused(f, VBLK_EV_CHAIN_ORDER);
        } else {
            dropped(f, VBLK_EV_CHAIN_ORDER);
        }
        guest_check();
    }
}

void v2_strict_wants_the_status_last(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 512);
    part p[4] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                 {r.status, 1, WRITE}, {r.status, 0, WRITE}};
    dropped(send_parts(p, 4, 0), VBLK_EV_STATUS_FRAMING);
    dropped(send_parts(p + 2, 1, 0), VBLK_EV_STATUS_FRAMING);
}

void v3_short_header(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (uint32_t n = 0; n < 16; n++) {
            req r = prepare(VBLK_T_FLUSH, 0, 0);
            part p[2] = {{r.header, n, 0}, {r.status, 1, WRITE}};
            refused(send_parts(p, 2, r.status), VBLK_EV_HEADER_SHORT);
        }
        req r = prepare(VBLK_T_IN, 0, 512);
        part p[2] = {{r.data, 16, WRITE}, {r.status, 1, WRITE}};
        refused(send_parts(p, 2, r.status), VBLK_EV_HEADER_SHORT);
        guest_check();
    }
}

void v3_strict_wants_the_header_first(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 512);
    part p[4] = {{r.header, 8, 0}, {r.header + 8, 8, 0},
                 {r.data, 512, WRITE}, {r.status, 1, WRITE}};
    refused(send_parts(p, 4, r.status), VBLK_EV_HEADER_FRAMING);
}

void v3_a_longer_header_descriptor_is_fine(void) {
    guest_up();
    req r = prepare(VBLK_T_OUT, 1, 512);
    fill(r.data, 0x5a, 512);
    part p[3] = {{r.header, 40, 0}, {r.data, 512, 0}, {r.status, 1, WRITE}};
    alloc(40, 1);
    fate f = send_parts(p, 3, r.status);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_MEM(at(r.data), g.disk + 512, 512);
}

void v4_header_outside_memory(void) {
    static const uint64_t where[] = {RAM_END, RAM_END - 15, HIGH - 16,
                                     UINT64_MAX - 14, UINT64_MAX};
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (size_t i = 0; i < COUNT(where); i++) {
            req r = prepare(VBLK_T_IN, 0, 512);
            part p[3] = {{where[i], 16, 0}, {r.data, 512, WRITE},
                         {r.status, 1, WRITE}};
            refused(send_parts(p, 3, r.status), VBLK_EV_HEADER_UNREADABLE);
        }
        guest_check();
    }
}

// Cutting the header off a descriptor that wraps must not leave a piece of it
// at address 0, where there is memory.
void v4_header_descriptor_that_wraps(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        put(UINT64_MAX - 15, at(put_header(VBLK_T_OUT, 0)), 16);
        uint64_t status = alloc(1, 1);
        part p[2] = {{UINT64_MAX - 15, 16 + 512, 0}, {status, 1, WRITE}};
        refused(send_parts(p, 2, status), VBLK_EV_HEADER_UNREADABLE);
    }
}

void v4_header_across_a_seam(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 6, 512);
    put(SEAM - 7, at(r.header), 16);
    r.header = SEAM - 7;
    send(0, &r);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(g.disk + 6 * 512, at(r.data), 512);
}

void v5_size_max(void) {
    g.o.size_max = 4096;
    guest_up();
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 4096).status);
    g.calls = 0;
    refused(send_request(VBLK_T_IN, 0, 4608), VBLK_EV_SEGMENT_LONG);
    refused(send_request(VBLK_T_OUT, 0, 4608), VBLK_EV_SEGMENT_LONG);
    refused(send_request(VBLK_T_GET_ID, 0, 4097), VBLK_EV_SEGMENT_LONG);
}

void p3_size_max_binds_who_accepted_it(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        g.o.size_max = 4096;
        guest_up_without(VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX);
        if (profile == VBLK_STANDARD) {
            CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 8192).status);
        } else {
            refused(send_request(VBLK_T_IN, 0, 8192),
                    VBLK_EV_SEGMENT_LONG_STRICT);
        }
    }
    guest_init();
    g.o.size_max = 4096;
    guest_up_standard(); // accepted: it binds
    refused(send_request(VBLK_T_IN, 0, 8192), VBLK_EV_SEGMENT_LONG);
}

void v6_no_data(void) {
    static const uint32_t types[] = {VBLK_T_IN, VBLK_T_OUT, VBLK_T_GET_ID};
    guest_up();
    for (size_t i = 0; i < COUNT(types); i++) {
        refused(send_request(types[i], 0, 0), VBLK_EV_DATA_MISSING);
        req r = prepare(types[i], 0, 0); // only empty data is none
        part p[3] = {{r.header, 16, 0}, {r.data, 0, 0},
                     {r.status, 1, WRITE}};
        refused(send_parts(p, 3, r.status), VBLK_EV_DATA_MISSING);
    }
}

void p4_no_data_standard(void) {
    guest_up_standard();
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 0).status);
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, SECTORS, 0).status);
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_OUT, 0, 0).status);
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_GET_ID, 0, 0).status);
    CHECK_EQ(0, g.calls);
    CHECK_EQ(2, counts().reads);
    CHECK_EQ(1, counts().writes);
    refused(send_request(VBLK_T_IN, SECTORS + 1, 0), VBLK_EV_OUT_OF_RANGE);
}

void v7_flush_with_data(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        req r = prepare(VBLK_T_FLUSH, 5, 512);
        part p[3] = {{r.header, 16, 0}, {r.data, 512, 0},
                     {r.status, 1, WRITE}};
        for (int in = 0; in < 2; in++) {
            fill(r.status, 0xff, 1);
            p[1].flags = in ? WRITE : 0;
            g.calls = 0;
            fate f = send_parts(p, 3, r.status);
            if (profile == VBLK_STRICT) {
                refused(f, VBLK_EV_DATA_UNWANTED);
            } else { // P4; P6: nothing was written before the status
                CHECK_EQ(VBLK_S_OK, f.status);
                CHECK_EQ(in ? 0 : 1, f.len);
                CHECK_EQ(1, g.calls);
            }
        }
        guest_check();
    }
}

void v8_no_multiple_of_512(void) {
    static const uint32_t bytes[] = {1, 511, 513, 1023, 4097};
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (size_t i = 0; i < COUNT(bytes); i++) {
            refused(send_request(VBLK_T_IN, 0, bytes[i]),
                    VBLK_EV_DATA_RAGGED);
            refused(send_request(VBLK_T_OUT, 0, bytes[i]),
                    VBLK_EV_DATA_RAGGED);
        }
        // The total counts, not its parts.
        req r = prepare(VBLK_T_IN, 0, 1024);
        part p[4] = {{r.header, 16, 0}, {r.data, 100, WRITE},
                     {r.data + 100, 924, WRITE}, {r.status, 1, WRITE}};
        CHECK_EQ(VBLK_S_OK, send_parts(p, 4, r.status).status);
        CHECK_MEM(g.disk, at(r.data), 1024);
        guest_check();
    }
}

// BREQ-09 to -11: offered is what matters, and everything else still works.
void v9_write_to_a_read_only_disk(void) {
    for (int declined = 0; declined < 2; declined++) {
        guest_init();
        g.o.backend.write = NULL;
        guest_up_without(VBLK_F_EVENT_IDX | (declined ? VBLK_F_RO : 0));
        refused(send_request(VBLK_T_OUT, 0, 512), VBLK_EV_READ_ONLY);
        CHECK_EQ(0, counts().writes);
        CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 512).status);
        CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_GET_ID, 0, 20).status);
    }
}

void v10_flush_of_a_read_only_disk(void) {
    g.o.backend.write = NULL;
    guest_up();
    fate f = send_request(VBLK_T_FLUSH, 0, 0);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(1, counts().flushes);
    CHECK_EQ(0, g.calls);
    guest_init();
    g.o.backend.write = NULL;
    g.o.backend.flush = NULL; // not offered, and OK all the same
    guest_up();
    CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_FLUSH, 0, 0).status);
}

void v11_unknown_types(void) {
    static const uint32_t types[] = {2,  3,  5,  6,  7,  9,  10, 11, 12, 13,
                                     14, 15, 16, 17, 18, 20, 22, 24, 26, 99,
                                     0x80000003, 0xc0000001, 0x100,
                                     UINT32_MAX};
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (size_t i = 0; i < COUNT(types); i++) {
            ROW_BEGIN();
            fate f = send_request(types[i], 0, 0);
            CHECK_EQ(VBLK_S_UNSUPP, f.status);
            CHECK_EQ(1, f.len);
            CHECK_EQ(0, f.errors);
            f = send_request(types[i], UINT64_MAX, 513);
            CHECK_EQ(VBLK_S_UNSUPP, f.status);
            CHECK_EQ(profile == VBLK_STRICT ? 1 : 0, f.len); // P6
            CHECK_EQ(0, f.errors);
            ROW("type %u", types[i]);
        }
        CHECK_EQ(0, g.calls);
        vblk_counts none = {0}, now = counts();
        CHECK_MEM(&none, &now, sizeof none);
    }
}

void p9_the_barrier_bit_is_ignored(void) {
    static const uint32_t barrier = 0x80000000;
    for (int profile = 0; profile < 2; profile++) {
        bool standard = profile == VBLK_STANDARD;
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        static const uint32_t types[] = {VBLK_T_IN, VBLK_T_OUT, VBLK_T_FLUSH,
                                         VBLK_T_GET_ID};
        for (size_t i = 0; i < COUNT(types); i++) {
            uint32_t bytes = types[i] == VBLK_T_FLUSH ? 0 : 512;
            fate f = send_request(types[i] | barrier, 0, bytes);
            CHECK_EQ(standard ? VBLK_S_OK : VBLK_S_UNSUPP, f.status);
        }
        CHECK_EQ(standard ? 0 : COUNT(types), g.events[VBLK_EV_TYPE_BARRIER]);
        CHECK_EQ(standard ? 1 : 0, counts().writes);
        CHECK_EQ(standard ? 1 : 0, counts().reads);
        send_request(99 | barrier, 0, 0); // the event has the type as it was
        CHECK_EQ(VBLK_EV_TYPE_UNKNOWN, g.last.code);
        CHECK_EQ(99 | barrier, event_a(&g.last));
    }
}

void v11_flush_is_unknown_where_it_is_not_offered(void) {
    g.o.backend.flush = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_UNSUPP, send_request(VBLK_T_FLUSH, 0, 0).status);
    CHECK_EQ(0, g.calls);
}

void v12_wrong_direction(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        req r = prepare(VBLK_T_IN, 0, 1024);
        part p[4] = {{r.header, 16, 0}, {r.data, 512, 0},
                     {r.data + 512, 512, WRITE}, {r.status, 1, WRITE}};
        refused(send_parts(p, 4, r.status), VBLK_EV_DATA_DIRECTION);
        p[2] = p[3];
        fill(r.status, 0xff, 1);
        refused(send_parts(p, 3, r.status), VBLK_EV_DATA_DIRECTION);
        r.header = put_header(VBLK_T_GET_ID, 0);
        p[0].gpa = r.header;
        fill(r.status, 0xff, 1);
        refused(send_parts(p, 3, r.status), VBLK_EV_DATA_DIRECTION);
        r = prepare(VBLK_T_OUT, 0, 512);
        part q[3] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                     {r.status, 1, WRITE}};
        refused(send_parts(q, 3, r.status), VBLK_EV_DATA_DIRECTION);
        guest_check();
    }
}

void v13_beyond_the_disk(void) {
    static const struct {
        uint64_t sector;
        uint32_t sectors;
        bool     fine;
    } rows[] = {
        {0, 1, true},
        {SECTORS - 1, 1, true},
        {SECTORS - 2, 2, true},
        {0, 128, true},
        {SECTORS, 1, false},
        {SECTORS - 1, 2, false},
        {SECTORS - 7, 8, false},
        {SECTORS + 1, 1, false},
        {UINT64_C(1) << 55, 1, false}, // * 512 wraps to sector 0
        {(UINT64_C(1) << 55) - 1, 1, false},
        {UINT64_MAX, 1, false},
        {UINT64_MAX, 2, false},
        {UINT64_MAX / 512, 1, false},
        {UINT64_C(1) << 32, 1, false},
    };
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (size_t i = 0; i < COUNT(rows); i++) {
            for (uint32_t type = 0; type < 2; type++) {
                ROW_BEGIN();
                g.calls = 0;
                fate f = send_request(type, rows[i].sector,
                                      rows[i].sectors * 512);
                if (rows[i].fine) {
                    CHECK_EQ(VBLK_S_OK, f.status);
                } else {
                    refused(f, VBLK_EV_OUT_OF_RANGE);
                }
                ROW("%u sectors at %" PRIu64, rows[i].sectors,
                    rows[i].sector);
            }
        }
        guest_check();
    }
}

void v13_a_disk_of_no_sectors(void) {
    g.backing = 511;
    guest_up();
    CHECK_EQ(0, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(1, g.events[VBLK_EV_CAPACITY_ZERO]);
    refused(send_request(VBLK_T_IN, 0, 512), VBLK_EV_OUT_OF_RANGE);
    refused(send_request(VBLK_T_OUT, 0, 512), VBLK_EV_OUT_OF_RANGE);
}

// A used length has 32 bits.
void v13_data_of_4_gib(void) {
    g.o.profile = VBLK_STANDARD;
    g.o.capacity = UINT64_C(1) << 40;
    guest_up_without(VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX);
    req r = prepare(VBLK_T_IN, 0, 512);
    part p[4] = {{r.header, 16, 0}, {0, 0x80000000, WRITE},
                 {0, 0x80000000, WRITE}, {r.status, 1, WRITE}};
    uint16_t head = put_chain(0, (part[]){p[0], p[0], p[0], p[3]}, 4);
    put64(g.queue[0].desc + 16 * (head + 1u), 0);
    put32(g.queue[0].desc + 16 * (head + 1u) + 8, 0x80000000);
    put16(g.queue[0].desc + 16 * (head + 1u) + 12, WRITE | NEXT);
    put64(g.queue[0].desc + 16 * (head + 2u), 0);
    put32(g.queue[0].desc + 16 * (head + 2u) + 8, 0x80000000);
    put16(g.queue[0].desc + 16 * (head + 2u) + 12, WRITE | NEXT);
    offer(0, head);
    kick(0);
    CHECK_EQ(VBLK_S_IOERR, status_of(&r));
    CHECK_EQ(1, g.events[VBLK_EV_DATA_LONG]);
    CHECK_EQ(0, g.calls);
}

void v14_empty_descriptors_among_others(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 2, 1024);
    part p[7] = {{r.header, 16, 0}, {UINT64_MAX, 0, WRITE},
                 {r.data, 512, WRITE}, {RAM_END, 0, 0},
                 {r.data + 512, 512, WRITE}, {0, 0, WRITE},
                 {r.status, 1, WRITE}};
    fate f = send_parts(p, 7, r.status);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(1025, f.len);
    CHECK_MEM(g.disk + 2 * 512, at(r.data), 1024);
    CHECK_EQ(2, g.op[0].segs * (g.mapped ? 1u : 2u));
}

void v15_long_status_descriptor(void) {
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 512);
    uint64_t status = alloc(8, 1);
    fill(status, 0x77, 8);
    part p[3] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                 {status, 8, WRITE}};
    fate f = send_parts(p, 3, status + 7);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(513, f.len);
    for (uint64_t i = 0; i < 7; i++) {
        CHECK_EQ(0x77, *at(status + i));
    }
}

void v16_get_id(void) {
    static const struct {
        const char *id;
        const char  want[21];
    } rows[] = {
        {NULL, ""},
        {"x", "x"},
        {"nineteen-characters", "nineteen-characters"},
        {"exactly-twenty-chars", "exactly-twenty-chars"},
        {"this one is longer than twenty", "this one is longer t"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        guest_init();
        g.o.id = rows[i].id;
        guest_up();
        req r = request(VBLK_T_GET_ID, 77, 64);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(21, used_len(0));
        char want[20] = {0};
        memcpy(want, rows[i].want, strlen(rows[i].want));
        CHECK_MEM(want, at(r.data), 20);
        CHECK_EQ(DIRT, *at(r.data + 20)); // no 21st byte
        guest_check();
    }
    for (uint32_t n = 1; n < 20; n++) {
        refused(send_request(VBLK_T_GET_ID, 0, n), VBLK_EV_ID_SHORT);
    }
    req r = prepare(VBLK_T_GET_ID, 0, 40);
    part p[4] = {{r.header, 16, 0}, {r.data, 19, WRITE},
                 {r.data + 19, 21, WRITE}, {r.status, 1, WRITE}};
    refused(send_parts(p, 4, r.status), VBLK_EV_ID_SHORT);
}

void p4_get_id_standard(void) {
    static const uint32_t sizes[] = {1, 5, 19, 20, 21, 512};
    guest_up_standard();
    for (size_t i = 0; i < COUNT(sizes); i++) {
        uint32_t n = sizes[i] < 20 ? sizes[i] : 20;
        fate f = send_request(VBLK_T_GET_ID, 0, sizes[i]);
        CHECK_EQ(VBLK_S_OK, f.status);
        CHECK_EQ(n + (sizes[i] <= 20), f.len); // P6
    }
    req r = prepare(VBLK_T_GET_ID, 0, 40);
    part p[4] = {{r.header, 16, 0}, {r.data, 3, WRITE},
                 {r.data + 3, 37, WRITE}, {r.status, 1, WRITE}};
    CHECK_EQ(20, send_parts(p, 4, r.status).len);
    CHECK_MEM("disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", at(r.data), 20);
}

static vblk_memory whole;

static void *map_a_page(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    *n = *n < 4096 ? *n : 4096;
    return whole.map(user, gpa, n, writable);
}

// The rest of its buffers is not even asked for, and need not be there.
void v16_get_id_looks_up_what_it_fills(void) {
    whole = g.o.memory;
    g.o.memory.map = g.mapped ? map_a_page : NULL;
    g.o.profile = VBLK_STANDARD;
    guest_up_without(VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX);
    req r = prepare(VBLK_T_GET_ID, 0, 20);
    part p[5] = {{r.header, 16, 0}, {r.data, 15, WRITE},
                 {SEAM, 1u << 20, WRITE}, {RAM_END, 0xf0000000, WRITE},
                 {r.status, 1, WRITE}};
    unsigned before = g.accesses;
    fate f = send_parts(p, 5, r.status);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(20, f.len);
    CHECK_MEM("disk-0", at(r.data), 6);
    CHECK(g.accesses - before < 30);
    CHECK_EQ(0, *at(SEAM + 4)); // of the id
    CHECK_EQ(DIRT, *at(SEAM + 5));
}

void v16_get_id_outside_memory(void) {
    guest_up();
    req r = prepare(VBLK_T_GET_ID, 0, 20);
    part p[3] = {{r.header, 16, 0}, {RAM_END - 19, 20, WRITE},
                 {r.status, 1, WRITE}};
    refused(send_parts(p, 3, r.status), VBLK_EV_DATA_UNMAPPED);
}

// Whichever access is refused, once: no more than one error is counted.
void v16_get_id_when_memory_changes_its_mind(void) {
    unsigned errors = 0;
    for (int n = 1, left = 0; left == 0; n++) {
        guest_init();
        guest_up();
        request(VBLK_T_GET_ID, 0, 20);
        g.fail_access = n;
        kick(0);
        left = g.fail_access;
        CHECK(counts().io_errors <= 1);
        errors += counts().io_errors > 0;
    }
    CHECK(g.mapped || errors >= 2);
}

// Flash is guest memory to read from: a write goes out of it, and nothing in.
void x5_a_region_that_is_read_only(void) {
    for (int i = 0; i < 2; i++) {
        guest_init();
        g.region[2].read_only = true; // HIGH
        g.o.profile = (vblk_profile)i;
        guest_up();
        req r = prepare(VBLK_T_OUT, 0, 512);
        part p[3] = {{r.header, 16, 0}, {HIGH + 64, 512, 0},
                     {r.status, 1, WRITE}};
        CHECK_EQ(VBLK_S_OK, send_parts(p, 3, r.status).status);
        CHECK_EQ(DIRT, g.disk[0]);
        CHECK_EQ(DIRT, g.disk[511]);
        g.calls = 0;
        r = prepare(VBLK_T_IN, 1, 512);
        p[0].gpa = r.header;
        p[1].flags = WRITE;
        p[2].gpa = r.status;
        refused(send_parts(p, 3, r.status), VBLK_EV_DATA_UNMAPPED);
        r = prepare(VBLK_T_GET_ID, 0, 20);
        p[0].gpa = r.header;
        p[1].n = 20;
        p[2].gpa = r.status;
        refused(send_parts(p, 3, r.status), VBLK_EV_DATA_UNMAPPED);
        p[2].gpa = HIGH; // V17
        CHECK_EQ(UINT32_MAX, send_parts(p, 3, r.header).len);
        CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
        guest_negotiate(VBLK_F_EVENT_IDX); // a used ring there is broken
        guest_queue_up(0, 16);
        wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)HIGH + 0x1000);
        wr(VBLK_REG_QUEUE_DEVICE_HIGH, (uint32_t)(HIGH >> 32));
        guest_go();
        request(VBLK_T_IN, 0, 512);
        wr_drain(VBLK_REG_QUEUE_NOTIFY, 0);
        CHECK(rd(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET);
        g.queue[0].size = 0;
    }
}

void v17_status_outside_memory(void) {
    static const uint64_t where[] = {RAM_END, HIGH - 1, 0x5000000000};
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        for (size_t i = 0; i < COUNT(where); i++) {
            req r = prepare(VBLK_T_OUT, 0, 512);
            part p[3] = {{r.header, 16, 0}, {r.data, 512, 0},
                         {where[i], 1, WRITE}};
            fate f = send_parts(p, 3, 0);
            CHECK_EQ(UINT32_MAX, f.len);
            CHECK_EQ(1, f.errors);
        }
        CHECK_EQ(0, g.calls);
        CHECK_EQ(0, used_count(0));
        CHECK_EQ(3, g.events[VBLK_EV_STATUS_UNWRITABLE]);
        CHECK_EQ(VBLK_S_OK, send_request(VBLK_T_IN, 0, 512).status);
        guest_check();
    }
}

// The guest changes header and descriptors as soon as the device has them.
static req victim;

static int64_t read_and_change(void *user, uint64_t offset,
                               const vblk_seg *seg, unsigned segs) {
    (void)user;
    put32(victim.header, VBLK_T_OUT);
    put64(victim.header + 8, UINT64_MAX);
    put64(g.queue[0].desc + 16, 0);
    put32(g.queue[0].desc + 16 + 8, UINT32_MAX);
    put64(g.queue[0].desc + 32, RAM_END);
    uint64_t done = 0;
    for (unsigned i = 0; i < segs; i++) {
        memcpy(seg[i].ptr, g.disk + offset + done, seg[i].n);
        done += seg[i].n;
    }
    return (int64_t)done;
}

void v18_what_changes_later_does_not_count(void) {
    g.o.backend.read = read_and_change;
    guest_up();
    victim = prepare(VBLK_T_IN, 4, 512);
    send(0, &victim);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&victim));
    CHECK_EQ(513, used_len(0));
    CHECK_MEM(g.disk + 4 * 512, at(victim.data), 512);
    CHECK_EQ(1, counts().reads);
}

// Each of the device's own fields is read once: without map, the trace shows.
void v18_each_descriptor_and_header_is_read_once(void) {
    guest_up();
    req r = request(VBLK_T_IN, 4, 512);
    g.traced = 0;
    kick(0);
    unsigned header = 0, table = 0;
    for (unsigned i = 0; i < g.traced; i++) {
        const guest_access *a = &g.trace[i];
        header += !a->write && a->gpa == r.header;
        table += !a->write && a->gpa == g.queue[0].desc;
    }
    if (!g.mapped) {
        CHECK_EQ(1, header);
        CHECK_EQ(1, table);
    }
}

// SPLIT-01: the same write and read in every framing.
static void framings(unsigned kind, uint32_t type) {
    req r = prepare(type, 8, 1024);
    uint64_t out = alloc(16 + 1024, 1), in = alloc(1024 + 1, 1);
    put(out, at(r.header), 16);
    fill(in + 1024, 0xff, 1);
    for (uint32_t i = 0; i < 1024; i++) {
        uint8_t byte = (uint8_t)(i * 5 + kind);
        put(out + 16 + i, &byte, 1);
    }
    uint32_t out_bytes = type == VBLK_T_OUT ? 16 + 1024 : 16;
    uint64_t in_at = type == VBLK_T_IN ? in : in + 1024;
    uint32_t in_bytes = type == VBLK_T_IN ? 1025 : 1;
    // How to cut both areas: chunk sizes in turn, 0 is an empty descriptor.
    static const uint32_t cuts[][4] = {
        {2000, 2000, 2000, 2000}, {1, 15, 2000, 2000}, {8, 8, 1000, 24},
        {16, 512, 512, 1},        {7, 0, 13, 200},     {1, 1, 1, 300},
        {0, 40, 0, 900},
    };
    part p[MAX_SEGS];
    unsigned n = 0, turn = 0;
    for (uint32_t done = 0; done < out_bytes; turn++) {
        uint32_t cut = cuts[kind][turn % 4];
        cut = cut < out_bytes - done ? cut : out_bytes - done;
        p[n++] = (part){out + done, cut, 0};
        done += cut;
    }
    for (uint32_t done = 0; done < in_bytes; turn++) {
        uint32_t cut = cuts[kind][turn % 4];
        cut = cut < in_bytes - done ? cut : in_bytes - done;
        p[n++] = (part){in_at + done, cut, WRITE};
        done += cut;
    }
    fate f = send_parts(p, n, in + 1024);
    ROW_BEGIN();
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(in_bytes, f.len);
    CHECK_MEM(type == VBLK_T_IN ? at(in) : at(out + 16), g.disk + 8 * 512,
              1024);
    ROW("framing %u, type %u", kind, type);
}

void p1_any_framing(void) {
    guest_up_standard();
    for (unsigned kind = 0; kind < 7; kind++) {
        framings(kind, VBLK_T_OUT);
        framings(kind, VBLK_T_IN);
    }
    CHECK_EQ(0, counts().io_errors);
}

// A header of single bytes, a status in a descriptor with the data.
void p1_a_header_in_sixteen_descriptors(void) {
    guest_up_standard();
    req r = prepare(VBLK_T_IN, 8, 512);
    part p[18];
    for (unsigned i = 0; i < 16; i++) {
        p[i] = (part){r.header + i, 1, 0};
    }
    uint64_t in = alloc(513, 1);
    p[16] = (part){in, 513, WRITE};
    fate f = send_parts(p, 17, in + 512);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(513, f.len);
    CHECK_MEM(g.disk + 8 * 512, at(in), 512);
}

void p1_empty_descriptors_after_the_status(void) {
    guest_up_standard();
    req r = prepare(VBLK_T_IN, 8, 512);
    part p[5] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                 {r.status, 1, WRITE}, {UINT64_MAX, 0, WRITE},
                 {RAM_END, 0, 0}};
    fate f = send_parts(p, 5, r.status);
    CHECK_EQ(VBLK_S_OK, f.status);
    CHECK_EQ(513, f.len);
}

// P6: a failed read wrote its status alone, which does not start the area.
void p6_used_length_of_failures(void) {
    guest_up_standard();
    fate f = send_request(VBLK_T_IN, SECTORS, 512);
    CHECK_EQ(VBLK_S_IOERR, f.status);
    CHECK_EQ(0, f.len);
    f = send_request(VBLK_T_OUT, SECTORS, 512);
    CHECK_EQ(1, f.len);
    g.fail_call = 1;
    CHECK_EQ(0, send_request(VBLK_T_IN, 0, 512).len);
    g.fail_call = 1;
    CHECK_EQ(1, send_request(VBLK_T_OUT, 0, 512).len);
    CHECK_EQ(513, send_request(VBLK_T_IN, 0, 512).len);
}

// The numbers of an event: what was wrong, as its text names it.
void v_events_say_what_was_wrong(void) {
    const uint64_t nowhere = RAM_END + GAP, size_max = 1 << 20;
    const struct {
        vblk_event_code code;
        uint32_t type;
        uint64_t sector;
        part     header, data, status; // of no bytes: as it should be
        uint64_t a, b;
    } rows[] = {
        {VBLK_EV_CHAIN_UNREADABLE, 0, 0, {nowhere, 32, INDIRECT},
         {0, 0, 0}, {0, 0, 0}, nowhere, 0},
        {VBLK_EV_INDIRECT_SIZE, 0, 0, {nowhere, 17, INDIRECT},
         {0, 0, 0}, {0, 0, 0}, 17, 0},
        {VBLK_EV_STATUS_WRAPS, 0, 0, {0, 0, 0}, {0, 0, 0},
         {UINT64_MAX - 3, 16, WRITE}, UINT64_MAX - 3, 0},
        {VBLK_EV_STATUS_UNWRITABLE, 0, 0, {0, 0, 0}, {0, 0, 0},
         {nowhere, 1, WRITE}, nowhere, 0},
        {VBLK_EV_HEADER_SHORT, 0, 0, {0x100, 15, 0}, {0, 0, 0}, {0, 0, 0}, 15,
         0},
        {VBLK_EV_HEADER_FRAMING, 1, 0, {0x100, 8, 0}, {0x108, 24, 0},
         {0, 0, 0}, 32, 0},
        {VBLK_EV_HEADER_UNREADABLE, 0, 0, {nowhere, 16, 0}, {0, 0, 0},
         {0, 0, 0}, nowhere, 0},
        {VBLK_EV_TYPE_UNKNOWN, 77, 0, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, 77, 0},
        {VBLK_EV_SEGMENT_LONG, 0, 0, {0, 0, 0}, {0, (1 << 20) + 512, WRITE},
         {0, 0, 0}, size_max + 512, size_max},
        {VBLK_EV_DATA_DIRECTION, 1, 0, {0, 0, 0}, {0x1000, 512, WRITE},
         {0, 0, 0}, 1, 0},
        {VBLK_EV_DATA_MISSING, 1, 0, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, 1, 0},
        {VBLK_EV_DATA_UNWANTED, 4, 0, {0, 0, 0}, {0x1000, 512, 0}, {0, 0, 0},
         512, 0},
        {VBLK_EV_DATA_RAGGED, 0, 0, {0, 0, 0}, {0x1000, 513, WRITE},
         {0, 0, 0}, 513, 0},
        {VBLK_EV_DATA_UNMAPPED, 0, 0, {0, 0, 0}, {nowhere, 512, WRITE},
         {0, 0, 0}, nowhere, 512},
        {VBLK_EV_OUT_OF_RANGE, 0, SECTORS - 1, {0, 0, 0},
         {0x1000, 1024, WRITE}, {0, 0, 0}, SECTORS - 1, 1024},
        {VBLK_EV_ID_SHORT, 8, 0, {0, 0, 0}, {0x1000, 19, WRITE}, {0, 0, 0},
         19, 0},
    };
    guest_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        part p[3] = {{put_header(rows[i].type, rows[i].sector), 16, 0},
                     rows[i].data, {alloc(1, 1), 1, WRITE}};
        if (rows[i].header.n) {
            p[0] = rows[i].header;
        }
        if (rows[i].status.n) {
            p[2] = rows[i].status;
        }
        unsigned n = 3;
        if (p[0].flags & INDIRECT) {
            n = 1;
        } else if (p[1].n == 0) {
            p[1] = p[2];
            n = 2;
        }
        submit(0, p, n);
        CHECK_EQ(EMPTY, kick(0).state);
        ROW_BEGIN();
        CHECK_EQ(1, g.events[rows[i].code]);
        CHECK_EQ((uint64_t)rows[i].code, (uint64_t)g.last.code);
        CHECK_EQ(rows[i].a, event_a(&g.last));
        CHECK_EQ(rows[i].b, event_b(&g.last));
        ROW("%s", event_text(rows[i].code));
    }
    reset();
    g.o.backend.write = NULL;
    guest_up();
    run(VBLK_T_OUT, 7, 512);
    CHECK_EQ(VBLK_EV_READ_ONLY, g.last.code);
    CHECK_EQ(7, event_a(&g.last));
}

void v1_events_say_where_a_chain_leads(void) {
    guest_up();
    uint64_t header = put_header(VBLK_T_IN, 0);
    part p = {header, 16, NEXT};
    put_desc(g.queue[0].desc, 3, p, 9999);
    offer(0, 3);
    kick(0);
    CHECK_EQ(VBLK_EV_CHAIN_NEXT, g.last.code);
    CHECK_EQ(3, g.last.head);
    CHECK_EQ(9999, event_a(&g.last));
    CHECK_EQ(g.queue[0].size, event_b(&g.last));
    put_desc(g.queue[0].desc, 3, p, 3);
    offer(0, 3);
    kick(0);
    CHECK_EQ(VBLK_EV_CHAIN_LONG, g.last.code);
    CHECK_EQ(g.dev.seg_max + 2, event_a(&g.last));
}

// Every access fails in turn: the id is there, or the request failed, or the
// device said that it cannot be returned.
void v16_an_id_that_cannot_be_stored(void) {
    bool passed = false;
    for (int n = 1; n < 40 && !passed; n++) {
        guest_init();
        g.o.id = "a serial number of 20";
        guest_up();
        req r = request(VBLK_T_GET_ID, 0, 20);
        g.fail_access = n;
        kick(0);
        passed = g.tripped == 0;
        bool lost = g.events[VBLK_EV_STATUS_UNWRITABLE] ||
                    g.events[VBLK_EV_CHAIN_UNREADABLE] ||
                    rd(VBLK_REG_STATUS) & VBLK_STATUS_NEEDS_RESET;
        uint8_t status = status_of(&r);
        ROW_BEGIN();
        CHECK(lost || status == VBLK_S_OK || status == VBLK_S_IOERR);
        CHECK(lost || used_count(0) == 1);
        CHECK(status != VBLK_S_OK ||
              !memcmp(at(r.data), "a serial number of 2", 20));
        ROW("access %d", n);
    }
    CHECK(passed);
}

// The last byte of memory is the last that has an address.
void v_memory_up_to_the_last_address(void) {
    guest_up();
    part p[3] = {{put_header(VBLK_T_IN, 3), 16, 0},
                 {HIGH + HIGH_SIZE - 512, 512, WRITE},
                 {alloc(1, 1), 1, WRITE}};
    submit(0, p, 3);
    kick(0);
    CHECK_EQ(VBLK_S_OK, *at(p[2].gpa));
    CHECK_MEM(g.disk + 3 * 512, at(HIGH + HIGH_SIZE - 512), 512);
    part q[3] = {{HIGH + HIGH_SIZE - 16, 16, 0},
                 {alloc(512, 1), 512, WRITE}, {alloc(1, 1), 1, WRITE}};
    put(q[0].gpa, at(p[0].gpa), 16);
    mark(q[0].gpa, 16, READABLE);
    submit(0, q, 3);
    kick(0);
    CHECK_EQ(VBLK_S_OK, *at(q[2].gpa));
    part t[3] = {p[0], q[1], {HIGH + HIGH_SIZE - 1, 1, WRITE}};
    rewritable(t[2].gpa);
    submit(0, t, 3);
    kick(0);
    CHECK_EQ(VBLK_S_OK, *at(t[2].gpa));
}
