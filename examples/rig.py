#!/usr/bin/env python3
"""A test rig for firmware that drives virtio-blk, in Python: the device is
vblk.h, compiled as it is, and its declarations are read from the same file.
Here the driver is Python too; a simulator of a processor would call load() and
store() in its place. Time stands still unless a test moves it.

    make rig        (python3-cffi), or: pytest examples/rig.py
"""
import os
import re
import struct
import subprocess
import sys
import tempfile

try:
    import cffi
except ImportError:
    print("SKIP: rig needs cffi (apt install python3-cffi)")
    sys.exit(0)

HEADER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../vblk.h")
TEXT = open(HEADER).read()
C = {name: int(number, 0) for name, number in
     re.findall(r"#define (VBLK_\w+)\s+(0x[0-9a-f]+|\d+)u?\b", TEXT)}
NEVER = 2**64 - 1


def load_library():
    cc = os.environ.get("CC", "cc")
    public = TEXT[:TEXT.index("#if defined(VBLK_IMPLEMENTATION) && !")]
    public = re.sub(r"#include .*", "", public)
    ffi = cffi.FFI()
    # Without stdint.h, which the parser cannot read, its limits are given.
    ffi.cdef(subprocess.run([cc, "-E", "-P", "-U__GNUC__",
                             "-DUINTPTR_MAX=__UINTPTR_MAX__",
                             "-DUINT32_MAX=__UINT32_MAX__", "-"], check=True,
                            input=public, text=True, capture_output=True).stdout)
    with tempfile.TemporaryDirectory() as where:
        so = os.path.join(where, "vblk.so")
        subprocess.run([cc, "-shared", "-fPIC", "-O1", "-DVBLK_IMPLEMENTATION",
                        "-x", "c", HEADER, "-o", so], check=True)
        return ffi, ffi.dlopen(so)


ffi, lib = load_library()


class Rig:
    """A machine of 64 KiB and a disk of 16; `options` are vblk_options."""

    def __init__(self, read=None, **options):
        self.ram = ffi.new("uint8_t[]", 1 << 16)
        self.disk = ffi.new("uint8_t[]", 1 << 14)
        self.lines, self.now, self.keep = [], 0, []
        region = self.new("vblk_region *", [0, 1 << 16, self.ram, False])
        regions = self.new("vblk_regions *", [region, 1])
        image = self.new("vblk_ramdisk *", [self.disk, 1 << 14])
        o = self.new("vblk_options *")
        o.memory = lib.vblk_regions_memory(regions)
        o.backend = lib.vblk_ramdisk_backend(image)
        if read:
            o.backend.read = self.call(o.backend.read, read)
        o.event = self.call(o.event, self.on_event)
        for name, value in options.items():
            setattr(o, name, value)
        self.dev = self.new("vblk_dev *")
        err = lib.vblk_init_checked(
            self.dev, o, C["VBLK_VERSION_MAJOR"] * 10000 +
            C["VBLK_VERSION_MINOR"] * 100 + C["VBLK_VERSION_PATCH"],
            ffi.sizeof("vblk_dev"))
        assert err == 0, ffi.string(lib.vblk_strerror(err)).decode()

    def new(self, *what):
        self.keep.append(ffi.new(*what))
        return self.keep[-1]

    def call(self, field, function):
        self.keep.append(ffi.callback(ffi.typeof(field), function))
        return self.keep[-1]

    def on_event(self, user, event):
        line = ffi.new("char[]", 400)
        lib.vblk_event_line(event, line, 400)
        self.lines.append(ffi.string(line).decode())

    def load(self, offset, width=4):
        return lib.vblk_mmio_read(self.dev, offset, width)

    def store(self, offset, value, width=4):
        lib.vblk_mmio_write(self.dev, offset, width, value)
        return self.poll()

    def poll(self):
        again = self.now
        while again == self.now:
            again = lib.vblk_poll(self.dev, self.now)
        return again

    def put(self, at, data):
        ffi.memmove(self.ram + at, data, len(data))

    def get(self, at, n):
        return bytes(ffi.buffer(self.ram + at, n))

    # A driver: descriptors at 0, available ring at 0x1000, used ring at
    # 0x2000, header and status at 0x3000, data at 0x4000.
    def bind(self, steps=(1, 3, 0xb)):
        for status in steps:
            if status & C["VBLK_STATUS_FEATURES_OK"]:
                self.store(C["VBLK_REG_DRIVER_FEATURES_SEL"], 1)
                self.store(C["VBLK_REG_DRIVER_FEATURES"], 1)
            self.store(C["VBLK_REG_STATUS"], status)
        self.store(C["VBLK_REG_QUEUE_NUM"], 16)
        self.store(C["VBLK_REG_QUEUE_DRIVER_LOW"], 0x1000)
        self.store(C["VBLK_REG_QUEUE_DEVICE_LOW"], 0x2000)
        self.store(C["VBLK_REG_QUEUE_READY"], 1)
        live = steps[-1] | C["VBLK_STATUS_DRIVER_OK"]
        self.store(C["VBLK_REG_STATUS"], live)
        self.idx = 0
        return self.load(C["VBLK_REG_STATUS"]) == live

    def send(self, kind, sector=0, data=b""):
        """Returns when to poll again; answer() has what the device wrote."""
        self.put(0x3000, struct.pack("<IIQB", kind, 0, sector, 0xff))
        self.put(0x4000, data)
        write = 0 if kind == C["VBLK_T_OUT"] else 2
        chain = [(0x3000, 16, 0)] + [(0x4000, len(data), write)] * bool(data)
        chain.append((0x3010, 1, 2))
        for i, (gpa, n, flags) in enumerate(chain):
            more = i + 1 < len(chain)
            self.put(16 * i, struct.pack("<QIHH", gpa, n, flags | more, i + 1))
        self.put(0x1004 + 2 * (self.idx % 16), b"\0\0")
        self.idx += 1
        self.put(0x1002, struct.pack("<H", self.idx))
        return self.store(C["VBLK_REG_QUEUE_NOTIFY"], 0)

    def answer(self, n=0):
        return self.get(0x3010, 1)[0], self.get(0x4000, n)


