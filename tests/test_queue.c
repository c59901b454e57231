// Group Q (queues): drains, poison, notifications, interrupts, indirect
// tables, ring wrap.
#include "guest.h"

static uint64_t used_event(void) { // where the driver asks for interrupts
    return g.queue[0].avail + 4 + 2 * (uint64_t)g.queue[0].size;
}

static uint64_t avail_event(void) {
    return g.queue[0].used + 4 + 8 * (uint64_t)g.queue[0].size;
}

void q1_a_poisoned_queue_is_left_alone(void) {
    guest_up();
    put16(g.queue[0].avail + 2, 257);
    CHECK_EQ(BROKEN, kick(0).state);
    put16(g.queue[0].avail + 2, 0);
    req r = request(VBLK_T_IN, 0, 512);
    unsigned accesses = g.accesses;
    uint32_t status = rd(VBLK_REG_INTERRUPT_STATUS);
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(BROKEN, kick(0).state);
        vblk_request none;
        CHECK_EQ(BROKEN, take(0, 0, &none).state);
    }
    CHECK_EQ(accesses, g.accesses);
    CHECK_EQ(0xff, status_of(&r));
    CHECK_EQ(status, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(1, counts().broken_queues);
    CHECK_EQ(1, g.fired);
}

// A driver that adds one more as soon as the device looks again. `late` of
// them, each without a notification.
static unsigned late;
static req      late_one;

static int64_t read_and_add(void *user, uint64_t offset, const vblk_seg *seg,
                            unsigned segs) {
    (void)user, (void)offset, (void)segs;
    if (late > 0) {
        late--;
        again(&late_one);
        offer(0, late_one.head);
    }
    return (int64_t)seg[0].n;
}

void q2_what_arrives_during_a_drain_is_not_stranded(void) {
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        g.o.backend.read = read_and_add;
        guest_up_without(event_idx ? 0 : VBLK_F_EVENT_IDX);
        late = 20;
        late_one = request(VBLK_T_IN, 0, 512);
        CHECK_EQ(EMPTY, kick(0).state);
        CHECK_EQ(21, used_count(0));
        reset();
    }
}

// For 65,536 requests nobody decides on an interrupt, and the driver goes on
// as if it had seen them.
void q7_an_interrupt_after_once_round_the_indices(void) {
    for (unsigned more = 0; more < 3; more++) {
        vblk_request under_way;
        vblk_seg     seg[MAX_SEGS + 2];
        guest_init();
        guest_up_without(0);
        req r = prepare(VBLK_T_FLUSH, 0, 0);
        r.head = send(0, &r);
        rewritable(r.status);
        put16(g.queue[0].avail + 4 + 2 * g.queue[0].size, 30000);
        for (unsigned done = 0; done < 65535 + more; done++) {
            if (done > 0) {
                put16(g.queue[0].avail + 4 +
                          2 * (uint64_t)(g.queue[0].avail_idx % 256), r.head);
                put16(g.queue[0].avail + 2, ++g.queue[0].avail_idx);
            }
            rewritable(r.status);
            CHECK(vblk_next(&g.dev, 0, 0, &under_way, seg, COUNT(seg)));
            CHECK(!vblk_complete(&g.dev, &under_way, 0));
        }
        vblk_publish(&g.dev, 0);
        CHECK_EQ(1, g.fired);
        CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    }
}

// Without map, the trace shows the switch, and the second look after it.
void q2_the_switch_without_event_idx_is_no_notify(void) {
    guest_up();
    run(VBLK_T_IN, 0, 512);
    g.traced = 0;
    run(VBLK_T_IN, 0, 512);
    CHECK_EQ(0, get16(g.queue[0].used));
    if (!g.mapped) {
        int off = -1, on = -1, looked = -1;
        for (int i = 0; i < (int)g.traced; i++) {
            guest_access *a = &g.trace[i];
            if (a->write && a->gpa == g.queue[0].used && a->n == 2) {
                *(off < 0 ? &off : &on) = i;
            }
            if (!a->write && a->gpa == g.queue[0].avail + 2) {
                looked = i;
            }
        }
        CHECK(off >= 0 && on > off && looked > on);
    }
}

void q2_no_notify_is_set_while_draining(void) {
    g.o.backend.read = read_and_add;
    late = 0;
    guest_up();
    run(VBLK_T_IN, 0, 512);
    vblk_request r;
    memset(&r, 0, sizeof r);
    request(VBLK_T_FLUSH, 0, 0);
    CHECK_EQ(REQUEST, take(0, 0, &r).state);
    CHECK(r.direct && r.segs == 0); // all of its no segments have pointers
    CHECK_EQ(1, get16(g.queue[0].used));
    CHECK(!vblk_complete(&g.dev, &r, 0));
    CHECK_EQ(EMPTY, take(0, 0, &r).state);
    CHECK_EQ(0, get16(g.queue[0].used));
    CHECK_EQ(2, get16(g.queue[0].used + 2));
}

// SPLIT-25 to -27: flags stay 0, avail_event follows, written on switching on.
void q2_the_switch_with_event_idx_is_avail_event(void) {
    guest_up_without(0);
    for (uint16_t i = 1; i <= 300; i++) {
        run(VBLK_T_IN, 0, 512);
        CHECK_EQ(0, get16(g.queue[0].used));
        CHECK_EQ(i, get16(avail_event()));
    }
    reset();
    guest_negotiate(0);
    guest_queue_up(0, 16);
    put16(g.queue[0].used, 1); // left behind by a session without EVENT_IDX
    guest_go();
    CHECK_EQ(0, get16(g.queue[0].used));
}

