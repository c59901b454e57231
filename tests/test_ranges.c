// Requests over ranges of the disk, the storage's lifetime, blocks, topology,
// and guest memory behind somebody else's table.
#define _FILE_OFFSET_BITS 64
#define VBLK_THREADED
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static const uint32_t types[] = {VBLK_T_DISCARD, VBLK_T_WRITE_ZEROES,
                                 VBLK_T_SECURE_ERASE};

typedef struct cleared {
    uint32_t type;
    uint64_t offset, bytes;
    bool     unmap;
} cleared;

static cleared  done[VBLK_EV_END];
static unsigned dones, flushed_at; // the latter: of them, at the last flush
static uint64_t bad_offset;        // is an error

static int clear(uint32_t type, uint64_t offset, uint64_t bytes, bool unmap) {
    if (offset == bad_offset) {
        return -EIO;
    }
    done[dones++ % COUNT(done)] = (cleared){type, offset, bytes, unmap};
    if (type == VBLK_T_WRITE_ZEROES) {
        memset(g.disk + offset, 0, (size_t)bytes);
    }
    return 0;
}

static int discard(void *user, uint64_t offset, uint64_t bytes, bool unmap) {
    (void)user;
    return clear(VBLK_T_DISCARD, offset, bytes, unmap);
}

static int zero(void *user, uint64_t offset, uint64_t bytes, bool unmap) {
    (void)user;
    return clear(VBLK_T_WRITE_ZEROES, offset, bytes, unmap);
}

static int erase(void *user, uint64_t offset, uint64_t bytes, bool unmap) {
    (void)user;
    return clear(VBLK_T_SECURE_ERASE, offset, bytes, unmap);
}

static int note_flush(void *user) {
    (void)user;
    flushed_at = dones;
    g.flushes++;
    return 0;
}

static void ranges_up(void) {
    dones = flushed_at = 0;
    bad_offset = UINT64_MAX;
    g.o.backend.discard = discard;
    g.o.backend.write_zeroes = zero;
    g.o.backend.secure_erase = erase;
    g.o.backend.flush = note_flush;
    guest_up();
}

static uint64_t put_ranges(const uint32_t (*range)[3], unsigned n) {
    uint64_t gpa = alloc(16 * (size_t)n + 16, 1);
    for (unsigned i = 0; i < n; i++) {
        put64(gpa + 16 * i, range[i][0]);
        put32(gpa + 16 * i + 8, range[i][1]);
        put32(gpa + 16 * i + 12, range[i][2]);
    }
    return gpa;
}

// `bytes` of them at `gpa`, in descriptors of `piece` bytes.
static uint8_t run_ranges(uint32_t type, uint64_t gpa, uint32_t bytes,
                          uint32_t piece) {
    part     p[MAX_SEGS + 2];
    unsigned n = 0;
    req      r = prepare(type, 77, 0);
    p[n++] = (part){r.header, 16, 0};
    for (uint32_t at = 0; at < bytes; at += piece) {
        p[n++] = (part){gpa + at, bytes - at < piece ? bytes - at : piece, 0};
    }
    p[n++] = (part){r.status, 1, WRITE};
    submit(0, p, n);
    kick(0);
    return status_of(&r);
}

static uint8_t one_range(uint32_t type, uint64_t sector, uint32_t sectors,
                         uint32_t flags) {
    const uint32_t range[1][3] = {{0, sectors, flags}};
    uint64_t gpa = put_ranges(range, 1);
    put64(gpa, sector);
    return run_ranges(type, gpa, 16, 16);
}

