"""Running the programs that make an image: what they say is told as it comes, and is in the error of one that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence

from pytest_chvm.errors import HostError, MissingRequirementError

# Of each program, the Debian package that has it.
PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "fakeroot": "fakeroot",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "mformat": "mtools",
    "qemu-img": "qemu-utils",
}
# Where programs are that are not on everybody's PATH.
PLACES = ("/usr/sbin", "/sbin")
TIMEOUT_S = 1800.0
END_S = 20.0
LAST_LINES = 12


def search_path() -> str:
    """Return PATH with the directories of system programs."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *PLACES])


def check_tools() -> None:
    """Raise MissingRequirementError, naming the packages, where a program is not there."""
    missing = [program for program in PACKAGES if shutil.which(program, path=search_path()) is None]
    if missing:
        packages = " ".join(PACKAGES[program] for program in missing)
        raise MissingRequirementError(f"building an image needs {', '.join(missing)}: install {packages} (Debian, Ubuntu)")


def run_tool(words: Sequence[str | os.PathLike[str]], text: str = "", heard: Callable[[str], None] = lambda line: None) -> None:
    """Run a program with a text as its input; `heard` is told each line that it says.

    Raises HostError with its last lines where it fails or takes half an hour; then, and when this is interrupted, it is ended.
    """
    said: deque[str] = deque(maxlen=LAST_LINES)
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        late = threading.Timer(TIMEOUT_S, process.terminate)
        late.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            # All of it fits into the pipe.
            process.stdin.write(text)
            process.stdin.close()
            for line in process.stdout:
                said.append(line.rstrip())
                heard(line.rstrip())
            status = process.wait()
        finally:
            late.cancel()
            _end(process)
    if status != 0:
        lines = "\n".join(said)
        raise HostError(f"{words[0]} failed with status {status}{f'; it said last:{chr(10)}{lines}' if lines else ''}")


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that still runs; mmdebstrap removes what it has unpacked first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
