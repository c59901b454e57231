.POSIX:
CC       = cc
CFLAGS   = -O2 -g
WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes
STD      = -std=c99 -D_GNU_SOURCE -DFUZZ_IN_TESTS
SAN      = -fsanitize=address,undefined -fno-sanitize-recover=all
LIBS     = -lpthread
B        = build

TESTS    = tests/main.c tests/test.c tests/guest.c tests/test_registers.c \
           tests/test_queue.c tests/test_request.c tests/test_ranges.c \
           tests/test_execution.c \
           tests/test_throttle.c tests/test_transport.c tests/test_host.c \
           tests/test_worker.c \
           tests/test_exhaustive.c tests/test_fault.c tests/test_cases.c \
           tests/test_worker_edges.c tests/test_calls.c tests/test_races.c \
           tests/model.c tests/test_model.c tests/test_habits.c \
           tests/uring.c tests/test_engine.c \
           tests/fuzz.c
SERVE    = examples/serve/main.c examples/serve/options.c \
           examples/serve/memory.c examples/serve/protocol.c \
           examples/serve/inflight.c examples/serve/rings.c \
           examples/serve/engines.c examples/serve/latency.c \
           examples/serve/loop.c
HEADERS  = vblk.h examples/pacer.h tests/uring.h tests/test.h tests/tests.h tests/guest.h tests/rig.h tests/model.h
COMPILE  = $(CC) $(STD) $(CFLAGS) $(WARN)

all: $(B)/vblk_test $(B)/demo $(B)/throttle $(B)/threaded $(B)/emulator \
     $(B)/pool $(B)/queues $(B)/vblk-serve

test: $(B)/vblk_test           ## build and run every test, and the compile matrix
	$(B)/vblk_test
	@B=$(B) sh tests/compile/check.sh
	@CC="$(CC)" sh tests/compile/rig.sh

demo: $(B)/demo                ## a driver, a device and a disk image, explained
	$(B)/demo

throttle: $(B)/throttle        ## a limited disk in real time
	$(B)/throttle

threaded: $(B)/threaded        ## a worker thread, a file, three seconds of reads
	$(B)/threaded

queues: $(B)/queues            ## a host with a thread of its own for each queue
	$(B)/queues

pool: $(B)/pool                ## an asynchronous host: a pool of threads, resets under way
	$(B)/pool

rig:                           ## firmware is tested like this: a driver in Python (python3-cffi)
	@CC="$(CC)" sh tests/compile/rig.sh

test-kvm:                      ## a small guest on examples/kvm.c, where there is /dev/kvm
	@sh tests/kvm/run.sh

emulator: $(B)/emulator        ## an emulator's loop: no threads, a level line, a limit
	$(B)/emulator

asan: $(B)/vblk_asan           ## the tests under address and UB sanitizers
	$(B)/vblk_asan

tsan:                          ## the threads under the thread sanitizer (clang)
	@mkdir -p $(B); echo 'int main(void) { return 0; }' | \
	clang -fsanitize=thread -x c - -o $(B)/probe 2>/dev/null || { \
	    echo 'SKIP: tsan needs clang and its sanitizers' \
	    '(apt install clang libclang-rt-14-dev)'; exit 0; }; \
	clang $(STD) -O1 -g -fsanitize=thread \
	    -o $(B)/vblk_tsan $(TESTS) $(LIBS) && $(B)/vblk_tsan w && \
	$(B)/vblk_tsan rac && \
	clang -std=c99 -D_GNU_SOURCE -O1 -g -fsanitize=thread -I. \
	    -o $(B)/static_tsan tests/compile/static_a.c \
	    tests/compile/static_b.c $(LIBS) && $(B)/static_tsan && \
	clang -std=c99 -D_GNU_SOURCE -O1 -g -fsanitize=thread \
	    -o $(B)/pool_tsan examples/pool.c $(LIBS) && $(B)/pool_tsan && \
	clang -std=c99 -D_GNU_SOURCE -O1 -g -fsanitize=thread \
	    -o $(B)/queues_tsan examples/queues.c $(LIBS) && $(B)/queues_tsan

soak: $(B)/vblk_test           ## the threads for millions of requests, minutes long
	VBLK_SOAK=100 $(B)/vblk_test party
	ROUNDS=20 sh tests/interop/vhost/powerloss.sh

rules: $(B)/vblk_test          ## each rule of the device and its tests (ID=V13: run)
	@sh tests/rules.sh $(B)/vblk_test $(ID)

conformance: $(B)/vblk_test    ## each statement of the standard and its test (ID=SPLIT-19)
	@sh tests/conformance.sh $(B)/vblk_test $(ID)

fuzz:                          ## libFuzzer for FUZZ_SECONDS, default 60 (clang)
	@B=$(B) sh tests/fuzz.sh

cov:                           ## lines and branches reached (clang, llvm)
	@B=$(B) TESTS="-DFUZZ_IN_TESTS $(TESTS)" sh tests/cov.sh

