# The program of signals.py: it undoes that SIGINT and SIGQUIT are ignored, and becomes what it is given. A test assembles it and compares:
#     as --64 -o signals.o signals.S && objcopy -O binary -j .text signals.o signals.bin
# System calls: asm/unistd_64.h; the stack at the start: the x86-64 ABI, "Initial Stack and Register State".
        .intel_syntax noprefix
        .text
        .set RT_SIGACTION, 13
        .set EXECVE, 59
        .set EXIT, 60
        .set SIGINT, 2
        .set SIGQUIT, 3
start:
        mov     rbx, [rsp]              # argc
        lea     r12, [rsp + 16]         # argv + 1
        lea     r13, [rsp + 8*rbx + 16] # envp
        xor     eax, eax
        push    rax                     # a kernel's sigaction: SIG_DFL, and no flags, restorer or mask
        push    rax
        push    rax
        push    rax
        mov     edi, SIGINT
        call    reset
        mov     edi, SIGQUIT
        call    reset
        mov     eax, EXECVE
        mov     rdi, [r12]
        mov     rsi, r12
        mov     rdx, r13
        syscall
        mov     eax, EXIT
        mov     edi, 127
        syscall
reset:
        mov     eax, RT_SIGACTION
        lea     rsi, [rsp + 8]
        xor     edx, edx
        mov     r10d, 8                 # the size of a mask
        syscall
        ret
