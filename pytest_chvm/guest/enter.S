# The program of enter.py: it becomes another program, in the root of a mount namespace. A test assembles it and compares:
#     as --64 -o enter.o enter.S && objcopy -O binary -j .text enter.o enter.bin
# Its arguments: a directory there; the path of a program; that one's arguments.
# System calls: asm/unistd_64.h; the stack at the start: the x86-64 ABI, "Initial Stack and Register State".
        .intel_syntax noprefix
        .text
        .set OPEN, 2
        .set CLOSE, 3
        .set EXECVE, 59
        .set EXIT, 60
        .set CHDIR, 80
        .set SETNS, 308
        .set CLONE_NEWNS, 0x20000
start:
        mov     rbx, [rsp]              # argc
        lea     r13, [rsp + 8*rbx + 16] # envp
        mov     eax, OPEN
        lea     rdi, [rip + namespace]
        xor     esi, esi                # O_RDONLY
        xor     edx, edx
        syscall
        mov     r12d, eax
        mov     edi, eax                # of what could not be opened setns fails
        mov     eax, SETNS
        mov     esi, CLONE_NEWNS
        syscall
        test    eax, eax
        js      fail
        mov     eax, CLOSE
        mov     edi, r12d
        syscall
        mov     eax, CHDIR              # where there is no such directory it stays at the root
        mov     rdi, [rsp + 16]
        syscall
        mov     eax, EXECVE
        mov     rdi, [rsp + 24]
        lea     rsi, [rsp + 24]
        mov     rdx, r13
        syscall
        lea     rdi, [rip + shell]      # sh knows what else to do, and says what is wrong: in place of the first three words
        mov     [rsp], rdi
        lea     rax, [rip + dash_c]
        mov     [rsp + 8], rax
        lea     rax, [rip + script]
        mov     [rsp + 16], rax
        mov     eax, EXECVE
        mov     rsi, rsp
        mov     rdx, r13
        syscall
fail:
        mov     eax, EXIT
        mov     edi, 126
        syscall
namespace:
        .asciz  "/lib/chvm/root.ns"
shell:
        .asciz  "/bin/sh"
dash_c:
        .asciz  "-c"
script:
        .asciz  "exec \"$0\" \"$@\""