void v20_how_many_ranges(void) {
    static uint32_t range[64][3];
    for (unsigned i = 0; i < COUNT(range); i++) {
        range[i][0] = 8 * i;
        range[i][1] = 1 + i % 8;
    }
    ranges_up();
    uint64_t gpa = put_ranges((const uint32_t (*)[3])range, COUNT(range));
    CHECK_EQ(64, rd(VBLK_REG_CONFIG + 40));
    for (unsigned t = 0; t < COUNT(types); t++) {
        static const uint32_t bad[] = {0, 1, 8, 15, 17, 24, 63 * 16 + 8,
                                       65 * 16, 64 * 16 + 1};
        for (unsigned i = 0; i < COUNT(bad); i++) {
            ROW_BEGIN();
            CHECK_EQ(VBLK_S_IOERR, run_ranges(types[t], gpa, bad[i], 2000));
            ROW("type %u, %u bytes", types[t], bad[i]);
        }
        CHECK_EQ(0, dones);
        static const uint32_t pieces[] = {2000, 16, 7, 1, 100};
        for (unsigned i = 0; i < COUNT(pieces); i++) {
            uint32_t n = pieces[i] < 10 ? 7 : 64;
            dones = 0;
            CHECK_EQ(VBLK_S_OK, run_ranges(types[t], gpa, 16 * n, pieces[i]));
            CHECK_EQ(n, dones);
            for (unsigned k = 0; k < dones; k++) {
                CHECK_EQ(types[t], done[k].type);
                CHECK_EQ(range[k][0] * 512, done[k].offset);
                CHECK_EQ(range[k][1] * 512, done[k].bytes);
                CHECK(!done[k].unmap);
            }
        }
        dones = 0;
    }
    CHECK_EQ(5, counts().discards);
    CHECK_EQ(5, counts().write_zeroes);
    CHECK_EQ(5, counts().secure_erases);
    CHECK_EQ(27, counts().io_errors);
}

// One that is bad spoils all, wherever it stands: nothing is executed.
void v20_v21_one_bad_range(void) {
    ranges_up();
    const uint32_t most = rd(VBLK_REG_CONFIG + 36);
    CHECK_EQ(65536, most);
    for (unsigned t = 0; t < COUNT(types); t++) {
        for (unsigned where = 0; where < 3; where++) {
            for (unsigned bit = 0; bit < 36; bit++) {
                uint32_t range[3][3] = {{0, 8, 0}, {16, 8, 0}, {32, 8, 0}};
                uint32_t *r = range[where];
                uint8_t   want = VBLK_S_IOERR;
                uint64_t  sector = r[0];
                if (bit < 32) {
                    r[2] = UINT32_C(1) << bit;
                    want = VBLK_S_UNSUPP;
                    if (bit == 0 && types[t] == VBLK_T_WRITE_ZEROES) {
                        want = VBLK_S_OK;
                    }
                } else if (bit == 32) {
                    r[1] = most + 1;
                } else if (bit == 33) {
                    sector = SECTORS - 7;
                } else if (bit == 34) {
                    sector = UINT64_MAX - 3;
                } else {
                    sector = UINT64_MAX / 512 + 1;
                }
                uint64_t gpa = put_ranges((const uint32_t (*)[3])range, 3);
                put64(gpa + 16 * where, sector);
                ROW_BEGIN();
                dones = 0;
                CHECK_EQ(want, run_ranges(types[t], gpa, 48, 48));
                CHECK_EQ(want == VBLK_S_OK ? 3 : 0, dones);
                CHECK(want != VBLK_S_OK || done[where].unmap);
                ROW("type %u, range %u, case %u", types[t], where, bit);
            }
        }
        CHECK_EQ(VBLK_S_OK, one_range(types[t], 0, 9, 0));
        CHECK_EQ(VBLK_S_OK, one_range(types[t], SECTORS, 0, 0)); // empty
        CHECK_EQ(VBLK_S_IOERR, one_range(types[t], SECTORS + 1, 0, 0));
    }
    CHECK_EQ(VBLK_S_IOERR, // and what is no memory
             run_ranges(VBLK_T_DISCARD, RAM_END - 8, 16, 16));
    CHECK_EQ(VBLK_EV_DATA_UNMAPPED, g.last.code);
}

void v20_how_long_a_range_may_be(void) {
    g.o.range_sectors = 10;
    ranges_up();
    CHECK_EQ(10, rd(VBLK_REG_CONFIG + 60));
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_SECURE_ERASE, 5, 10, 0));
    CHECK_EQ(VBLK_S_IOERR, one_range(VBLK_T_SECURE_ERASE, 5, 11, 0));
    CHECK_EQ(VBLK_EV_RANGE_LONG, g.last.code);
    CHECK_EQ(11 * 512, g.last.bytes);
    CHECK_EQ(10 * 512, g.last.against);
    CHECK_EQ(1, dones);
}

