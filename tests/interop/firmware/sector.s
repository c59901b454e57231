# A boot sector that uses its disk through int 13h. It reads 100 sectors from
# 2000 on and writes them from 4000 on, then sector 9 to 19 by cylinder, head
# and sector, and shows on the serial line what text the last sector has.
    .code16
    .globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld

    movb $'r', step
    movb $0x42, %ah
    movw $packet, %si
    int $0x13
    jc fail

    movb $'w', step
    movl $4000, packet + 8
    movw $0x4300, %ax
    int $0x13
    jc fail

    movb $'R', step
    movw $0x0201, %ax
    movw $0x8000, %bx
    movw $10, %cx       # sectors of a track count from 1
    movb $0, %dh
    int $0x13
    jc fail

    movb $'W', step
    movw $0x0301, %ax
    movw $20, %cx
    movb $0, %dh
    int $0x13
    jc fail

    movb $'s', step
    movb $0x48, %ah
    movw $parameters, %si
    int $0x13
    jc fail

    movb $'l', step
    movl parameters + 16, %eax
    decl %eax
    movl %eax, packet + 8
    movw $1, packet + 2
    movb $0x42, %ah
    movw $packet, %si
    int $0x13
    jc fail

    movw $0x1000, %ax
    movw %ax, %ds
    xorw %si, %si
    call print
    jmp off

fail:
    movw $failed, %si
    call print
off:
    movw $0x501, %dx    # isa-debug-exit
    outb %al, %dx
    hlt
    jmp off

print:                  # the string at ds:si
    movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz print
    lodsb
    testb %al, %al
    jz 1f
    movw $0x3f8, %dx
    outb %al, %dx
    jmp print
1:  ret

packet:                 # sectors, to where, from where
    .word 16, 100, 0, 0x1000
    .quad 2000
parameters:
    .word 26
    .fill 24
failed:
    .ascii "guest failed in step "
step:
    .asciz " \r\n"

    .org 510
    .word 0xaa55