void q3_switching_on_fails(void) {
    guest_make();
    guest_negotiate(0);
    guest_queue_up(0, 16);
    guest_go();
    req r = request(VBLK_T_FLUSH, 0, 0);
    put16(used_event(), 1000); // no interrupt wanted: it comes all the same
    g.fired = 0;
    g.hole = avail_event();
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory); // with map: forget the pointers

    CHECK_EQ(EMPTY, kick(0).state);

    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(1, used_count(0));
    CHECK_EQ(1, g.fired);
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(1, counts().flushes);
    CHECK_EQ(1, g.events[VBLK_EV_NOTIFY_SWITCH]);
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
}

// A switch that failed is set once it can be, also if there is nothing to do.
void q3_switching_on_is_tried_again(void) {
    for (int poll = 0; poll < 2; poll++) {
        guest_init();
        guest_up_without(VBLK_F_EVENT_IDX);
        req r = request(VBLK_T_FLUSH, 0, 0);
        put16(g.queue[0].used, 1);
        g.hole = g.queue[0].used;
        g.hole_bytes = 2;
        vblk_set_memory(&g.dev, g.o.memory);
        CHECK_EQ(EMPTY, kick(0).state);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(1, g.events[VBLK_EV_NOTIFY_SWITCH]);
        CHECK_EQ(1, get16(g.queue[0].used));
        g.hole_bytes = 0;
        if (poll) {
            vblk_notify(&g.dev, 0);
            vblk_poll(&g.dev, 0);
        } else {
            drain(0);
        }
        CHECK_EQ(0, get16(g.queue[0].used));
    }
}

static void told(vblk_event_code code, uint64_t a, uint64_t b) {
    CHECK_EQ(1, g.events[code]);
    CHECK_EQ((uint64_t)code, (uint64_t)g.last.code);
    CHECK_EQ(a, event_a(&g.last));
    CHECK_EQ(b, event_b(&g.last));
}

static void poisoned(vblk_event_code code, uint64_t a, uint64_t b) {
    CHECK_EQ(BROKEN, kick(0).state);
    told(code, a, b);
    CHECK_EQ(1, counts().broken_queues);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(2, rd(VBLK_REG_INTERRUPT_STATUS) & 2);
    CHECK_EQ(1, g.fired);
    CHECK_EQ(0, g.calls);
}

void q4_avail_idx_jumps_ahead(void) {
    guest_up();
    put16(g.queue[0].avail + 2, 257);
    poisoned(VBLK_EV_AVAIL_JUMP, 257, 0);
}

void q4_avail_idx_moves_back(void) {
    guest_up();
    run(VBLK_T_IN, 0, 512);
    run(VBLK_T_IN, 0, 512);
    wr(VBLK_REG_INTERRUPT_ACK, 3);
    g.fired = g.calls = 0;
    put16(g.queue[0].avail + 2, 1);
    poisoned(VBLK_EV_AVAIL_JUMP, 1, 2);
}

void q4_a_full_ring_is_fine(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC);
    guest_queue_up(0, 16);
    guest_go();
    part p[2] = {{put_header(VBLK_T_FLUSH, 0), 16, 0}, {alloc(1, 1), 1, WRITE}};
    uint16_t head = put_chain(0, p, 2);
    for (int i = 0; i < 16; i++) {
        mark(p[1].gpa, 1, OFFERED);
        offer(0, head);
    }
    CHECK_EQ(EMPTY, kick(0).state);
    CHECK_EQ(16, used_count(0));
}

void q4_head_beyond_the_queue(void) {
    guest_up();
    offer(0, 256);
    poisoned(VBLK_EV_HEAD_RANGE, 256, 0);
}

void q4_avail_ring_outside_memory(void) {
    guest_up();
    g.hole = g.queue[0].avail + 2;
    g.hole_bytes = 1;
    vblk_set_memory(&g.dev, g.o.memory);
    poisoned(VBLK_EV_AVAIL_UNREADABLE, g.queue[0].avail, 0);
    CHECK_EQ(BROKEN, kick(0).state);
    CHECK_EQ(1, counts().broken_queues);
}

void q4_avail_entry_outside_memory(void) {
    guest_up();
    request(VBLK_T_IN, 0, 512);
    g.hole = g.queue[0].avail + 4;
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory);
    poisoned(VBLK_EV_AVAIL_UNREADABLE, g.queue[0].avail + 4, 0);
}

void q4_used_element_outside_memory(void) {
    guest_up();
    request(VBLK_T_FLUSH, 0, 0);
    g.hole = g.queue[0].used + 4;
    g.hole_bytes = 8;
    vblk_set_memory(&g.dev, g.o.memory);
    kick(0);
    told(VBLK_EV_USED_UNWRITABLE, g.queue[0].used + 4, 0);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, used_count(0));
}

// What cannot be returned is not done either, but for the request at which it
// showed.
void q4_a_drain_stops_where_the_queue_breaks(void) {
    guest_up();
    for (int i = 0; i < 5; i++) {
        request(VBLK_T_FLUSH, 0, 0);
    }
    g.hole = g.queue[0].used + 4;
    g.hole_bytes = 64;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(BROKEN, kick(0).state);
    CHECK_EQ(1, g.calls);
}

void q4_used_idx_outside_memory(void) {
    guest_up();
    request(VBLK_T_FLUSH, 0, 0);
    g.hole = g.queue[0].used + 2;
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(BROKEN, kick(0).state);
    told(VBLK_EV_USED_UNWRITABLE, g.queue[0].used + 2, 0);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
}

