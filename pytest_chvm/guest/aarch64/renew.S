// The program of renew.py for aarch64, step by step as renew.S. A test assembles it and compares:
//     as -o renew.o renew.S && objcopy -O binary -j .text renew.o renew.bin
// System calls: asm-generic/unistd.h; requests: linux/random.h.
        .text
        .set WRITE, 64
        .set READ, 63
        .set OPENAT, 56
        .set IOCTL, 29
        .set EXIT, 93
        .set CLOCK_SETTIME, 112
        .set CLOCK_REALTIME, 0
        .set AT_FDCWD, -100
        .set RNDADDENTROPY, 0x40085203
        .set RNDRESEEDCRNG, 0x5207
        .set LINE_SIZE, 39              // the host's line: a token of 32, " renew" and the line's end
        .set MESSAGE_SIZE, 56           // struct timespec, and struct rand_pool_info with 32 bytes
start:
        sub     sp, sp, 128
        mov     x8, WRITE               // write(1, "waits\n", 6)
        mov     x0, 1
        adr     x1, waits
        mov     x2, 6
        svc     0
        add     x19, sp, 1              // read the host's line to sp + 1
        mov     x20, LINE_SIZE
        bl      read_all
        ldrb    w0, [sp, 1]
        cmp     w0, '-'                 // sent away
        b.eq    fail
        mov     w0, '\n'                // say it again, on a line of its own
        strb    w0, [sp]
        mov     x8, WRITE
        mov     x0, 1
        mov     x1, sp
        mov     x2, LINE_SIZE + 1
        svc     0
        add     x19, sp, 64             // read the message to sp + 64
        mov     x20, MESSAGE_SIZE
        bl      read_all
        mov     x8, CLOCK_SETTIME
        mov     x0, CLOCK_REALTIME
        add     x1, sp, 64
        svc     0
        cbnz    x0, fail
        mov     x8, OPENAT
        mov     x0, AT_FDCWD
        adr     x1, urandom
        mov     x2, 0                   // O_RDONLY
        svc     0
        tbnz    x0, 63, fail
        mov     x19, x0
        mov     x8, IOCTL               // the seed into the pool
        ldr     w1, =RNDADDENTROPY
        add     x2, sp, 80
        svc     0
        cbnz    x0, fail
        mov     x8, IOCTL               // and used from now on
        mov     x0, x19
        mov     w1, RNDRESEEDCRNG
        svc     0
        cbnz    x0, fail
        mov     x0, 0
        b       exit
fail:   mov     x0, 1
exit:   mov     x8, EXIT
        svc     0
read_all:                               // x20 bytes to x19
        mov     x21, 0
again:  mov     x8, READ                // read(0, x19 + x21, x20 - x21)
        mov     x0, 0
        add     x1, x19, x21
        sub     x2, x20, x21
        svc     0
        cmp     x0, 0
        b.le    fail
        add     x21, x21, x0
        cmp     x21, x20
        b.lo    again
        ret
        .ltorg
waits:  .ascii  "waits\n"
urandom:
        .asciz  "/dev/urandom"
