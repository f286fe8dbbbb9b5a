"""The plugin: hooks and fixtures, a file a topic. Only this folder imports pytest.

Loaded by every pytest run of everyone who has this package, so anything heavy is imported inside functions.
"""

from pytest_chvm.plugin.collection import pytest_collection_finish as pytest_collection_finish
from pytest_chvm.plugin.collection import pytest_collection_modifyitems as pytest_collection_modifyitems
from pytest_chvm.plugin.collection import pytest_configure_node as pytest_configure_node
from pytest_chvm.plugin.collection import pytest_generate_tests as pytest_generate_tests
from pytest_chvm.plugin.collection import pytest_ignore_collect as pytest_ignore_collect
from pytest_chvm.plugin.collection import pytest_report_collectionfinish as pytest_report_collectionfinish
from pytest_chvm.plugin.end import pytest_sessionfinish as pytest_sessionfinish
from pytest_chvm.plugin.end import pytest_terminal_summary as pytest_terminal_summary
from pytest_chvm.plugin.end import pytest_unconfigure as pytest_unconfigure
from pytest_chvm.plugin.fixtures import chvm_driver as chvm_driver
from pytest_chvm.plugin.fixtures import chvm_kernel as chvm_kernel
from pytest_chvm.plugin.fixtures import chvm_ktap as chvm_ktap
from pytest_chvm.plugin.fixtures import chvm_network as chvm_network
from pytest_chvm.plugin.fixtures import chvm_settings as chvm_settings
from pytest_chvm.plugin.fixtures import chvm_vm as chvm_vm
from pytest_chvm.plugin.fixtures import chvm_vm_factory as chvm_vm_factory
from pytest_chvm.plugin.options import pytest_addoption as pytest_addoption
from pytest_chvm.plugin.options import pytest_configure as pytest_configure
from pytest_chvm.plugin.protocol import pytest_fixture_setup as pytest_fixture_setup
from pytest_chvm.plugin.protocol import pytest_runtest_call as pytest_runtest_call
from pytest_chvm.plugin.protocol import pytest_runtest_makereport as pytest_runtest_makereport
from pytest_chvm.plugin.protocol import pytest_runtest_setup as pytest_runtest_setup
from pytest_chvm.plugin.protocol import pytest_runtest_teardown as pytest_runtest_teardown
