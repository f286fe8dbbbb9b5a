"""QEMU: its command line, its devices and its control protocol."""
