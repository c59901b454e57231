// The loop: what happens when, the connection, and a line every second.
#include "serve.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum tag { TAG_LISTEN, TAG_CONNECTION, TAG_SIGNAL, TAG_ATTENTION, TAG_RING };

#define MAX_READY (MAX_QUEUES + TAG_RING)

static int         epoll_fd, listen_fd, signal_fd;
static int         connection = -1;
static unsigned    events;     // worth a line since it came
static struct stat our_socket; // in the file system
static uint64_t    accept_ns;  // when to try again; 0: no need
static uint64_t    tick_ns;    // when --stats says something next; 0: never
static uint64_t    work_ns;    // when to work again
static bool        stopping;
static struct epoll_event ready[MAX_READY]; // what there is to do in a turn

unsigned count_event(void) {
    return __atomic_add_fetch(&events, 1, __ATOMIC_RELAXED);
}

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static bool watch(int fd, uint32_t what, uint32_t tag) {
    struct epoll_event e = {.events = what, .data.u32 = tag};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e) == 0;
}

// Edge-triggered, every write wakes us and nothing needs to be read.
bool watch_in_loop(int fd, unsigned ring) {
    return watch(fd, EPOLLIN | EPOLLET, TAG_RING + ring);
}

// To close a socket may wait for its peer.
void close_foreign(int fd) {
    const struct linger none = {0, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    close(fd);
}

// The front end has the same descriptor open: closing ours would leave it in
// the epoll set.
void let_go(int *fd) {
    if (*fd >= 0) {
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
        close_foreign(*fd);
        *fd = -1;
    }
}


// ---- Connections -----------------------------------------------------------

// A change needs no memory, so this cannot fail.
static void listen_again(bool yes) {
    struct epoll_event e = {.events = yes ? EPOLLIN : 0,
                            .data.u32 = TAG_LISTEN};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, listen_fd, &e);
}

static void disconnect(void) {
    hold();
    memory_gone(); // not the next one's
    drop_device();
    forget_memory();
    forget_messages();
    let_go(&connection);
    end_threads();
    events = 0;
    listen_again(true);
    go_on();
}

// Where descriptors or memory are short, the next one waits a second.
static void connect_next(void) {
    connection = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (connection >= 0 && watch(connection, EPOLLIN, TAG_CONNECTION)) {
        listen_again(false);
        return;
    }
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) {
        return;
    }
    say("a front end cannot be taken: %s; trying again every second",
        strerror(errno));
    let_go(&connection);
    listen_again(false);
    accept_ns = now_ns() + SECOND;
}

// A socket in the file system that nobody listens at.
static bool left_over(const struct sockaddr_un *a) {
    int  fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool left = connect(fd, (const void *)a, sizeof *a) < 0 &&
                errno == ECONNREFUSED;
    close(fd);
    return left;
}

static void listen_at(const char *path) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof a.sun_path) {
        die("--socket %s: a path of up to %zu characters is needed", path,
            sizeof a.sun_path - 1);
    }
    strcpy(a.sun_path, path);
    listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int err = bind(listen_fd, (const void *)&a, sizeof a);
    if (err && errno == EADDRINUSE) {
        struct stat st;
        if (lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode)) {
            die("--socket %s: there is something else than a socket", path);
        }
        if (!left_over(&a)) {
            die("--socket %s: another process listens there", path);
        }
        unlink(path);
        err = bind(listen_fd, (const void *)&a, sizeof a);
    }
    if (err || listen(listen_fd, 8) || lstat(path, &our_socket)) {
        die("--socket %s: %s", path, strerror(errno));
    }
}

static void remove_socket(const char *path) {
    struct stat st;
    if (lstat(path, &st) == 0 && st.st_dev == our_socket.st_dev &&
        st.st_ino == our_socket.st_ino) {
        unlink(path);
    }
}


// ---- The loop --------------------------------------------------------------

static void print_rates(void) {
    static vblk_counts last;
    vblk_counts c = device_counts();
    printf("reads %" PRIu64 " (%.1f MB) writes %" PRIu64 " (%.1f MB) flushes %"
           PRIu64 " errors %" PRIu64 " stalls %" PRIu64,
           c.reads - last.reads, (double)(c.bytes_read - last.bytes_read) / 1e6,
           c.writes - last.writes,
           (double)(c.bytes_written - last.bytes_written) / 1e6,
           c.flushes - last.flushes, c.io_errors - last.io_errors,
           c.throttled - last.throttled);
    print_latency();
    putchar('\n');
    fflush(stdout);
    last = c;
}

static void on_time(void) {
    uint64_t now = now_ns();
    if (!message_in_time(now)) {
        disconnect();
    }
    if (accept_ns && accept_ns <= now) {
        accept_ns = 0;
        listen_again(connection < 0);
    }
    if (tick_ns && tick_ns <= now) {
        print_rates();
        tick_ns += SECOND;
    }
}

static void on_signal(void) {
    struct signalfd_siginfo s;
    bool ends = read(signal_fd, &s, sizeof s) != sizeof s ||
                s.ssi_signo != SIGHUP;
    stopping |= ends;
    if (!ends) {
        hold();
        if (resize() && connection >= 0 && !tell_of_config()) {
            say("the front end takes no word of it: the guest keeps its size");
        }
        go_on();
    }
}

// In guest memory, which may be gone: what follows is thrown away then.
static void turn(void) {
    uint64_t next = sooner(sooner(tick_ns, accept_ns), message_due_ns());
    bool readable = wait_for(epoll_fd, next && next < work_ns ? next : work_ns);
    int  n = readable ? epoll_wait(epoll_fd, ready, MAX_READY, 0) : 0;
    watch_ourselves(readable);
    for (int i = 0; i < n; i++) {
        switch (ready[i].data.u32) {
        case TAG_LISTEN: connect_next();  break;
        case TAG_SIGNAL: on_signal();     break;
        case TAG_CONNECTION:
            hold();
            if (memory_gone() ? !refuse("its guest's memory is gone")
                              : !receive(connection)) {
                disconnect();
            }
            go_on();
            break;
        case TAG_ATTENTION:
            if (memory_gone()) {
                refuse("its guest's memory is gone");
                disconnect();
            }
            break;
        default: break; // a kick; to be awake is enough
        }
    }
    if (next) {
        on_time();
    }
    work_ns = work();
    if (blocked()) {
        disconnect();
    }
}

void run(const char *socket_path, bool stats, int attention) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP); // the image has grown
    sigprocmask(SIG_BLOCK, &set, NULL);
    make_watchdog();
    listen_at(socket_path);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    signal_fd = signalfd(-1, &set, SFD_CLOEXEC);
    if (!watch(listen_fd, EPOLLIN, TAG_LISTEN) ||
        !watch(signal_fd, EPOLLIN, TAG_SIGNAL) ||
        (attention >= 0 && !watch(attention, EPOLLIN, TAG_ATTENTION))) {
        die("epoll: %s", strerror(errno));
    }
    tick_ns = stats ? now_ns() + SECOND : 0;
    while (!stopping) {
        if (escaped(turn)) {
            refuse("its guest's memory is gone");
            disconnect();
        }
    }
    remove_socket(socket_path);
    if (connection >= 0) {
        disconnect();
    }
    close_engines();
}
