// Groups M (register file) and F (features, status machine), P2, P8, R.
#include "guest.h"

static const uint32_t ALL_REGISTERS_END = 0x100;

void m1_identity(void) {
    g.o.vendor_id = 0x554d4551;
    guest_make();

    CHECK_EQ(0x74726976, rd(VBLK_REG_MAGIC_VALUE));
    CHECK_EQ(2, rd(VBLK_REG_VERSION));
    CHECK_EQ(2, rd(VBLK_REG_DEVICE_ID));
    CHECK_EQ(0x554d4551, rd(VBLK_REG_VENDOR_ID));
    g.o.vendor_id = 0;
    g.o.profile = VBLK_STRICT;
    guest_make();
    CHECK_EQ(0, rd(VBLK_REG_VENDOR_ID));
}

void p11_the_standard_vendor_is_qemus(void) {
    g.o.profile = VBLK_STANDARD;
    guest_make();
    CHECK_EQ(0x554d4551, rd(VBLK_REG_VENDOR_ID));
    g.o.vendor_id = 7;
    guest_make();
    CHECK_EQ(7, rd(VBLK_REG_VENDOR_ID));
}

void m2_registers_are_32_bits_wide(void) {
    guest_up();
    for (uint32_t offset = 0; offset < ALL_REGISTERS_END; offset++) {
        CHECK_EQ(0xff, vblk_mmio_read(&g.dev, offset, 1));
        CHECK_EQ(0xffff, vblk_mmio_read(&g.dev, offset, 2));
        CHECK_EQ(0xffffff, vblk_mmio_read(&g.dev, offset, 3));
        CHECK_EQ(UINT64_MAX, vblk_mmio_read(&g.dev, offset, 8));
        vblk_mmio_write(&g.dev, offset, 1, 0);
        vblk_mmio_write(&g.dev, offset, 8, 0);
    }
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS)); // no narrow write of 0 got through
    CHECK_EQ(6 * 256, g.events[VBLK_EV_REG_WIDTH]);
    CHECK_EQ(UINT64_MAX, vblk_mmio_read(&g.dev, 0x100, 9));
    CHECK_EQ(UINT64_MAX, vblk_mmio_read(&g.dev, 0x100, 0));
}

void m3_config_any_width_and_alignment(void) {
    g.o.queues = 3;
    g.o.seg_max = 77;
    g.o.size_max = 0x12345;
    guest_make();
    uint8_t want[64] = {0};
    want[1] = SECTORS >> 8;
    want[8] = 0x45, want[9] = 0x23, want[10] = 1;
    want[12] = 77;
    want[21] = 2;
    want[32] = 1;
    want[34] = 3;

    for (unsigned bytes = 1; bytes <= 8; bytes++) {
        for (unsigned i = 0; i + bytes <= sizeof want; i++) {
            uint64_t value = 0;
            for (unsigned k = 0; k < bytes; k++) {
                value |= (uint64_t)want[i + k] << 8 * k;
            }
            ROW_BEGIN();
            CHECK_EQ(value, vblk_mmio_read(&g.dev, 0x100 + i, bytes));
            ROW("offset %u, width %u", i, bytes);
        }
    }
    CHECK_EQ(0, vblk_mmio_read(&g.dev, 0x100 + 35, 4)); // partly past
    CHECK_EQ(0, vblk_mmio_read(&g.dev, 0x1000, 4));
    CHECK_EQ(0, vblk_mmio_read(&g.dev, UINT64_MAX, 8));
}

void m3_config_of_large_numbers(void) {
    g.o.capacity = UINT64_C(0x12345678abcdef);
    g.o.size_max = 0x89abcdef;
    guest_make();
    CHECK_EQ(g.o.capacity, vblk_mmio_read(&g.dev, VBLK_REG_CONFIG, 8));
    CHECK_EQ(g.o.size_max, rd(VBLK_REG_CONFIG + 8));
}

void m3_config_is_not_writable(void) {
    guest_up();
    for (unsigned bytes = 1; bytes <= 8; bytes++) {
        for (uint64_t i = 0; i < 96; i++) {
            vblk_mmio_write(&g.dev, 0x100 + i, bytes, UINT64_MAX);
        }
    }
    vblk_mmio_write(&g.dev, UINT64_MAX, 8, UINT64_MAX);
    CHECK_EQ(0, g.events[VBLK_EV_REG_WIDTH]); // any width is right there
    CHECK_EQ(SECTORS, vblk_mmio_read(&g.dev, 0x100, 8));
    CHECK_EQ(512, vblk_mmio_read(&g.dev, 0x114, 4));
    for (uint64_t i = 24; i < 96; i++) { // but for `writeback`
        CHECK_EQ(i == 32, vblk_mmio_read(&g.dev, 0x100 + i, 1));
    }
}

static uint64_t writeback(void) {
    return vblk_mmio_read(&g.dev, VBLK_REG_CONFIG + 32, 1);
}

static void set_writeback(uint64_t offset, unsigned bytes, uint64_t value) {
    vblk_mmio_write(&g.dev, VBLK_REG_CONFIG + offset, bytes, value);
}

