"""What a guest says of its sshd, and what is made of it."""

import pytest

from pytest_chvm import UnsupportedError
from pytest_chvm.guest.ssh import let_in
from pytest_chvm.model import CommandResult

KEY = "ssh-ed25519 " + "A" * 68
SAID = f"port 22\npermitrootlogin without-password\npubkeyauthentication yes\npublic {KEY} root@guest\nlistens 0016\n"


def of(stdout, *, status=0, stderr=""):
    """What is known of a guest's sshd where its shell says so."""
    return let_in(lambda _script, _data: CommandResult("x", status, stdout.encode(), stderr.encode(), 0.1), KEY, "box")


def test_a_guest_says_its_port_and_its_host_keys():
    server = of(SAID.replace("port 22", "port 2222").replace("0016", "08AE"))
    assert (server.port, server.host_keys, server.listens) == (2222, (KEY,), True)
    assert not of(SAID.replace("0016", "0017")).listens


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (SAID.replace("without-password", "no"), "has 'permitrootlogin no'"),
        (SAID.replace("without-password", "forced-commands-only"), "has 'permitrootlogin forced-commands-only'"),
        (SAID.replace("cation yes", "cation no"), "has 'pubkeyauthentication no'"),
        (SAID.replace("public", "private"), r"has no host key \(ssh-keygen -A"),
        # A guest must not be able to have the host trust what it likes.
        (SAID.replace(KEY, "* ssh-ed25519 " + "A" * 68), "has no host key"),
        (SAID.replace(KEY, "@cert-authority " + KEY), "has no host key"),
        ("", "has no host key"),
    ],
)
def test_what_lets_no_root_in_is_an_error(said, why):
    with pytest.raises(UnsupportedError, match=rf"VM 'box' cannot be reached over SSH: the guest's sshd {why}.* vm\.run"):
        of(said)


@pytest.mark.parametrize(
    ("status", "why"), [(3, "there is no sshd in"), (4, "would not start: no such option"), (5, "no file of"), (77, "status 77")]
)
def test_a_failure_is_told_in_words(status, why):
    with pytest.raises(UnsupportedError, match=why):
        of("", status=status, stderr="no such option\n")
