// Published classes of bugs in other virtio devices, and those that come up
// again and again: one test each, named after what went wrong there.
#include "guest.h"

// CVE-2011-1750: request sizes that are no multiple of a sector.
void case_cve_2011_1750_ragged_sizes(void) {
    guest_up();
    for (uint32_t bytes = 1; bytes < 1600; bytes += 37) {
        for (uint32_t type = 0; type < 2; type++) {
            if (bytes % 512) {
                CHECK_EQ(VBLK_S_IOERR, run(type, SECTORS - 1, bytes));
            }
        }
    }
    CHECK_EQ(0, g.calls);
}

// CVE-2011-2212: an indirect table with more entries than fit an array.
void case_cve_2011_2212_a_huge_indirect_table(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        uint64_t table = alloc(16 * 4096, 16);
        mark(table, 16 * 4096, READABLE);
        req r = prepare(VBLK_T_IN, 0, 512);
        for (uint16_t i = 0; i < 4095; i++) {
            part p = {i ? r.data : r.header, 16,
                      (uint16_t)(NEXT | (i ? WRITE : 0))};
            put_desc(table, i, p, (uint16_t)(i + 1));
        }
        part whole = {table, 16 * 4096, INDIRECT};
        submit(0, &whole, 1);
        CHECK_EQ(EMPTY, kick(0).state);
        // Its last entry is dirt, which only standard comes to see.
        CHECK_EQ(1, g.events[!profile ? VBLK_EV_INDIRECT_NESTED
                                     : VBLK_EV_CHAIN_LONG]);
        CHECK_EQ(0, g.calls);
        memset(g.offers, 0, sizeof g.offers);
    }
}

// CVE-2011-2512: a queue index that is taken for a signed number.
void case_cve_2011_2512_queue_index(void) {
    static const uint32_t indices[] = {0x80000000, 0xffffffff, 0xffff8000,
                                       0x8000, 64, 1024};
    guest_up();
    for (size_t i = 0; i < COUNT(indices); i++) {
        CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
                 (uint64_t)wr(VBLK_REG_QUEUE_NOTIFY, indices[i]));
        wr(VBLK_REG_QUEUE_SEL, indices[i]);
        wr(VBLK_REG_QUEUE_READY, 1);
        CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
        CHECK_EQ(0, rd(VBLK_REG_QUEUE_NUM_MAX));
    }
}

// CVE-2016-5403: more requests in flight than the queue has entries.
void case_cve_2016_5403_requests_without_end(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 8);
    guest_go();
    req r = request(VBLK_T_IN, 0, 512);
    vblk_request under_way;
    unsigned taken = 0;
    for (int i = 0; i < 1000; i++) {
        taken += take(0, 0, &under_way).state == REQUEST;
        again(&r);
        offer(0, r.head);
    }
    CHECK_EQ(8, taken);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    memset(g.offers, 1, sizeof g.offers);
}

// CVE-2016-6490, CVE-2023-5158: empty descriptors that a loop never passes.
void case_cve_2016_6490_empty_descriptors(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        req r = prepare(VBLK_T_IN, 1, 512);
        part p[9] = {{r.header, 16, 0}, {0, 0, 0}, {0, 0, WRITE},
                     {r.data, 256, WRITE}, {UINT64_MAX, 0, WRITE},
                     {r.data + 256, 256, WRITE}, {0, 0, WRITE},
                     {0, 0, WRITE}, {r.status, 1, WRITE}};
        submit(0, p, 9);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_MEM(g.disk + 512, at(r.data), 512);
        part none[3] = {{0, 0, 0}, {0, 0, WRITE}, {0, 0, WRITE}};
        submit(0, none, 3);
        CHECK_EQ(EMPTY, kick(0).state);
        CHECK_EQ(1, counts().io_errors);
    }
}