// By any width that covers it; whatever is not 0 is 1.
void m3_writeback(void) {
    guest_make();
    set_writeback(32, 1, 0); // not yet accepted
    CHECK_EQ(1, writeback());
    guest_up();
    CHECK_EQ(1, writeback()); // FLUSH was accepted
    for (unsigned bytes = 1; bytes <= 8; bytes++) {
        for (unsigned at_ = 24; at_ < 36; at_++) {
            bool hits = at_ <= 32 && at_ + bytes > 32;
            ROW_BEGIN();
            set_writeback(32, 1, 1);
            set_writeback(at_, bytes, 0);
            CHECK_EQ(!hits, writeback());
            set_writeback(at_, bytes, UINT64_MAX);
            CHECK_EQ(1, writeback());
            ROW("offset %u, width %u", at_, bytes);
        }
    }
    set_writeback(32, 0, 0);
    set_writeback(32, 9, 0); // no such access
    set_writeback(UINT64_MAX - 31, 8, 0);
    CHECK_EQ(1, writeback());
    CHECK_EQ(0, vblk_mmio_read(&g.dev, VBLK_REG_CONFIG + 33, 1));
    set_writeback(32, 1, 2);
    CHECK_EQ(1, writeback());
    set_writeback(32, 1, 0);
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(1, writeback());

    guest_up_without(VBLK_F_FLUSH);
    CHECK_EQ(0, writeback());
    set_writeback(32, 1, 1);
    CHECK_EQ(1, writeback());
    guest_up_without(VBLK_F_CONFIG_WCE);
    set_writeback(32, 1, 0);
    CHECK_EQ(1, writeback());
    guest_up_without(VBLK_F_CONFIG_WCE | VBLK_F_FLUSH);
    set_writeback(32, 1, 1);
    CHECK_EQ(0, writeback());
}

void m4_device_features_by_page(void) {
    g.o.size_max = 1 << 20; // so that standard offers it too (P12)
    guest_make();
    const uint64_t want = VBLK_F_VERSION_1 | VBLK_F_BLK_SIZE |
                          VBLK_F_SEG_MAX | VBLK_F_SIZE_MAX |
                          VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC |
                          VBLK_F_FLUSH | VBLK_F_CONFIG_WCE | VBLK_F_RING_RESET;
    CHECK_EQ((uint32_t)want, rd(VBLK_REG_DEVICE_FEATURES));
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 1); // the two selectors are apart
    CHECK_EQ((uint32_t)want, rd(VBLK_REG_DEVICE_FEATURES));
    wr(VBLK_REG_DEVICE_FEATURES_SEL, 1);
    CHECK_EQ((uint32_t)(want >> 32), rd(VBLK_REG_DEVICE_FEATURES));
    static const uint32_t none[] = {2, 3, 7, 33, UINT32_MAX};
    for (size_t i = 0; i < COUNT(none); i++) {
        wr(VBLK_REG_DEVICE_FEATURES_SEL, none[i]);
        CHECK_EQ(0, rd(VBLK_REG_DEVICE_FEATURES));
    }
}

void m5_driver_features_window(void) {
    guest_make();
    wr(VBLK_REG_DRIVER_FEATURES, 0x200); // before DRIVER
    wr(VBLK_REG_STATUS, 1);
    wr(VBLK_REG_DRIVER_FEATURES, 0x200);
    CHECK_EQ(0, g.dev.accepted);
    CHECK_EQ(2, g.events[VBLK_EV_REG_FEATURES_WINDOW]);
    wr(VBLK_REG_STATUS, 3);
    wr(VBLK_REG_DRIVER_FEATURES, 0x40);
    wr(VBLK_REG_DRIVER_FEATURES, 0x200); // the last one counts
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    wr(VBLK_REG_DRIVER_FEATURES, 1);
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 2); // ignored, and harmless
    wr(VBLK_REG_DRIVER_FEATURES, UINT32_MAX);
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 33);
    wr(VBLK_REG_DRIVER_FEATURES, UINT32_MAX);
    CHECK_EQ(VBLK_F_FLUSH | VBLK_F_VERSION_1, g.dev.accepted);
    wr(VBLK_REG_STATUS, 0xb);
    CHECK_EQ(0xb, rd(VBLK_REG_STATUS));
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 0);
    wr(VBLK_REG_DRIVER_FEATURES, 0);
    CHECK_EQ(VBLK_F_FLUSH | VBLK_F_VERSION_1, g.dev.accepted);
}

void m6_queues_that_do_not_exist(void) {
    static const uint32_t none[] = {2, 7, 8, 0xffff, UINT32_MAX};
    g.o.queues = 2;
    guest_make();
    CHECK_EQ(256, rd(VBLK_REG_QUEUE_NUM_MAX));
    wr(VBLK_REG_QUEUE_SEL, 1);
    CHECK_EQ(256, rd(VBLK_REG_QUEUE_NUM_MAX));
    guest_negotiate(0);
    for (size_t i = 0; i < COUNT(none); i++) {
        wr(VBLK_REG_QUEUE_SEL, none[i]);
        CHECK_EQ(0, rd(VBLK_REG_QUEUE_NUM_MAX));
        CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
        wr(VBLK_REG_QUEUE_NUM, 4);
        wr(VBLK_REG_QUEUE_DESC_LOW, 0xdeadbee0);
        wr(VBLK_REG_QUEUE_READY, 1);
        CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
    }
    guest_negotiate(VBLK_F_MQ); // declined: one queue is left
    wr(VBLK_REG_QUEUE_SEL, 1);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_NUM_MAX));
    wr(VBLK_REG_QUEUE_SEL, 0);
    CHECK_EQ(256, rd(VBLK_REG_QUEUE_NUM_MAX));
}

