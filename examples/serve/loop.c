// The loop: what happens when, the connection, and a line every second.
#include "serve.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum tag { TAG_LISTEN, TAG_CONNECTION, TAG_SIGNAL, TAG_TIMER, TAG_RING };

#define MAX_READY (MAX_QUEUES + TAG_RING)

static int         epoll_fd, listen_fd, signal_fd, timer_fd;
static int         connection = -1;
static unsigned    events;     // worth a line since it came
static struct stat our_socket; // in the file system
static uint64_t    accept_ns;  // when to try again; 0: no need
static uint64_t    tick_ns;    // when --stats says something next; 0: never
static uint64_t    set_to;     // the timer; 0: to nothing
static bool        stopping;
static int         ready_count;
static struct epoll_event ready[MAX_READY]; // what there is to do in a turn

unsigned count_event(void) {
    return ++events;
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
bool watch_kick(int fd, unsigned index) {
    return watch(fd, EPOLLIN | EPOLLET, TAG_RING + index);
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
    forget_memory();
    drop_device();
    forget_messages();
    let_go(&connection);
    events = 0;
    listen_again(true);
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
           PRIu64 " errors %" PRIu64 " stalls %" PRIu64 "\n",
           c.reads - last.reads, (double)(c.bytes_read - last.bytes_read) / 1e6,
           c.writes - last.writes,
           (double)(c.bytes_written - last.bytes_written) / 1e6,
           c.flushes - last.flushes, c.io_errors - last.io_errors,
           c.throttled - last.throttled);
    fflush(stdout);
    last = c;
}

static void on_timer(void) {
    uint64_t now = now_ns();
    if (!message_in_time(now)) {
        disconnect();
    }
    if (accept_ns && accept_ns <= now) {
        accept_ns = 0;
        listen_again(connection < 0);
    }
    wake_rings(now);
    if (tick_ns && tick_ns <= now) {
        print_rates();
        tick_ns += SECOND;
    }
}

static void set_timer(void) {
    uint64_t next = sooner(tick_ns, accept_ns);
    next = sooner(sooner(next, message_due_ns()), wake_rings(0));
    if (next != set_to) {
        struct itimerspec t = {{0, 0}, {(time_t)(next / SECOND),
                                        (long)(next % SECOND)}};
        timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
        set_to = next;
    }
}

// While there is something to do, a signal comes every second and interrupts
// whatever the front end may have made to block.
static void watch_ourselves(bool yes) {
    static bool watching;
    if (yes != watching) {
        struct itimerval t = {{yes, 0}, {yes, 0}};
        setitimer(ITIMER_REAL, &t, NULL);
        watching = yes;
    }
}

static void on_alarm(int number) {
    (void)number;
}

static void act(void) {
    for (int i = 0; i < ready_count; i++) {
        switch (ready[i].data.u32) {
        case TAG_LISTEN: connect_next();  break;
        case TAG_SIGNAL: stopping = true; break;
        case TAG_TIMER:  on_timer();      break;
        case TAG_CONNECTION:
            if (!receive(connection)) {
                disconnect();
            }
            break;
        default: kick_ring(ready[i].data.u32 - TAG_RING); break;
        }
    }
    if (!work()) {
        disconnect();
    }
}

static void turn(void) {
    set_timer();
    ready_count = epoll_wait(epoll_fd, ready, MAX_READY, rings_wait() ? 0 : -1);
    watch_ourselves(ready_count >= 0);
    if (escaped(act)) {
        refuse("its guest's memory is gone");
        disconnect();
        set_to = 0; // what came with it is forgotten, the timer perhaps
    }
}

void run(const char *socket_path, bool stats) {
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    struct sigaction alarm = {.sa_handler = on_alarm}; // interrupts
    sigaction(SIGALRM, &alarm, NULL);

    listen_at(socket_path);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    signal_fd = signalfd(-1, &ends, SFD_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    if (!watch(listen_fd, EPOLLIN, TAG_LISTEN) ||
        !watch(signal_fd, EPOLLIN, TAG_SIGNAL) ||
        !watch(timer_fd, EPOLLIN | EPOLLET, TAG_TIMER)) {
        die("epoll: %s", strerror(errno));
    }
    tick_ns = stats ? now_ns() + SECOND : 0;
    while (!stopping) {
        turn();
    }
    remove_socket(socket_path);
    if (connection >= 0) {
        disconnect();
    }
}