// CVE-2016-7422, CVE-2023-41051: a buffer that begins in memory and is longer
// than what is mapped there.
void case_cve_2016_7422_a_buffer_longer_than_memory(void) {
    static const uint32_t bytes[] = {512, 4096, 0x100000, 0x80000000,
                                     0xfffffe00};
    g.o.profile = VBLK_STANDARD;
    g.o.capacity = UINT64_C(1) << 40;
    guest_up_without(VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX);
    for (size_t i = 0; i < COUNT(bytes); i++) {
        for (int in = 0; in < 2; in++) {
            req r = prepare(in ? VBLK_T_IN : VBLK_T_OUT, 0, 1);
            uint16_t head = put_chain(0, (part[]){{r.header, 16, 0},
                                                  {0, 0, 0},
                                                  {r.status, 1, WRITE}}, 3);
            uint64_t d = g.queue[0].desc + 16 * (head + 1u);
            put64(d, RAM_END - 256);
            put32(d + 8, bytes[i]);
            put16(d + 12, (uint16_t)(NEXT | (in ? WRITE : 0)));
            offer(0, head);
            kick(0);
            CHECK_EQ(VBLK_S_IOERR, status_of(&r));
        }
    }
    CHECK_EQ(0, g.calls);
}

// CVE-2017-17381: a division by a queue size of 0, or a ring that was never
// set up.
void case_cve_2017_17381_a_queue_of_size_0(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_make();
        guest_negotiate(0);
        wr(VBLK_REG_QUEUE_NUM, 0);
        wr(VBLK_REG_QUEUE_READY, 1);
        guest_go();
        wr_drain(VBLK_REG_QUEUE_NOTIFY, 0);
        CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
        vblk_request none;
        CHECK_EQ(BROKEN, take(0, 0, &none).state);
        vblk_publish(&g.dev, 0);
    }
}

// CVE-2019-9547: chains and tables that lead back into themselves.
void case_cve_2019_9547_loops(void) {
    for (unsigned length = 1; length < 20; length++) {
        guest_init();
        guest_up();
        uint64_t table = alloc(16 * 32, 16);
        for (unsigned i = 0; i < length; i++) {
            part p = {0x100, 16, (uint16_t)(NEXT | (i ? WRITE : 0))};
            put_desc(g.queue[0].desc, i, p, (uint16_t)((i + 1) % length));
            put_desc(table, i, p, (uint16_t)((i + 1) % length));
        }
        part whole = {table, 16 * 32, INDIRECT};
        put_desc(g.queue[0].desc, 40, whole, 0);
        offer(0, 0);
        offer(0, 40);
        CHECK_EQ(EMPTY, kick(0).state);
        CHECK_EQ(2, g.events[VBLK_EV_CHAIN_LONG]);
        CHECK_EQ(0, g.calls);
    }
}

// CVE-2021-3748: a header or a status byte in memory that has no pointer.
static void *no_map(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    (void)user, (void)gpa, (void)n, (void)writable;
    return NULL;
}

static uint64_t not_mapped;

static void *map_all_but_one(void *user, uint64_t gpa, uint64_t *n,
                             bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    return gpa == not_mapped ? NULL : m.map(m.user, gpa, n, writable);
}

void case_cve_2021_3748_memory_without_pointers(void) {
    if (!g.mapped) {
        return;
    }
    guest_up();
    g.dev.memory.map = no_map;
    vblk_set_memory(&g.dev, g.dev.memory);
    request(VBLK_T_IN, 0, 512);
    kick(0);
    CHECK_EQ(0, g.calls);
    CHECK_EQ(1, counts().io_errors);
    CHECK_EQ(0, used_count(0));
    // Only the header has none: the accessors serve it.
    guest_init();
    guest_up();
    req r = request(VBLK_T_IN, 3, 512);
    not_mapped = r.header;
    g.dev.memory.map = map_all_but_one;
    vblk_set_memory(&g.dev, g.dev.memory);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(g.disk + 3 * 512, at(r.data), 512);
}