void m7_queue_registers_have_a_window(void) {
    guest_make();
    static const uint32_t before[] = {1, 3};
    wr(VBLK_REG_QUEUE_NUM, 8);
    for (size_t i = 0; i < COUNT(before); i++) {
        wr(VBLK_REG_STATUS, before[i]);
        wr(VBLK_REG_QUEUE_NUM, 8);
        wr(VBLK_REG_QUEUE_DESC_LOW, 0x1000);
        wr(VBLK_REG_QUEUE_DRIVER_HIGH, 0x1000);
        wr(VBLK_REG_QUEUE_DEVICE_LOW, 0x1000);
        wr(VBLK_REG_QUEUE_READY, 1);
    }
    CHECK_EQ(11, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
    CHECK_EQ(0, g.dev.queue[0].size);
    CHECK_EQ(0, g.dev.queue[0].desc_gpa | g.dev.queue[0].avail_gpa |
                    g.dev.queue[0].used_gpa);

    guest_up();
    vblk_queue was = g.dev.queue[0];
    wr(VBLK_REG_QUEUE_NUM, 8);
    wr(VBLK_REG_QUEUE_DESC_LOW, 0x1000);
    wr(VBLK_REG_QUEUE_DRIVER_HIGH, 0x1000);
    wr(VBLK_REG_QUEUE_DEVICE_HIGH, 0x1000);
    CHECK_EQ(0, memcmp(&was, &g.dev.queue[0], sizeof was));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

// Linux clears QueueReady after each reset.
void m7_what_changes_nothing_is_silent(void) {
    static const uint32_t registers[] = {
        VBLK_REG_QUEUE_NUM,        VBLK_REG_QUEUE_READY,
        VBLK_REG_QUEUE_DESC_LOW,   VBLK_REG_QUEUE_DESC_HIGH,
        VBLK_REG_QUEUE_DRIVER_LOW, VBLK_REG_QUEUE_DRIVER_HIGH,
        VBLK_REG_QUEUE_DEVICE_LOW, VBLK_REG_QUEUE_DEVICE_HIGH};
    guest_make();
    guest_negotiate(0);
    wr(VBLK_REG_STATUS, 0);
    for (size_t i = 0; i < COUNT(registers); i++) {
        wr(registers[i], 0);
    }
    wr(VBLK_REG_QUEUE_READY, 2); // clears as well
    CHECK_EQ(0, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    for (size_t i = 0; i < COUNT(registers); i++) {
        ROW_BEGIN();
        wr(registers[i], 1);
        CHECK_EQ(i + 1, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
        ROW("register %#x", registers[i]);
    }
    guest_up();
    const vblk_queue *q = &g.dev.queue[0];
    unsigned said = g.events[VBLK_EV_REG_QUEUE_WINDOW];
    wr(VBLK_REG_QUEUE_NUM, q->size);
    wr(VBLK_REG_QUEUE_READY, 1);
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)q->avail_gpa);
    CHECK_EQ(said, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)q->avail_gpa + 2);
    CHECK_EQ(said + 1, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
}

void m7_queue_sizes(void) {
    static const uint32_t bad[] = {0, 3, 257, 512, 0x10000, 0x10004,
                                   UINT32_MAX};
    guest_make();
    guest_negotiate(0);
    for (uint32_t size = 1; size <= 256; size *= 2) {
        wr(VBLK_REG_QUEUE_NUM, size);
        CHECK_EQ(size, g.dev.queue[0].size);
        for (size_t i = 0; i < COUNT(bad); i++) {
            wr(VBLK_REG_QUEUE_NUM, bad[i]);
            CHECK_EQ(size, g.dev.queue[0].size);
        }
    }
    CHECK_EQ(9 * (COUNT(bad) - 1), g.events[VBLK_EV_REG_QUEUE_SIZE]); // not 0
}

void m7_queue_ready_is_frozen_when_live(void) {
    guest_up();
    wr(VBLK_REG_QUEUE_READY, 0);
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
    CHECK_EQ(1, g.events[VBLK_EV_REG_QUEUE_FROZEN]);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

void m7_queue_ready_before_driver_ok(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_READY, 0));
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_READY, 1)); // as it was set up
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

void m8_address_halves_in_either_order(void) {
    static const uint32_t low[] = {VBLK_REG_QUEUE_DESC_LOW,
                                   VBLK_REG_QUEUE_DRIVER_LOW,
                                   VBLK_REG_QUEUE_DEVICE_LOW};
    guest_make();
    guest_negotiate(0);
    for (uint32_t i = 0; i < 3; i++) {
        wr(low[i] + (i & 1 ? 4 : 0), i & 1 ? 0x12345678 : 0x9abcdef0);
        wr(low[i] + (i & 1 ? 0 : 4), i & 1 ? 0x9abcdef0 : 0x12345678);
    }
    CHECK_EQ(0x123456789abcdef0, g.dev.queue[0].desc_gpa);
    CHECK_EQ(0x123456789abcdef0, g.dev.queue[0].avail_gpa);
    CHECK_EQ(0x123456789abcdef0, g.dev.queue[0].used_gpa);
}

void m8_rings_in_any_order(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)g.queue[0].used);
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)g.queue[0].avail);
    wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)g.queue[0].desc);
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

void m8_rings_above_4_gib(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    uint64_t low = g.bump;
    g.bump = HIGH;
    guest_queue *q = &g.queue[0];
    q->size = 4;
    q->desc = HIGH;
    q->avail = HIGH + 64;
    q->used = HIGH + 96;
    fill(HIGH, 0, 256);
    mark(q->desc, 80, READABLE);
    mark(q->used, 6 + 8 * 4, RING);
    wr(VBLK_REG_QUEUE_NUM, 4);
    wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)q->desc);
    wr(VBLK_REG_QUEUE_DESC_HIGH, (uint32_t)(q->desc >> 32));
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)q->avail);
    wr(VBLK_REG_QUEUE_DRIVER_HIGH, (uint32_t)(q->avail >> 32));
    wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)q->used);
    wr(VBLK_REG_QUEUE_DEVICE_HIGH, (uint32_t)(q->used >> 32));
    wr(VBLK_REG_QUEUE_READY, 1);
    guest_go();
    g.bump = low;

    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 5, 1024));
    CHECK_EQ(1025, used_len(0));
}

