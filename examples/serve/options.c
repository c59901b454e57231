// The command line.
#include "serve.h"

#include <ctype.h>
#include <getopt.h>

static const char usage[] =
    "usage: vblk-serve --socket PATH --image FILE [options]\n"
    "  --socket PATH   where front ends connect, one at a time\n"
    "  --image FILE    the disk: a raw image or a block device\n"
    "  --create SIZE   make FILE, of SIZE bytes; it must not exist\n"
    "  --read-only     offer a disk that cannot be written\n"
    "  --id TEXT       the serial number that the guest sees, up to 20 bytes\n"
    "  --queues N      up to %u (all of them)\n"
    "  --iops N        requests a second, all queues together (no limit)\n"
    "  --bps N         bytes a second (no limit)\n"
    "  --cache MODE    writeback: the guest may flush; unsafe: it may not\n"
    "  --aio MODE      uring: many requests at once, by io_uring; sync: one\n"
    "                  after another; auto, the default: uring if it can be\n"
    "                  had (if the daemon is killed and comes back, only sync\n"
    "                  needs no help of the front end's, which QEMU gives)\n"
    "  --threads       one for each queue\n"
    "  --direct        around the page cache (O_DIRECT)\n"
    "  --discard MODE  on, the default: what the guest discards is given back\n"
    "                  to the file system; off\n"
    "  --block-size N  logical blocks of the disk, 512 to 64K; less than a\n"
    "                  block is refused (512, or what --direct needs)\n"
    "  --profile NAME  standard, or strict: what Linux never sends is refused\n"
    "  --size-max N    bytes in a piece of a request, 4096 or more (no limit)\n"
    "  --seg-max N     pieces in a request (what fits the rings)\n"
    "  --stats         a line every second; how long requests take, too\n"
    "  --no-lock       do not ask whether others use FILE\n"
    "Sizes and rates take K, M, G or T for powers of 1024. SIGINT or SIGTERM\n"
    "end it; SIGHUP tells it, and it the guest, that FILE has grown.\n";

static uint64_t number(const char *name, const char *text) {
    static const char units[] = "KMGT";
    char    *end;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end))
                            : NULL;
    unsigned    shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (errno || text[0] < '0' || text[0] > '9' || n == 0 ||
        n > UINT64_MAX >> shift || (*end && (!unit || end[1]))) {
        die("--%s %s: a number above 0 is needed, like 100 or 64M", name, text);
    }
    return n << shift;
}

static uint32_t within(const char *name, const char *text, uint32_t least,
                       uint32_t most) {
    uint64_t n = number(name, text);
    if (n < least || n > most) {
        die("--%s %s: %u to %u are possible", name, text, least, most);
    }
    return (uint32_t)n;
}

options parse(int argc, char **argv) {
    static const struct option longs[] = {
        {"socket", 1, 0, 's'}, {"image", 1, 0, 'f'},  {"create", 1, 0, 'n'},
        {"read-only", 0, 0, 'r'}, {"id", 1, 0, 'i'},  {"queues", 1, 0, 'q'},
        {"iops", 1, 0, 'o'},   {"bps", 1, 0, 'b'},    {"cache", 1, 0, 'c'},
        {"stats", 0, 0, 't'},  {"no-lock", 0, 0, 'l'}, {"help", 0, 0, 'h'},
        {"aio", 1, 0, 'a'}, {"direct", 0, 0, 'd'}, {"threads", 0, 0, 'p'},
        {"discard", 1, 0, 'D'}, {"block-size", 1, 0, 'B'},
        {"profile", 1, 0, 'P'}, {"size-max", 1, 0, 'Z'},
        {"seg-max", 1, 0, 'G'},
        {0, 0, 0, 0}};
    options  o = {.queues = MAX_QUEUES, .aio = AIO_AUTO};
    int      c, which;
    uint64_t n;
    while ((c = getopt_long(argc, argv, "", longs, &which)) != -1) {
        switch (c) {
        case 's': o.socket = optarg;                        break;
        case 'f': o.image = optarg;                         break;
        case 'n': o.create = number("create", optarg);      break;
        case 'r': o.read_only = true;                       break;
        case 'i': o.id = optarg;                            break;
        case 'o': o.limits.iops = number("iops", optarg);   break;
        case 'b': o.limits.bps = number("bps", optarg);     break;
        case 'd': o.direct = true;                          break;
        case 'p': o.threads = true;                         break;
        case 't': o.stats = true;                           break;
        case 'l': o.no_lock = true;                         break;
        case 'D':
            o.no_discard = strcmp(optarg, "off") == 0;
            if (!o.no_discard && strcmp(optarg, "on") != 0) {
                die("--discard %s: on or off is needed", optarg);
            }
            break;
        case 'P':
            o.profile = strcmp(optarg, "strict") == 0 ? VBLK_STRICT
                                                      : VBLK_STANDARD;
            if (!o.profile && strcmp(optarg, "standard") != 0) {
                die("--profile %s: standard or strict is needed", optarg);
            }
            break;
        case 'B':
            o.block_size = within("block-size", optarg, 512, 65536);
            if (o.block_size & (o.block_size - 1)) {
                die("--block-size %s: a power of two is needed", optarg);
            }
            break;
        case 'Z':
            o.size_max = within("size-max", optarg, 4096, UINT32_MAX);
            break;
        case 'G':
            o.seg_max = within("seg-max", optarg, 1, 128);
            break;
        case 'q':
            n = number("queues", optarg);
            if (n > MAX_QUEUES) {
                die("--queues %s: up to %d are possible", optarg, MAX_QUEUES);
            }
            o.queues = (unsigned)n;
            break;
        case 'c':
            o.unsafe = strcmp(optarg, "unsafe") == 0;
            if (!o.unsafe && strcmp(optarg, "writeback") != 0) {
                die("--cache %s: writeback or unsafe is needed", optarg);
            }
            break;
        case 'a':
            o.aio = strcmp(optarg, "uring") == 0  ? AIO_URING
                    : strcmp(optarg, "auto") == 0 ? AIO_AUTO
                                                  : AIO_SYNC;
            if (o.aio == AIO_SYNC && strcmp(optarg, "sync") != 0) {
                die("--aio %s: sync, uring or auto is needed", optarg);
            }
            break;
        case 'h':
            printf(usage, MAX_QUEUES);
            exit(0);
        default: die("--help lists the options");
        }
    }
    if (!o.socket || !o.image || optind < argc) {
        die("--socket PATH and --image FILE are needed; --help says more");
    }
    if (o.id && strlen(o.id) > VBLK_ID_BYTES) {
        die("--id %s: up to %u bytes are possible", o.id, VBLK_ID_BYTES);
    }
    return o;
}
