"""What the host lends to a VM and gets back. Nothing here knows a VMM, a guest or pytest."""
