// Who serves the rings: the loop's thread, with one engine for all; or, with
// --threads, a thread with an engine for each ring. Those are at rest while the
// loop does what the front end asks for.
#include "serve.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id // of glibc
#define sigev_notify_thread_id _sigev_un._tid
#endif
#define QUIET_MS 5000u // for what is under way to end

typedef struct server {
    vblk_engine engine;
    uint64_t    next_ns;  // when to serve again
    int         ring;
    int         epoll_fd; // what it sleeps on: kicks and wake_fd
    int         wake_fd;
    bool        opened;   // before it first rests
    bool        ends;     // under `mutex`: the thread is to
    pthread_t   thread;
} server;

static vblk_dev   *device;
static enum aio    aio;
static bool        threads;
static vblk_engine one;                 // without --threads
static server     *server_of[MAX_QUEUES]; // with; NULL: had no kick so far
static int         attention = -1;      // eventfd: a thread wants the loop
static bool        gone;                // atomic; guest memory is
static __thread server *self;

static pthread_mutex_t limits = PTHREAD_MUTEX_INITIALIZER; // of all engines
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  changed = PTHREAD_COND_INITIALIZER;
static bool            asked;           // under `mutex`: to rest
static unsigned        awake;           // under `mutex`: those not at rest

static bool open_engine(vblk_engine *e, int queue) {
    static bool told;
    int err = vblk_engine_open(e, device, queue, aio != AIO_SYNC);
    e->lock = threads ? &limits : NULL;
    if (err == VBLK_ERR_URING && aio == AIO_AUTO) {
        if (errno != EOPNOTSUPP && !told) {
            told = true;
            say("%s: %s; going on without", vblk_strerror(err),
                strerror(errno));
        }
        return true;
    }
    if (err == VBLK_ERR_URING) {
        vblk_engine_close(e); // which keeps errno
    }
    return !err || say("%s: %s; --aio sync does without", vblk_strerror(err),
                       strerror(errno));
}

static void signal_fd(int fd) {
    const uint64_t one_more = 1;
    ssize_t n = write(fd, &one_more, sizeof one_more);
    (void)n;
}


// ---- The watchdog ----------------------------------------------------------

static __thread timer_t timer;
static __thread bool    watching;
static __thread volatile sig_atomic_t alarmed;

static void on_alarm(int number) {
    (void)number;
    alarmed = true;
}

// For the calling thread.
void make_watchdog(void) {
    struct sigaction alarm = {.sa_handler = on_alarm}; // interrupts
    struct sigevent  event = {.sigev_notify = SIGEV_THREAD_ID,
                              .sigev_signo = SIGALRM};
    event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
    sigaction(SIGALRM, &alarm, NULL);
    watching = false;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer)) {
        die("a timer: %s", strerror(errno));
    }
}

// While there is something to do, a signal comes every second and interrupts
// whatever the front end may have made to block.
void watch_ourselves(bool busy) {
    bool yes = busy || !alarmed;
    alarmed = false;
    if (yes != watching) {
        struct itimerspec t = {{yes, 0}, {yes, 0}};
        timer_settime(timer, 0, &t, NULL);
        watching = yes;
    }
}


// ---- A thread --------------------------------------------------------------

static void serve(void) {
    struct epoll_event e[2];
    bool kicked = vblk_engine_wait(&self->engine, self->epoll_fd,
                                   self->next_ns);
    if (kicked) {
        epoll_wait(self->epoll_fd, e, 2, 0);
    }
    watch_ourselves(kicked);
    self->next_ns = vblk_engine_poll(&self->engine);
    look_at_ring((unsigned)self->ring);
}

static void end_all(void) {
    vblk_engine_quiesce(&self->engine, 0, QUIET_MS);
}

static void drop_all(void) {
    vblk_engine_quiesce(&self->engine, VBLK_ALL_QUEUES, QUIET_MS);
}

static bool is_asked(void) {
    pthread_mutex_lock(&mutex);
    bool yes = asked;
    pthread_mutex_unlock(&mutex);
    return yes;
}

// As long as the loop asks for it. False: to end.
static bool rest(void) {
    pthread_mutex_lock(&mutex);
    awake--;
    pthread_cond_broadcast(&changed);
    while (asked && !self->ends) {
        pthread_cond_wait(&changed, &mutex);
    }
    bool goes_on = !self->ends;
    awake += goes_on;
    pthread_mutex_unlock(&mutex);
    return goes_on;
}

// If guest memory is gone, nothing goes on until the front end is.
static void *thread_main(void *its_server) {
    self = its_server;
    make_watchdog();
    self->opened = open_engine(&self->engine, self->ring);
    while (rest() && self->opened) {
        bool lost = false;
        self->next_ns = 0; // the loop may have started the ring
        while (!lost && !is_asked()) {
            lost = escaped(serve);
        }
        if (lost || escaped(end_all)) {
            escaped(drop_all);
            __atomic_store_n(&gone, true, __ATOMIC_RELEASE);
            signal_fd(attention);
            pthread_mutex_lock(&mutex);
            while (!asked) {
                pthread_cond_wait(&changed, &mutex);
            }
            pthread_mutex_unlock(&mutex);
        }
    }
    timer_delete(timer);
    return NULL;
}


