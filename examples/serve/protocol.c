// vhost-user: the messages, what each of them does, and how they come here.
#include "serve.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>


// ---- The protocol: numbers and layouts -------------------------------------

// Name, number, the least bytes that must follow the header. What makes no
// sense is the front end's fault and ends its connection; but for the values
// that come from the guest, through a front end that looks at nothing. Such a
// message is taken, and the ring broken that it is about.
#define REQUESTS(X)                                                            \
    X(GET_FEATURES, 1, 0)                                                      \
    X(SET_FEATURES, 2, 8)      /* the front end masks them */                  \
    X(SET_OWNER, 3, 0)                                                         \
    X(RESET_OWNER, 4, 0)                                                       \
    X(SET_MEM_TABLE, 5, 8)                                                     \
    X(SET_VRING_NUM, 8, 8)     /* the guest's: QueueNum */                     \
    X(SET_VRING_ADDR, 9, 40)   /* the guest's: where its rings are */          \
    X(SET_VRING_BASE, 10, 8)                                                   \
    X(GET_VRING_BASE, 11, 8)                                                   \
    X(SET_VRING_KICK, 12, 8)                                                   \
    X(SET_VRING_CALL, 13, 8)                                                   \
    X(SET_VRING_ERR, 14, 8)                                                    \
    X(GET_PROTOCOL_FEATURES, 15, 0)                                            \
    X(SET_PROTOCOL_FEATURES, 16, 8)                                            \
    X(GET_QUEUE_NUM, 17, 0)                                                    \
    X(SET_VRING_ENABLE, 18, 8) /* the guest's: a queue it may not have */      \
    X(SET_BACKEND_REQ_FD, 21, 0)                                               \
    X(GET_CONFIG, 24, 12)                                                      \
    X(SET_CONFIG, 25, 12)      /* the guest's: a store in config space */      \
    X(GET_INFLIGHT_FD, 31, 20)                                                 \
    X(SET_INFLIGHT_FD, 32, 20)                                                 \
    X(RESET_DEVICE, 34, 0)                                                     \
    X(GET_MAX_MEM_SLOTS, 36, 0)                                                \
    X(ADD_MEM_REG, 37, 40)                                                     \
    X(REM_MEM_REG, 38, 40)

#define X(name, number, least) name = number,
enum request { REQUESTS(X) };
#undef X

#define PROTOCOL_MQ           (UINT64_C(1) << 0)
#define PROTOCOL_REPLY_ACK    (UINT64_C(1) << 3)
#define PROTOCOL_BACKEND_REQ  (UINT64_C(1) << 5) // User-Mode Linux insists
#define PROTOCOL_CONFIG       (UINT64_C(1) << 9)
#define PROTOCOL_INFLIGHT     (UINT64_C(1) << 12)
#define PROTOCOL_RESET_DEVICE (UINT64_C(1) << 13)
#define PROTOCOL_MEM_SLOTS    (UINT64_C(1) << 15) // libblkio insists
#define PROTOCOL_OFFERED                                                       \
    (PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_BACKEND_REQ |                 \
     PROTOCOL_CONFIG | PROTOCOL_INFLIGHT | PROTOCOL_RESET_DEVICE |             \
     PROTOCOL_MEM_SLOTS)

#define FLAGS_VERSION    3u // mask; the version is 1
#define FLAGS_REPLY      4u
#define FLAGS_NEED_REPLY 8u

#define BACKEND_CONFIG_CHANGE 2u // from us, on the channel for that

#define CONFIG_SPACE  256u
#define CONFIG_HEADER 12u    // bytes in front of the data
#define NO_FD         0x100u // in the index of SET_VRING_KICK, CALL and ERR

typedef struct header {
    uint32_t request, flags, size;
} header;