mutants:                       ## weaken the header, see what the tests miss; hours
	@B=$(B) sh tests/mutants.sh

test-32:                       ## the tests as a 32-bit program (an i686 compiler)
	@B=$(B) sh tests/compile/elsewhere.sh 32 $(TESTS)

test-be:                       ## the tests on big-endian s390x (qemu-user, a compiler)
	@B=$(B) sh tests/compile/elsewhere.sh be $(TESTS)

test-O:                        ## the tests at -O0, -O2, -O3 and -Os
	@B=$(B) sh tests/compile/elsewhere.sh O $(TESTS)

model:                         ## the barriers and the worker's states (spin)
	@sh tests/model/run.sh

bench: $(B)/bench $(B)/bench_worker ## ns per request, beside memcpy and preadv
	$(B)/bench
	$(B)/bench_worker

count:                         ## instructions a request, beside those recorded (valgrind)
	@CC="$(CC)" B=$(B) sh tests/count.sh

bench-vhost:                   ## vblk-serve beside qemu-storage-daemon
	@sh tests/vhost/bench.sh

abuse:                         ## a front end that lies, on a sanitized vblk-serve
	@sh tests/vhost/abuse.sh

interop: interop-uboot interop-m3 interop-uml interop-qemu interop-kvm interop-firmware interop-powerloss interop-crash ## all below but xv6

interop-uboot:                 ## U-Boot under Unicorn
	@sh tests/interop/uboot/run.sh

interop-m3:                    ## driver and device in a firmware image, on QEMU's Cortex-M3
	@B=$(B) sh tests/image/m3.sh

interop-uml:                   ## Linux in a process, on vblk-serve (user-mode-linux)
	@sh tests/interop/uml/run.sh

interop-qemu:                  ## Linux under QEMU, on vblk-serve
	@sh tests/interop/qemu/run.sh

interop-crash:                 ## vblk-serve is killed under fio --verify, and comes back
	@sh tests/interop/vhost/crash.sh

interop-firmware:              ## SeaBIOS, GRUB, EDK2 and SLOF under QEMU, on vblk-serve
	@sh tests/interop/firmware/run.sh

interop-kvm:                   ## Linux on examples/kvm.c, under Linux under QEMU
	@sh tests/interop/kvm/run.sh

interop-xv6:                   ## xv6 under QEMU, on vblk-serve (XV6=its sources)
	@sh tests/interop/xv6/run.sh

interop-powerloss:             ## nothing flushed is lost (ROUNDS=20, GUEST=uml|qemu)
	@sh tests/interop/vhost/powerloss.sh

size:                          ## of an image, of the stack, of structs: a table (gcc for each)
	@B=$(B) sh tests/image/size.sh

lint:                          ## what no compiler checks: width, tabs, ASCII, no call downwards
	@awk 'length > 80 || /\t/ || /[^ -~]/ \
	    { print FILENAME ":" FNR ": " $$0; bad = 1 } END { exit bad }' \
	    examples/serve/*.[ch] \
	    vblk.h tests/*.[ch] tests/vhost/*.[ch] tests/kvm/*.c examples/*.c \
	    tests/rules.txt
	@awk -f tests/order.awk vblk.h vblk.h

help:                          ## this list
	@awk -F ':.*## ' '/^[A-Za-z0-9-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' \
	    Makefile

$(B):
	mkdir -p $(B)

$(B)/vblk_test: $(TESTS) $(HEADERS)
	@mkdir -p $(B)
	$(COMPILE) -o $@ $(TESTS) $(LIBS)

$(B)/vblk_asan: $(TESTS) $(HEADERS)
	@mkdir -p $(B)
	$(COMPILE) -O1 $(SAN) -o $@ $(TESTS) $(LIBS)

$(B)/demo: examples/demo.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/demo.c $(LIBS)

$(B)/throttle: examples/throttle.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/throttle.c $(LIBS)

$(B)/threaded: examples/threaded.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/threaded.c $(LIBS)

$(B)/queues: examples/queues.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/queues.c $(LIBS)

$(B)/pool: examples/pool.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/pool.c $(LIBS)

$(B)/emulator: examples/emulator.c vblk.h
	@mkdir -p $(B)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -o $@ examples/emulator.c

$(B)/kvm: examples/kvm.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ examples/kvm.c $(LIBS)

$(B)/vblk-serve: $(SERVE) examples/serve/serve.h vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ $(SERVE) $(LIBS)

$(B)/bench_worker: tests/bench_worker.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ tests/bench_worker.c $(LIBS)

$(B)/bench: tests/bench.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ tests/bench.c $(LIBS)

clean:
	rm -rf $(B)

.PHONY: all test rules conformance fuzz cov mutants test-32 test-be test-O demo \
        throttle threaded emulator asan tsan soak model bench bench-vhost count abuse interop interop-uboot \
        interop-uml interop-qemu interop-kvm test-kvm interop-firmware interop-xv6 interop-powerloss size lint help clean
