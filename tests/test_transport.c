// The door for transports other than MMIO.
#include "guest.h"

static void bind_by_calls(uint64_t features) {
    guest_make();
    vblk_set_status(&g.dev, 1);
    vblk_set_status(&g.dev, 3);
    vblk_set_driver_features(&g.dev, vblk_device_features(&g.dev) & features);
    vblk_set_status(&g.dev, 0xb);
    CHECK_EQ(0xb, vblk_status(&g.dev));
    CHECK_EQ(vblk_device_features(&g.dev) & features,
             vblk_driver_features(&g.dev));
}

static vblk_ring lay_out(unsigned queue, uint32_t size) {
    guest_queue *q = &g.queue[queue];
    memset(q, 0, sizeof *q);
    q->size = size;
    q->desc = alloc(16 * (size_t)size, 16);
    q->avail = alloc(6 + 2 * (size_t)size, 2);
    q->used = alloc(6 + 8 * (size_t)size, 4);
    fill(q->desc, 0, 16 * (size_t)size);
    fill(q->avail, 0, 6 + 2 * (size_t)size);
    fill(q->used, 0, 6 + 8 * (size_t)size);
    mark(q->used, 6 + 8 * (uint64_t)size, RING);
    return (vblk_ring){.size = size, .desc = q->desc, .avail = q->avail,
                       .used = q->used};
}

void transport_binds_without_registers(void) {
    g.o.queues = 2;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    ring = lay_out(1, 8);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 1, &ring));
    CHECK_EQ(1, g.notified);
    vblk_set_status(&g.dev, 0xf);
    CHECK_EQ((uint64_t)VBLK_ALL_QUEUES, (uint64_t)g.notified);
    for (unsigned i = 0; i < 2; i++) {
        req r = prepare(VBLK_T_IN, i, 512);
        send(i, &r);
        drain(i);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(i, (unsigned)g.fired_queue);
    }
    vblk_needs_reset(&g.dev);
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE, (uint64_t)g.fired_queue);
    vblk_interrupt_ack(&g.dev, 3);
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    uint8_t config[64];
    vblk_read_config(&g.dev, 0, config, sizeof config);
    for (uint32_t i = 0; i < sizeof config; i++) {
        CHECK_EQ(vblk_mmio_read(&g.dev, 0x100 + i, 1), config[i]);
    }
    vblk_read_config(&g.dev, UINT64_MAX, config, 8);
    CHECK_EQ(0, config[0]);
}

void transport_refuses_a_start_that_makes_no_sense(void) {
    guest_make();
    vblk_ring ring = lay_out(0, 16);
    CHECK_EQ((uint64_t)VBLK_ERR_RING,
             (uint64_t)vblk_queue_start(&g.dev, 0, &ring)); // too early
    bind_by_calls(~UINT64_C(0));
    static const uint32_t sizes[] = {0, 3, 512, UINT32_MAX};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        ring.size = sizes[i];
        CHECK_EQ((uint64_t)VBLK_ERR_RING,
                 (uint64_t)vblk_queue_start(&g.dev, 0, &ring));
    }
    ring.size = 16;
    CHECK_EQ((uint64_t)VBLK_ERR_RING,
             (uint64_t)vblk_queue_start(&g.dev, 1, &ring));
    CHECK_EQ((uint64_t)VBLK_ERR_RING,
             (uint64_t)vblk_queue_start(&g.dev, ~0u, &ring));
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    CHECK_EQ((uint64_t)VBLK_ERR_RING,
             (uint64_t)vblk_queue_start(&g.dev, 0, &ring)); // runs already
}

// Stop, and go on where it was, with another device over the same rings.
void transport_moves_a_queue_to_another_device(void) {
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    vblk_queue_start(&g.dev, 0, &ring);
    vblk_set_status(&g.dev, 0xf);
    for (uint32_t i = 0; i < 100; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, i, 512));
        g.bump = g.queue[0].used + 512;
    }
    req late = request(VBLK_T_IN, 7, 512);
    vblk_ring was = ring;
    memset(&ring, 0xee, sizeof ring);
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(was.size, ring.size);
    CHECK_EQ(was.desc, ring.desc);
    CHECK_EQ(was.avail, ring.avail);
    CHECK_EQ(was.used, ring.used);
    CHECK_EQ(100, ring.position);
    CHECK_EQ(0, ring.agains);
    CHECK_EQ(EMPTY, drain(0).state);
    CHECK_EQ(0xff, status_of(&late));

    bind_by_calls(~VBLK_F_EVENT_IDX);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    vblk_set_status(&g.dev, 0xf);
    drain(0);
    CHECK_EQ(VBLK_S_OK, status_of(&late));
    CHECK_EQ(101, get16(g.queue[0].used + 2));
    memset(g.writes, 0, sizeof g.writes); // buffers were used over and over
}

