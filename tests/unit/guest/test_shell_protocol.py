"""The host's side of the console shell against a peer that may be broken, slow or hostile."""

import contextlib
import os
import re
import secrets
import socket
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_chvm import CommandTimeoutError, VmIOError
from pytest_chvm.base.deadline import Deadline
from pytest_chvm.base.text import shown_outputs
from pytest_chvm.guest.channels import Line
from pytest_chvm.guest.channels.console import shell
from pytest_chvm.guest.channels.console.shell import GuestShell
from pytest_chvm.guest.renew import AWAY
from tests.conftest import AT_ONCE_S

OUTPUT_PIECE = 1 << 15

# In a response: wait until the host has asked for the next piece.
MORE = object()
MESSAGE = b"the time, and\na seed"


class Peer:
    """The guest's end of a console. `respond(token, script)` yields what a command's answer is, piece by piece."""

    def __init__(self, respond, hello=None):
        self.respond = respond
        self.hello = hello or (lambda token: b"\n%s loop\n" % token)
        self.ours, self.theirs = socket.socketpair()
        self.scripts = []
        self.drops = 0
        self.lines = self.theirs.makefile("rb")
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        try:
            while line := self.lines.readline():
                words = line.split()
                self.drops += words[:1] == [b"drop"]
                if words[:1] == [b"eval"]:
                    self.theirs.sendall(self.hello(words[1]))
                elif words[:1] == [b"turn"]:
                    self.theirs.sendall(b"\n%s turn\n" % words[1])
                elif words[:1] == [b"input"]:
                    self.scripts.append(self.lines.read(int(words[2])))
                    self.theirs.sendall(b"\n%s input\n" % words[1])
                elif words[1:] == [b"renew"]:
                    for piece in self.respond(words[0]):
                        self.theirs.sendall(piece)
                    self.scripts.append(self.lines.read(len(MESSAGE)))
                elif words[:1] == [b"do"]:
                    self.scripts.append(line)
                    for piece in self.respond(words[-1]):
                        self.theirs.sendall(piece)
                elif line == AWAY:
                    self.scripts.append(line)
                elif words[:1] == [b"run"]:
                    self.scripts.append(line)
                    for piece in self.respond(words[1]):
                        if piece is MORE:
                            assert self.lines.readline() == b"more\n"
                        else:
                            self.theirs.sendall(piece)
        except OSError:
            # The test is over.
            return

    def close(self):
        # Of both ends, since the test may have shut one.
        self.ours.close()
        with contextlib.suppress(OSError):
            self.theirs.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.lines.close()
        self.theirs.close()


def answer(token, stdout=b"", stderr=b"", status=b"0"):
    return b"\n%s out %d\n%s\n%s err %d\n%s\n%s end %s\n" % (token, len(stdout), stdout, token, len(stderr), stderr, token, status)


@pytest.fixture
def console():
    peers = []

    def make(respond, hello=None, check_alive=lambda: None, **more):
        peer = Peer(respond, hello)
        guest = GuestShell(Line("web", lambda: os.dup(peer.ours.fileno()), list, check_alive, check_alive, OUTPUT_PIECE, **more))
        guest.drops = lambda: peer.drops
        guest.scripts = lambda: (peer.ours.shutdown(socket.SHUT_WR), peer.thread.join(5), peer.scripts)[-1]
        guest.end = lambda: peer.theirs.shutdown(socket.SHUT_RDWR)
        peers.append((guest, peer))
        return guest

    yield make
    for guest, peer in peers:
        guest.close()
        peer.close()


def run(guest, command="true", timeout=5, input=None):
    return guest.run(command, timeout=timeout, input=input)


def test_a_clone_is_told_what_it_asks_for_when_it_asks(console):
    asked = threading.Event()

    def respond(token):
        # Not its own.
        yield b"\n%s renew\n" % secrets.token_hex(16).encode()
        yield b"\n%s ren" % token
        asked.set()
        yield b"ew\n"

    def message():
        assert asked.is_set()
        return MESSAGE

    guest = console(respond)
    guest.renew(message, "configure", Deadline.after(5))
    guest.close()
    assert guest.scripts() == [MESSAGE, b"do - configure\n"]


def test_a_clone_that_never_asks_is_given_up_in_time(console):
    guest = console(lambda token: [b"\n%s no\n" % token])
    with pytest.raises(VmIOError, match=r"did not begin to make it a machine of its own within 0.2 s"):
        guest.renew(lambda: MESSAGE, "configure", Deadline.after(0.2))


