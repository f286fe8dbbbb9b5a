# The program of stream.py: it sends one output of a process over the console. A test assembles it and compares:
#     as --64 -o stream.o stream.S && objcopy -O binary -j .text stream.o stream.bin
# System calls: asm/unistd_64.h; terminals: asm-generic/ioctls.h, termbits.h; the stack at the start: the x86-64 ABI.
        .intel_syntax noprefix
        .text
        .set READ, 0
        .set WRITE, 1
        .set IOCTL, 16
        .set EXIT, 60
        .set TCGETS, 0x5401
        .set TCSETS, 0x5402
        .set C_OFLAG, 4                 # in a kernel's struct termios
        .set OPOST, 1
        .set GO, 7                      # where the host's wish for more comes
        .set TURN, 9                    # where the turn to write to the console is
        .set DATA, 256                  # from there on, what was read; before it, the line that says how much
        .set LARGEST, 65536
start:
        mov     r12, [rsp + 16]         # argv[1], the beginning of the line
        mov     rsi, [rsp + 24]         # argv[2], how many bytes are read at most
        xor     r13d, r13d
number: movzx   eax, byte ptr [rsi]
        sub     eax, '0'
        js      known
        imul    r13d, r13d, 10
        add     r13d, eax
        inc     rsi
        jmp     number
known:  cmp     r13d, LARGEST
        ja      fail
        mov     rbx, r12                # the beginning's length, of at most 100
        xor     r14d, r14d
length: cmp     byte ptr [rbx + r14], 0
        je      begin
        inc     r14d
        cmp     r14d, 100
        ja      fail
        jmp     length
begin:  sub     rsp, DATA + LARGEST
next:   xor     eax, eax                # read(0, data, size)
        xor     edi, edi
        lea     rsi, [rsp + DATA]
        mov     edx, r13d
        syscall
        test    eax, eax
        jns     some
        xor     eax, eax
some:   mov     r15d, eax
        lea     rdi, [rsp + DATA - 1]   # the line, from its end
        mov     byte ptr [rdi], '\n'
        mov     ecx, 10
digit:  xor     edx, edx
        div     ecx
        add     edx, '0'
        dec     rdi
        mov     [rdi], dl
        test    eax, eax
        jne     digit
        mov     ecx, r14d
        sub     rdi, rcx
        mov     rbp, rdi                # where what is written begins
        mov     rsi, r12
        rep movsb
        mov     eax, IOCTL              # a command may have changed the terminal's settings
        mov     edi, 1
        mov     esi, TCGETS
        mov     rdx, rsp
        syscall
        test    eax, eax
        jne     turn
        test    dword ptr [rsp + C_OFLAG], OPOST
        je      turn
        and     dword ptr [rsp + C_OFLAG], -1 - OPOST
        mov     eax, IOCTL
        mov     edi, 1
        mov     esi, TCSETS
        mov     rdx, rsp
        syscall
turn:   xor     eax, eax
        mov     edi, TURN
        mov     rsi, rsp
        mov     edx, 1
        syscall
        lea     rbx, [rsp + DATA]
        add     rbx, r15                # where it ends
write:  mov     eax, WRITE
        mov     edi, 1
        mov     rsi, rbp
        mov     rdx, rbx
        sub     rdx, rbp
        syscall
        test    rax, rax
        jle     fail
        add     rbp, rax
        cmp     rbp, rbx
        jb      write
        test    r15d, r15d
        je      last
        xor     eax, eax
        mov     edi, GO
        mov     rsi, rsp
        mov     edx, 1
        syscall
        jmp     next
last:   mov     eax, WRITE              # give back the turn
        mov     edi, TURN
        lea     rsi, [rip + line]
        mov     edx, 1
        syscall
        xor     edi, edi
        jmp     exit
fail:   mov     edi, 1
exit:   mov     eax, EXIT
        syscall
line:   .ascii  "\n"