def test_it_is_a_disk():
    rig = Rig()
    assert rig.load(0) == 0x74726976 and rig.load(8) == 2
    assert rig.load(C["VBLK_REG_CONFIG"], 8) == 32


def test_what_is_written_is_read_back():
    rig = Rig()
    assert rig.bind()
    assert rig.send(C["VBLK_T_OUT"], 5, b"firmware" * 64) == NEVER
    assert rig.answer() == (C["VBLK_S_OK"], b"")
    rig.send(C["VBLK_T_IN"], 5, bytes(512))
    assert rig.answer(512) == (C["VBLK_S_OK"], b"firmware" * 64)
    assert bytes(ffi.buffer(rig.disk + 5 * 512, 8)) == b"firmware"


def test_a_read_beyond_the_end_is_told():
    rig = Rig()
    assert rig.bind()
    rig.send(C["VBLK_T_IN"], 32, bytes(512))
    assert rig.answer()[0] == C["VBLK_S_IOERR"]
    assert rig.lines == ["queue 0, head 0: beyond the disk's end "
                         "(V13) [sector 32, bytes 512]"]


def test_a_disk_that_fails():
    rig = Rig(read=lambda user, offset, seg, segs: -5)
    assert rig.bind()
    rig.send(C["VBLK_T_IN"], 0, bytes(512))
    assert rig.answer()[0] == C["VBLK_S_IOERR"]
    assert "[sector 0, error 5]" in rig.lines[0]


def test_a_driver_that_skips_acknowledge():
    assert Rig().bind(steps=(2, 0xa))
    strict = Rig(profile=lib.VBLK_STRICT)
    assert not strict.bind(steps=(2, 0xa))
    assert "the standard profile takes it" in strict.lines[0]


def test_a_slow_disk():
    rig = Rig(limits={"iops": 1})
    assert rig.bind()
    assert rig.send(C["VBLK_T_IN"], 0, bytes(512)) == NEVER
    assert rig.send(C["VBLK_T_IN"], 1, bytes(512)) == 10**9
    rig.now = 10**9 - 1
    assert rig.poll() == 10**9 and rig.answer()[0] == 0xff
    rig.now = 10**9
    assert rig.poll() == NEVER and rig.answer()[0] == C["VBLK_S_OK"]


if __name__ == "__main__":
    tests = [t for name, t in list(globals().items()) if name[:5] == "test_"]
    for test in tests:
        test()
    print(f"{len(tests)} passed, 0 failed")