// A host does them itself, and says that it failed: where they begin.
void x7_ranges_of_an_asynchronous_host(void) {
    const uint32_t range[3][3] = {{24, 2, 0}, {0, 0, 1}, {40, 3, 1}};
    ranges_up();
    for (int fails = 0; fails < 2; fails++) {
        vblk_request r;
        uint64_t gpa = put_ranges(range, 3);
        req      q = prepare(VBLK_T_WRITE_ZEROES, 0, 0);
        part     p[3] = {{q.header, 16, 0}, {gpa, 48, 0}, {q.status, 1, WRITE}};
        submit(0, p, 3);
        CHECK_EQ(REQUEST, take(0, 0, &r).state);
        CHECK_EQ(VBLK_T_WRITE_ZEROES, r.type);
        CHECK_EQ(2, r.segs);
        CHECK_EQ(0, r.bytes);
        vblk_range second = vblk_range_of(&r, 1);
        CHECK(vblk_range_of(&r, 0).offset == 24 * 512 &&
              !vblk_range_of(&r, 0).unmap);
        CHECK(second.offset == 40 * 512 && second.bytes == 1536 &&
              second.unmap);
        CHECK_EQ(VBLK_OK, vblk_complete(&g.dev, &r, fails ? -EIO : 0));
        CHECK_EQ(fails ? VBLK_S_IOERR : VBLK_S_OK, status_of(&q));
        CHECK(!fails || g.last.sector == 24);
        vblk_publish(&g.dev, 0);
    }
    CHECK_EQ(0, dones);
    CHECK_EQ(1, counts().write_zeroes);
}

void x7_write_zeroes_reads_as_zeroes(void) {
    static uint8_t before[SECTORS * 512];
    ranges_up();
    memcpy(before, g.disk, sizeof before);
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_WRITE_ZEROES, 9, 5, 0));
    req r = request(VBLK_T_IN, 8, 7 * 512);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(before + 8 * 512, at(r.data), 512);
    for (unsigned i = 512; i < 6 * 512; i++) {
        CHECK_EQ(0, *at(r.data + i));
    }
    CHECK_MEM(before + 14 * 512, at(r.data + 6 * 512), 512);
}

// What fails is told with its place; what is behind it is not tried.
void x7_a_range_that_fails(void) {
    const uint32_t range[3][3] = {{8, 1, 0}, {24, 2, 0}, {40, 3, 0}};
    for (unsigned t = 0; t < COUNT(types); t++) {
        ranges_up();
        bad_offset = 24 * 512;
        uint64_t gpa = put_ranges(range, 3);
        CHECK_EQ(VBLK_S_IOERR, run_ranges(types[t], gpa, 48, 48));
        CHECK_EQ(1, dones);
        CHECK_EQ(VBLK_EV_DISCARD_FAILED, g.last.code);
        CHECK_EQ(24, g.last.sector);
        CHECK_EQ(EIO, g.last.error);
        CHECK_EQ(1, counts().io_errors);
        CHECK_EQ(0, counts().discards + counts().write_zeroes +
                        counts().secure_erases);
        guest_init();
    }
}

// With the cache off it is durable before it completes, as a write is.
void x7_ranges_are_durable_where_writes_are(void) {
    g.o.backend.discard = discard;
    g.o.backend.write_zeroes = zero;
    g.o.backend.flush = note_flush;
    bad_offset = UINT64_MAX;
    guest_up_without(VBLK_F_FLUSH);
    dones = flushed_at = 0;
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_WRITE_ZEROES, 1, 1, 0));
    CHECK_EQ(1, flushed_at);
    CHECK_EQ(1, g.flushes);
    reset();
    guest_negotiate(0);
    guest_queue_up(0, 64);
    guest_go();
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_WRITE_ZEROES, 1, 1, 0));
    CHECK_EQ(1, g.flushes);
}

