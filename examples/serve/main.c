// vblk-serve: a disk image for any virtual machine monitor that speaks
// vhost-user: QEMU, cloud-hypervisor, crosvm, User-Mode Linux.
//
//     cc -O2 *.c -o vblk-serve -lpthread
//     ./vblk-serve --socket disk.sock --image disk.img
//     qemu-system-x86_64 ... -m 1G -machine q35,memory-backend=m
//         -object memory-backend-memfd,id=m,size=1G,share=on
//         -chardev socket,id=c,path=disk.sock,reconnect=1
//         -device vhost-user-blk-pci,chardev=c
//
// With reconnect=1 the guest waits for a daemon that was restarted, and loses
// nothing. disable-legacy=on makes it a device of VIRTIO 1 alone. On a machine
// without PCI (virt, microvm) the disk is on virtio-mmio:
//
//         -global virtio-mmio.force-legacy=false
//         -device vhost-user-blk,chardev=c
//
// The front end sends descriptors of the guest's memory and the places of its
// rings over the socket. After that only event descriptors and the rings are
// used: engines.c is all that a request meets. One front end at a time; the
// next one waits.
//
// A front end is trusted no more than a guest. A message that makes no sense
// ends its connection, with a line that says why; where what makes no sense is
// the guest's, it is that ring alone that does not run. Nothing that either of
// them does holds the daemon for long: between two requests it looks at the
// socket, the signals and the clock.
#include "serve.h"

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/file.h>
#include <unistd.h>


bool say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    flockfile(stderr);
    fputs("vblk-serve: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    funlockfile(stderr);
    va_end(args);
    return false;
}


// ---- The image -------------------------------------------------------------

// Bytes that QEMU locks for reading: from 100 on for what it does itself, from
// 200 on for what it lets nobody else do, one each for reading (0), writing
// (1) and resizing (3). Then each looks for the other's. A lock of the whole
// file, as of cloud-hypervisor, meets them too. An errno, or 0.
static int lock_as_qemu(int fd, const options *o) {
    const short held[] = {100, 201, 203, 101};
    unsigned    n = o->read_only ? 3 : 4;
    for (unsigned i = 0; i < n; i++) {
        struct flock l = {.l_type = F_RDLCK, .l_whence = SEEK_SET,
                          .l_start = held[i], .l_len = 1};
        if (fcntl(fd, F_OFD_SETLK, &l)) {
            return errno;
        }
    }
    for (unsigned i = 0; i < n; i++) {
        struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET,
                          .l_start = held[i] < 200 ? held[i] + 100
                                                   : held[i] - 100,
                          .l_len = 1};
        if (fcntl(fd, F_OFD_GETLK, &l)) {
            return errno;
        }
        if (l.l_type != F_UNLCK) {
            return EWOULDBLOCK;
        }
    }
    return 0;
}

// One that was killed has the image until what the kernel had under way for it
// has ended.
static void lock_image(int fd, const options *o) {
    const struct timespec a_while = {0, 50000000};
    int err = EWOULDBLOCK;
    for (int i = 0; i < 20 && (err == EWOULDBLOCK || err == EACCES); i++) {
        if (i > 0) {
            nanosleep(&a_while, NULL);
        }
        bool ours = !flock(fd, (o->read_only ? LOCK_SH : LOCK_EX) | LOCK_NB);
        err = ours ? lock_as_qemu(fd, o) : errno;
    }
    if (err == EWOULDBLOCK || err == EACCES) {
        die("--image %s: in use by another process", o->image);
    }
    if (err) {
        die("--image %s: cannot be locked: %s; --no-lock goes on without",
            o->image, strerror(err));
    }
}

static void open_image(vblk_file *file, const options *o) {
    if (o->create) {
        int fd = open(o->image, O_RDWR | O_CREAT | O_EXCL, 0666);
        if (fd < 0) {
            die("--create %s: %s", o->image, strerror(errno));
        }
        if (o->create > INT64_MAX || ftruncate(fd, (off_t)o->create)) {
            unlink(o->image);
            die("--create %s: %" PRIu64 " bytes are not to be had: %s",
                o->image, o->create, strerror(errno));
        }
        close(fd);
    }
    unsigned flags = (o->read_only ? VBLK_FILE_READ_ONLY : 0) |
                     (o->direct ? VBLK_FILE_DIRECT : 0);
    if (vblk_file_open(file, o->image, flags)) {
        bool may_read = errno == EACCES || errno == EROFS || errno == EPERM;
        die("--image %s: %s%s", o->image, strerror(errno),
            o->read_only ? "" : may_read ? "; --read-only may do" :
            errno == ENOENT ? "; --create SIZE makes it" :
            o->direct && (errno == EINVAL || errno == EOPNOTSUPP)
                ? "; it has no O_DIRECT, go without --direct" : "");
    }
    uint64_t bytes = vblk_file_backend(file).size(file);
    if (bytes < VBLK_SECTOR) {
        die("--image %s: %" PRIu64 " bytes are no disk; a sector has %u",
            o->image, bytes, VBLK_SECTOR);
    }
    if (!o->no_lock) {
        lock_image(file->fd, o);
    }
    if (o->direct) { // what is cached costs those who pass it by
        fdatasync(file->fd);
        posix_fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED);
    }
}


// ---- The process -----------------------------------------------------------

// What is opened is none of the standard descriptors, or messages would go
// there.
static void fill_standard_descriptors(void) {
    int fd;
    do {
        fd = open("/dev/null", O_RDWR);
    } while (fd >= 0 && fd <= 2);
    close(fd);
}

static void print_counters(void) {
    vblk_counts c = device_counts();
    printf("reads %" PRIu64 "\nbytes_read %" PRIu64 "\nwrites %" PRIu64 "\n"
           "bytes_written %" PRIu64 "\nflushes %" PRIu64 "\nio_errors %" PRIu64
           "\nstalls %" PRIu64 "\nbroken_rings %" PRIu64 "\ndiscards %" PRIu64
           "\nwrite_zeroes %" PRIu64 "\n",
           c.reads, c.bytes_read, c.writes, c.bytes_written, c.flushes,
           c.io_errors, c.throttled, c.broken_queues, c.discards,
           c.write_zeroes);
}

int main(int argc, char **argv) {
    vblk_file file;
    fill_standard_descriptors();
    signal(SIGPIPE, SIG_IGN); // what fails says so
    signal(SIGXFSZ, SIG_IGN);
    options o = parse(argc, argv);
    open_image(&file, &o);
    catch_escapes();
    int attention = make_device(&o, &file);
    run(o.socket, o.stats, attention);
    vblk_file_close(&file);
    print_counters();
    if (o.stats) {
        print_all_latency();
    }
    return 0;
}
