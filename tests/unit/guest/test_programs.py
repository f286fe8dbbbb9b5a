"""The programs for the guest are what their sources say."""

import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import pytest_chvm.guest
from pytest_chvm.guest import carry, elf, enter, renew, signals, stream
from pytest_chvm.model import architecture

SOURCES = Path(pytest_chvm.guest.__file__).parent


@pytest.mark.parametrize("program", [carry, enter, renew, signals, stream], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize(("arch", "place", "flags"), [("x86_64", ".", ["--64"]), ("aarch64", "aarch64", [])])
def test_the_machine_code_is_the_assembled_source(program, arch, place, flags, tmp_path):
    prefix = "" if platform.machine() == arch else f"{arch}-linux-gnu-"
    if not shutil.which(f"{prefix}as") or not shutil.which(f"{prefix}objcopy"):
        pytest.skip(f"binutils for {arch} are missing")
    source = SOURCES / place / f"{program.__name__.rpartition('.')[2]}.S"
    subprocess.run([f"{prefix}as", *flags, "-o", tmp_path / "program.o", source], check=True)
    subprocess.run(
        [f"{prefix}objcopy", "-O", "binary", "-j", ".text", tmp_path / "program.o", tmp_path / "program.bin"], check=True
    )
    assert (tmp_path / "program.bin").read_bytes() == getattr(program, arch.upper())


@pytest.mark.skipif(architecture(None).name not in elf.WRITTEN_FOR, reason="the program is not written for this machine")
def test_only_who_knows_the_token_is_carried(tmp_path):
    program = tmp_path / "carry"
    program.write_bytes(carry.program(architecture(None)))
    program.chmod(0o755)
    assert subprocess.run([program], stdin=subprocess.DEVNULL).returncode == 1
    token = os.urandom(carry.TOKEN_SIZE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert subprocess.run([program], input=carry.tcp_message(port, token)).returncode == carry.REFUSED
    words = [program, "/bin/sh", "-c", "head -c 3; echo there; cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listens:
        listens.stdin.write(carry.tcp_message(port, token))
        listens.stdin.close()
        assert listens.stdout.readline() == b"ready\n"
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(bytes(carry.TOKEN_SIZE))
            assert stranger.recv(100) == b""
        with socket.create_connection(("127.0.0.1", port)) as known:
            known.sendall(token)
            assert known.recv(carry.TOKEN_SIZE, socket.MSG_WAITALL) == token
            known.sendall(b"hi there")
            known.shutdown(socket.SHUT_WR)
            assert known.recv(100, socket.MSG_WAITALL) == b"hi there\nthere"[:3] + b"there\nthere"
        assert listens.wait(10) == 0
