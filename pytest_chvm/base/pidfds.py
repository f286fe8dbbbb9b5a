"""Descriptors of processes, by their pids."""

import errno
import os


def open_pidfd(pid: int) -> int:
    """Return a descriptor of a process; raises ProcessLookupError where there is none.

    Older kernels say EINVAL of a pid whose process is being collected, or that is only the number of a session or group of others
    by now (pidfd_prepare in kernel/fork.c).
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL and pid > 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        raise