// A position is read from a used ring that is not there: the first drain says
// so.
void transport_starts_where_no_ring_can_be(void) {
    vblk_ring ring = {.size = 16, .desc = 0x1000, .avail = 0x2000,
                      .used = UINT64_MAX - 1, .position = 7};
    vblk_memory none = {0}, later;
    g.o.queues = 1;
    later = g.o.memory;
    g.o.memory = none;
    guest_make();
    guest_negotiate(0);
    ring.used = 0x3000;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(7, ring.position);
    vblk_set_memory(&g.dev, later);
    ring.used = UINT64_MAX - 1;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    wr(VBLK_REG_STATUS, 0xf);
    CHECK_EQ(BROKEN, drain_at(0, 0).state);
    CHECK_EQ(1, g.events[VBLK_EV_RING_PLACE]);

    reset();
    g.o.memory = none;
    guest_make();
    guest_negotiate(0);
    ring.used = 0x3000;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    g.hole = ring.used + 2;
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, later);
    wr(VBLK_REG_STATUS, 0xf);
    CHECK_EQ(BROKEN, drain_at(0, 0).state);
    CHECK_EQ(1, g.events[VBLK_EV_USED_UNWRITABLE]);
    CHECK_EQ(ring.used + 2, event_a(&g.last));
}

// What was completed and not published is not lost by a stop.
void transport_stop_publishes(void) {
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    vblk_queue_start(&g.dev, 0, &ring);
    vblk_set_status(&g.dev, 0xf);
    vblk_request r;
    request(VBLK_T_FLUSH, 0, 0);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    CHECK(!vblk_complete(&g.dev, &r, 0));
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(1, ring.position);
    CHECK_EQ(1, get16(g.queue[0].used + 2));
    CHECK_EQ(1, g.fired);
}

// A queue that goes on where another left it, started before its memory came.
void transport_start_before_memory(void) {
    vblk_memory later = g.o.memory;
    memset(&g.o.memory, 0, sizeof g.o.memory);
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    ring.position = 37;
    put16(ring.avail + 2, 37);
    put16(ring.used + 2, 37);
    g.queue[0].avail_idx = 37;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    vblk_set_status(&g.dev, 0xf);
    req r = request(VBLK_T_FLUSH, 0, 0);
    vblk_set_memory(&g.dev, later);
    drain(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(38, get16(g.queue[0].used + 2));
}

// The position is taken from the ring once: what a guest writes there later
// does not count, be the memory new or not.
void transport_a_position_is_read_once(void) {
    vblk_memory memory = g.o.memory, none = {0};
    g.o.memory = none;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    ring.position = 5;
    put16(ring.avail + 2, 5);
    put16(ring.used + 2, 5);
    g.queue[0].avail_idx = 5;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    vblk_set_status(&g.dev, 0xf);
    vblk_set_memory(&g.dev, memory);
    for (uint16_t i = 6; i < 9; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_FLUSH, 0, 0));
        CHECK_EQ(i, get16(g.queue[0].used + 2));
        put16(g.queue[0].used + 2, 1000);
        vblk_set_memory(&g.dev, memory);
    }
    put16(g.queue[0].used + 2, 8);
}

// Completed before the queue broke, and not published yet: published.
void transport_a_broken_queue_publishes_first(void) {
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    vblk_queue_start(&g.dev, 0, &ring);
    vblk_set_status(&g.dev, 0xf);
    vblk_request r[2];
    for (int i = 0; i < 2; i++) {
        request(VBLK_T_FLUSH, 0, 0);
        CHECK_EQ(REQUEST, take(0, 0, &r[i]).state);
    }
    CHECK(!vblk_complete(&g.dev, &r[0], 0));
    g.hole = ring.used + 12; // the second element
    g.hole_bytes = 8;
    guest_remap();
    g.dev.queue[0].run.used = NULL;
    vblk_complete(&g.dev, &r[1], 0);
    CHECK_EQ(1, g.events[VBLK_EV_USED_UNWRITABLE]);
    CHECK_EQ(BROKEN, take(0, 0, &r[0]).state);
    CHECK_EQ(1, get16(ring.used + 2));
}

// Accessors are asked for words at even addresses only.
static unsigned odd_words;

static int read_even(void *user, uint64_t gpa, void *dst, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    odd_words += n == 2 && gpa & 1;
    return m.read(m.user, gpa, dst, n);
}

void transport_a_used_ring_at_an_odd_address(void) {
    g.o.memory.read = read_even;
    odd_words = 0;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 16);
    ring.used++;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    vblk_set_status(&g.dev, 0xf);
    CHECK_EQ(BROKEN, drain(0).state);
    CHECK_EQ(1, g.events[VBLK_EV_RING_PLACE]);
    CHECK_EQ(0, odd_words);
    g.queue[0].size = 0;
}

// ---- After a crash ----------------------------------------------------------

static char     tracked[200]; // heads, and S
static uint16_t left[8];      // heads that were taken and not returned
static unsigned lefts;

