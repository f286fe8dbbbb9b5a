"""Descriptors of processes, by their pids. Of the standard library only: the keeper has it too."""

import errno
import os


def open_pidfd(pid: int) -> int:
    """Return a descriptor of a process; raises ProcessLookupError where there is none.

    The kernel says EINVAL of a pid that has no process any more, and is still the number of a session or group of others, or whose
    process is just being collected (pidfd_prepare in kernel/fork.c).
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL and pid > 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        raise
