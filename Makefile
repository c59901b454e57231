.POSIX:
CC       = cc
CFLAGS   = -O2 -g
WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes
STD      = -std=c99 -D_GNU_SOURCE
SAN      = -fsanitize=address,undefined -fno-sanitize-recover=all
LIBS     = -lpthread
B        = build

TESTS    = tests/main.c tests/guest.c tests/test_registers.c \
           tests/test_queue.c tests/test_request.c tests/test_execution.c \
           tests/test_throttle.c tests/test_transport.c
HEADERS  = vblk.h tests/test.h tests/tests.h tests/guest.h
COMPILE  = $(CC) $(STD) $(CFLAGS) $(WARN)

all: $(B)/vblk_test $(B)/demo $(B)/throttle

test: $(B)/vblk_test           ## build and run every test, and the compile matrix
	$(B)/vblk_test
	@B=$(B) sh tests/compile/check.sh

demo: $(B)/demo                ## a driver, a device and a disk image, explained
	$(B)/demo

throttle: $(B)/throttle        ## a limited disk in real time
	$(B)/throttle

asan: $(B)/vblk_asan           ## the tests under address and UB sanitizers
	$(B)/vblk_asan

bench: $(B)/bench              ## nanoseconds per request, beside memcpy and preadv
	$(B)/bench

interop: interop-uboot         ## drivers we did not write

interop-uboot:                 ## U-Boot under Unicorn (u-boot-qemu libunicorn-dev
	@sh tests/interop/uboot/run.sh  # device-tree-compiler e2fsprogs)

size: $(B)                     ## bytes of code of the core at -Os
	$(CC) $(STD) -Os -DVBLK_IMPLEMENTATION -x c -c vblk.h -o $(B)/size.o
	size $(B)/size.o

lint:                          ## what no compiler checks: width, tabs, ASCII
	@awk 'length > 80 || /\t/ || /[^ -~]/ \
	    { print FILENAME ":" FNR ": " $$0; bad = 1 } END { exit bad }' \
	    vblk.h tests/*.[ch] examples/*.c

help:                          ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' Makefile

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

$(B)/bench: tests/bench.c vblk.h
	@mkdir -p $(B)
	$(COMPILE) -o $@ tests/bench.c $(LIBS)

clean:
	rm -rf $(B)

.PHONY: all test demo throttle asan bench interop interop-uboot size lint help \
        clean