void m9_interrupt_status_and_ack(void) {
    guest_up();
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    run(VBLK_T_IN, 0, 512);
    vblk_needs_reset(&g.dev);
    for (int i = 0; i < 10; i++) {
        CHECK_EQ(3, rd(VBLK_REG_INTERRUPT_STATUS)); // no read-to-clear
    }
    wr(VBLK_REG_INTERRUPT_ACK, 0);
    wr(VBLK_REG_INTERRUPT_ACK, 0xfffffffc);
    CHECK_EQ(3, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(vblk_interrupt_line(&g.dev));
    wr(VBLK_REG_INTERRUPT_ACK, 1);
    CHECK_EQ(2, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(vblk_interrupt_line(&g.dev));
    CHECK_EQ(0, g.lowered);
    wr(VBLK_REG_INTERRUPT_ACK, 2);
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(!vblk_interrupt_line(&g.dev));
    CHECK_EQ(1, g.lowered);
    wr(VBLK_REG_INTERRUPT_ACK, 3);
    CHECK_EQ(1, g.lowered);
    run(VBLK_T_IN, 0, 512);
    CHECK_EQ(1, rd(VBLK_REG_INTERRUPT_STATUS));
}

void m10_notify_before_driver_ok_takes_nothing(void) {
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 256);
    req r = request(VBLK_T_IN, 0, 512);
    unsigned accesses = g.accesses;

    CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_QUEUE_NOTIFY, 0));
    CHECK_EQ(EMPTY, drain_at(0, 0).state);

    CHECK_EQ(accesses, g.accesses);
    CHECK_EQ(0xff, status_of(&r));
    CHECK_EQ(0, g.calls);
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    guest_go();
    CHECK_EQ(VBLK_S_OK, status_of(&r));
}

void m10_notify_of_no_queue_is_ignored(void) {
    static const uint32_t none[] = {1, 2, 8, 0xffff, 0x10000, UINT32_MAX};
    guest_up();
    request(VBLK_T_IN, 0, 512);
    for (size_t i = 0; i < COUNT(none); i++) {
        CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_QUEUE_NOTIFY, none[i]));
    }
    CHECK_EQ(COUNT(none), g.events[VBLK_EV_NOTIFY_NO_QUEUE]);
    CHECK_EQ(0, used_count(0));
}

void m10_queue_that_is_not_ready_is_not_touched(void) {
    g.o.queues = 2;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_queue_up(1, 16);
    wr(VBLK_REG_QUEUE_READY, 0);
    req r = prepare(VBLK_T_IN, 0, 512);
    send(1, &r);
    guest_go();
    CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_QUEUE_NOTIFY, 1));
    drain_at(1, 0);
    CHECK_EQ(0, used_count(1));
    CHECK_EQ(0xff, status_of(&r));
}

void m11_config_generation(void) {
    guest_up();
    uint32_t generation = rd(VBLK_REG_CONFIG_GENERATION);
    for (int i = 0; i < 100; i++) {
        run(VBLK_T_IN, 0, 512);
    }
    CHECK_EQ(generation, rd(VBLK_REG_CONFIG_GENERATION));
    wr(VBLK_REG_STATUS, 0);
    CHECK(rd(VBLK_REG_CONFIG_GENERATION) != generation);
}

