"""The exceptions: what is caught by what."""

import pickle

import pytest

import pytest_chvm
from pytest_chvm import errors

HIERARCHY = {
    "InvalidConfigError": (errors.VmError, ValueError),
    "MissingRequirementError": (errors.InvalidConfigError,),
    "BootFailedError": (errors.VmError,),
    "GuestPanicError": (errors.BootFailedError,),
    "VmNotFoundError": (errors.VmError,),
    "StopFailedError": (errors.VmError,),
    "StateFailedError": (errors.VmError,),
    "HypervisorError": (errors.VmError,),
    "VmIOError": (errors.VmError, OSError),
    "UnsupportedError": (errors.VmError,),
    "GuestCommandError": (errors.VmError,),
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


def test_io_error_has_no_errno_of_its_own():
    assert errors.VmIOError("x").errno is None


def test_timeout_keeps_what_was_printed():
    error = errors.CommandTimeoutError("late", stdout="a", stderr="b")
    assert (error.stdout, error.stderr, str(error)) == ("a", "b", "late")


@pytest.mark.parametrize("name", HIERARCHY)
def test_error_survives_the_way_from_a_worker(name):
    error = pickle.loads(pickle.dumps(getattr(pytest_chvm, name)("what happened", vm_name="web")))
    assert (str(error), error.vm_name) == ("what happened", "web")


def test_all_promised_names_are_there():
    promised = "launch VmConfig Vm Settings VmDriver CloudHypervisorDriver QemuDriver SharedDir Tap SocketPairFd Network VmHandle VmState VmStatus"
    for name in promised.split() + list(HIERARCHY):
        assert getattr(pytest_chvm, name) is not None
        assert name in pytest_chvm.__all__
    with pytest.raises(AttributeError):
        _ = pytest_chvm.none_such