// A bad head, and then the completion before it cannot be shown either.
void q4_a_queue_breaks_for_one_reason(void) {
    guest_up();
    request(VBLK_T_FLUSH, 0, 0);
    offer(0, 256);
    g.hole = g.queue[0].used + 2;
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(BROKEN, kick(0).state);
    told(VBLK_EV_HEAD_RANGE, 256, 0);
    CHECK_EQ(1, counts().broken_queues);
    CHECK_EQ(0, g.events[VBLK_EV_USED_UNWRITABLE]);
}

void q4_a_queue_breaks_once(void) {
    guest_up();
    request(99, 0, 512); // two that the device answers in one drain
    request(99, 0, 512);
    g.hole = g.queue[0].used + 4;
    g.hole_bytes = 16;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(BROKEN, kick(0).state);
    CHECK_EQ(1, g.events[VBLK_EV_USED_UNWRITABLE]);
    CHECK_EQ(1, counts().broken_queues);
}

// A map whose pointers to the rings are odd and lead nowhere: 16-bit words
// have to go through the accessors.
static void *map_odd(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    static uint64_t nowhere[1024];
    if (gpa == g.queue[0].avail || gpa == g.queue[0].used) {
        return (uint8_t *)nowhere + 1;
    }
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    return m.map(m.user, gpa, n, writable);
}

void q_what_is_only_read_is_mapped_for_reading(void) {
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_OUT, 0, 512));
    req r = prepare(VBLK_T_FLUSH, 0, 0);
    part p[2] = {{r.header, 16, 0}, {r.status, 1, WRITE}};
    part table = {put_table(p, 2), 32, INDIRECT};
    submit(0, &table, 1);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK(!g.mapped_for_writing);
}

void q_rings_at_odd_pointers(void) {
    g.o.memory.map = map_odd;
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(1, used_count(0));
}

// ROB-27, ROB-29: what a ready queue must have, looked at when it goes live.
void q4_misplaced_rings(void) {
    static const struct {
        const char *what;
        uint32_t    reg[2];
        uint64_t    add, set;
        vblk_event_code code;
    } rows[] = {
        {"table not at 16", {VBLK_REG_QUEUE_DESC_LOW, 0}, 8, 0,
         VBLK_EV_RING_PLACE},
        {"driver area not at 2", {VBLK_REG_QUEUE_DRIVER_LOW, 0}, 1, 0,
         VBLK_EV_RING_PLACE},
        {"device area not at 4", {VBLK_REG_QUEUE_DEVICE_LOW, 0}, 2, 0,
         VBLK_EV_RING_PLACE},
        {"table wraps", {VBLK_REG_QUEUE_DESC_LOW, VBLK_REG_QUEUE_DESC_HIGH},
         0, 0xfffffffffffffff0, VBLK_EV_RING_PLACE},
        {"driver area wraps",
         {VBLK_REG_QUEUE_DRIVER_LOW, VBLK_REG_QUEUE_DRIVER_HIGH}, 0,
         0xfffffffffffffffe, VBLK_EV_RING_PLACE},
        {"device area wraps",
         {VBLK_REG_QUEUE_DEVICE_LOW, VBLK_REG_QUEUE_DEVICE_HIGH}, 0,
         0xfffffffffffffffc, VBLK_EV_RING_PLACE},
        {"driver area nowhere",
         {VBLK_REG_QUEUE_DRIVER_LOW, VBLK_REG_QUEUE_DRIVER_HIGH}, 0,
         0x40000000, VBLK_EV_AVAIL_UNREADABLE},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        ROW_BEGIN();
        guest_init();
        guest_make();
        guest_negotiate(VBLK_F_EVENT_IDX);
        guest_queue_up(0, 16);
        uint64_t base = i == 0 ? g.queue[0].desc
                      : i == 1 ? g.queue[0].avail
                               : g.queue[0].used;
        uint64_t gpa = rows[i].set ? rows[i].set : base + rows[i].add;
        wr(rows[i].reg[0], (uint32_t)gpa);
        if (rows[i].reg[1]) {
            wr(rows[i].reg[1], (uint32_t)(gpa >> 32));
        }
        guest_go();
        CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
        told(rows[i].code, gpa, 0);
        ROW("%s", rows[i].what);
    }
}

void q4_a_queue_without_a_size(void) {
    guest_make();
    guest_negotiate(0);
    wr(VBLK_REG_QUEUE_NUM, 3);
    wr(VBLK_REG_QUEUE_READY, 1);
    guest_go();
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, g.events[VBLK_EV_RING_SIZE]);
}

void q4_only_the_queue_at_fault_stops(void) {
    g.o.queues = 2;
    guest_up();
    offer(0, 9999);
    CHECK_EQ(BROKEN, kick(0).state);
    req r = prepare(VBLK_T_IN, 0, 512);
    send(1, &r);
    CHECK_EQ(EMPTY, kick(1).state);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    offer(1, 9999);
    CHECK_EQ(BROKEN, kick(1).state);
    CHECK_EQ(2, counts().broken_queues);
}

