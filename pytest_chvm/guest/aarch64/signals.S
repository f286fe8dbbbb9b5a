// The program of signals.py for aarch64, step by step as signals.S. A test assembles it and compares:
//     as -o signals.o signals.S && objcopy -O binary -j .text signals.o signals.bin
// System calls: asm-generic/unistd.h; the stack at the start: create_elf_tables() of its fs/binfmt_elf.c.
        .text
        .set RT_SIGACTION, 134
        .set EXECVE, 221
        .set EXIT, 93
        .set SIGINT, 2
        .set SIGQUIT, 3
start:
        ldr     x19, [sp]               // argc
        add     x20, sp, 16             // argv + 1
        add     x21, x20, x19, lsl 3    // envp
        stp     xzr, xzr, [sp, -32]!    // a kernel's sigaction: SIG_DFL, and no flags, restorer or mask
        stp     xzr, xzr, [sp, 16]
        mov     x0, SIGINT
        bl      reset
        mov     x0, SIGQUIT
        bl      reset
        mov     x8, EXECVE
        ldr     x0, [x20]
        mov     x1, x20
        mov     x2, x21
        svc     0
        mov     x8, EXIT
        mov     x0, 127
        svc     0
reset:
        mov     x8, RT_SIGACTION
        mov     x1, sp
        mov     x2, 0
        mov     x3, 8                   // the size of a mask
        svc     0
        ret