static void on_track(void *user, int queue, int head) {
    size_t n = strlen(tracked);
    (void)user;
    CHECK_EQ(0, queue);
    if (head == VBLK_NO_HEAD) {
        snprintf(tracked + n, sizeof tracked - n, "S ");
    } else {
        snprintf(tracked + n, sizeof tracked - n, "%d ", head / 3);
    }
}

// Six reads, each of a sector of its number, with descriptors from 3 i on. Of
// the first four the one at 1 is returned, then all is gone but the rings.
static vblk_ring crash_after_one(req *r) {
    vblk_request under_way[4];
    g.o.track = on_track;
    tracked[0] = 0;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_ring ring = lay_out(0, 32);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    vblk_set_status(&g.dev, 0xf);
    for (unsigned i = 0; i < 6; i++) {
        r[i] = prepare(VBLK_T_IN, i, 512);
        send(0, &r[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        CHECK_EQ(REQUEST, take(0, 0, &under_way[i]).state);
    }
    CHECK(!vblk_put(&g.dev, &under_way[1], 0, g.disk + 512, 512));
    CHECK(!vblk_complete(&g.dev, &under_way[1], 512));
    vblk_publish(&g.dev, 0);
    lefts = 0;
    for (unsigned i = 0; i < 4; i++) {
        if (i != 1) {
            left[lefts++] = under_way[i].head;
        }
    }
    ring.position = (uint16_t)(get16(ring.used + 2) + lefts);
    ring.agains = (uint16_t)lefts;
    ring.again = left;
    return ring;
}

// R5: what was taken and not returned is taken first, once, then the rest.
void r5_what_was_under_way_is_taken_again(void) {
    req       r[6];
    vblk_ring ring = crash_after_one(r);
    CHECK(strcmp(tracked, "0 1 2 3 S ") == 0);
    tracked[0] = 0;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_set_status(&g.dev, 0xf);
    ring.agains = 33;
    CHECK_EQ((uint64_t)VBLK_ERR_RING,
             (uint64_t)vblk_queue_start(&g.dev, 0, &ring));
    ring.agains = (uint16_t)lefts;
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    drain(0);
    CHECK(strcmp(tracked, "0 2 3 4 5 S ") == 0);
    for (unsigned i = 0; i < 6; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&r[i]));
        CHECK_MEM(g.disk + 512 * i, at(r[i].data), 512);
    }
    CHECK_EQ(6, get16(ring.used + 2));
    CHECK_EQ(6, used_count(0));
    CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
    CHECK_EQ(6, ring.position);
    CHECK_EQ(0, ring.agains);
}

// R5: also over stops, and with a limit by which a head is looked at twice.
void r5_what_a_stop_leaves_is_taken_again(void) {
    req       r[6];
    vblk_ring ring = crash_after_one(r);
    g.o.limits.iops = 1;
    g.o.limits.iops_burst = 1;
    tracked[0] = 0;
    for (unsigned i = 1; i <= 5; i++) {
        bind_by_calls(~VBLK_F_EVENT_IDX);
        vblk_set_status(&g.dev, 0xf);
        CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
        drain(0);
        CHECK_EQ(1 + i, get16(ring.used + 2));
        CHECK_EQ(VBLK_OK, vblk_queue_stop(&g.dev, 0, &ring));
        CHECK_EQ(i < 3 ? 3 - i : 0, ring.agains);
        CHECK_EQ(i < 3 ? 4 : 1 + i, ring.position);
    }
    for (unsigned i = 0; i < 6; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&r[i]));
    }
    CHECK_EQ(6, used_count(0));
}

// R5: also where a limit lets one pass at a time.
void r5_what_was_under_way_waits_for_a_limit(void) {
    req       r[6];
    vblk_ring ring = crash_after_one(r);
    g.o.limits.iops = 1;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_set_status(&g.dev, 0xf);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    tracked[0] = 0;
    for (unsigned i = 1; i <= 5; i++) {
        drain_at(0, i * SECOND);
        drain_at(0, i * SECOND + SECOND / 2);
        CHECK_EQ(1 + i, get16(ring.used + 2));
    }
    for (unsigned i = 0; i < 6; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&r[i]));
    }
    CHECK_EQ(EMPTY, drain_at(0, 100 * SECOND).state);
    CHECK_EQ(6, used_count(0));
}

// R5: a head that cannot be breaks the queue, as in the ring.
void r5_a_head_that_cannot_be(void) {
    req       r[6];
    vblk_ring ring = crash_after_one(r);
    left[1] = 32;
    bind_by_calls(~VBLK_F_EVENT_IDX);
    vblk_set_status(&g.dev, 0xf);
    CHECK_EQ(VBLK_OK, vblk_queue_start(&g.dev, 0, &ring));
    CHECK_EQ(BROKEN, drain(0).state);
    CHECK_EQ(1, g.events[VBLK_EV_HEAD_RANGE]);
}
