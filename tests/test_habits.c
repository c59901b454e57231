// What drivers that are shipped store in the window, and in what order: the
// habits of each as a row of data, played against both profiles, with how far
// it comes and what is said of it. A disk that a guest does not find is most
// often one of these.
#include "guest.h"

// A step is a store, or one of these.
enum { END, S, FEATURES, QUEUE, READ, RESET_READY };

typedef struct step {
    uint8_t  what;
    uint16_t offset;
    uint32_t value;
} step;

#define STATUS(v)   {S, VBLK_REG_STATUS, v}
#define STORE(o, v) {S, o, v}

typedef struct habit {
    const char     *driver;
    uint64_t        declined; // of what is offered
    step            steps[24];
    // In strict, in standard: Status at the end, and the events on the way.
    uint8_t         status[2];
    vblk_event_code says[2]; // the first; NONE: silent
} habit;

#define NEW (VBLK_F_VERSION_1 | VBLK_F_EVENT_IDX) // declined by who is old

static const habit habits[] = {
    {"Linux 6.12", 0,
     {STATUS(0), STORE(VBLK_REG_QUEUE_READY, 0), STATUS(1), STATUS(3),
      {FEATURES, 0, 0}, STATUS(0xb), {QUEUE, 0, 0}, STATUS(0xf),
      {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_NONE, VBLK_EV_NONE}},
    {"Linux 6.12, unbound", 0,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0}, STATUS(0),
      {RESET_READY, 0, 0}},
     {0, 0}, {VBLK_EV_NONE, VBLK_EV_NONE}},
    {"U-Boot 2023.01", NEW & ~VBLK_F_VERSION_1,
     {STATUS(1), STATUS(0), STATUS(2), {FEATURES, 0, 0}, STATUS(0xa),
      {QUEUE, 0, 0}, STATUS(0xe), {READ, 0, 0}},
     {0, 0xe}, {VBLK_EV_STATUS_NO_ACK, VBLK_EV_NONE}},
    {"EDK2", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_NONE, VBLK_EV_NONE}},
    {"SeaBIOS 1.16 on mmio", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb), {QUEUE, 0, 0},
      STATUS(0xf), {READ, 0, 0}},
     {0, 0xf}, {VBLK_EV_STATUS_BITS, VBLK_EV_NONE}},
    {"SLOF", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0x80000000}},
     {0xf, 0xf}, {VBLK_EV_TYPE_BARRIER, VBLK_EV_NONE}},
    {"xv6-riscv", NEW,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0}},
     {3, 0xf}, {VBLK_EV_FEATURES_VERSION, VBLK_EV_NONE}},
    {"LK", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(3), {QUEUE, 0, 0}, {FEATURES, 0, 0},
      STATUS(0xb), STATUS(0xf), {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_REG_QUEUE_WINDOW, VBLK_EV_NONE}},
    {"NuttX", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(2), {FEATURES, 0, 0}, STATUS(8),
      {QUEUE, 0, 0}, STATUS(4), {READ, 0, 0}},
     {1, 0xf}, {VBLK_EV_STATUS_CLEARS, VBLK_EV_NONE}},
    {"seL4's sDDF", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(2), {FEATURES, 0, 0}, STATUS(8),
      {QUEUE, 0, 0}, STATUS(4), {READ, 0, 0}},
     {1, 0xf}, {VBLK_EV_STATUS_CLEARS, VBLK_EV_NONE}},
    {"Unikraft, giving up", NEW,
     {STATUS(0), STATUS(1), STATUS(3), STATUS(0x80)},
     {3, 0x83}, {VBLK_EV_STATUS_CLEARS, VBLK_EV_STATUS_FAILED}},
    {"Phoenix-RTOS", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb), {QUEUE, 0, 0},
      STATUS(0xf), {READ, 0, 0}},
     {0, 0xf}, {VBLK_EV_STATUS_BITS, VBLK_EV_NONE}},
    {"virtio-drivers, Rust", 0,
     {STATUS(0), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb), {QUEUE, 0, 0},
      STATUS(0xf), {READ, 0, 0}, STORE(VBLK_REG_QUEUE_SEL, 0),
      STORE(VBLK_REG_QUEUE_READY, 0), STORE(VBLK_REG_QUEUE_NUM, 0),
      STORE(VBLK_REG_QUEUE_DESC_LOW, 0), STORE(VBLK_REG_QUEUE_DESC_HIGH, 0),
      STORE(VBLK_REG_QUEUE_DRIVER_LOW, 0),
      STORE(VBLK_REG_QUEUE_DRIVER_HIGH, 0),
      STORE(VBLK_REG_QUEUE_DEVICE_LOW, 0),
      STORE(VBLK_REG_QUEUE_DEVICE_HIGH, 0)},
     {0, 0xf}, {VBLK_EV_STATUS_BITS, VBLK_EV_NONE}},
    {"barebox", NEW & ~VBLK_F_VERSION_1,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STORE(VBLK_REG_QUEUE_NOTIFY, 0), STATUS(0xf),
      {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_NOTIFY_EARLY, VBLK_EV_NOTIFY_EARLY}},
    {"viostor, on modern transports", 0,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_NONE, VBLK_EV_NONE}},
    {"FreeBSD", 0,
     {STATUS(0), STATUS(1), STATUS(3), {FEATURES, 0, 0}, STATUS(0xb),
      {QUEUE, 0, 0}, STATUS(0xf), {READ, 0, 0}},
     {0xf, 0xf}, {VBLK_EV_NONE, VBLK_EV_NONE}},
    {"RT-Thread, of version 1", NEW,
     {STATUS(0), STATUS(1), STATUS(3), STORE(0x28, 4096),
      STORE(VBLK_REG_QUEUE_SEL, 0), STORE(0x3c, 4096), STORE(0x40, 0x80)},
     {3, 3}, {VBLK_EV_NONE, VBLK_EV_NONE}},
};

