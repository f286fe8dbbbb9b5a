"""Cloud Hypervisor: its command line, its API and its events."""