void m12_unknown_registers(void) {
    static const uint16_t known[] = {0x00, 0x04, 0x08, 0x0c, 0x10, 0x34,
                                     0x44, 0x60, 0x70, 0xb0, 0xb4, 0xb8,
                                     0xbc, 0xfc};
    guest_up();
    for (uint32_t offset = 0; offset < ALL_REGISTERS_END; offset++) {
        bool is_known = false;
        for (size_t i = 0; i < COUNT(known); i++) {
            is_known |= known[i] == offset;
        }
        if (!is_known) {
            ROW_BEGIN();
            CHECK_EQ(0, rd(offset));
            ROW("offset %#x", offset);
        }
        if (offset < 0x14 || (offset > 0x70 && offset < 0x80) ||
            offset % 4 || offset >= 0xa8) {
            CHECK_EQ(VBLK_NO_QUEUE, wr(offset, 0)); // none of them is Status
        }
    }
    CHECK_EQ(UINT32_MAX, rd(VBLK_REG_SHM_LEN_LOW));
    CHECK_EQ(UINT32_MAX, rd(VBLK_REG_SHM_LEN_HIGH));
    CHECK_EQ(UINT32_MAX, rd(VBLK_REG_SHM_BASE_LOW));
    CHECK_EQ(UINT32_MAX, rd(VBLK_REG_SHM_BASE_HIGH));
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

static uint64_t offered(void) {
    guest_make();
    uint64_t f = rd(VBLK_REG_DEVICE_FEATURES);
    wr(VBLK_REG_DEVICE_FEATURES_SEL, 1);
    return f | (uint64_t)rd(VBLK_REG_DEVICE_FEATURES) << 32;
}

void f1_features_follow_from_the_options(void) {
    const vblk_backend whole = g.o.backend;
    g.o.size_max = 1 << 20; // so that standard offers it too (P12)
    const uint64_t base = VBLK_F_VERSION_1 | VBLK_F_BLK_SIZE |
                          VBLK_F_SEG_MAX | VBLK_F_SIZE_MAX |
                          VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC |
                          VBLK_F_RING_RESET;
    const uint64_t cache = VBLK_F_FLUSH | VBLK_F_CONFIG_WCE;
    CHECK_EQ(base | cache, offered());
    g.o.backend.flush = NULL;
    CHECK_EQ(base, offered());
    g.o.backend = whole;
    g.o.backend.write = NULL;
    CHECK_EQ(base | VBLK_F_FLUSH | VBLK_F_RO, offered());
    g.o.backend = whole;
    g.o.backend.flush = NULL;
    CHECK_EQ(base, offered());
    g.o.backend = whole;
    g.o.queues = 2;
    CHECK_EQ(base | cache | VBLK_F_MQ, offered());
    g.o.queues = 1;
    g.o.features_off = VBLK_F_INDIRECT_DESC | VBLK_F_SIZE_MAX;
    CHECK_EQ((base | cache) & ~g.o.features_off, offered());
}

// Every (old, written) pair against the rule.
static void status_pairs(vblk_profile profile) {
    static const uint8_t states[] = {0x00, 0x01, 0x03, 0x0b, 0x0f, 0x80, 0x81,
                                     0x83, 0x8b, 0x8f, 0x02, 0x0a, 0x0e};
    bool standard = profile == VBLK_STANDARD;
    g.o.profile = profile;
    for (size_t s = 0; s < COUNT(states) - (standard ? 0 : 3); s++) {
        for (uint32_t value = 0; value < 0x200; value++) {
            uint32_t old = states[s];
            guest_make();
            wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
            uint32_t steps[4] = {1, 3, 0xb, 0xf};
            for (int i = 0; i < 4; i++) {
                uint32_t step = steps[i] & ~(old & 1 ? 0u : 1u);
                if (step == 0 || step & ~old) {
                    continue;
                }
                wr(VBLK_REG_STATUS, step);
                wr(VBLK_REG_DRIVER_FEATURES, 1);
            }
            wr(VBLK_REG_STATUS, old);
            CHECK_EQ(old, rd(VBLK_REG_STATUS));

            uint32_t want = guest_status_after(standard, old, value);
            bool live = want & ~old & VBLK_STATUS_DRIVER_OK;
            ROW_BEGIN();
            CHECK_EQ((unsigned)(live ? VBLK_ALL_QUEUES : VBLK_NO_QUEUE),
                     (unsigned)wr(VBLK_REG_STATUS, value));
            CHECK_EQ(want, rd(VBLK_REG_STATUS));
            ROW("%#x over %#x", value, old);
        }
    }
}

void f2_status_steps_strict(void) {
    status_pairs(VBLK_STRICT);
    CHECK(g.events[VBLK_EV_STATUS_CLEARS] > 0);
    CHECK(g.events[VBLK_EV_STATUS_BITS] > 0);
    CHECK(g.events[VBLK_EV_STATUS_ORDER] > 0);
    CHECK(g.events[VBLK_EV_STATUS_NO_ACK] > 0);
}

void p2_status_steps_standard(void) {
    status_pairs(VBLK_STANDARD);
    CHECK_EQ(0, g.events[VBLK_EV_STATUS_NO_ACK]);
    CHECK_EQ(0, g.events[VBLK_EV_STATUS_CLEARS]);
    CHECK_EQ(0, g.events[VBLK_EV_STATUS_BITS]);
}

// Steps that come together take what FEATURES_OK settles with them.
void p2_steps_at_once(void) {
    g.o.profile = VBLK_STANDARD;
    for (int declined = 0; declined < 2; declined++) {
        guest_make();
        wr(VBLK_REG_STATUS, 3);
        wr(VBLK_REG_DRIVER_FEATURES,
           (uint32_t)(VBLK_F_INDIRECT_DESC | (declined ? 0 : VBLK_F_FLUSH)));
        wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
        wr(VBLK_REG_DRIVER_FEATURES, 1);
        CHECK_EQ((unsigned)VBLK_ALL_QUEUES,
                 (unsigned)wr(VBLK_REG_STATUS, 0xf));
        CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
        vblk_ring ring = {.size = 16, .desc = 0x4000, .avail = 0x5000,
                          .used = 0x6000};
        guest_queue *q = &g.queue[0];
        *q = (guest_queue){.size = 16, .desc = ring.desc, .avail = ring.avail,
                           .used = ring.used};
        fill(ring.desc, 0, 0x3000);
        mark(ring.used, 6 + 8 * 16, RING);
        mark(ring.desc, 0x2000, READABLE);
        g.bump = 0x8000;
        CHECK_EQ(0, vblk_queue_start(&g.dev, 0, &ring));
        req r = prepare(VBLK_T_OUT, 0, 512);
        part p[3] = {{r.header, 16, 0}, {r.data, 512, 0}, {r.status, 1, WRITE}};
        part table = {put_table(p, 3), 48, INDIRECT};
        submit(0, &table, 1);
        kick(0);
        CHECK_EQ(VBLK_S_OK, status_of(&r));
        CHECK_EQ(declined, g.flushes);
        g.flushes = 0;
        wr(VBLK_REG_STATUS, 0);
    }
}

void f3_features_ok_needs_version_1_and_a_subset(void) {
    g.o.size_max = 1 << 20; // so that standard offers it too (P12)
    const uint64_t all = VBLK_F_BLK_SIZE | VBLK_F_SEG_MAX | VBLK_F_SIZE_MAX |
                         VBLK_F_EVENT_IDX | VBLK_F_INDIRECT_DESC |
                         VBLK_F_FLUSH | VBLK_F_CONFIG_WCE | VBLK_F_RING_RESET;
    guest_make();
    for (unsigned bit = 0; bit < 64; bit++) { // one bit that was not offered
        uint64_t f = UINT64_C(1) << bit;
        bool fine = (f & (all | VBLK_F_VERSION_1)) != 0;
        f |= VBLK_F_VERSION_1;
        wr(VBLK_REG_STATUS, 0);
        wr(VBLK_REG_STATUS, 1);
        wr(VBLK_REG_STATUS, 3);
        wr(VBLK_REG_DRIVER_FEATURES, (uint32_t)f);
        wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
        wr(VBLK_REG_DRIVER_FEATURES, (uint32_t)(f >> 32));
        wr(VBLK_REG_STATUS, 0xb);
        ROW_BEGIN();
        CHECK_EQ(fine ? 0xb : 3, rd(VBLK_REG_STATUS));
        ROW("bit %u", bit);
    }
    CHECK(g.events[VBLK_EV_FEATURES_UNOFFERED] > 50);
    for (unsigned set = 0; set < 256; set++) { // any subset will do
        uint64_t f = VBLK_F_VERSION_1, left = all;
        for (unsigned bit = 0; bit < 8; bit++, left &= left - 1) {
            f |= set >> bit & 1 ? left & (~left + 1) : 0;
        }
        guest_negotiate(~f);
        CHECK_EQ(0xb, rd(VBLK_REG_STATUS));
    }
    guest_negotiate(VBLK_F_VERSION_1);
    if (g.o.profile == VBLK_STANDARD) {
        return; // p10
    }
    CHECK_EQ(3, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, g.events[VBLK_EV_FEATURES_VERSION]);
    CHECK_EQ(all, g.last.value); // accepted, of those offered
    CHECK_EQ(all | VBLK_F_VERSION_1, g.last.against);
    wr(VBLK_REG_STATUS, 0x43);
    CHECK_EQ(VBLK_EV_STATUS_BITS, g.last.code);
    CHECK_EQ(0x43, g.last.value); // written, over Status
    CHECK_EQ(3, g.last.against);
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 1); // and it may try again
    wr(VBLK_REG_DRIVER_FEATURES, 1);
    wr(VBLK_REG_STATUS, 0xb);
    CHECK_EQ(0xb, rd(VBLK_REG_STATUS));
}

