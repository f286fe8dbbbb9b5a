"""Runs a guest of five bytes with KVM, over its own interface (Documentation/virt/kvm/api.rst): prints its TSC's
frequency in kHz, and what it wrote to a port."""

import ctypes
import fcntl
import mmap
import os
import struct

KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4020AE46, 0x4090AE82, 0x8138AE83, 0x4138AE84
KVM_GET_TSC_KHZ = 0xAEA3
KVM_EXIT_IO, KVM_EXIT_HLT = 2, 5
# mov al, 'K'; out 0x10, al; hlt
CODE = b"\xb0K\xe6\x10\xf4"
ENTRY = 0x1000

kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
memory = mmap.mmap(-1, 0x4000)
memory[ENTRY : ENTRY + len(CODE)] = CODE
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, len(memory), address))
vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
print(fcntl.ioctl(vcpu, KVM_GET_TSC_KHZ))
state = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))

segments = bytearray(312)
fcntl.ioctl(vcpu, KVM_GET_SREGS, segments)
# The code segment is the first: base, and further on the selector.
segments[0:8] = bytes(8)
segments[12:14] = bytes(2)
fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(segments))
registers = [0] * 18
registers[16], registers[17] = ENTRY, 2
fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("=18Q", *registers))

while True:
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    (reason,) = struct.unpack_from("=I", state, 8)
    if reason == KVM_EXIT_HLT:
        break
    assert reason == KVM_EXIT_IO, reason
    (offset,) = struct.unpack_from("=Q", state, 32 + 8)
    print("guest wrote", chr(state[offset]))
