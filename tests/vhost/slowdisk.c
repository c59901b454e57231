// A disk that is slow, fails, does not answer, or loses its power: one file in
// a directory that libfuse3 mounts.
//
//     slowdisk DIRECTORY FILE MICROSECONDS [SEED [liar]]
//
// FILE is seen as DIRECTORY/disk, and a transfer takes up to twice so long.
// From SIGUSR1 on all fail, from SIGUSR2 on none ends, from SIGHUP on it is as
// at first. At SIGPWR about half of the blocks that were written since they
// were synced, by random numbers from SEED, are as before, and it ends with
// status 3. A liar syncs nothing.
#define FUSE_USE_VERSION 35
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int  fd;
static long delay_us;
static volatile sig_atomic_t mode; // the signal

#define BLOCK 4096

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static uint8_t       **durable; // under `mutex`: of each block that is not
static size_t          blocks, unsynced; // the last under `mutex`
static bool            lies;

static void *lose_power(void *arg) {
    int    number;
    size_t unflushed = 0, lost = 0;
    sigwait(arg, &number);
    pthread_mutex_lock(&mutex);
    for (int tries = 0; !unsynced && tries < 5000; tries++) { // for some
        pthread_mutex_unlock(&mutex);
        usleep(1000);
        pthread_mutex_lock(&mutex);
    }
    for (size_t i = 0; i < blocks; i++) {
        unflushed += durable[i] != NULL;
        if (durable[i] && random() % 2) {
            lost += pwrite(fd, durable[i], BLOCK, (off_t)(i * BLOCK)) == BLOCK;
        }
    }
    printf("unflushed %zu\nlost %zu\n", unflushed, lost);
    fflush(stdout);
    _exit(3);
}

// With the mutex held: it is about to be written.
static void keep(size_t n, off_t offset) {
    size_t first = (size_t)offset / BLOCK, end = (size_t)offset + n + BLOCK - 1;
    for (size_t i = first; i < end / BLOCK && i < blocks; i++) {
        if (!durable[i]) {
            durable[i] = calloc(1, BLOCK);
            unsynced++;
            if (pread(fd, durable[i], BLOCK, (off_t)(i * BLOCK)) < 0) {
                abort();
            }
        }
    }
}

static void on_signal(int number) {
    mode = number;
}

static int wait_a_while(void) {
    long            us = random() % (2 * delay_us + 1);
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    const struct timespec look = {0, 10000000};
    nanosleep(&t, NULL);
    while (mode == SIGUSR2) {
        nanosleep(&look, NULL);
    }
    return mode == SIGUSR1 ? -EIO : 0;
}

static int get_attributes(const char *path, struct stat *st,
                          struct fuse_file_info *info) {
    (void)info;
    memset(st, 0, sizeof *st);
    if (strcmp(path, "/") == 0) {
        st->st_mode = S_IFDIR | 0755;
        st->st_nlink = 2;
        return 0;
    }
    if (strcmp(path, "/disk") != 0) {
        return -ENOENT;
    }
    int err = fstat(fd, st) ? -errno : 0;
    st->st_mode = S_IFREG | 0600;
    return err;
}

static int open_disk(const char *path, struct fuse_file_info *info) {
    (void)path;
    info->direct_io = 1;
    return 0;
}

static int read_disk(const char *path, char *buffer, size_t n, off_t offset,
                     struct fuse_file_info *info) {
    (void)path;
    (void)info;
    int     err = wait_a_while();
    ssize_t done = err ? err : pread(fd, buffer, n, offset);
    return (int)done;
}

static int write_disk(const char *path, const char *buffer, size_t n,
                      off_t offset, struct fuse_file_info *info) {
    (void)path;
    (void)info;
    int     err = wait_a_while();
    ssize_t done = err;
    if (!err) {
        pthread_mutex_lock(&mutex);
        keep(n, offset);
        done = pwrite(fd, buffer, n, offset);
        pthread_mutex_unlock(&mutex);
    }
    return (int)done;
}

static int sync_disk(const char *path, int data, struct fuse_file_info *info) {
    (void)path;
    (void)data;
    (void)info;
    int err = wait_a_while();
    if (!err && !lies) {
        pthread_mutex_lock(&mutex);
        for (size_t i = 0; i < blocks; i++) {
            free(durable[i]);
            durable[i] = NULL;
        }
        unsynced = 0;
        pthread_mutex_unlock(&mutex);
    }
    return err;
}

int main(int argc, char **argv) {
    static const struct fuse_operations disk = {
        .getattr = get_attributes, .open = open_disk, .read = read_disk,
        .write = write_disk, .fsync = sync_disk};
    if (argc < 4 || argc > 6) {
        fprintf(stderr, "usage: slowdisk DIRECTORY FILE MICROSECONDS "
                        "[SEED [liar]]\n");
        return 2;
    }
    fd = open(argv[2], O_RDWR);
    delay_us = strtol(argv[3], NULL, 10);
    if (fd < 0) {
        perror(argv[2]);
        return 1;
    }
    srandom(argc > 4 ? (unsigned)strtoul(argv[4], NULL, 10) : 1);
    lies = argc > 5;
    blocks = (size_t)lseek(fd, 0, SEEK_END) / BLOCK;
    durable = calloc(blocks + 1, sizeof *durable);
    sigset_t  power;
    pthread_t thread;
    sigemptyset(&power);
    sigaddset(&power, SIGPWR);
    pthread_sigmask(SIG_BLOCK, &power, NULL);
    if (!durable || pthread_create(&thread, NULL, lose_power, &power)) {
        perror("slowdisk");
        return 1;
    }
    struct sigaction a = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &a, NULL);
    sigaction(SIGUSR2, &a, NULL);
    char options[] = "max_idle_threads=80,max_threads=80";
    char *args[] = {argv[0], "-f", "-o", options, argv[1], NULL};
    // libfuse takes SIGHUP for an end, unless it has a handler already.
    sigaction(SIGHUP, &a, NULL);
    return fuse_main(5, args, &disk, NULL);
}