// An operation each; WRITE_ZEROES pays for its bytes, DISCARD does not.
void t2_what_ranges_cost(void) {
    const uint32_t range[3][3] = {{8, 100, 0}, {240, 0, 0}, {400, 30, 0}};
    g.o.limits.iops = 1000;
    g.o.limits.bps = 1000000;
    ranges_up();
    uint64_t gpa = put_ranges(range, 3);
    int64_t ops = g.dev.ops.tokens, bytes = g.dev.bytes.tokens;
    CHECK_EQ(VBLK_S_OK, run_ranges(VBLK_T_DISCARD, gpa, 48, 48));
    CHECK_EQ(2, ops - g.dev.ops.tokens);
    CHECK_EQ(0, bytes - g.dev.bytes.tokens);
    CHECK_EQ(VBLK_S_OK, run_ranges(VBLK_T_WRITE_ZEROES, gpa, 48, 48));
    CHECK_EQ(4, ops - g.dev.ops.tokens);
    CHECK_EQ(130 * 512, bytes - g.dev.bytes.tokens);
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_WRITE_ZEROES, 1, 0, 1)); // is empty
    CHECK_EQ(4, ops - g.dev.ops.tokens);
    g.dev.ops.tokens = 1; // one more is needed: it waits for it
    request(VBLK_T_FLUSH, 0, 0);
    drain_at(0, 0);
    req r = prepare(VBLK_T_DISCARD, 0, 0);
    part p[3] = {{r.header, 16, 0}, {gpa, 48, 0}, {r.status, 1, WRITE}};
    submit(0, p, 3);
    outcome out = drain_at(0, 0);
    CHECK_EQ(STALLED, out.state);
    CHECK_EQ(2000000, out.wait_ns);
    drain_at(0, out.wait_ns);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
}

void v22_lifetime(void) {
    uint16_t figures[3] = {2, 10, 11};
    g.o.backend.lifetime = figures;
    guest_up();
    for (unsigned i = 0; i < 2; i++) {
        uint8_t want[6] = {2, 0, 10, 0, 11, 0};
        req r = request(VBLK_T_GET_LIFETIME, 0, 6);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        for (unsigned k = 0; k < 6 && i; k++) {
            want[k] = 0;
        }
        CHECK_MEM(want, at(r.data), 6);
        figures[0] = 4; // what the standard reserves is not known
        figures[1] = figures[2] = 12;
    }
    g.o.backend.lifetime = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_UNSUPP, run(VBLK_T_GET_LIFETIME, 0, 6));
}

static const uint32_t wrong_blocks[][5] = { // block, physical, and the three
    {4096, 2048, 0, 0, 0}, {512, 131072, 0, 0, 0}, {512, 1536, 0, 0, 0},
    {4096, 8192, 512, 0, 0}, {512, 4096, 4096, 0, 0}, {512, 0, 0, 100, 0},
    {512, 0, 0, 65536 * 512, 0}, {4096, 0, 0, 0, 6144}, {0, 0, 512, 0, 0}};

void b6_topology(void) {
    for (unsigned i = 0; i < COUNT(wrong_blocks); i++) {
        const uint32_t *w = wrong_blocks[i];
        g.o.backend.block_size = w[0];
        g.o.backend.physical_size = w[1];
        g.o.backend.align_offset = w[2];
        g.o.backend.min_io = w[3];
        g.o.backend.opt_io = w[4];
        ROW_BEGIN();
        CHECK_EQ((uint64_t)VBLK_ERR_BACKEND,
                 (uint64_t)vblk_init(&g.dev, &g.o));
        ROW("case %u", i);
    }
    g.o.backend.block_size = 1024;
    g.o.backend.physical_size = 8192;
    g.o.backend.align_offset = 3072;
    g.o.backend.min_io = 16384;
    g.o.backend.opt_io = 1u << 20;
    ranges_up();
    CHECK(vblk_device_features(&g.dev) & VBLK_F_TOPOLOGY);
    CHECK_EQ(1024, rd(VBLK_REG_CONFIG + 20));
    CHECK_EQ(3 | 3 << 8 | 16 << 16, rd(VBLK_REG_CONFIG + 24));
    CHECK_EQ(1024, rd(VBLK_REG_CONFIG + 28));
    CHECK_EQ(16, rd(VBLK_REG_CONFIG + 44)); // discards in physical blocks
    CHECK_EQ(16, rd(VBLK_REG_CONFIG + 68));
    CHECK_EQ(0, rd(VBLK_REG_CONFIG + 56));
    g.o.backend.unmaps = true;
    guest_up();
    CHECK_EQ(1, rd(VBLK_REG_CONFIG + 56));
}

