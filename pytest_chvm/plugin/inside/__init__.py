"""Tests that run in the guest: `@pytest.mark.chvm(inside=True)`.

The VM has the host's file system, and in it a pytest of its own runs the test and sends its reports, which are those of the run out
here. As on the controller of pytest-xdist, no hook around the test is called out here; those in the guest are, by the same conftest
files and plugins.

    checks.py   which tests cannot
    runs.py     out here: the hooks that run such a test in place of pytest's own
    places.py   out here: a guest, and the pytest in it
    resident.py out here: what a pytest that waits in a guest needs of this machine's files
    session.py  out here: a pytest in a guest, and what it is asked
    coverage_home.py  what coverage.py has measured in a guest
    wire.py     reports and warnings, as they come
    program.py  in the guest: the program that is started there
    remembered.py  in the guest: what pytest need not find out of its plugins each time
    guest.py    in the guest: the plugin that is asked for tests and answers with reports
"""