// The layout is the modern one all the same.
void p10_a_driver_without_version_1(void) {
    g.o.profile = VBLK_STANDARD;
    guest_up_without(VBLK_F_VERSION_1 | VBLK_F_EVENT_IDX);
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(0, g.events[VBLK_EV_FEATURES_VERSION]);
    guest_negotiate(VBLK_F_VERSION_1 | VBLK_F_FLUSH);
    CHECK_EQ(0xb, rd(VBLK_REG_STATUS));
    wr(VBLK_REG_STATUS, 0); // what was not offered is refused all the same
    wr(VBLK_REG_STATUS, 3);
    wr(VBLK_REG_DRIVER_FEATURES, (uint32_t)VBLK_F_RO);
    wr(VBLK_REG_STATUS, 0xb);
    CHECK_EQ(3, rd(VBLK_REG_STATUS));
    CHECK_EQ(VBLK_EV_FEATURES_UNOFFERED, g.last.code);
}

// LK sets its queue up before FEATURES_OK.
void p13_queue_registers_from_driver_on(void) {
    for (int standard = 0; standard < 2; standard++) {
        guest_init();
        g.o.profile = standard ? VBLK_STANDARD : VBLK_STRICT;
        guest_make();
        wr(VBLK_REG_STATUS, 1);
        wr(VBLK_REG_QUEUE_NUM, 16);
        CHECK_EQ(1, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
        wr(VBLK_REG_STATUS, 3);
        wr(VBLK_REG_QUEUE_NUM, 16);
        wr(VBLK_REG_QUEUE_READY, 1);
        CHECK_EQ(standard, rd(VBLK_REG_QUEUE_READY));
        CHECK_EQ(standard ? 16 : 0, g.dev.queue[0].size);
        CHECK_EQ(standard ? 1 : 3, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    }
}

void f4_writing_the_same_status_is_nothing(void) {
    guest_up();
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_STATUS, 0xf));
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, used_count(0));
    for (int i = 1; i < VBLK_EV_END; i++) {
        CHECK_EQ(0, g.events[i]);
    }
}

void f5_failed_is_stored_and_nothing_else_happens(void) {
    guest_up();
    wr(VBLK_REG_STATUS, 0x8f);
    CHECK_EQ(0x8f, rd(VBLK_REG_STATUS));
    CHECK_EQ(1, g.events[VBLK_EV_STATUS_FAILED]);
    CHECK_EQ(0, g.fired);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    vblk_needs_reset(&g.dev);
    CHECK_EQ(0xcf, rd(VBLK_REG_STATUS));
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
}

void f6_writing_0_resets_from_every_state(void) {
    static const uint32_t steps[] = {1, 3, 0xb, 0xf, 0x8f};
    for (size_t n = 0; n <= COUNT(steps) + 1; n++) {
        guest_make();
        for (size_t i = 0; i < n && i < COUNT(steps); i++) {
            wr(VBLK_REG_STATUS, steps[i]);
            wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
            wr(VBLK_REG_DRIVER_FEATURES, 1);
        }
        if (n > COUNT(steps)) {
            vblk_needs_reset(&g.dev);
        }
        wr(VBLK_REG_STATUS, 0);
        CHECK_EQ(0, rd(VBLK_REG_STATUS));
        CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    }
}

void f7_needs_reset_belongs_to_the_device(void) {
    guest_up();
    vblk_needs_reset(&g.dev);
    CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
    CHECK_EQ(2, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(1, g.fired);
    bool strict = g.o.profile == VBLK_STRICT;
    for (uint32_t value = 1; value < 0x100; value++) {
        bool failed = strict ? value == 0xcf : value & 0x80; // F5
        if (value != 0x4f && !failed) {
            wr(VBLK_REG_STATUS, value);
            CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
        }
    }
    CHECK_EQ(strict ? 253 : 0, g.events[VBLK_EV_STATUS_NEEDS_RESET]);
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));

    guest_negotiate(0); // before DRIVER_OK: the bit and no interrupt
    g.fired = 0;
    vblk_needs_reset(&g.dev);
    CHECK_EQ(0x4b, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(0, g.fired);
    wr(VBLK_REG_STATUS, 0x4f);
    CHECK_EQ(0x4b, rd(VBLK_REG_STATUS));
}

