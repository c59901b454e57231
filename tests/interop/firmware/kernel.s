# A kernel by the multiboot specification. It is mostly ballast, and says what
# the sum of it is where it was loaded.
    .set magic, 0x1badb002
    .set flags, 0x10000 # no ELF file: the addresses are in the header
    .globl _start
header:
    .long magic, flags, -(magic + flags)
    .long header, header, end, end, _start

_start:
    movl $0x80000, %esp
    movl $ballast, %esi
    xorl %ebx, %ebx
1:  lodsl
    addl %eax, %ebx
    cmpl $end, %esi
    jb 1b

    movl $text, %esi
2:  lodsb
    call print
    cmpl $text_end, %esi
    jb 2b

    movl $8, %ecx
3:  roll $4, %ebx
    movb %bl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 4f
    addb $'a' - '0' - 10, %al
4:  call print
    loop 3b

    movb $'\n', %al
    call print
    movw $0x501, %dx    # isa-debug-exit
    outb %al, %dx
5:  hlt
    jmp 5b

print:                  # al
    movb %al, %ah
    movw $0x3fd, %dx
6:  inb %dx, %al
    testb $0x20, %al
    jz 6b
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    ret

text:
    .ascii "\nguest kernel sum "
text_end:

    .balign 4
ballast:
    .incbin "file"
end:
