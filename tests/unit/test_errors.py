"""The exceptions: what is caught by what."""

import inspect
import pickle
from pathlib import Path

import pytest

import pytest_chvm
from pytest_chvm import errors

HIERARCHY = {
    "InvalidConfigError": (errors.VmError, ValueError),
    "MissingRequirementError": (errors.InvalidConfigError,),
    "HostError": (errors.VmError,),
    "VmNotFoundError": (errors.HostError,),
    "StopFailedError": (errors.HostError,),
    "StateFailedError": (errors.HostError,),
    "BootFailedError": (errors.VmError,),
    "GuestError": (errors.VmError,),
    "GuestPanicError": (errors.GuestError,),
    "EarlyGuestPanicError": (errors.BootFailedError, errors.GuestPanicError),
    "GuestRebootError": (errors.GuestError,),
    "GuestShutdownError": (errors.GuestError,),
    "GuestSplatError": (errors.GuestError,),
    "GuestOopsError": (errors.GuestSplatError,),
    "HypervisorError": (errors.VmError,),
    "VmIOError": (errors.VmError, OSError),
    "UnsupportedError": (errors.VmError,),
    "GuestCommandError": (errors.GuestError,),
    "CommandTimeoutError": (errors.GuestCommandError, TimeoutError),
}


@pytest.mark.parametrize("name", HIERARCHY)
def test_error(name):
    kind = getattr(pytest_chvm, name)
    for base in HIERARCHY[name]:
        assert issubclass(kind, base)
    error = kind("what happened", vm_name="web")
    assert (str(error), error.vm_name) == ("what happened", "web")
    assert kind("what happened").vm_name is None


def test_kinds_of_errors_are_apart():
    """Who catches one kind gets nothing of another's: only a panic before the guest was ready is of two."""
    kinds = [errors.InvalidConfigError, errors.HostError, errors.BootFailedError, errors.GuestError, errors.HypervisorError]
    for name in HIERARCHY:
        of = [kind for kind in kinds if issubclass(getattr(errors, name), kind)]
        assert len(of) <= (2 if name == "EarlyGuestPanicError" else 1), name


def test_io_error_has_no_errno_of_its_own():
    assert errors.VmIOError("x").errno is None


def test_timeout_keeps_what_was_printed():
    error = errors.CommandTimeoutError("late", stdout="a", stderr="b")
    assert (error.stdout, error.stderr, str(error)) == ("a", "b", "late")


@pytest.mark.parametrize("name", HIERARCHY)
def test_error_survives_the_way_from_a_worker(name):
    error = pickle.loads(pickle.dumps(getattr(pytest_chvm, name)("what happened", vm_name="web")))
    assert (str(error), error.vm_name) == ("what happened", "web")


def test_every_error_is_public_and_in_the_readme():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.VmError)
        assert name in pytest_chvm.__all__
        assert f"`{name}`" in readme


def test_all_promised_names_are_there():
    promised = "launch VmConfig Vm Settings VmDriver CloudHypervisorDriver QemuDriver SharedDir Tap SocketPairFd Network VmHandle VmState VmStatus"
    for name in promised.split() + list(HIERARCHY):
        assert getattr(pytest_chvm, name) is not None
        assert name in pytest_chvm.__all__
    with pytest.raises(AttributeError):
        _ = pytest_chvm.none_such