void f8_event_idx_only_if_negotiated(void) {
    for (int on = 0; on < 2; on++) {
        guest_make();
        guest_negotiate(on ? 0 : VBLK_F_EVENT_IDX);
        guest_queue_up(0, 16);
        uint64_t avail_event = g.queue[0].used + 4 + 8 * 16;
        guest_go();
        run(VBLK_T_IN, 0, 512);
        CHECK_EQ(on ? 1 : 0, get16(avail_event));
    }
}

void p8_queue_ready_0_stops_a_queue_and_it_starts_over(void) {
    g.o.queues = 2;
    guest_up_standard();
    uint32_t id, len;
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    }
    vblk_request under_way;
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &under_way).state);

    wr(VBLK_REG_QUEUE_SEL, 0);
    wr(VBLK_REG_QUEUE_READY, 0);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));

    unsigned traced = g.traced;
    CHECK(vblk_complete(&g.dev, &under_way, 512));
    vblk_publish(&g.dev, 0);
    CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_QUEUE_NOTIFY, 0));
    CHECK_EQ(traced, g.traced);
    req other = prepare(VBLK_T_IN, 0, 512); // queue 1 goes on
    send(1, &other);
    kick(1);
    CHECK_EQ(VBLK_S_OK, status_of(&other));

    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    guest_queue_up(0, 8); // other size, other rings
    req r = request(VBLK_T_IN, 0, 512);
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK(used_next(0, &id, &len));
    CHECK_EQ(0, id);
    CHECK_EQ(1, get16(g.queue[0].used + 2));
}

// Size and addresses stay; so does poison, which only a reset clears (Q4).
void p8_a_stopped_queue_keeps_what_it_was_told(void) {
    guest_up_standard();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    wr(VBLK_REG_QUEUE_READY, 0);
    guest_queue *q = &g.queue[0];
    put16(q->avail + 2, 0);
    fill(q->used, 0, 4);
    q->avail_idx = q->used_idx = 0;
    wr_drain(VBLK_REG_QUEUE_READY, 1);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    put16(q->avail + 2, 5000);
    CHECK_EQ(BROKEN, kick(0).state);
    put16(q->avail + 2, 0);
    wr(VBLK_REG_QUEUE_READY, 0);
    int queue = wr(VBLK_REG_QUEUE_READY, 1);
    CHECK_EQ(BROKEN, drain_at(queue, 0).state);
}

// M13: what is under way goes stale; the queue is as new, other queues go on,
// and it may come up with another size and other rings.
static void reset_a_queue(vblk_profile profile) {
    uint32_t id, len;
    g.o.profile = profile;
    g.o.queues = 2;
    guest_up();
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    }
    vblk_request under_way;
    request(VBLK_T_IN, 0, 512);
    CHECK_EQ(REQUEST, take(0, 0, &under_way).state);
    req pending = request(VBLK_T_OUT, 0, 512);
    wr(VBLK_REG_QUEUE_SEL, 0);
    for (uint32_t i = 0; i < 4; i++) {
        static const uint32_t others[] = {0, 2, 3, UINT32_MAX};
        wr(VBLK_REG_QUEUE_RESET, others[i]);
        CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
    }

    wr(VBLK_REG_QUEUE_RESET, 1);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_RESET));
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
    CHECK_EQ(0xf, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, g.dev.queue[0].size);
    CHECK_EQ(0, g.dev.queue[0].used_gpa);
    wr(VBLK_REG_INTERRUPT_ACK, 1);
    unsigned traced = g.traced;
    CHECK(vblk_complete(&g.dev, &under_way, 512));
    vblk_publish(&g.dev, 0);
    CHECK_EQ(VBLK_NO_QUEUE, wr(VBLK_REG_QUEUE_NOTIFY, 0));
    CHECK_EQ(EMPTY, drain(0).state);
    CHECK_EQ(traced, g.traced);
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK_EQ(0xff, status_of(&pending));
    req other = prepare(VBLK_T_IN, 0, 512);
    send(1, &other);
    kick(1);
    CHECK_EQ(VBLK_S_OK, status_of(&other));

    guest_queue_up(0, 8);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_RESET));
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
    req r = request(VBLK_T_IN, 0, 512);
    kick(0);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
    CHECK(used_next(0, &id, &len));
    CHECK_EQ(0, id);
    CHECK_EQ(1, get16(g.queue[0].used + 2));
    CHECK_EQ(0, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    wr(VBLK_REG_QUEUE_NUM, 16); // while it is ready
    CHECK_EQ(8, g.dev.queue[0].size);

    CHECK_EQ(1, drain(0).state == EMPTY); // a broken one stays that
    put16(g.queue[0].avail + 2, 5000);
    CHECK_EQ(BROKEN, kick(0).state);
    wr(VBLK_REG_QUEUE_RESET, 1);
    CHECK(vblk_queue_broken(&g.dev, 0));
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_RESET));
    CHECK(!vblk_queue_broken(&g.dev, 0));
}

void m13_a_queue_is_reset_alone(void) {
    reset_a_queue(VBLK_STRICT);
    guest_init();
    reset_a_queue(VBLK_STANDARD);
}

