# The program of renew.py: it makes a clone's clock and random numbers its own. A test assembles it and compares:
#     as --64 -o renew.o renew.S && objcopy -O binary -j .text renew.o renew.bin
# System calls: asm/unistd_64.h; requests: linux/random.h. What is not needed of the C library is most of it.
        .intel_syntax noprefix
        .text
        .set WRITE, 1
        .set OPEN, 2
        .set IOCTL, 16
        .set EXIT, 60
        .set CLOCK_SETTIME, 227
        .set CLOCK_REALTIME, 0
        .set O_RDONLY, 0
        .set RNDADDENTROPY, 0x40085203
        .set RNDRESEEDCRNG, 0x5207
        .set LINE_SIZE, 39              # the host's line: a token of 32, " renew" and the line's end
        .set MESSAGE_SIZE, 56           # struct timespec, and struct rand_pool_info with 32 bytes
start:
        sub     rsp, 128
        mov     eax, WRITE              # write(1, "waits\n", 6)
        mov     edi, 1
        lea     rsi, [rip + waits]
        mov     edx, 6
        syscall
        lea     r12, [rsp + 1]          # read the host's line to rsp + 1
        mov     r13d, LINE_SIZE
        call    read_all
        cmp     byte ptr [rsp + 1], '-' # sent away
        je      fail
        mov     byte ptr [rsp], '\n'    # say it again, on a line of its own
        mov     eax, WRITE
        mov     edi, 1
        mov     rsi, rsp
        mov     edx, LINE_SIZE + 1
        syscall
        lea     r12, [rsp + 64]         # read the message to rsp + 64
        mov     r13d, MESSAGE_SIZE
        call    read_all
        mov     eax, CLOCK_SETTIME
        xor     edi, edi                # CLOCK_REALTIME
        lea     rsi, [rsp + 64]
        syscall
        test    eax, eax
        jne     fail
        mov     eax, OPEN
        lea     rdi, [rip + urandom]
        xor     esi, esi                # O_RDONLY
        syscall
        test    eax, eax
        js      fail
        mov     edi, eax
        mov     eax, IOCTL              # the seed into the pool
        mov     esi, RNDADDENTROPY
        lea     rdx, [rsp + 80]
        syscall
        test    eax, eax
        jne     fail
        mov     eax, IOCTL              # and used from now on
        mov     esi, RNDRESEEDCRNG
        syscall
        test    eax, eax
        jne     fail
        xor     edi, edi
        jmp     exit
fail:   mov     edi, 1
exit:   mov     eax, EXIT
        syscall
read_all:                               # r13 bytes to r12
        xor     ebx, ebx
again:  xor     eax, eax                # read(0, r12 + rbx, r13 - rbx)
        xor     edi, edi
        lea     rsi, [r12 + rbx]
        mov     edx, r13d
        sub     edx, ebx
        syscall
        test    eax, eax
        jle     fail
        add     ebx, eax
        cmp     ebx, r13d
        jb      again
        ret
waits:  .ascii  "waits\n"
urandom:
        .asciz  "/dev/urandom"
