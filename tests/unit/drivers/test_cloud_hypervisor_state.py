"""What is changed of a state that Cloud Hypervisor has saved."""

import json

import pytest

from pytest_chvm.drivers.cloud_hypervisor.state import STATE, STEP_NS, stop_clock

# struct kvm_clock_data: the clock, flags and padding, the host's time, its TSC.
TIME_NS = 22_669_561_137


def clock(time_ns, flags):
    parts = [time_ns.to_bytes(8, "little"), flags.to_bytes(4, "little"), bytes(4), bytes(range(16)), bytes(16)]
    return list(b"".join(parts))


def saved(machine):
    return json.dumps({"snapshots": {"one": 1}, "snapshot_data": {"state": json.dumps(machine)}})


def test_a_clones_clock_does_not_count_the_time_since_it_was_saved(tmp_path):
    (tmp_path / STATE).write_text(saved({"clock": {"Kvm": clock(TIME_NS, 14)}, "other": [1, 2]}))
    stop_clock(tmp_path)
    assert (tmp_path / STATE).read_text() == saved({"clock": {"Kvm": clock(TIME_NS + STEP_NS, 0)}, "other": [1, 2]})


@pytest.mark.parametrize("text", ["", "{}", "[]", saved({"clock": None}), saved([]), '{"snapshot_data": {"state": "{"}}'])
def test_a_state_of_another_form_is_left_as_it_is(tmp_path, text):
    (tmp_path / STATE).write_text(text)
    stop_clock(tmp_path)
    assert (tmp_path / STATE).read_text() == text
