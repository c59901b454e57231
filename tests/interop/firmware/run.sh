#!/bin/sh
# Firmware as it is shipped uses a disk of examples/serve, under
# QEMU: SeaBIOS, GRUB on it, EDK2 for x86-64 and AArch64, SLOF. One line per
# check; the status is 0 if all are ok, or if something is not installed and
# INTEROP_REQUIRED is not 1. vhost/common.sh has the variables.
test=firmware
packages="mtools dosfstools"
. "$(dirname "$0")/../vhost/common.sh"

LIMIT=120 # seconds for what takes less than twenty

need_tools mcopy mtype mkfs.fat fsck.fat timeout od
here=$root/tests/interop/firmware
# shellcheck disable=SC2086
build "$tmp/serve" $SANITIZE

have() { # a part, its packages, tools and files...; false if one is missing
    part=$1 its_packages=$2
    shift 2
    for thing in "$@"; do
        command -v "$thing" >/dev/null || [ -r "$thing" ] || {
            echo "SKIP: interop-firmware: $part needs $thing" \
                "(apt install $its_packages)"
            [ "${INTEROP_REQUIRED:-0}" = 1 ] && failures=$((failures + 1))
            return 1
        }
    done
}

binutils=x86_64-linux-gnu

assemble() { # name, where it is loaded
    $binutils-as --32 -I "$tmp" -o "$tmp/$1.o" "$here/$1.s" &&
        $binutils-ld -m elf_i386 --oformat binary -Ttext "$2" -o "$tmp/$1" \
            "$tmp/$1.o" || { echo "FAIL build"; exit 1; }
}

# timeout passes a TERM on to QEMU, but not the KILL of clean_up.
guest_pid=
trap 'end_guest; clean_up' EXIT

end_guest() {
    [ -n "$guest_pid" ] && kill -TERM $guest_pid 2>/dev/null &&
        wait $guest_pid 2>/dev/null
}

# The disk is disk.img; the machine is among the options.
run_guest() { # name, status of QEMU expected, emulator, options...
    start "$1" "$tmp/serve" --image "$tmp/disk.img"
    console=$tmp/$1.console
    expected=$2
    emulator=$3
    shift 3
    timeout -k 5 $LIMIT "$emulator" -nodefaults -no-user-config -no-reboot \
        -display none -serial stdio -m 256 \
        -object memory-backend-memfd,id=m,size=256M,share=on \
        -chardev "socket,id=d,path=$tmp/$name.sock" "$@" \
        </dev/null >"$console" 2>"$tmp/$name-qemu.err" &
    guest_pid=$!
    running="$running $guest_pid"
    wait $guest_pid
    check "$name-ends" "status $?" "status $expected"
    forget $guest_pid
    guest_pid=
    check "$name-qemu-silent" "$(cat "$tmp/$name-qemu.err")" ""
    end TERM
    check "$name-daemon-ends" "status $status" "status 0"
    check "$name-errors" \
        "$(counter "$name" io_errors) $(counter "$name" broken_rings)" "0 0"
    check "$name-silent" "$(cat "$tmp/$name.err")" ""
}

says() { # name, key
    tr '\r' '\n' <"$tmp/$1.console" | sed -n "s/^guest $2 \(.*[^ ]\) *$/\1/p"
}

copy_sectors() { # image, from, to, count
    dd if="$1" of="$1" bs=512 skip="$2" seek="$3" count="$4" conv=notrunc \
        status=none
}

check_image() { # name
    check "$1-image" "$(status_of cmp "$tmp/disk.img" "$tmp/expected.img")" 0
}

add_up() { # file, byte order, format
    od -An -v -tu4 --endian="$2" "$1" | awk -v format="$3" '
        { for (i = 1; i <= NF; i++) sum = (sum + $i) % 4294967296 }
        END { printf format, sum }'
}


# ---- The disk: a partition with FAT, and some room after it -----------------

START=2048 SECTORS=65536
partition=$tmp/disk.img@@1M

head -c 1500000 /dev/urandom >"$tmp/file"
head -c 100000 /dev/urandom >"$tmp/other"
truncate -s 40M "$tmp/made.img"
mkfs.fat -F 16 --offset $START "$tmp/made.img" $((SECTORS / 2)) \
    >"$tmp/mkfs.log" 2>&1 || exit 1