// V19: where the driver can know of blocks, parts of them are refused.
void v19_parts_of_blocks(void) {
    g.o.backend.block_size = 4096;
    g.backing = SECTORS * 512 - 512; // the last block is not whole
    g.o.capacity = 0;
    ranges_up();
    CHECK_EQ(SECTORS - 8, rd(VBLK_REG_CONFIG));
    CHECK_EQ(1, g.events[VBLK_EV_CAPACITY_ROUNDED]);
    CHECK_EQ(3584, g.backing % 4096);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 8, 4096));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 16, 8192));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 8, 512));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 7, 4096));
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_OUT, 4, 4096));
    CHECK_EQ(VBLK_EV_BLOCK_RAGGED, g.last.code);
    CHECK_EQ(VBLK_S_OK, one_range(VBLK_T_DISCARD, 8, 8, 0));
    CHECK_EQ(VBLK_S_IOERR, one_range(VBLK_T_DISCARD, 8, 4, 0));
    CHECK_EQ(VBLK_S_IOERR, one_range(VBLK_T_DISCARD, 4, 8, 0));
    CHECK_EQ(1, dones);
    CHECK_EQ((uint64_t)VBLK_ERR_CAPACITY, (uint64_t)vblk_resize(&g.dev, 12));
    CHECK_EQ(VBLK_OK, vblk_resize(&g.dev, 16));
    g.o.range_sectors = 12;
    CHECK_EQ((uint64_t)VBLK_ERR_RANGES, (uint64_t)vblk_init(&g.dev, &g.o));
    g.o.range_sectors = (1u << 21) + 8;
    CHECK_EQ((uint64_t)VBLK_ERR_RANGES, (uint64_t)vblk_init(&g.dev, &g.o));
    g.o.range_sectors = 0;
    g.o.range_max = 65;
    CHECK_EQ((uint64_t)VBLK_ERR_RANGES, (uint64_t)vblk_init(&g.dev, &g.o));
    g.o.range_max = 0;
    g.o.features_off = VBLK_F_BLK_SIZE;
    guest_up();
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, 7, 512)); // it is so all the same
}

void f1_what_is_optional_is_offered_where_it_is(void) {
    const uint64_t all = VBLK_F_DISCARD | VBLK_F_WRITE_ZEROES |
                         VBLK_F_SECURE_ERASE;
    ranges_up();
    CHECK_EQ(all, vblk_device_features(&g.dev) & all);
    g.o.backend.secure_erase = NULL;
    guest_up();
    CHECK_EQ(all & ~VBLK_F_SECURE_ERASE, vblk_device_features(&g.dev) & all);
    CHECK_EQ(VBLK_S_UNSUPP, one_range(VBLK_T_SECURE_ERASE, 0, 1, 0));
    g.o.features_off = VBLK_F_DISCARD;
    guest_up();
    CHECK_EQ(VBLK_F_WRITE_ZEROES, vblk_device_features(&g.dev) & all);
    g.o.features_off = 0;
    g.o.backend.write = NULL;
    guest_up();
    CHECK_EQ(0, vblk_device_features(&g.dev) & all);
    CHECK_EQ(VBLK_S_UNSUPP, one_range(VBLK_T_DISCARD, 0, 1, 0));
    CHECK_EQ(0, dones);
}


// ---- ACCESS_PLATFORM --------------------------------------------------------

// Pages of what the driver says, to pages of memory; 0: none.
enum { PAGE = 4096, PAGES = 64, IOVA = 0x40000000 };
static uint64_t table[PAGES];

static bool translate(uint64_t *iova, uint64_t *n) {
    uint64_t page = (*iova - IOVA) / PAGE, at_ = *iova % PAGE;
    if (*iova < IOVA || page >= PAGES || !table[page]) {
        return false;
    }
    *n = *n < PAGE - at_ ? *n : PAGE - at_;
    *iova = table[page] + at_;
    return true;
}

static int through(uint64_t iova, uint8_t *host, uint64_t n, bool in) {
    for (int moves = 0; moves <= (host != NULL); moves++) {
        for (uint64_t k = 0, some; k < n; k += some) {
            uint64_t gpa = iova + k;
            some = n - k;
            if (!translate(&gpa, &some)) {
                return -1;
            }
            if (moves) {
                memcpy(in ? host + k : at(gpa), in ? at(gpa) : host + k,
                       (size_t)some);
            }
        }
    }
    return 0;
}

