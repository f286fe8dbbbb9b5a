"""What a guest may send for the files that are got from it: nothing is written outside the destination."""

import io
import tarfile

import pytest

from pytest_chvm import VmIOError
from pytest_chvm.guest import fetch
from pytest_chvm.model import CommandResult

LISTED = b"d\n//41ed 60 0 0 .\n//81a4 1 8 0 ./file\n"


def archive(**member):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(member.pop("name"))
        for key, value in member.items():
            setattr(info, key, value)
        tar.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize(
    ("listed", "sent"),
    [
        (LISTED.replace(b"./file", b"./../file"), archive(name="file")),
        (LISTED.replace(b"./file", b"/etc/file"), archive(name="file")),
        (LISTED.replace(b"81a4", b"zzzz"), archive(name="file")),
        (LISTED, archive(name="../file")),
        (LISTED, archive(name="other")),
        (LISTED, archive(name="file", type=tarfile.SYMTYPE, linkname="/etc")),
        (LISTED, archive(name="file", type=tarfile.LNKTYPE, linkname="../../x")),
        (LISTED, archive(name="file", type=tarfile.CHRTYPE)),
        (LISTED, b"no archive"),
        (LISTED.replace(b"1 8", b"1 0"), archive(name="file", type=tarfile.SYMTYPE, linkname="/etc")),
    ],
)
def test_nothing_of_a_trick_is_unpacked(tmp_path, listed, sent):
    answers = iter([listed, sent])
    with pytest.raises(VmIOError, match="cannot be unpacked"):
        fetch.get(lambda script, _data: CommandResult(script, 0, next(answers), b"", 0.0), "/tree", tmp_path / "got")
    assert list(tmp_path.iterdir()) == []
