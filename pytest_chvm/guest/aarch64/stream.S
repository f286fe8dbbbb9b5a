// The program of stream.py for aarch64, step by step as stream.S. A test assembles it and compares:
//     as -o stream.o stream.S && objcopy -O binary -j .text stream.o stream.bin
// System calls: asm-generic/unistd.h; terminals: asm-generic/ioctls.h, termbits.h; the stack at the start: fs/binfmt_elf.c.
        .text
        .set READ, 63
        .set WRITE, 64
        .set IOCTL, 29
        .set EXIT, 93
        .set TCGETS, 0x5401
        .set TCSETS, 0x5402
        .set C_OFLAG, 4                 // in a kernel's struct termios
        .set OPOST, 1
        .set GO, 7                      // where the host's wish for more comes
        .set TURN, 9                    // where the turn to write to the console is
        .set DATA, 256                  // from there on, what was read; before it, the line that says how much
        .set LARGEST, 65536
start:
        ldr     x19, [sp, 16]           // argv[1], the beginning of the line
        ldr     x1, [sp, 24]            // argv[2], how many bytes are read at most
        mov     x20, 0
        mov     x9, 10
number: ldrb    w0, [x1], 1
        subs    w0, w0, '0'
        b.lt    known
        madd    x20, x20, x9, x0
        b       number
known:  mov     x0, LARGEST
        cmp     x20, x0
        b.hi    fail
        mov     x21, 0                  // the beginning's length, of at most 100
length: ldrb    w0, [x19, x21]
        cbz     w0, begin
        add     x21, x21, 1
        cmp     x21, 100
        b.hi    fail
        b       length
begin:  sub     sp, sp, LARGEST
        sub     sp, sp, DATA
        add     x22, sp, DATA           // the data
next:   mov     x8, READ                // read(0, data, size)
        mov     x0, 0
        mov     x1, x22
        mov     x2, x20
        svc     0
        cmp     x0, 0
        csel    x23, x0, xzr, gt
        sub     x24, x22, 1             // the line, from its end
        mov     w1, '\n'
        strb    w1, [x24]
        mov     x1, x23
digit:  udiv    x2, x1, x9
        msub    x3, x2, x9, x1
        add     w3, w3, '0'
        strb    w3, [x24, -1]!
        mov     x1, x2
        cbnz    x1, digit
        sub     x24, x24, x21           // where what is written begins
        mov     x1, 0
copy:   cmp     x1, x21
        b.hs    copied
        ldrb    w2, [x19, x1]
        strb    w2, [x24, x1]
        add     x1, x1, 1
        b       copy
copied: mov     x8, IOCTL               // a command may have changed the terminal's settings
        mov     x0, 1
        mov     x1, TCGETS
        mov     x2, sp
        svc     0
        cbnz    x0, turn
        ldr     w1, [sp, C_OFLAG]
        tbz     w1, 0, turn
        and     w1, w1, ~OPOST
        str     w1, [sp, C_OFLAG]
        mov     x8, IOCTL
        mov     x0, 1
        mov     x1, TCSETS
        mov     x2, sp
        svc     0
turn:   mov     x8, READ
        mov     x0, TURN
        mov     x1, sp
        mov     x2, 1
        svc     0
        add     x25, x22, x23           // where it ends
write:  mov     x8, WRITE
        mov     x0, 1
        mov     x1, x24
        sub     x2, x25, x24
        svc     0
        cmp     x0, 0
        b.le    fail
        add     x24, x24, x0
        cmp     x24, x25
        b.lo    write
        cbz     x23, last
        mov     x8, READ
        mov     x0, GO
        mov     x1, sp
        mov     x2, 1
        svc     0
        b       next
last:   mov     x8, WRITE               // give back the turn
        mov     x0, TURN
        adr     x1, line
        mov     x2, 1
        svc     0
        mov     x0, 0
        b       exit
fail:   mov     x0, 1
exit:   mov     x8, EXIT
        svc     0
line:   .ascii  "\n"