// Chain faults: strict drops, standard returns with length 0.
static void bad_chain(const part *p, unsigned n, vblk_event_code code) {
    uint32_t id = 99, len = 99;
    uint64_t errors = counts().io_errors;
    uint16_t head = submit(0, p, n);
    CHECK_EQ(EMPTY, kick(0).state);
    CHECK_EQ(1, g.events[code]);
    CHECK_EQ(errors + 1, counts().io_errors);
    CHECK_EQ(0, g.calls);
    if (g.o.profile == VBLK_STANDARD) {
        CHECK(used_next(0, &id, &len));
        CHECK_EQ(head, id);
        CHECK_EQ(0, len);
    }
    CHECK_EQ(0, used_count(0));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512)); // the ring goes on
}

static void q4_chain_faults(vblk_profile profile) {
    enum { LOOP, NEXT_RANGE, NESTED, BOTH, NO_BYTES, RAGGED, HUGE_, NOWHERE,
           WRAPS, TABLE_LOOP, TABLE_RANGE, OFF, KINDS };
    static const vblk_event_code codes[KINDS] = {
        VBLK_EV_CHAIN_LONG, VBLK_EV_CHAIN_NEXT, VBLK_EV_INDIRECT_NESTED,
        VBLK_EV_INDIRECT_NEXT, VBLK_EV_INDIRECT_SIZE, VBLK_EV_INDIRECT_SIZE,
        VBLK_EV_INDIRECT_SIZE, VBLK_EV_CHAIN_UNREADABLE,
        VBLK_EV_CHAIN_UNREADABLE, VBLK_EV_CHAIN_LONG, VBLK_EV_CHAIN_NEXT,
        VBLK_EV_INDIRECT_OFF};
    for (int kind = 0; kind < KINDS; kind++) {
        ROW_BEGIN();
        guest_init();
        g.o.profile = profile;
        guest_up_without(VBLK_F_EVENT_IDX |
                         (kind == OFF ? VBLK_F_INDIRECT_DESC : 0));
        req r = prepare(VBLK_T_IN, 0, 512);
        part p[3] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                     {r.status, 1, WRITE}};
        part in[1] = {{put_table(p, 3), 48, INDIRECT}};
        unsigned n = 1;
        switch (kind) {
        case LOOP:
            memcpy(in, p, sizeof in);
            break;
        case NEXT_RANGE:
            put_desc(g.queue[0].desc, 1, p[1], 0);
            break;
        case NESTED:
            put_desc(in[0].gpa, 1,
                     (part){put_table(p, 3), 48, INDIRECT}, 0);
            break;
        case BOTH:
            in[0].flags |= NEXT;
            break;
        case NO_BYTES:
            in[0].n = 0;
            break;
        case RAGGED:
            in[0].n = 47;
            break;
        case HUGE_:
            in[0].n = UINT32_MAX;
            break;
        case NOWHERE:
            in[0].gpa = RAM_END;
            break;
        case WRAPS:
            in[0].gpa = UINT64_MAX - 15;
            break;
        case TABLE_LOOP:
            p[1].flags |= NEXT;
            put_desc(in[0].gpa, 1, p[1], 1);
            break;
        case TABLE_RANGE:
            p[1].flags |= NEXT;
            put_desc(in[0].gpa, 1, p[1], 3);
            break;
        default:
            break;
        }
        if (kind == LOOP) {
            in[0].flags |= NEXT;
            put_desc(g.queue[0].desc, 0, in[0], 0);
            offer(0, 0);
            g.queue[0].next_desc = 1;
            CHECK_EQ(EMPTY, kick(0).state);
            CHECK_EQ(1, g.events[codes[kind]]);
            CHECK_EQ(1, counts().io_errors);
            CHECK_EQ(profile == VBLK_STANDARD, used_count(0));
        } else if (kind == NEXT_RANGE) {
            part q[2] = {{r.header, 16, NEXT}, {0, 0, 0}};
            put_desc(g.queue[0].desc, 0, q[0], 256);
            offer(0, 0);
            g.queue[0].next_desc = 1;
            CHECK_EQ(EMPTY, kick(0).state);
            CHECK_EQ(1, g.events[codes[kind]]);
            CHECK_EQ(1, counts().io_errors);
            CHECK_EQ(profile == VBLK_STANDARD, used_count(0));
        } else {
            bad_chain(in, n, codes[kind]);
        }
        CHECK_EQ(0xff, status_of(&r));
        CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
        guest_check();
        ROW("fault %d", kind);
    }
}

void q4_chain_faults_strict(void) {
    q4_chain_faults(VBLK_STRICT);
}

void q4_chain_faults_standard(void) {
    q4_chain_faults(VBLK_STANDARD);
}

void q4_descriptor_outside_memory(void) {
    guest_up();
    request(VBLK_T_IN, 0, 512);
    g.hole = g.queue[0].desc;
    g.hole_bytes = 16;
    vblk_set_memory(&g.dev, g.o.memory);
    CHECK_EQ(EMPTY, kick(0).state);
    CHECK_EQ(1, g.events[VBLK_EV_CHAIN_UNREADABLE]);
    CHECK_EQ(0, used_count(0));
}

// SPLIT-06 to -08: k direct descriptors, then a table in any order; WRITE on
// the descriptor of the table means nothing.
void q4_indirect_tables(void) {
    for (unsigned direct = 0; direct < 3; direct++) {
        for (unsigned write = 0; write < 2; write++) {
            guest_init();
            guest_up();
            req r = prepare(VBLK_T_IN, 3, 1024);
            part p[4] = {{r.header, 16, 0}, {r.data, 512, WRITE},
                         {r.data + 512, 512, WRITE}, {r.status, 1, WRITE}};
            uint64_t table = alloc(16 * 8, 16); // more entries than used
            fill(table, 0xff, 16 * 8);
            mark(table, 16 * 8, READABLE);
            static const uint16_t slot[5] = {0, 6, 2, 5, 1};
            for (unsigned i = direct; i < 4; i++) {
                unsigned k = i - direct;
                p[i].flags |= i < 3 ? NEXT : 0;
                put_desc(table, slot[k], p[i], slot[k + 1]);
            }
            part chain[3];
            for (unsigned i = 0; i < direct; i++) {
                chain[i] = p[i];
                chain[i].flags &= (uint16_t)~NEXT;
            }
            chain[direct] = (part){
                table, 128, (uint16_t)(INDIRECT | (write ? WRITE : 0))};
            uint32_t id = 0, len = 0;
            uint16_t head = submit(0, chain, direct + 1);
            kick(0);
            CHECK(used_next(0, &id, &len));
            CHECK_EQ(head, id);
            CHECK_EQ(1025, len);
            CHECK_EQ(VBLK_S_OK, status_of(&r));
            CHECK_MEM(g.disk + 3 * 512, at(r.data), 1024);
            guest_check();
        }
    }
}

void q4_more_under_way_than_entries(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 4);
    guest_go();
    req r = request(VBLK_T_IN, 0, 512);
    vblk_request one;
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(REQUEST, take(0, 0, &one).state);
        again(&r);
        offer(0, r.head); // the same head again, while it is under way
    }
    CHECK_EQ(BROKEN, take(0, 0, &one).state);
    CHECK_EQ(1, g.events[VBLK_EV_QUEUE_OVERRUN]);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK(vblk_complete(&g.dev, &one, 512));
}

// ROB-43: each occurrence is completed.
void q4_the_same_head_twice(void) {
    guest_up();
    req r = request(VBLK_T_IN, 0, 512);
    again(&r);
    offer(0, r.head);
    kick(0);
    CHECK_EQ(2, used_count(0));
    CHECK_EQ(2, counts().reads);
}

// SPLIT-18, -19, BREQ-27: data, status, element, index; then the question
// whether to interrupt.
void q5_publish_order(void) {
    guest_up();
    g.traced = 0;
    req r = request(VBLK_T_IN, 0, 512);
    kick(0);
    if (g.mapped) {
        return;
    }
    int data = -1, status = -1, element = -1, idx = -1, flags = -1;
    int avail_idx = -1, entry = -1, table = -1;
    const guest_queue *q = &g.queue[0];
    for (int i = 0; i < (int)g.traced; i++) {
        guest_access *a = &g.trace[i];
        if (a->write && a->gpa == r.data) {
            data = i;
        } else if (a->write && a->gpa == r.status) {
            status = i;
            CHECK_EQ(1, a->n);
        } else if (a->write && a->gpa == q->used + 4) {
            element = i;
        } else if (a->write && a->gpa == q->used + 2) {
            idx = i;
            CHECK_EQ(2, a->n);
        } else if (!a->write && a->gpa == q->avail) {
            flags = i;
        } else if (!a->write && a->gpa == q->avail + 2 && avail_idx < 0) {
            avail_idx = i;
        } else if (!a->write && a->gpa == q->avail + 4) {
            entry = i;
        } else if (!a->write && a->gpa == q->desc) {
            table = i;
        }
        CHECK(!a->write || a->gpa < q->desc || a->gpa >= q->used ||
              a->gpa >= q->avail + 6 + 512); // SPLIT-05, -10
    }
    CHECK(0 <= avail_idx && avail_idx < entry && entry < table &&
          table < data && data < status && status < element &&
          element < idx && idx < flags);
}

// SPLIT-11, -22: more than 65536 requests at the extreme sizes.
void q6_positions_wrap(void) {
    static const uint32_t sizes[] = {1, 2, 256, 32768};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        guest_init();
        g.o.queue_size = 32768;
        guest_make();
        guest_negotiate(i & 1 ? 0 : VBLK_F_EVENT_IDX);
        guest_queue_up(0, sizes[i]);
        guest_go();
        part p[2] = {{put_header(VBLK_T_FLUSH, 0), 16, 0},
                     {alloc(1, 1), 1, WRITE}};
        part table = {put_table(p, 2), 32, INDIRECT};
        uint16_t head = put_chain(0, &table, 1);
        uint32_t done = 0;
        while (done < 70000) {
            uint32_t batch = 1 + test_below(sizes[i] < 100 ? sizes[i] : 100);
            for (uint32_t k = 0; k < batch; k++) {
                offer(0, head);
            }
            CHECK_EQ(EMPTY, kick(0).state);
            done += batch;
            CHECK_EQ((uint16_t)done, get16(g.queue[0].used + 2));
            uint32_t id, len;
            for (uint32_t k = 0; k < batch; k++) {
                CHECK(used_next(0, &id, &len) && id == head && len == 1);
            }
            if (test_failed) {
                return;
            }
            rewritable(p[1].gpa);
        }
        CHECK_EQ(done, counts().flushes);
    }
}

static void irq_with_flags(vblk_profile profile) {
    g.o.profile = profile;
    guest_up();
    put16(g.queue[0].avail, 1); // NO_INTERRUPT
    run(VBLK_T_IN, 0, 512);
    CHECK_EQ(0, g.fired);
    CHECK(!vblk_interrupt_line(&g.dev));
    CHECK_EQ(profile == VBLK_STRICT, rd(VBLK_REG_INTERRUPT_STATUS)); // P7
    wr(VBLK_REG_INTERRUPT_ACK, 3);
    put16(used_event(), 1000); // garbage: ignored (SPLIT-12)
    put16(g.queue[0].avail, 0);
    run(VBLK_T_IN, 0, 512);
    CHECK_EQ(1, g.fired);
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(vblk_interrupt_line(&g.dev));
    for (int i = 0; i < 5; i++) {
        request(VBLK_T_IN, 0, 512);
    }
    kick(0);
    CHECK_EQ(2, g.fired); // once for a drain
    kick(0);
    CHECK_EQ(2, g.fired); // and not for an empty one
}