static int iommu_read(void *user, uint64_t iova, void *dst, uint64_t n) {
    (void)user;
    return through(iova, dst, n, true);
}

static int iommu_write(void *user, uint64_t iova, const void *src, uint64_t n) {
    (void)user;
    return through(iova, (uint8_t *)(uintptr_t)src, n, false);
}

void f3_access_platform(void) {
    g.o.access_platform = true;
    guest_make();
    guest_negotiate(VBLK_F_ACCESS_PLATFORM);
    CHECK_EQ(3, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, g.events[VBLK_EV_FEATURES_PLATFORM]);
    guest_up();
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
}

// Mappings come and go under requests: what is mapped when a request is there
// is where its data goes, what is not is refused, and no other page changes.
void x5_mappings_that_change(void) {
    uint64_t pages = alloc(PAGES * PAGE, PAGE);
    uint8_t *const memory = at(pages);
    static uint8_t before[PAGES * PAGE];
    g.o.access_platform = true;
    g.o.memory = (vblk_memory){iommu_read, iommu_write, NULL, NULL};
    guest_make();
    memset(table, 0, sizeof table);
    table[0] = pages;            // rings, header, status
    table[1] = pages + 1 * PAGE;
    vblk_set_status(&g.dev, 1);
    vblk_set_status(&g.dev, 3);
    vblk_set_driver_features(&g.dev, VBLK_F_VERSION_1 | VBLK_F_ACCESS_PLATFORM);
    vblk_set_status(&g.dev, 0xb);
    vblk_set_status(&g.dev, 0xf);
    memset(memory, 0, 2 * PAGE);
    vblk_ring ring = {.size = 4, .desc = IOVA, .avail = IOVA + 256,
                      .used = IOVA + 512};
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    for (unsigned i = 0; i < 400; i++) {
        uint32_t n = 512 * (1 + test_below(24));
        uint64_t iova = IOVA + 2 * PAGE + test_below(40 * PAGE);
        uint8_t *desc = memory, *status = memory + PAGE + 100;
        bool     mapped = true;
        for (unsigned k = 2; k < PAGES; k++) { // each to a page of its own
            uint64_t page = pages + (2 + (k * 5 + i) % 62) * PAGE;
            table[k] = test_below(8) ? page : 0;
        }
        for (uint64_t k = iova / PAGE; k <= (iova + n - 1) / PAGE; k++) {
            mapped = mapped && table[k - IOVA / PAGE];
        }
        const uint64_t parts[3][3] = {{IOVA + PAGE, 16, 1}, {iova, n, 3},
                                      {IOVA + PAGE + 100, 1, 2}};
        for (unsigned k = 0; k < 3; k++) {
            for (unsigned b = 0; b < 8; b++) {
                desc[16 * k + b] = (uint8_t)(parts[k][0] >> 8 * b);
                uint64_t rest = parts[k][1] | parts[k][2] << 32 |
                                (uint64_t)(k + 1) << 48;
                desc[16 * k + 8 + b] = (uint8_t)(rest >> 8 * b);
            }
        }
        memory[256 + 2] = (uint8_t)(i + 1);
        memory[256 + 3] = (uint8_t)((i + 1) >> 8);
        *status = 0xee;
        memcpy(before, memory, sizeof before);
        vblk_drain(&g.dev, 0, 0);
        ROW_BEGIN();
        CHECK_EQ(mapped ? VBLK_S_OK : VBLK_S_IOERR, *status);
        for (uint64_t k = 0; k < n && mapped; k++) {
            uint64_t gpa = iova + k, one = 1;
            CHECK(translate(&gpa, &one) && *at(gpa) == g.disk[k]);
            before[gpa - pages] = g.disk[k];
        }
        CHECK_MEM(before + 2 * PAGE, memory + 2 * PAGE,
                  sizeof before - 2 * PAGE);
        ROW("round %u", i);
    }
    guest_init();
}


// ---- Files ------------------------------------------------------------------

static vblk_file file;
static char      path[] = "/tmp/vblk-ranges-XXXXXX";

static uint64_t blocks(void) {
    struct stat st;
    fsync(file.fd);
    return fstat(file.fd, &st) ? 0 : (uint64_t)st.st_blocks;
}