typedef union payload { // in the byte order of the machine
    uint64_t u64;
    struct {
        uint32_t index, num;
    } state;
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr;
    struct {
        uint32_t   count, padding;
        mem_region region[MAX_REGIONS];
    } memory;
    struct {
        uint64_t   padding;
        mem_region region;
    } slot;
    struct {
        uint64_t bytes, offset;
        uint16_t rings, size;
    } inflight;
    struct {
        uint32_t offset, size, flags;
        uint8_t  data[CONFIG_SPACE];
    } config;
} payload;

// The message that is arriving.
static header   head;
static payload  body;
static size_t   have;       // bytes of both
static uint64_t message_ns; // when the rest of it must be there; 0: none
static int      fds[MAX_REGIONS];
static unsigned nfds;

static uint64_t protocol; // features accepted
static int      backend_req = -1;


// ---- Messages --------------------------------------------------------------

// With a descriptor, unless `pass` is -1.
static bool reply_with(int fd, uint32_t size, int pass) {
    union {
        struct cmsghdr align;
        char           bytes[CMSG_SPACE(sizeof(int))];
    } control;
    head.flags = 1 | FLAGS_REPLY;
    head.size = size;
    struct iovec  iov[] = {{&head, sizeof head}, {&body, size}};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    if (pass >= 0) {
        memset(&control, 0, sizeof control);
        m.msg_control = &control;
        m.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &pass, sizeof pass);
    }
    return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL) ==
               (ssize_t)(sizeof head + size) ||
           refuse("it does not take replies: %s", strerror(errno));
}

static bool reply(int fd, uint32_t size) {
    return reply_with(fd, size, -1);
}

static bool reply_u64(int fd, uint64_t value) {
    body.u64 = value;
    return reply(fd, sizeof value);
}

static bool get_config(int fd) {
    uint32_t offset = body.config.offset;
    uint32_t size = body.config.size;
    if (offset > CONFIG_SPACE || size > CONFIG_SPACE - offset ||
        head.size < CONFIG_HEADER + size) {
        return reply(fd, 0); // the protocol's way to say no
    }
    uint8_t space[CONFIG_SPACE];
    read_config(space, sizeof space);
    memcpy(body.config.data, space + offset, size);
    return reply(fd, CONFIG_HEADER + size);
}

static bool set_config(void) {
    uint32_t offset = body.config.offset;
    uint32_t size = body.config.size;
    if (offset > CONFIG_SPACE || size > CONFIG_SPACE - offset ||
        head.size < CONFIG_HEADER + size) {
        return refuse("%u bytes of config space at %u in a message of %u", size,
                      offset, head.size);
    }
    write_config(offset, body.config.data, size);
    return true;
}

static bool get_inflight(int fd) {
    unsigned n = body.inflight.rings, size = body.inflight.size;
    if (n == 0 || n > MAX_QUEUES || size == 0 || size > 32768) {
        return refuse("what %u rings of %u entries have under way", n, size);
    }
    int memory = make_inflight(n, size, &body.inflight.bytes);
    if (memory < 0) {
        return refuse("memory for what is under way: %s", strerror(errno));
    }
    body.inflight.offset = 0;
    bool ok = reply_with(fd, head.size, memory);
    close(memory);
    return ok;
}

static bool pass_memory_table(void) {
    uint32_t count = body.memory.count;
    if (count == 0 || count > MAX_REGIONS || count != nfds ||
        head.size < 8 + count * sizeof(mem_region)) {
        return refuse("a memory table of %u regions with %u descriptors in %u "
                      "bytes; the most is %u regions", count, nfds, head.size,
                      MAX_REGIONS);
    }
    return set_memory(body.memory.region, fds, count);
}

static bool pass_ring_fd(unsigned index, enum ring_fd which) {
    bool none = body.u64 & NO_FD;
    if (nfds != (none ? 0 : 1) || (none && which == RING_KICK)) {
        return refuse("request %u for ring %u with %u descriptors; rings are "
                      "not polled", head.request, index, nfds);
    }
    return set_ring_fd(index, which, none ? -1 : fds[--nfds]);
}

