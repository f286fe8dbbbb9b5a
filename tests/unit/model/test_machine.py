"""Processors, and what else of a machine only some tests ask for."""

import pytest

from pytest_chvm import Cpus, InvalidConfigError, VmConfig


def test_processors_are_a_number_or_have_a_topology():
    assert (VmConfig(cpus=4).cpus, VmConfig(cpus=4).processors) == (4, 4)
    config = VmConfig(cpus=Cpus(sockets=2, cores=3, threads=2, numa_nodes=2))
    assert config.processors == 12
    assert [list(config.topology.of_node(node)) for node in range(2)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cpus(sockets=0), "expected sockets to be a whole number of 1 or more"),
        (lambda: Cpus(threads=True), "expected threads to be a whole number"),
        (lambda: Cpus(cores=3, numa_nodes=2), "as many NUMA nodes as its 3 processors can be divided by"),
        (lambda: VmConfig(cpus="4"), r"cpus='4', expected a whole number of 1 or more, or Cpus"),
        (lambda: VmConfig(cpus=Cpus(cores=2), max_cpus=4), "max_cpus, and cpus with a topology"),
        (
            lambda: VmConfig(cpus=Cpus(cores=3, numa_nodes=3)),
            "memory_mb=256, expected one that 3 NUMA nodes can have equal parts of",
        ),
        (lambda: VmConfig(cpu="max avx"), "expected a model and its flags"),
        (lambda: VmConfig(cpu="max", cpu_model="max"), "which are the same: leave cpu_model out"),
        (lambda: VmConfig(hugepages=1), "hugepages=1, expected True or False"),
        (lambda: VmConfig(gdb="later"), "gdb='later', expected True, False or 'wait'"),
        (lambda: VmConfig(vmm_args="-device edu"), "expected a list of words"),
        (lambda: VmConfig(vmm_args=["-device", 3]), "vmm_args has 3"),
        (lambda: VmConfig(vmm_args=["a\0b"]), "without NUL"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(make, message):
    with pytest.raises(InvalidConfigError, match=message):
        make()


def test_a_processor_s_earlier_name_means_the_same():
    assert VmConfig(cpu_model="EPYC,+svm") == VmConfig(cpu="EPYC,+svm")
    assert VmConfig(cpu_model="EPYC").replace(cpu="max").cpu == "max"
