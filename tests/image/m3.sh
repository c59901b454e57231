#!/bin/sh
# The device in a firmware image, on QEMU's Cortex-M3 board.
cd "$(dirname "$0")/../.." || exit 1
B=${B:-build}
command -v arm-none-eabi-gcc >/dev/null &&
    command -v qemu-system-arm >/dev/null || {
    echo 'SKIP: interop-m3 needs a compiler and QEMU' \
        '(apt install gcc-arm-none-eabi qemu-system-arm)'
    exit 0
}
mkdir -p "$B"
failed=0
for optimize in -Os -O0 -O2; do
    arm-none-eabi-gcc -std=c99 -Wall -Wextra -ffreestanding -nostdlib \
        -mcpu=cortex-m3 -mthumb $optimize -fno-tree-loop-distribute-patterns \
        -ffunction-sections -fdata-sections -Wl,--gc-sections \
        -DVBLK_MAX_SEGS=16 -DVBLK_SCRATCH=512 -DVBLK_MAX_RANGES=0 \
        -T tests/image/m3.ld -o "$B/m3.elf" tests/image/device.c tests/image/mem.c \
        tests/image/m3.c || exit 1
    said=$(timeout 60 qemu-system-arm -M mps2-an385 -nographic -monitor none \
        -serial none -semihosting -kernel "$B/m3.elf" 2>&1)
    code=$?
    echo "$optimize: $said"
    [ $code = 0 ] && [ "$said" = ok ] || failed=$((failed + 1))
done
echo "$((3 - failed)) passed, $failed failed"
[ $failed = 0 ]
