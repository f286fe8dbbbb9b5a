"""The shell on a guest's virtio console."""
