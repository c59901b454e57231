#!/bin/sh
# Builds the guest of this directory into $1.
cd "$(dirname "$0")" || exit 1
${CC:-cc} -std=gnu99 -O1 -g0 -Wall -Wextra -ffreestanding -nostdlib -static \
    -fno-pic -fno-stack-protector -fcf-protection=none -mno-red-zone \
    -mgeneral-regs-only -fno-asynchronous-unwind-tables \
    -Wl,--build-id=none -Wl,-T,guest.ld -o "$1" guest.c
