"""The keeper process and what it reads and removes: standard library only, started in milliseconds."""