// ---- The loop's side -------------------------------------------------------

static void wait_for_rest(void) {
    while (awake > 0) {
        pthread_cond_wait(&changed, &mutex);
    }
}

void hold(void) {
    pthread_mutex_lock(&mutex);
    asked = true;
    pthread_cond_broadcast(&changed);
    for (unsigned i = 0; i < ring_count(); i++) {
        if (server_of[i]) {
            signal_fd(server_of[i]->wake_fd);
        }
    }
    wait_for_rest();
    pthread_mutex_unlock(&mutex);
}

void go_on(void) {
    pthread_mutex_lock(&mutex);
    asked = false;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

// While they are held. Where it did not help to wait, that is not done again.
int quiesce(int queue) {
    static bool in_vain;
    unsigned ms = in_vain ? 0 : QUIET_MS;
    int err = threads ? VBLK_OK : vblk_engine_quiesce(&one, queue, ms);
    in_vain = err != VBLK_OK;
    for (unsigned i = 0; i < ring_count(); i++) {
        if (server_of[i] && (queue == VBLK_ALL_QUEUES || queue == (int)i) &&
            server_of[i]->engine.under_way) {
            err = VBLK_ERR_BUSY;
        }
    }
    return err;
}

bool settle(void) {
    int err = threads ? quiesce(VBLK_ALL_QUEUES) : quiesce(0);
    return err == VBLK_OK || say("the image does not answer");
}

static void end_server(server *s) {
    pthread_mutex_lock(&mutex);
    s->ends = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    pthread_join(s->thread, NULL);
}

static void free_server(server *s) {
    if (s->opened) {
        vblk_engine_close(&s->engine);
    }
    close(s->epoll_fd);
    close(s->wake_fd);
    free(s);
}

// A thread that rests.
static server *start_server(unsigned ring) {
    server *s = calloc(1, sizeof *s);
    if (!s) {
        return NULL;
    }
    struct epoll_event e = {.events = EPOLLIN | EPOLLET};
    s->ring = (int)ring;
    s->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int err = epoll_ctl(s->epoll_fd, EPOLL_CTL_ADD, s->wake_fd, &e) ? errno : 0;
    pthread_mutex_lock(&mutex);
    err = err ? err : pthread_create(&s->thread, NULL, thread_main, s);
    awake += !err;
    wait_for_rest();
    pthread_mutex_unlock(&mutex);
    if (!err && s->opened) {
        return s;
    }
    if (!err) {
        end_server(s);
    }
    free_server(s);
    return NULL;
}

bool watch_kick(int fd, unsigned ring) {
    struct epoll_event e = {.events = EPOLLIN | EPOLLET};
    if (!threads) {
        return watch_in_loop(fd, ring);
    }
    server_of[ring] = server_of[ring] ? server_of[ring] : start_server(ring);
    return server_of[ring] &&
           epoll_ctl(server_of[ring]->epoll_fd, EPOLL_CTL_ADD, fd, &e) == 0;
}

void forget_kick(int fd, unsigned ring) {
    if (server_of[ring] && fd >= 0) {
        epoll_ctl(server_of[ring]->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
    }
}

void call_loop(void) {
    signal_fd(attention);
}

bool memory_gone(void) {
    uint64_t n;
    return attention >= 0 && read(attention, &n, sizeof n) > 0 &&
           __atomic_exchange_n(&gone, false, __ATOMIC_ACQ_REL);
}

uint64_t work(void) {
    if (threads) {
        return VBLK_NEVER;
    }
    uint64_t next = vblk_engine_poll(&one);
    for (unsigned i = 0; i < ring_count(); i++) {
        look_at_ring(i);
    }
    return next;
}

bool wait_for(int fd, uint64_t until) {
    if (!threads) {
        return vblk_engine_wait(&one, fd, until);
    }
    uint64_t      now = now_ns(), ns = until > now ? until - now : 0;
    uint64_t      ms = until == VBLK_NEVER ? 1000000 : ns / 1000000 + 1;
    struct pollfd p = {fd, POLLIN, 0};
    return poll(&p, 1, (int)(ms < 1000000 ? ms : 1000000)) > 0;
}

int open_engines(vblk_dev *dev, const options *o) {
    device = dev;
    aio = o->aio;
    threads = o->threads;
    if (!open_engine(&one, VBLK_ALL_QUEUES)) {
        exit(1);
    }
    if (threads) { // it was to see whether there can be any
        vblk_engine_close(&one);
        attention = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    return attention;
}

// While they are held. One that has something under way still stays.
void end_threads(void) {
    for (unsigned i = 0; i < ring_count(); i++) {
        server *s = server_of[i];
        if (s && !s->engine.under_way) {
            end_server(s);
            free_server(s);
            server_of[i] = NULL;
        }
    }
}

void close_engines(void) {
    if (!threads && vblk_engine_close(&one)) {
        say("the image does not answer");
    }
}
