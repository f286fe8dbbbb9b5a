"""logbox: keeps log lines on a volume of its own."""

from logbox.client import Client, LogboxError

__all__ = ["Client", "LogboxError"]
