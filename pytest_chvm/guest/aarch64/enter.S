// The program of enter.py for aarch64, step by step as enter.S. A test assembles it and compares:
//     as -o enter.o enter.S && objcopy -O binary -j .text enter.o enter.bin
// System calls: asm-generic/unistd.h; the stack at the start: create_elf_tables() of its fs/binfmt_elf.c.
        .text
        .set OPENAT, 56
        .set CLOSE, 57
        .set CHDIR, 49
        .set SETNS, 268
        .set EXECVE, 221
        .set EXIT, 93
        .set AT_FDCWD, -100
        .set CLONE_NEWNS, 0x20000
start:
        ldr     x19, [sp]               // argc
        add     x20, sp, 16
        add     x20, x20, x19, lsl 3    // envp
        mov     x8, OPENAT
        mov     x0, AT_FDCWD
        adr     x1, namespace
        mov     x2, 0                   // O_RDONLY
        mov     x3, 0
        svc     0
        mov     x21, x0                 // of what could not be opened setns fails
        mov     x8, SETNS
        mov     x1, CLONE_NEWNS
        svc     0
        tbnz    x0, 63, fail
        mov     x8, CLOSE
        mov     x0, x21
        svc     0
        mov     x8, CHDIR               // where there is no such directory it stays at the root
        ldr     x0, [sp, 16]
        svc     0
        mov     x8, EXECVE
        ldr     x0, [sp, 24]
        add     x1, sp, 24
        mov     x2, x20
        svc     0
        adr     x0, shell               // sh knows what else to do, and says what is wrong: in place of the first three words
        adr     x1, dash_c
        adr     x2, script
        stp     x0, x1, [sp]
        str     x2, [sp, 16]
        mov     x8, EXECVE
        mov     x1, sp
        mov     x2, x20
        svc     0
fail:
        mov     x8, EXIT
        mov     x0, 126
        svc     0
namespace:
        .asciz  "/lib/chvm/root.ns"
shell:
        .asciz  "/bin/sh"
dash_c:
        .asciz  "-c"
script:
        .asciz  "exec \"$0\" \"$@\""