void q7_interrupt_by_flags_strict(void) {
    irq_with_flags(VBLK_STRICT);
}

void p7_interrupt_by_flags_standard(void) {
    irq_with_flags(VBLK_STANDARD);
}

// SPLIT-15 to -17: every batch of 1 to 4 around every event, across the wrap.
void q7_interrupt_by_used_event(void) {
    guest_make();
    guest_negotiate(0);
    guest_queue_up(0, 4);
    guest_go();
    put16(g.queue[0].avail, 1); // ignored
    part p[2] = {{put_header(VBLK_T_FLUSH, 0), 16, 0}, {alloc(1, 1), 1, WRITE}};
    part table = {put_table(p, 2), 32, INDIRECT};
    uint16_t head = put_chain(0, &table, 1);
    for (uint32_t done = 0; done < 66000;) {
        uint16_t batch = (uint16_t)(1 + test_below(4));
        bool     edge = done < 64 || done > 65400;
        int      event = edge ? (int)test_below(8) - 2 : 2;
        put16(used_event(), (uint16_t)(done + (uint32_t)event));
        g.fired = 0;
        for (int k = 0; k < batch; k++) {
            offer(0, head);
        }
        kick(0);
        bool want = event >= 0 && event < batch;
        if (g.fired != want) {
            ROW_BEGIN();
            CHECK_EQ(want, g.fired);
            ROW("done %u, batch %u, event %d", done, batch, event);
            return;
        }
        done += batch;
        rewritable(p[1].gpa);
    }
}

void q7_fires_if_the_question_cannot_be_read(void) {
    guest_make();
    guest_negotiate(0);
    guest_queue_up(0, 16);
    guest_go();
    request(VBLK_T_FLUSH, 0, 0);
    put16(used_event(), 1000);
    g.hole = used_event();
    g.hole_bytes = 2;
    vblk_set_memory(&g.dev, g.o.memory);
    kick(0);
    CHECK_EQ(1, used_count(0));
    CHECK_EQ(1, g.fired);
}

void q8_errors_interrupt_like_successes(void) {
    guest_up();
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, SECTORS, 512));
    CHECK_EQ(1, g.fired);
    CHECK_EQ(VBLK_S_UNSUPP, run(77, 0, 0));
    CHECK_EQ(2, g.fired);
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    put16(g.queue[0].avail, 1);
    CHECK_EQ(VBLK_S_IOERR, run(VBLK_T_IN, SECTORS, 512));
    CHECK_EQ(2, g.fired);
}

void q9_used_lengths(void) {
    static const struct {
        uint32_t type, bytes, want;
    } rows[] = {
        {VBLK_T_IN, 512, 513},   {VBLK_T_IN, 4096, 4097},
        {VBLK_T_OUT, 512, 1},    {VBLK_T_FLUSH, 0, 1},
        {VBLK_T_GET_ID, 20, 21}, {VBLK_T_GET_ID, 64, 21},
        {VBLK_T_IN, 511, 1},     {99, 0, 1},
    };
    guest_up();
    for (size_t i = 0; i < COUNT(rows); i++) {
        ROW_BEGIN();
        run(rows[i].type, 0, rows[i].bytes);
        CHECK_EQ(rows[i].want, used_len(0));
        ROW("type %u, %u bytes", rows[i].type, rows[i].bytes);
    }
}

void q9_a_used_length_of_16_mib(void) {
    g.o.capacity = UINT64_C(1) << 20; // the backing is shorter, X2
    guest_up();
    req r = prepare(VBLK_T_IN, 0, 0x80000);
    part p[35] = {{r.header, 16, 0}};
    for (unsigned i = 1; i < 34; i++) {
        p[i] = (part){r.data, r.bytes, WRITE};
    }
    p[34] = (part){r.status, 1, WRITE};
    submit(0, p, 35);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_EQ(33 * 0x80000 + 1, used_len(0));
}

void q10_what_waits_at_driver_ok_is_served(void) {
    g.o.queues = 3;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    req r[3];
    for (unsigned i = 0; i < 3; i++) {
        guest_queue_up(i, 16);
        r[i] = prepare(VBLK_T_IN, i, 512);
        send(i, &r[i]);
    }
    CHECK_EQ(VBLK_ALL_QUEUES, wr(VBLK_REG_STATUS, 0xf));
    CHECK_EQ(EMPTY, drain_at(VBLK_ALL_QUEUES, 0).state);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQ(VBLK_S_OK, status_of(&r[i]));
        CHECK_EQ(1, used_count(i));
    }
}

void q11_a_drain_is_bounded_by_the_queue_size(void) {
    g.o.backend.read = read_and_add;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    late = 100; // a driver that never stops adding
    late_one = request(VBLK_T_IN, 0, 512);
    g.fired = 0;
    CHECK_EQ(MORE, drain_at(0, 0).state);
    CHECK_EQ(16, used_count(0));
    CHECK_EQ(1, g.fired);
    CHECK_EQ(MORE, drain_at(VBLK_ALL_QUEUES, 0).state);
    CHECK_EQ(32, used_count(0));
    CHECK_EQ(EMPTY, drain(0).state);
    CHECK_EQ(101, used_count(0));
}

