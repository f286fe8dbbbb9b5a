# The program of carry.py: it listens, and becomes what it is given with who knows the token as its input and output. A test assembles
# it and compares:
#     as --64 -o carry.o carry.S && objcopy -O binary -j .text carry.o carry.bin
# System calls: asm/unistd_64.h; options: asm-generic/socket.h; the stack at the start: the x86-64 ABI.
        .intel_syntax noprefix
        .text
        .set READ, 0
        .set WRITE, 1
        .set CLOSE, 3
        .set DUP2, 33
        .set SOCKET, 41
        .set ACCEPT, 43
        .set BIND, 49
        .set LISTEN, 50
        .set SETSOCKOPT, 54
        .set EXECVE, 59
        .set EXIT, 60
        .set SOCK_STREAM, 1
        .set SOL_SOCKET, 1
        .set SO_REUSEADDR, 2
        .set SO_RCVTIMEO, 20
        .set MESSAGE_SIZE, 56           # domain, length of the address, address (16), token (32)
        .set ADDRESS, 8
        .set TOKEN, 24
        .set TOKEN_SIZE, 32
        .set SAID, 64                   # what the other end says
        .set TIME, 96                   # a struct timeval
start:
        mov     rbx, [rsp]              # argc
        lea     r12, [rsp + 16]         # argv + 1
        lea     r13, [rsp + 8*rbx + 16] # envp
        sub     rsp, 128
        xor     edi, edi                # the message, from standard input
        mov     rsi, rsp
        mov     r14d, MESSAGE_SIZE
        call    read_all
        jne     fail
        mov     eax, SOCKET
        mov     edi, [rsp]
        mov     esi, SOCK_STREAM
        xor     edx, edx
        syscall
        test    eax, eax
        js      refused
        mov     r15d, eax
        mov     dword ptr [rsp + TIME], 1
        mov     eax, SETSOCKOPT
        mov     edi, r15d
        mov     esi, SOL_SOCKET
        mov     edx, SO_REUSEADDR
        lea     r10, [rsp + TIME]
        mov     r8d, 4
        syscall
        mov     eax, BIND
        mov     edi, r15d
        lea     rsi, [rsp + ADDRESS]
        mov     edx, [rsp + 4]
        syscall
        test    eax, eax
        jne     refused
        mov     eax, LISTEN
        mov     edi, r15d
        mov     esi, 8
        syscall
        test    eax, eax
        jne     refused
        mov     eax, WRITE              # write(1, "ready\n", 6)
        mov     edi, 1
        lea     rsi, [rip + ready]
        mov     edx, 6
        syscall
again:  mov     eax, ACCEPT
        mov     edi, r15d
        xor     esi, esi
        xor     edx, edx
        syscall
        test    eax, eax
        js      fail
        mov     ebp, eax
        mov     edi, 5                  # who says nothing must not keep others waiting
        call    set_timeout
        mov     edi, ebp
        lea     rsi, [rsp + SAID]
        mov     r14d, TOKEN_SIZE
        call    read_all
        jne     stranger
        lea     rsi, [rsp + TOKEN]
        lea     rdi, [rsp + SAID]
        mov     ecx, TOKEN_SIZE
        repe cmpsb
        jne     stranger
        xor     edi, edi
        call    set_timeout
        mov     eax, WRITE              # the token again: the other end knows that it is here
        mov     edi, ebp
        lea     rsi, [rsp + TOKEN]
        mov     edx, TOKEN_SIZE
        syscall
        mov     eax, DUP2
        mov     edi, ebp
        xor     esi, esi
        syscall
        mov     eax, DUP2
        mov     edi, ebp
        mov     esi, 1
        syscall
        mov     eax, CLOSE
        mov     edi, ebp
        syscall
        mov     eax, CLOSE
        mov     edi, r15d
        syscall
        mov     eax, EXECVE
        mov     rdi, [r12]
        mov     rsi, r12
        mov     rdx, r13
        syscall
        jmp     fail
stranger:
        mov     eax, CLOSE
        mov     edi, ebp
        syscall
        jmp     again
fail:   mov     edi, 1
        jmp     exit
refused:
        mov     edi, 2
exit:   mov     eax, EXIT
        syscall
read_all:                               # r14 bytes from edi to rsi; "not equal" where fewer come
        mov     eax, READ
        mov     edx, r14d
        syscall
        test    eax, eax
        jle     short_of
        add     rsi, rax
        sub     r14d, eax
        jne     read_all
        ret
short_of:
        cmp     rsp, 0                  # never equal
        ret
set_timeout:                            # edi seconds for each read of ebp; 0: no limit
        mov     [rsp + 8 + TIME], rdi
        mov     qword ptr [rsp + 8 + TIME + 8], 0
        mov     eax, SETSOCKOPT
        mov     edi, ebp
        mov     esi, SOL_SOCKET
        mov     edx, SO_RCVTIMEO
        lea     r10, [rsp + 8 + TIME]
        mov     r8d, 16
        syscall
        ret
ready:  .ascii  "ready\n"