# The table: active, type 6, START and SECTORS in 32 bits.
printf '\200\376\377\377\006\376\377\377\000\010\000\000\000\000\001\000' |
    dd of="$tmp/made.img" bs=1 seek=446 conv=notrunc status=none
printf '\125\252' |
    dd of="$tmp/made.img" bs=1 seek=510 conv=notrunc status=none
mcopy -i "$tmp/made.img@@1M" "$tmp/file" "$tmp/other" "$here/check.fs" ::/ &&
    mcopy -t -i "$tmp/made.img@@1M" "$here/startup.nsh" ::/ &&
    mcopy -i "$tmp/made.img@@1M" "$tmp/other" ::/gone || exit 1


# ---- SeaBIOS: a boot sector uses int 13h ------------------------------------

boot_sector() { # name, options of QEMU...
    cp "$tmp/boot.img" "$tmp/disk.img"
    run_guest "$@" -device isa-debug-exit,iobase=0x501,iosize=1
    check "$1-last-sector" "$(says "$1" word)" "$word"
    check_image "$1"
}

if have SeaBIOS "qemu-system-x86 seabios binutils-x86-64-linux-gnu" \
    qemu-system-x86_64 $binutils-as /usr/share/seabios/bios-microvm.bin; then
    assemble sector 0x7c00
    word=$(od -An -N 16 -tx1 /dev/urandom | tr -d ' \n')
    head -c 16M /dev/urandom >"$tmp/boot.img"
    dd if="$tmp/sector" of="$tmp/boot.img" conv=notrunc status=none
    printf 'guest word %s\r\n\0' "$word" |
        dd of="$tmp/boot.img" bs=512 seek=32767 conv=notrunc status=none
    cp "$tmp/boot.img" "$tmp/expected.img"
    copy_sectors "$tmp/expected.img" 2000 4000 100
    copy_sectors "$tmp/expected.img" 9 19 1

    boot_sector seabios-pci 1 qemu-system-x86_64 \
        -M q35,accel=tcg,memory-backend=m -device vhost-user-blk-pci,chardev=d
    boot_sector seabios-legacy 1 qemu-system-x86_64 \
        -M pc,accel=tcg,memory-backend=m \
        -device vhost-user-blk-pci,chardev=d,disable-modern=on

    # Its stack is in the lower half of its image, and QEMU shares RAM with
    # the daemon but no ROM. So that half is put into RAM.
    bios=/usr/share/seabios/bios-microvm.bin
    head -c 65536 $bios >"$tmp/lower"
    tail -c 65536 $bios >"$tmp/upper"
    boot_sector seabios-mmio 1 qemu-system-x86_64 \
        -M microvm,accel=tcg,memory-backend=m,pic=on,pit=on,rtc=on \
        -bios "$tmp/upper" \
        -device "loader,file=$tmp/lower,addr=0xe0000,force-raw=on" \
        -global virtio-mmio.force-legacy=false \
        -device vhost-user-blk,chardev=d
fi


# ---- GRUB: checks sums, loads a kernel --------------------------------------

grub=/usr/lib/grub/i386-pc
if have GRUB "qemu-system-x86 grub-pc-bin binutils-x86-64-linux-gnu" \
    qemu-system-x86_64 $binutils-as grub-mkimage $grub/boot.img; then
    assemble kernel 0x100000
    cat >"$tmp/grub.cfg" <<'GRUB'