static void make_file(uint64_t bytes) {
    static uint8_t ones[1 << 16];
    strcpy(path + sizeof path - 7, "XXXXXX");
    int fd = mkstemp(path);
    memset(ones, 0xa7, sizeof ones);
    for (uint64_t at_ = 0; at_ < bytes; at_ += sizeof ones) {
        CHECK_EQ(sizeof ones, write(fd, ones, sizeof ones));
    }
    CHECK_EQ(VBLK_OK, vblk_file_from(&file, fd, false));
}

static bool all_are(uint64_t offset, uint64_t bytes, uint8_t value) {
    uint8_t b[512];
    for (uint64_t k = 0; k < bytes; k += sizeof b) {
        if (pread(file.fd, b, sizeof b, (off_t)(offset + k)) != 512 ||
            b[0] != value || memcmp(b, b + 1, sizeof b - 1)) {
            return false;
        }
    }
    return true;
}

// Holes where the file system makes them; zeroes in any case.
void b8_a_file_gives_space_back(void) {
    const uint64_t mib = 1 << 20;
    static const int errors[] = {0, EOPNOTSUPP, EINVAL, ENOSYS};
    for (unsigned how = 0; how < COUNT(errors); how++) { // but 0: it cannot
        make_file(4 * mib);
        vblk_backend b = vblk_file_backend(&file);
        uint64_t full = blocks();
        if (how) {
            test_calls_fail("fallocate", errors[how], 0, 4);
        } else {
            test_calls_fail("fallocate", EINTR, 0, 1); // is tried again
        }
        file.end = 0; // what is known of its end does not count, where it is
        CHECK_EQ(0, b.discard(b.user, mib, mib, false));
        CHECK_EQ(full, blocks() + (how ? 0 : 2048));
        CHECK(all_are(mib, mib, how ? 0xa7 : 0));
        CHECK_EQ(0, b.write_zeroes(b.user, 2 * mib, mib, false));
        CHECK_EQ(full, blocks() + (how ? 0 : 2048));
        CHECK_EQ(0, b.write_zeroes(b.user, 3 * mib + 512, mib / 2, true));
        CHECK(how || full - blocks() > 2048 + 900);
        CHECK(all_are(0, mib, 0xa7));
        CHECK(all_are(2 * mib, mib, 0));
        CHECK(all_are(3 * mib, 512, 0xa7));
        CHECK(all_are(3 * mib + 512, mib / 2, 0));
        CHECK(all_are(3 * mib + 512 + mib / 2, mib / 2 - 512, 0xa7));
        CHECK_EQ(0, test_calls_left());
        CHECK_EQ(4 * mib, lseek(file.fd, 0, SEEK_END));
        // Beyond the end all is zero, and the file does not grow.
        test_calls_fail("fallocate", errors[how], 0, how > 0);
        CHECK_EQ(0, b.write_zeroes(b.user, 4 * mib - 512, mib, false));
        CHECK_EQ(0, b.discard(b.user, 8 * mib, mib, false));
        CHECK_EQ(4 * mib, lseek(file.fd, 0, SEEK_END));
        CHECK(all_are(4 * mib - 512, 512, 0));
        test_calls_fail("fallocate", EIO, 0, 2);
        CHECK_EQ((uint64_t)-EIO, (uint64_t)b.discard(b.user, 0, mib, false));
        CHECK_EQ((uint64_t)-EIO,
                 (uint64_t)b.write_zeroes(b.user, 0, mib, false));
        CHECK_EQ(0, test_calls_left());
        vblk_file_close(&file);
        unlink(path);
    }
}

void b8_a_memory_disk_is_cleared(void) {
    static uint8_t data[4096];
    vblk_ramdisk   disk = {data, sizeof data};
    vblk_backend   b = vblk_ramdisk_backend(&disk);
    memset(data, 1, sizeof data);
    CHECK_EQ(0, b.write_zeroes(b.user, 512, 512, true));
    CHECK_EQ(0, b.discard(b.user, 3584, 4096, false)); // beyond its end too
    CHECK_EQ(0, b.discard(b.user, 8192, 4096, false));
    for (unsigned i = 0; i < sizeof data; i++) {
        CHECK_EQ(i < 512 || (i >= 1024 && i < 3584), data[i]);
    }
}
