"""Guest kernels: what a kernel is and has, and the forms in which a user may name one, a file each."""