serial
terminal_output serial
set root=(hd0,msdos1)
hashsum --hash sha256 --check /sums
multiboot /kernel
boot
GRUB
    (cd "$tmp" && sha256sum file other kernel) | sed 's/  /  \//' >"$tmp/sums"
    cp "$tmp/made.img" "$tmp/disk.img"
    mcopy -i "$partition" "$tmp/kernel" "$tmp/sums" ::/ || exit 1
    # boot.img loads what follows it, and the table begins at byte 446.
    grub-mkimage -O i386-pc -o "$tmp/core.img" -p / -c "$tmp/grub.cfg" \
        biosdisk part_msdos fat serial terminal hashsum gcry_sha256 \
        multiboot boot || exit 1
    head -c 440 $grub/boot.img |
        dd of="$tmp/disk.img" conv=notrunc status=none
    dd if="$tmp/core.img" of="$tmp/disk.img" bs=512 seek=1 conv=notrunc \
        status=none
    cp "$tmp/disk.img" "$tmp/expected.img"

    # The kernel's last word is 10, which makes 21.
    run_guest grub 21 qemu-system-x86_64 -M q35,accel=tcg,memory-backend=m \
        -device vhost-user-blk-pci,chardev=d \
        -device isa-debug-exit,iobase=0x501,iosize=1
    check grub-hashes "$(tr -d '\r' <"$tmp/grub.console" | grep -c ': OK$')" 3
    check grub-kernel-sum "$(says grub "kernel sum")" \
        "$(add_up "$tmp/file" little %08x)"
    check_image grub
fi


# ---- EDK2: the shell runs startup.nsh ---------------------------------------

check_copies() { # name
    check "$1-comp" "$(says "$1" comp)" 0x0
    check "$1-copy" "$(mtype -i "$partition" ::/dir/copy | sha256sum)" \
        "$(sha256sum <"$tmp/file")"
    check "$1-new" "$(mtype -i "$partition" ::/dir/new | sha256sum)" \
        "$(sha256sum <"$tmp/other")"
    check "$1-gone" "$(status_of mtype -i "$partition" ::/gone)" 1
    dd if="$tmp/disk.img" of="$tmp/fat.img" bs=512 skip=$START \
        count=$SECTORS status=none
    check "$1-fsck" "$(status_of fsck.fat -n "$tmp/fat.img")" 0
}

edk2() { # name, emulator, options of QEMU...
    cp "$tmp/made.img" "$tmp/disk.img"
    edk2_name=$1
    shift
    run_guest "$edk2_name" 0 "$@"
    check_copies "$edk2_name"
}

ovmf=/usr/share/ovmf/OVMF.fd
if have OVMF "qemu-system-x86 ovmf" qemu-system-x86_64 $ovmf; then
    # QEMU's default is a device that is both, and this driver a legacy one.
    edk2 ovmf-transitional qemu-system-x86_64 \
        -M q35,accel=tcg,memory-backend=m -bios $ovmf \
        -device vhost-user-blk-pci,chardev=d
    edk2 ovmf-modern qemu-system-x86_64 \
        -M q35,accel=tcg,memory-backend=m -bios $ovmf \
        -device vhost-user-blk-pci,chardev=d,disable-legacy=on
fi

efi=/usr/share/qemu-efi-aarch64/QEMU_EFI.fd
if have "EDK2 on AArch64" "qemu-system-arm qemu-efi-aarch64" \
    qemu-system-aarch64 $efi; then
    edk2 aarch64-mmio qemu-system-aarch64 \
        -M virt,accel=tcg,memory-backend=m -cpu cortex-a57 -bios $efi \
        -global virtio-mmio.force-legacy=false -device vhost-user-blk,chardev=d
fi


# ---- SLOF: runs a Forth program from the partition --------------------------

if have SLOF "qemu-system-ppc" qemu-system-ppc64; then
    cp "$tmp/made.img" "$tmp/disk.img"
    cp "$tmp/made.img" "$tmp/expected.img"
    dd if="$tmp/other" of="$tmp/expected.img" bs=512 seek=1600 count=32 \
        conv=notrunc status=none
    # The capabilities are those that TCG lacks.
    run_guest slof 0 qemu-system-ppc64 \
        -M pseries,accel=tcg,memory-backend=m,cap-cfpc=broken,cap-sbbc=broken \
        -M cap-ibs=broken,cap-ccf-assist=off \
        -device vhost-user-blk-pci,chardev=d \
        -prom-env 'boot-command=s" disk:1,\check.fs" open-dev
            load-base s" load" 3 pick $call-method load-base swap evaluate'
    check slof-sum "$(says slof sum)" "$(add_up "$tmp/other" big %x)"
    check slof-written "$(says slof written)" 4000
    check_image slof
fi

explain
[ $failures -eq 0 ]