def test_a_guest_that_was_saved_is_told_to_go_on_whatever_became_of_the_save(console):
    guest = console(lambda token: [b"\n%s waits\n" % token])
    with pytest.raises(ZeroDivisionError), guest.waiting(lambda token: f"wait {token}", 5):
        raise ZeroDivisionError
    guest.close()
    line, away = guest.scripts()
    assert (line[:10], away) == (b"do - wait ", AWAY)


def test_a_guest_that_does_not_wait_cannot_be_saved(console):
    guest = console(lambda token: [b"\n%s no\n" % token])
    with (
        pytest.raises(VmIOError, match=r"did not begin to wait for a renewal within 0.2 s"),
        guest.waiting(lambda token: token, 0.2),
    ):
        pytest.fail("it was saved")
    guest.close()
    # Should it begin to wait later.
    assert guest.scripts()[-1] == AWAY


OUTPUTS = st.binary(max_size=300) | st.lists(
    st.sampled_from([b"\n", b" out 5\n", b" err 0\n", b" end 0\n", b"0" * 32, b"loop", b"input", b"\r", b"more\n"]), max_size=12
).map(b"".join)


@given(OUTPUTS, OUTPUTS, st.integers(0, 255), st.lists(st.integers(0, 700), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_outputs_arrive_as_they_were_however_they_are_cut(stdout, stderr, status, places):
    def respond(token):
        whole = answer(token, stdout, stderr, b"%d" % status)
        cuts = sorted({min(place, len(whole)) for place in places})
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            yield whole[start:end]

    peer = Peer(respond)
    guest = GuestShell(Line("web", lambda: os.dup(peer.ours.fileno()), list, lambda: None, lambda: None, OUTPUT_PIECE))
    try:
        done = run(guest)
        assert (done.stdout_bytes, done.stderr_bytes, done.returncode) == (stdout, stderr, status)
    finally:
        guest.close()
        peer.close()


def test_outputs_may_hold_answers_to_other_tokens(console):
    other = secrets.token_hex(16).encode()
    fake = answer(other, b"fake", b"fake", b"9")
    guest = console(lambda token: [answer(token, fake, fake, b"7")])
    done = run(guest)
    assert (done.stdout_bytes, done.stderr_bytes, done.returncode) == (fake, fake, 7)


def test_answer_to_an_earlier_token_is_not_taken_for_this_ones(console):
    tokens = []

    def respond(token):
        tokens.append(token)
        if len(tokens) == 1:
            yield answer(token, b"first")
        else:
            yield answer(tokens[0], b"stale", b"", b"9") + answer(token, b"second")

    guest = console(respond)
    assert run(guest).stdout == "first"
    assert run(guest).stdout == "second"


def test_noise_between_answers_is_dropped(console):
    guest = console(lambda token: [b"[  1.0] kernel says\n" * 100, answer(token, b"x"), b"noise\n" * 10])
    assert [run(guest).stdout for _time in range(3)] == ["x"] * 3


def test_after_an_answer_that_made_no_sense_the_guest_is_told_to_forget_it(console):
    answers = iter([b"nonsense", b"0", b"0"])
    guest = console(lambda token: [answer(token, status=next(answers))])
    with pytest.raises(VmIOError):
        run(guest)
    before = guest.drops()
    assert run(guest).returncode == 0
    assert guest.drops() == before + 1
    # Once, and not with every command.
    run(guest)
    assert guest.drops() == before + 1


@pytest.mark.parametrize("status", [b"", b"-1", b"1234", b"zero", b"0 0", b"\xff"])
def test_status_that_is_none_is_an_error(console, status):
    guest = console(lambda token: [answer(token, status=status)])
    with pytest.raises(VmIOError, match="as an exit status"):
        run(guest)


def test_answer_that_is_too_large_is_an_error_before_it_is_read(console, monkeypatch):
    guest = console(lambda token: [b"\n%s out 999999999999\n" % token])
    at_once = Deadline.after(AT_ONCE_S)
    with pytest.raises(VmIOError, match=r"953674 MiB, more than 256 MiB; write large results to a file in a shared dir"):
        run(guest, timeout=2 * AT_ONCE_S)
    assert not at_once.expired


def test_console_that_closes_is_an_error_at_once(console):
    guest = console(lambda token: [answer(token)[:20]])
    timer = threading.Timer(0.3, guest.end)
    timer.start()
    with pytest.raises(VmIOError, match="closed the guest's console"):
        run(guest, timeout=30)
    timer.join()


def test_what_has_become_of_the_guest_is_told_first(console):
    class GuestDiedError(Exception):
        pass

    def check_alive():
        raise GuestDiedError

    guest = console(lambda token: [], check_alive=check_alive)
    timer = threading.Timer(0.3, guest.end)
    timer.start()
    with pytest.raises(GuestDiedError):
        run(guest, timeout=30)
    timer.join()


def test_peer_that_never_answers_is_a_timeout(console, monkeypatch):
    monkeypatch.setattr(shell, "KILL_TIMEOUT_S", 0.2)
    guest = console(lambda token: [])
    started, at_once = time.monotonic(), Deadline.after(AT_ONCE_S)
    with pytest.raises(
        CommandTimeoutError, match=r"'sleep 9' did not end within 0.3 s; the guest did not answer the order to kill it either"
    ):
        run(guest, "sleep 9", timeout=0.3)
    assert time.monotonic() - started > 0.4
    assert not at_once.expired


def test_peer_without_a_shell_is_an_error_that_says_what_it_needs(console):
    guest = console(lambda token: [], hello=lambda token: b"login: ", connect_timeout_s=0.3)
    with pytest.raises(VmIOError, match=r"no shell answers on the guest's virtio console \(hvc0\).*needs a service that runs"):
        run(guest, timeout=30)


def test_echo_of_the_greeting_is_not_taken_for_an_answer(console):
    """A terminal that echoes sends back what it was typed, and no shell is behind it."""
    guest = console(
        lambda token: [],
        hello=lambda token: b"eval %s 2>/dev/null; echo; echo '%s''%s' sh\r\n" % (token, token[:16], token[16:]),
        connect_timeout_s=0.3,
    )
    with pytest.raises(VmIOError, match="no shell answers"):
        run(guest, timeout=30)


def test_timeout_while_the_output_is_sent_keeps_what_came(console, monkeypatch):
    monkeypatch.setattr(shell, "KILL_TIMEOUT_S", 0.2)
    guest = console(lambda token: [b"\n%s out 100000\n" % token + b"x" * OUTPUT_PIECE])
    with pytest.raises(CommandTimeoutError, match="not all of its output came in time") as caught:
        run(guest, timeout=0.3)
    assert caught.value.stdout == "x" * OUTPUT_PIECE


def test_after_a_timeout_the_next_answer_is_the_next_commands(console, monkeypatch):
    monkeypatch.setattr(shell, "KILL_TIMEOUT_S", 0.2)
    late = []

    def respond(token):
        if not late:
            late.append(token)
            return []
        return [answer(late[0], b"late"), answer(token, b"in time")]

    guest = console(respond)
    with pytest.raises(CommandTimeoutError):
        run(guest, timeout=0.3)
    assert run(guest).stdout == "in time"


def test_large_answer_is_read_in_linear_time(console):
    data = os.urandom(1 << 20) * 16

    def respond(token):
        for start in range(0, len(data), OUTPUT_PIECE):
            yield b"\n%s out %d\n" % (token, len(data) - start)
            yield data[start : start + OUTPUT_PIECE]
            yield MORE
        yield b"\n%s err 0\n\n%s end 0\n" % (token, token)

    guest = console(respond)
    started = time.process_time()
    assert run(guest, timeout=60).stdout_bytes == data
    assert time.process_time() - started < 5


def test_flood_without_an_answer_takes_bounded_memory(console, monkeypatch):
    monkeypatch.setattr(shell, "KILL_TIMEOUT_S", 0.2)

    def respond(token):
        for _time in range(200):
            yield b"x" * 100_000

    guest = console(respond)
    with pytest.raises(CommandTimeoutError):
        run(guest, timeout=2)
    assert len(guest._pending) < 1 << 20


@given(st.binary(max_size=200).filter(lambda raw: b"\0" not in raw))
@settings(max_examples=200)
def test_command_goes_as_one_line_that_printf_restores(raw):
    escaped = shell._escaped(raw)
    assert b"\n" not in escaped
    assert escaped.strip() == escaped
    assert re.sub(rb"\\0([0-7]{3})", lambda match: bytes([int(match[1], 8)]), escaped) == raw


def test_input_goes_in_pieces_that_are_acknowledged(console):
    guest = console(lambda token: [answer(token)])
    data = os.urandom(3 * shell.INPUT_PIECE + 5)
    run(guest, input=data)


def test_outputs_in_messages_are_cleaned_and_bounded():
    text = shown_outputs("x" * 100_000 + "\x1b[31mred", "\udcff\x07")
    assert len(text) < 10_000
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "last 4000 of" in text
    text.encode()