// True if the message was taken; false ends the connection. What has a reply
// of its own sets *replied.
static bool act_on_ring(int fd, bool *replied) {
    bool     has_fd = head.request >= SET_VRING_KICK &&
                  head.request <= SET_VRING_ERR;
    uint64_t index = has_fd ? body.u64 & ~(uint64_t)NO_FD : body.state.index;
    if (index >= ring_count()) {
        return refuse("request %u for ring %" PRIu64 " of %u", head.request,
                      index, ring_count());
    }
    unsigned i = (unsigned)index;
    switch (head.request) {
    case SET_VRING_NUM:  return set_ring_size(i, body.state.num);
    case SET_VRING_ADDR:
        return place_ring(i, body.addr.desc, body.addr.avail, body.addr.used);
    case SET_VRING_KICK: return pass_ring_fd(i, RING_KICK);
    case SET_VRING_CALL: return pass_ring_fd(i, RING_CALL);
    case SET_VRING_ERR:  return pass_ring_fd(i, RING_ERR);
    case SET_VRING_BASE: return set_ring_base(i, (uint16_t)body.state.num);
    case GET_VRING_BASE:
        *replied = true;
        return end_ring(i, &body.state.num) && reply(fd, sizeof body.state);
    default: // SET_VRING_ENABLE
        return enable_ring(i, body.state.num != 0);
    }
}

// It asks for it then. False: it has no channel for that; User-Mode Linux has a
// pipe, whose other ends could hold us.
bool tell_of_config(void) {
    const header h = {BACKEND_CONFIG_CHANGE, 1, 0};
    return backend_req >= 0 && send(backend_req, &h, sizeof h,
                                    MSG_DONTWAIT | MSG_NOSIGNAL) == sizeof h;
}

// Nothing else is written to: another socket may wait for who else has it.
static bool is_channel(int fd) {
    int         domain = 0, type = 0;
    socklen_t   n = sizeof domain, k = sizeof type;
    struct stat st;
    return (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode)) ||
           (!getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) &&
            !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &k) &&
            domain == AF_UNIX && type == SOCK_STREAM) ||
           refuse("a back-end channel that is no stream socket of AF_UNIX");
}

static bool act(int fd, bool *replied) {
    *replied = head.request == GET_FEATURES || head.request == GET_CONFIG ||
               head.request == GET_PROTOCOL_FEATURES ||
               head.request == GET_QUEUE_NUM ||
               head.request == GET_INFLIGHT_FD ||
               head.request == GET_MAX_MEM_SLOTS;
    switch (head.request) {
    case SET_OWNER:
    case RESET_OWNER: // deprecated, and best ignored
        return true;
    case GET_FEATURES:
        return reply_u64(fd, device_features() | F_PROTOCOL_FEATURES);
    case SET_FEATURES:          return set_features(body.u64);
    case GET_PROTOCOL_FEATURES: return reply_u64(fd, PROTOCOL_OFFERED);
    case SET_PROTOCOL_FEATURES:
        protocol = body.u64;
        return !(protocol & ~PROTOCOL_OFFERED) ||
               refuse("protocol features %#" PRIx64, protocol);
    case GET_QUEUE_NUM:         return reply_u64(fd, ring_count());
    case SET_MEM_TABLE:         return pass_memory_table();
    case GET_CONFIG:            return get_config(fd);
    case SET_CONFIG:            return set_config();
    case GET_MAX_MEM_SLOTS:     return reply_u64(fd, MAX_REGIONS);
    case ADD_MEM_REG:
        return add_memory(&body.slot.region, fds, nfds);
    case REM_MEM_REG:           return remove_memory(&body.slot.region);
    case GET_INFLIGHT_FD:       return get_inflight(fd);
    case SET_INFLIGHT_FD:
        if (nfds != 1) {
            return refuse("%u descriptors of what is under way", nfds);
        }
        if (!take_inflight(fds[0], body.inflight.bytes, body.inflight.offset,
                           body.inflight.rings, body.inflight.size)) {
            return false;
        }
        use_cache_mode();
        return true;
    case RESET_DEVICE:
        reset_device();
        return true;
    case SET_BACKEND_REQ_FD:
        if (nfds != 1) {
            return refuse("a back-end channel without a descriptor");
        }
        if (!is_channel(fds[0])) {
            return false;
        }
        let_go(&backend_req);
        backend_req = fds[--nfds];
        return true;
    default:
        return act_on_ring(fd, replied);
    }
}