// CVE-2024-11614: offsets into a header that is shorter than they assume.
void case_cve_2024_11614_header_shorter_than_16(void) {
    for (uint32_t n = 0; n < 16; n++) {
        guest_init();
        guest_up();
        // The last bytes of memory: a read of all 16 would leave it.
        part p[2] = {{RAM_END - n, n, 0}, {alloc(1, 1), 1, WRITE}};
        submit(0, p, 2);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, *at(p[1].gpa));
        CHECK_EQ(1, g.events[VBLK_EV_HEADER_SHORT]);
        // And where the bytes after it would make a header of it.
        p[0].gpa = put_header(VBLK_T_FLUSH, 0);
        p[1].gpa = alloc(1, 1);
        submit(0, p, 2);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, *at(p[1].gpa));
        CHECK_EQ(2, g.events[VBLK_EV_HEADER_SHORT]);
        CHECK_EQ(0, g.calls);
    }
}

// CVE-2026-5747: queue registers that are changed after activation.
void case_cve_2026_5747_queue_registers_when_live(void) {
    for (int profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up();
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
        vblk_queue before = g.dev.queue[0];
        static const uint32_t registers[] = {
            VBLK_REG_QUEUE_NUM, VBLK_REG_QUEUE_DESC_LOW,
            VBLK_REG_QUEUE_DESC_HIGH, VBLK_REG_QUEUE_DRIVER_LOW,
            VBLK_REG_QUEUE_DRIVER_HIGH, VBLK_REG_QUEUE_DEVICE_LOW,
            VBLK_REG_QUEUE_DEVICE_HIGH};
        for (size_t i = 0; i < COUNT(registers); i++) {
            wr(registers[i], 0xfffffff0);
            wr(registers[i], 1);
        }
        CHECK_EQ(0, memcmp(&before, &g.dev.queue[0], sizeof before));
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    }
}

// CVE-2026-45782: I/O under way when the device is reset, whose completion
// then works on what is gone.
void case_cve_2026_45782_completion_after_reset(void) {
    vblk_request r[4];
    guest_up();
    for (int i = 0; i < 4; i++) {
        request(VBLK_T_IN, 0, 512);
        CHECK_EQ(REQUEST, take(0, 0, &r[i]).state);
    }
    reset();
    unsigned accesses = g.accesses;
    for (int i = 0; i < 4; i++) {
        CHECK(vblk_complete(&g.dev, &r[i], 100));
    }
    CHECK_EQ(accesses, g.accesses);
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    CHECK_EQ(0, g.dev.queue[0].run.under_way);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

// FreeBSD-SA-24:17: a length that is read twice. The guest enlarges it in
// between: here, whenever the device looks a buffer up.
static vblk_memory inner_memory;
static uint64_t grow_at;

static void *map_and_grow(void *user, uint64_t gpa, uint64_t *n,
                          bool writable) {
    put32(grow_at, 0x7fffffff);
    return inner_memory.map(user, gpa, n, writable);
}

static int read_and_grow(void *user, uint64_t gpa, void *dst, uint64_t n) {
    int err = inner_memory.read(user, gpa, dst, n);
    put32(grow_at, gpa < grow_at && grow_at < gpa + n ? 0x7fffffff : 512);
    return err;
}

void case_freebsd_sa_24_17_a_length_read_twice(void) {
    inner_memory = g.o.memory;
    grow_at = 0x800;
    if (g.mapped) {
        g.o.memory.map = map_and_grow;
    } else {
        g.o.memory.read = read_and_grow;
    }
    guest_up();
    req r = request(VBLK_T_IN, 5, 512);
    grow_at = g.queue[0].desc + 16 + 8;
    if (g.mapped) { // the table is looked up once more, with the old length
        vblk_request taken;
        CHECK_EQ(REQUEST, take(0, 0, &taken).state);
        CHECK_EQ(512, taken.bytes);
        CHECK_EQ(512, taken.seg[0].n);
        vblk_complete(&g.dev, &taken, 512);
        vblk_publish(&g.dev, 0);
    } else {
        kick(0);
        CHECK_MEM(g.disk + 5 * 512, at(r.data), 512);
    }
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(513, used_len(0));
}

void case_sector_2_to_the_55_aliases_sector_0(void) {
    uint8_t before[512];
    guest_up();
    memcpy(before, g.disk, 512);
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, UINT64_C(1) << 55, 512));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, (UINT64_C(1) << 55) + 1, 512));
    CHECK_MEM(before, g.disk, 512);
}

