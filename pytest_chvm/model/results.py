"""What a command in the guest did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in the guest did. Nothing is stripped from its outputs.

    `stdout` and `stderr` are `stdout_bytes` and `stderr_bytes` as UTF-8, undecodable bytes by
    `surrogateescape`. `returncode` is the shell's: 128 + N for a command that signal N ended.
    """

    command: str | tuple[str, ...]
    returncode: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration_s: float

    @property
    def stdout(self) -> str:
        """Standard output as text."""
        return self.stdout_bytes.decode(errors="surrogateescape")

    @property
    def stderr(self) -> str:
        """Standard error as text."""
        return self.stderr_bytes.decode(errors="surrogateescape")