// The same for a host that takes requests itself, with chains that never
// become one.
void q11_next_is_bounded_too(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 4);
    guest_go();
    req r = request(99, 0, 0);
    for (int i = 0; i < 3; i++) {
        again(&r);
        offer(0, r.head);
    }
    vblk_request none;
    CHECK_EQ(EMPTY, take(0, 0, &none).state);
    CHECK_EQ(4, used_count(0)); // published, though nothing was handed out
    CHECK_EQ(1, g.fired);
}

void q12_the_line_is_high_until_the_status_reads_0(void) {
    guest_up();
    put16(g.queue[0].avail, 1);
    run(VBLK_T_IN, 0, 512); // strict: the bit without a firing
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(!vblk_interrupt_line(&g.dev));
    put16(g.queue[0].avail, 0);
    run(VBLK_T_IN, 0, 512);
    CHECK(vblk_interrupt_line(&g.dev));
    wr(VBLK_REG_INTERRUPT_ACK, 1);
    CHECK(!vblk_interrupt_line(&g.dev));
    wr(VBLK_REG_INTERRUPT_ACK, 0x80000000); // not the device's inner bit
    run(VBLK_T_IN, 0, 512);
    wr(VBLK_REG_INTERRUPT_ACK, 0x80000000);
    CHECK(vblk_interrupt_line(&g.dev));
}

// Status is set after the used ring is visible: seen from the hook.
static uint16_t used_at_fire;

static void look_at_fire(void *user, int queue, bool fire) {
    (void)user, (void)queue;
    used_at_fire = fire ? get16(g.queue[0].used + 2) : used_at_fire;
    if (fire) {
        CHECK_EQ(1, vblk_mmio_read(&g.dev, VBLK_REG_INTERRUPT_STATUS, 4));
        CHECK(vblk_interrupt_line(&g.dev));
    }
}

void q12_ring_then_bit_then_interrupt(void) {
    g.o.interrupt = look_at_fire;
    guest_up();
    run(VBLK_T_IN, 0, 512);
    CHECK_EQ(1, used_at_fire);
}

// Rings on top of each other and of the buffers: bounded work, nothing
// outside them changes (checked after the test), the device lives.
void q13_overlaps_do_no_harm(void) {
    for (unsigned kind = 0; kind < 6; kind++) {
        guest_init();
        guest_make();
        guest_negotiate(VBLK_F_EVENT_IDX);
        guest_queue_up(0, 16);
        guest_queue *q = &g.queue[0];
        part p[3] = {{put_header(VBLK_T_IN, 0), 16, 0},
                     {alloc(512, 16), 512, WRITE},
                     {alloc(1, 1), 1, WRITE}};
        switch (kind) {
        case 0: p[2].gpa = q->used + 2; break;      // status over used.idx
        case 1: p[1].gpa = q->desc; break;          // data over the table
        case 2: p[1].gpa = q->avail; break;
        case 3: p[1].gpa = q->used; break;
        case 4: p[2].gpa = p[1].gpa + 5; break;     // status inside the data
        default: p[1].gpa = p[0].gpa; break;        // data over the header
        }
        submit(0, p, 3);
        memset(g.offers, 100, sizeof g.offers);
        wr(VBLK_REG_STATUS, 0xf);
        for (int i = 0; i < 50; i++) {
            drain_at(0, 0);
        }
        CHECK(g.calls <= 16 * 50);
        mark(q->avail, 600, RING);
        mark(q->desc, 16 * 16, RING);
        memset(g.mark, RING, SEAM); // what is left: all beyond
        guest_check();
        g.queue[0].size = 0;
        g.read_offered = false; // the driver made the device do that
    }
    memset(g.mark, RING, SEAM);
}

void q13_regions_touch_begin_at_0_and_end_at_the_top(void) {
    guest_up();
    static const uint64_t where[] = {0, SEAM - 512, SEAM - 256, SEAM,
                                     RAM_END - 512, HIGH,
                                     UINT64_MAX - 511};
    for (size_t i = 0; i < COUNT(where); i++) {
        req r = prepare(VBLK_T_IN, i, 512);
        r.data = where[i];
        r.head = send(0, &r);
        kick(0);
        ROW_BEGIN();
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        for (uint64_t k = 0; k < 512; k++) {
            CHECK_EQ(g.disk[i * 512 + k], *at(where[i] + k));
        }
        ROW("at %#" PRIx64, where[i]);
    }
    // A status byte, and a header, as the last bytes there are.
    req r = prepare(VBLK_T_IN, 9, 512);
    r.status = UINT64_MAX;
    fill(r.status, 0xff, 1);
    mark(r.status, 1, OFFERED);
    put(UINT64_MAX - 16, at(r.header), 16);
    r.header = UINT64_MAX - 16;
    r.head = send(0, &r);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
}

