// The program of carry.py for aarch64, step by step as carry.S. A test assembles it and compares:
//     as -o carry.o carry.S && objcopy -O binary -j .text carry.o carry.bin
// System calls: asm-generic/unistd.h; options: asm-generic/socket.h; the stack at the start: create_elf_tables() of its fs/binfmt_elf.c.
        .text
        .set READ, 63
        .set WRITE, 64
        .set CLOSE, 57
        .set DUP3, 24
        .set SOCKET, 198
        .set ACCEPT, 202
        .set BIND, 200
        .set LISTEN, 201
        .set SETSOCKOPT, 208
        .set EXECVE, 221
        .set EXIT, 93
        .set SOCK_STREAM, 1
        .set SOL_SOCKET, 1
        .set SO_REUSEADDR, 2
        .set SO_RCVTIMEO, 20
        .set MESSAGE_SIZE, 56           // domain, length of the address, address (16), token (32)
        .set ADDRESS, 8
        .set TOKEN, 24
        .set TOKEN_SIZE, 32
        .set SAID, 64                   // what the other end says
        .set TIME, 96                   // a struct timeval
start:
        ldr     x19, [sp]               // argc
        add     x20, sp, 16             // argv + 1
        add     x21, x20, x19, lsl 3    // envp
        sub     sp, sp, 128
        mov     x22, 0                  // the message, from standard input
        mov     x23, sp
        mov     x24, MESSAGE_SIZE
        bl      read_all
        cbnz    x24, fail
        mov     x8, SOCKET
        ldr     w0, [sp]
        mov     x1, SOCK_STREAM
        mov     x2, 0
        svc     0
        tbnz    x0, 63, refused
        mov     x25, x0
        mov     w1, 1
        str     w1, [sp, TIME]
        mov     x8, SETSOCKOPT
        mov     x1, SOL_SOCKET
        mov     x2, SO_REUSEADDR
        add     x3, sp, TIME
        mov     x4, 4
        svc     0
        mov     x8, BIND
        mov     x0, x25
        add     x1, sp, ADDRESS
        ldr     w2, [sp, 4]
        svc     0
        cbnz    x0, refused
        mov     x8, LISTEN
        mov     x0, x25
        mov     x1, 8
        svc     0
        cbnz    x0, refused
        mov     x8, WRITE               // write(1, "ready\n", 6)
        mov     x0, 1
        adr     x1, ready
        mov     x2, 6
        svc     0
again:  mov     x8, ACCEPT
        mov     x0, x25
        mov     x1, 0
        mov     x2, 0
        svc     0
        tbnz    x0, 63, fail
        mov     x22, x0
        mov     x9, 5                   // who says nothing must not keep others waiting
        bl      set_timeout
        add     x23, sp, SAID
        mov     x24, TOKEN_SIZE
        bl      read_all
        cbnz    x24, stranger
        ldp     x0, x1, [sp, TOKEN]
        ldp     x2, x3, [sp, SAID]
        eor     x0, x0, x2
        eor     x1, x1, x3
        orr     x0, x0, x1
        ldp     x1, x2, [sp, TOKEN + 16]
        ldp     x3, x4, [sp, SAID + 16]
        eor     x1, x1, x3
        eor     x2, x2, x4
        orr     x1, x1, x2
        orr     x0, x0, x1
        cbnz    x0, stranger
        mov     x9, 0
        bl      set_timeout
        mov     x8, WRITE               // the token again: the other end knows that it is here
        mov     x0, x22
        add     x1, sp, TOKEN
        mov     x2, TOKEN_SIZE
        svc     0
        mov     x8, DUP3
        mov     x0, x22
        mov     x1, 0
        mov     x2, 0
        svc     0
        mov     x8, DUP3
        mov     x0, x22
        mov     x1, 1
        mov     x2, 0
        svc     0
        mov     x8, CLOSE
        mov     x0, x22
        svc     0
        mov     x8, CLOSE
        mov     x0, x25
        svc     0
        mov     x8, EXECVE
        ldr     x0, [x20]
        mov     x1, x20
        mov     x2, x21
        svc     0
        b       fail
stranger:
        mov     x8, CLOSE
        mov     x0, x22
        svc     0
        b       again
fail:   mov     x0, 1
        b       exit
refused:
        mov     x0, 2
exit:   mov     x8, EXIT
        svc     0
read_all:                               // x24 bytes from x22 to x23; x24 is not 0 after it where fewer come
        mov     x8, READ
        mov     x0, x22
        mov     x1, x23
        mov     x2, x24
        svc     0
        cmp     x0, 0
        b.le    short_of
        add     x23, x23, x0
        subs    x24, x24, x0
        b.ne    read_all
short_of:
        ret
set_timeout:                            // x9 seconds for each read of x22; 0: no limit
        stp     x9, xzr, [sp, TIME]
        mov     x8, SETSOCKOPT
        mov     x0, x22
        mov     x1, SOL_SOCKET
        mov     x2, SO_RCVTIMEO
        add     x3, sp, TIME
        mov     x4, 16
        svc     0
        ret
ready:  .ascii  "ready\n"