// 2^23 sectors are 2^32 bytes: a 32-bit product is 0.
void case_a_length_that_wraps_32_bits(void) {
    g.o.profile = VBLK_STANDARD;
    g.o.capacity = UINT64_C(1) << 33;
    g.backing = 0;
    guest_up_without(VBLK_F_SIZE_MAX | VBLK_F_EVENT_IDX);
    req r = prepare(VBLK_T_IN, 0, 1);
    part status = {r.status, 1, WRITE};
    uint16_t head = put_chain(0, (part[]){{r.header, 16, 0}, status, status,
                                          status}, 4);
    for (unsigned i = 1; i < 3; i++) {
        uint64_t d = g.queue[0].desc + 16 * (head + i);
        put64(d, 0);
        put32(d + 8, 0x80000000);
        put16(d + 12, NEXT | WRITE);
    }
    offer(0, head);
    kick(0);
    CHECK_EQ(VBLK_S_IOERR, status_of(&r));
    CHECK_EQ(0, g.calls);
}

void case_a_wide_store_to_the_status_byte(void) {
    guest_up();
    for (uint32_t type = 0; type < 10; type++) {
        req r = prepare(type, 0, type == VBLK_T_FLUSH ? 0 : 512);
        fill(r.status - 1, 0x11, 1);
        fill(r.status + 1, 0x22, 1);
        send(0, &r);
        kick(0);
        CHECK(status_of(&r) <= VBLK_S_UNSUPP);
        CHECK_EQ(0x11, *at(r.status - 1));
        CHECK_EQ(0x22, *at(r.status + 1));
    }
}

void case_the_status_lands_in_the_data_after_an_early_failure(void) {
    guest_up();
    static const uint64_t sectors[] = {SECTORS, UINT64_MAX};
    for (size_t i = 0; i < COUNT(sectors); i++) {
        req r = request(VBLK_T_IN, sectors[i], 1024);
        kick(0);
        CHECK_EQ(VBLK_S_IOERR, status_of(&r));
        for (uint64_t k = 0; k < 1024; k++) {
            CHECK_EQ(DIRT, *at(r.data + k));
        }
    }
}

// Discard is not offered; its request, whatever its payload, is unknown.
void case_discard_payloads(void) {
    for (uint32_t type = 11; type < 15; type++) {
        guest_init();
        guest_up();
        for (uint32_t n = 0; n < 64; n += 8) {
            req r = prepare(type, 0, n);
            part p[3] = {{r.header, 16, 0}, {r.data, n, 0},
                         {r.status, 1, WRITE}};
            submit(0, p, 3);
            kick(0);
            CHECK_EQ(VBLK_S_UNSUPP, status_of(&r));
        }
        CHECK_EQ(0, g.calls);
    }
}

void case_the_available_index_moves_backwards(void) {
    for (uint16_t back = 1; back < 6; back++) {
        guest_init();
        guest_up();
        for (int i = 0; i < 6; i++) {
            run(VBLK_T_IN, 0, 512);
        }
        g.calls = 0;
        put16(g.queue[0].avail + 2, (uint16_t)(6 - back));
        CHECK_EQ(BROKEN, kick(0).state);
        CHECK_EQ(0, g.calls);
        CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    }
}

void case_the_same_head_twice_in_flight(void) {
    vblk_request first, second;
    guest_up();
    req r = request(VBLK_T_IN, 3, 512);
    again(&r);
    offer(0, r.head);
    CHECK_EQ(REQUEST, take(0, 0, &first).state);
    CHECK_EQ(REQUEST, take(0, 0, &second).state);
    CHECK_EQ(first.head, second.head);
    CHECK(!vblk_complete(&g.dev, &second, -5));
    CHECK(!vblk_complete(&g.dev, &first, 0));
    vblk_publish(&g.dev, 0);
    CHECK_EQ(2, used_count(0));
}