void q13_buffers_that_leave_memory(void) {
    guest_up();
    static const struct {
        uint64_t gpa;
        uint32_t n;
    } rows[] = {
        {RAM_END - 511, 512}, {RAM_END, 512}, {HIGH - 1, 512},
        {UINT64_MAX - 510, 512}, // wraps to 0, where there is memory
        {UINT64_MAX - 511, 1024}, {0x123456789000, 512},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        for (uint32_t type = 0; type < 2; type++) {
            ROW_BEGIN();
            req r = prepare(type, 0, rows[i].n);
            part p[3] = {{r.header, 16, 0},
                         {rows[i].gpa, rows[i].n, type ? 0 : WRITE},
                         {r.status, 1, WRITE}};
            g.calls = 0;
            submit(0, p, 3);
            kick(0);
            CHECK_EQ(VBLK_S_IOERR, status_of(&r));
            CHECK_EQ(0, g.calls);
            ROW("type %u at %#" PRIx64, type, rows[i].gpa);
        }
    }
    CHECK_EQ(2 * COUNT(rows), g.events[VBLK_EV_DATA_UNMAPPED]);
    CHECK_EQ(2 * COUNT(rows), counts().io_errors);
}

// A page that the device may only read.
static uint64_t rom;

static void *map_rom(void *user, uint64_t gpa, uint64_t *n, bool writable) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    return writable && gpa - rom < 4096 ? NULL
                                        : m.map(m.user, gpa, n, writable);
}

static int write_rom(void *user, uint64_t gpa, const void *src, uint64_t n) {
    vblk_memory m = vblk_regions_memory((vblk_regions *)user);
    return gpa - rom < 4096 ? -1 : m.write(m.user, gpa, src, n);
}

void q13_memory_that_can_only_be_read(void) {
    g.o.memory.map = g.mapped ? map_rom : NULL;
    g.o.memory.write = write_rom;
    rom = alloc(4096, 4096);
    guest_up();
    req r = prepare(VBLK_T_OUT, 3, 512);
    put(rom, at(r.header), 16);
    fill(rom + 512, 0x3c, 512);
    r.header = rom;
    r.data = rom + 512;
    send(0, &r);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK_MEM(at(rom + 512), g.disk + 3 * 512, 512);

    r = prepare(VBLK_T_IN, 5, 512);
    r.data = rom + 512;
    send(0, &r);
    kick(0);
    CHECK_EQ(VBLK_S_IOERR, status_of(&r));
    CHECK_EQ(1, g.events[VBLK_EV_DATA_UNMAPPED]);

    r = prepare(VBLK_T_IN, 5, 512);
    r.status = rom + 1024;
    send(0, &r);
    kick(0);
    CHECK_EQ(1, g.events[VBLK_EV_STATUS_UNWRITABLE]);
    CHECK_EQ(DIRT, *at(rom + 1024));

    rom = g.queue[0].used;
    vblk_set_memory(&g.dev, g.o.memory);
    request(VBLK_T_IN, 5, 512);
    CHECK_EQ(BROKEN, kick(0).state);
    CHECK_EQ(1, g.events[VBLK_EV_USED_UNWRITABLE]);
}

// SPLIT-28, ROB-47.
void q_spurious_kicks(void) {
    guest_up_without(0);
    run(VBLK_T_IN, 0, 512);
    g.fired = 0;
    for (int i = 0; i < 100000; i++) {
        kick(0);
    }
    CHECK_EQ(0, g.fired);
    CHECK_EQ(1, counts().reads);
    CHECK_EQ(1, used_count(0));
}

// Q12: no bit in InterruptStatus before the used index is there.
static vblk_memory below;

static int write_and_look(void *user, uint64_t gpa, const void *src,
                          uint64_t n) {
    if (src && gpa == g.queue[0].used + 2) {
        CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    }
    return below.write(user, gpa, src, n);
}

void q12_no_bit_before_the_ring(void) {
    below = g.o.memory;
    g.o.memory.write = write_and_look;
    g.o.memory.map = NULL;
    guest_up();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
}

// Q2: avail_event is written on switching on, and not for each chain.
void q2_avail_event_is_written_once(void) {
    guest_up_without(0);
    for (int i = 0; i < 3; i++) {
        request(VBLK_T_FLUSH, 0, 0);
    }
    g.traced = 0;
    kick(0);
    unsigned writes = 0;
    for (unsigned i = 0; i < g.traced; i++) {
        writes += g.trace[i].write && g.trace[i].gpa == avail_event();
    }
    CHECK_EQ(g.mapped ? 0 : 1, writes);
}

// Q7: flags that cannot be read do not stop the interrupt. Q3: nor does a
// switch that cannot be set, though the driver wants none.
void q3_q7_interrupts_without_event_idx(void) {
    for (int q3 = 0; q3 < 2; q3++) {
        guest_init();
        guest_up();
        request(VBLK_T_FLUSH, 0, 0);
        put16(g.queue[0].avail, 1); // NO_INTERRUPT
        g.hole = q3 ? g.queue[0].used : g.queue[0].avail;
        g.hole_bytes = 2;
        vblk_set_memory(&g.dev, g.o.memory);
        CHECK_EQ(EMPTY, kick(0).state);
        CHECK_EQ(1, used_count(0));
        CHECK_EQ(1, g.fired);
        CHECK_EQ(q3, g.events[VBLK_EV_NOTIFY_SWITCH]);
    }
}

// Q11: used.idx moves once for a batch.
static uint16_t used_seen;

static int64_t read_and_look(void *user, uint64_t offset, const vblk_seg *seg,
                             unsigned segs) {
    (void)user, (void)offset, (void)segs;
    used_seen |= get16(g.queue[0].used + 2);
    return (int64_t)seg[0].n;
}

void q11_used_idx_moves_once(void) {
    g.o.backend.read = read_and_look;
    used_seen = 0;
    guest_up();
    for (int i = 0; i < 5; i++) {
        request(VBLK_T_IN, 0, 512);
    }
    kick(0);
    CHECK_EQ(0, used_seen);
    CHECK_EQ(5, used_count(0));
}