void m13_counts_only_if_accepted_and_live(void) {
    for (unsigned profile = 0; profile < 2; profile++) {
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_up_without(VBLK_F_RING_RESET);
        wr(VBLK_REG_QUEUE_RESET, 1);
        CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
        guest_init();
        g.o.profile = (vblk_profile)profile;
        guest_make();
        guest_negotiate(0);
        guest_queue_up(0, 16);
        wr(VBLK_REG_QUEUE_RESET, 1);
        CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
        wr(VBLK_REG_QUEUE_SEL, 1); // there is none
        wr(VBLK_REG_STATUS, 0xf);
        wr(VBLK_REG_QUEUE_RESET, 1);
        CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    }
}

void p8_a_ready_queue_is_not_reconfigured_live(void) {
    guest_up_standard();
    wr(VBLK_REG_QUEUE_NUM, 8);
    wr(VBLK_REG_QUEUE_DESC_LOW, 0);
    CHECK_EQ(2, g.events[VBLK_EV_REG_QUEUE_WINDOW]);
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

// What waited in a queue when it was enabled needs no notification.
void p8_enabling_a_live_queue_names_it(void) {
    guest_make();
    g.o.profile = VBLK_STANDARD;
    guest_make();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_go();
    guest_queue_up(0, 8);
    wr(VBLK_REG_QUEUE_READY, 0);
    g.queue[0].size = 8;
    wr(VBLK_REG_QUEUE_NUM, 8);
    wr(VBLK_REG_QUEUE_DESC_LOW, (uint32_t)g.queue[0].desc);
    wr(VBLK_REG_QUEUE_DRIVER_LOW, (uint32_t)g.queue[0].avail);
    wr(VBLK_REG_QUEUE_DEVICE_LOW, (uint32_t)g.queue[0].used);
    req r = request(VBLK_T_IN, 0, 512);
    wr_drain(VBLK_REG_QUEUE_READY, 1);
    CHECK_EQ(VBLK_S_OK, status_of(&r));
}

void p8_enabling_a_queue_that_runs_is_nothing(void) {
    guest_up_standard();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_READY, 1));
    CHECK_EQ(1, rd(VBLK_REG_QUEUE_READY));
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
    CHECK_EQ(2, used_count(0));
}

void r1_reset_clears_what_belongs_to_the_driver(void) {
    guest_up_without(0);
    run(VBLK_T_OUT, 1, 512);
    wr(VBLK_REG_DEVICE_FEATURES_SEL, 1);
    wr(VBLK_REG_DRIVER_FEATURES_SEL, 1);
    wr(VBLK_REG_QUEUE_SEL, 3);
    uint32_t generation = rd(VBLK_REG_CONFIG_GENERATION);
    vblk_counts before = counts();
    unsigned lowered = g.lowered;

    wr(VBLK_REG_STATUS, 0);

    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    CHECK_EQ(0, rd(VBLK_REG_INTERRUPT_STATUS));
    CHECK(!vblk_interrupt_line(&g.dev));
    CHECK_EQ(lowered + 1, g.lowered);
    CHECK_EQ(0, rd(VBLK_REG_QUEUE_READY));
    CHECK_EQ(256, rd(VBLK_REG_QUEUE_NUM_MAX)); // QueueSel is 0
    CHECK_EQ((uint32_t)g.features, rd(VBLK_REG_DEVICE_FEATURES));
    CHECK(!g.dev.accepted && !g.dev.event_idx && !g.dev.indirect);
    const vblk_queue *q = &g.dev.queue[0];
    CHECK(!q->size && !q->desc_gpa && !q->avail_gpa && !q->used_gpa);
    CHECK(generation != rd(VBLK_REG_CONFIG_GENERATION));
    CHECK_EQ(SECTORS, vblk_mmio_read(&g.dev, 0x100, 8));
    vblk_counts after = counts();
    CHECK_MEM(&before, &after, sizeof before);
}

void r1_reset_of_every_queue_there_can_be(void) {
    g.o.queues = 8;
    guest_up();
    wr(VBLK_REG_STATUS, 0);
    for (unsigned i = 0; i < 8; i++) {
        CHECK(!g.dev.queue[i].ready && !g.dev.queue[i].size);
    }
    CHECK_EQ(8, g.dev.queues);
    guest_up();
    CHECK_EQ((uint64_t)VBLK_NO_QUEUE,
             (uint64_t)wr(VBLK_REG_QUEUE_NOTIFY, 8));
    CHECK_EQ(1, g.events[VBLK_EV_NOTIFY_NO_QUEUE]);
}

void r1_reset_clears_poison(void) {
    guest_up();
    put16(g.queue[0].avail + 2, 1000);
    CHECK_EQ(BROKEN, kick(0).state);
    reset();
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

void r2_reset_twice_is_harmless(void) {
    guest_up();
    wr(VBLK_REG_STATUS, 0);
    wr(VBLK_REG_STATUS, 0);
    CHECK_EQ(0, rd(VBLK_REG_STATUS));
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(0, 16);
    guest_go();
    CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 512));
}

// FEAT-05, RST-05, RST-06: sessions do not leak into each other.
void r3_bind_again_any_number_of_times(void) {
    guest_make();
    uint64_t bump = g.bump;
    for (unsigned i = 0; i < 1000; i++) {
        g.bump = bump;
        guest_negotiate(i & 1 ? VBLK_F_EVENT_IDX : 0);
        CHECK_EQ(0xb, rd(VBLK_REG_STATUS));
        guest_queue_up(0, 1u << (i % 9));
        guest_go();
        if (g.queue[0].size >= 4) {
            CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, i, 512));
            CHECK_EQ(1, get16(g.queue[0].used + 2));
        }
        if (i % 3 == 0) {
            put16(g.queue[0].avail + 2, 0x7000);
            kick(0);
            CHECK_EQ(0x4f, rd(VBLK_REG_STATUS));
        }
        reset();
    }
}