static void close_message(void) {
    while (nfds > 0) {
        close_foreign(fds[--nfds]);
    }
    have = 0;
    message_ns = 0;
}

static int least_payload(uint32_t request) {
    switch (request) {
#define X(name, number, least) case name: return least;
        REQUESTS(X)
#undef X
    default: return -1;
    }
}

// User-Mode Linux asks with the message that negotiates REPLY_ACK.
static bool asks_for_reply(void) {
    return head.flags & FLAGS_NEED_REPLY && protocol & PROTOCOL_REPLY_ACK;
}

static bool take_message(int fd) {
    bool replied = false;
    int  least = least_payload(head.request);
    bool taken = false;
    if (least < 0) {
        refuse("unknown request %u", head.request);
    } else if (head.size < (uint32_t)least) {
        refuse("request %u with %u bytes; it has %d", head.request, head.size,
               least);
    } else {
        taken = act(fd, &replied);
        start_what_is_ready();
    }
    bool slots = !taken && head.request == ADD_MEM_REG && asks_for_reply();
    close_message();
    if (slots) { // one too many is an answer, and not the end
        return reply_u64(fd, 1);
    }
    return asks_for_reply() && !replied
               ? reply_u64(fd, !taken) && taken
               : taken;
}

static bool keep_fds(struct msghdr *m) {
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        size_t n = c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS
                       ? (c->cmsg_len - CMSG_LEN(0)) / sizeof(int)
                       : 0;
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (nfds < MAX_REGIONS) {
                fds[nfds++] = fd;
            } else {
                close_foreign(fd);
                m->msg_flags |= MSG_CTRUNC;
            }
        }
    }
    return !(m->msg_flags & MSG_CTRUNC) ||
           refuse("a message with more descriptors than %u, or than the limit "
                  "of open files allows", MAX_REGIONS);
}

#define MESSAGE_NS (5 * SECOND) // from its first byte to its last

// What there is of a message: its header first, then the rest.
bool receive(int fd) {
    union {
        struct cmsghdr align;
        char           bytes[CMSG_SPACE(MAX_REGIONS * sizeof(int))];
    } control;
    size_t        at = have < sizeof head ? 0 : sizeof head;
    struct iovec  iov = {at ? (char *)&body : (char *)&head,
                         at ? head.size : sizeof head};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof control};
    iov.iov_base = (char *)iov.iov_base + (have - at);
    iov.iov_len -= have - at;
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return true;
    }
    if (n <= 0) {
        return have > 0 && refuse("it left within a message");
    }
    have += (size_t)n;
    message_ns = message_ns ? message_ns : now_ns() + MESSAGE_NS;
    if (!keep_fds(&m)) {
        return false;
    }
    if (have < sizeof head) {
        return true;
    }
    if ((head.flags & FLAGS_VERSION) != 1 || head.flags & FLAGS_REPLY ||
        head.size > sizeof body) {
        return refuse("request %u with flags %#x and %u bytes", head.request,
                      head.flags, head.size);
    }
    return have < sizeof head + head.size || take_message(fd);
}

bool message_in_time(uint64_t now) {
    return !message_ns || message_ns > now ||
           refuse("%zu bytes of a message, and no more for %d s", have,
                  (int)(MESSAGE_NS / SECOND));
}

uint64_t message_due_ns(void) {
    return message_ns;
}

void forget_messages(void) {
    close_message();
    let_go(&backend_req);
    protocol = 0;
}