static vblk_event_code first;
static void (*said)(void *user, const vblk_event *event);

static void note_first(void *user, const vblk_event *event) {
    first = first ? first : event->code;
    said(user, event);
}

static void accept_features(uint64_t declined) {
    for (uint32_t sel = 0; sel < 2; sel++) {
        wr(VBLK_REG_DEVICE_FEATURES_SEL, sel);
        uint32_t offered = rd(VBLK_REG_DEVICE_FEATURES);
        wr(VBLK_REG_DRIVER_FEATURES_SEL, sel);
        wr(VBLK_REG_DRIVER_FEATURES,
           offered & ~(uint32_t)(declined >> 32 * sel));
    }
}

static void play(const habit *h, bool *served) {
    for (const step *s = h->steps; s->what != END; s++) {
        switch (s->what) {
        case S:           wr_drain(s->offset, s->value);     break;
        case FEATURES:    accept_features(h->declined);      break;
        case QUEUE:       guest_queue_up(0, 16);             break;
        case RESET_READY: wr(VBLK_REG_QUEUE_READY, 0);       break;
        default:
            *served = run(VBLK_T_IN | s->value, 3, 512) == VBLK_S_OK;
            break;
        }
    }
}

void habits_of_drivers(void) {
    for (int profile = 0; profile < 2; profile++) {
        for (size_t i = 0; i < COUNT(habits); i++) {
            const habit *h = &habits[i];
            bool served = false, asks = false;
            guest_init();
            g.o.profile = (vblk_profile)profile;
            said = g.o.event;
            g.o.event = note_first;
            guest_make();
            first = VBLK_EV_NONE;
            play(h, &served);
            for (const step *s = h->steps; s->what != END; s++) {
                asks |= s->what == READ;
            }
            ROW_BEGIN();
            bool standard = profile == VBLK_STANDARD;
            CHECK_EQ(h->status[standard], rd(VBLK_REG_STATUS));
            CHECK_EQ(h->says[standard], first);
            if (asks && standard) {
                CHECK(served);
            }
            guest_check();
            ROW("%s, %s", h->driver, standard ? "standard" : "strict");
        }
    }
}

// Three causes, three sentences.
void habits_notifications_that_are_ignored(void) {
    g.o.queues = 2;
    guest_make();
    wr(VBLK_REG_QUEUE_NOTIFY, 2);
    CHECK_EQ(VBLK_EV_NOTIFY_NO_QUEUE, g.last.code);
    CHECK_EQ(2, event_a(&g.last));
    guest_negotiate(VBLK_F_EVENT_IDX);
    guest_queue_up(1, 16);
    wr(VBLK_REG_QUEUE_NOTIFY, 1);
    CHECK_EQ(VBLK_EV_NOTIFY_EARLY, g.last.code);
    CHECK_EQ(1, event_a(&g.last));
    CHECK_EQ(0xb, event_b(&g.last));
    guest_go();
    wr(VBLK_REG_QUEUE_NOTIFY, 0);
    CHECK_EQ(VBLK_EV_NOTIFY_NOT_READY, g.last.code);
    CHECK_EQ(0, event_a(&g.last));
}

// P12, V5: what is not offered does not bind, and the end of a limit neither.
void p12_a_limit_that_is_not_offered_does_not_bind(void) {
    for (int profile = 0; profile < 2; profile++) {
        for (int off = 0; off < 2; off++) {
            guest_init();
            g.o.profile = (vblk_profile)profile;
            g.o.features_off = off ? VBLK_F_SIZE_MAX : 0;
            g.o.size_max = off ? 8192 : 0;
            guest_up();
            bool offered = vblk_device_features(&g.dev) & VBLK_F_SIZE_MAX;
            CHECK_EQ(profile == VBLK_STRICT && !off, offered);
            CHECK_EQ(VBLK_S_OK, run(VBLK_T_IN, 0, 16384));
        }
    }
    guest_init();
    g.o.profile = VBLK_STANDARD;
    g.o.size_max = 8192;
    guest_make();
    CHECK(vblk_device_features(&g.dev) & VBLK_F_SIZE_MAX);
    CHECK_EQ(8192, rd(VBLK_REG_CONFIG + 8));
}
