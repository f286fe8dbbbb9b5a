"""What README and docs say is so: the options are those there are, the links lead somewhere, the examples print what they show."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from pytest_chvm.settings import OPTIONS, Option
from tests.runs import LIGHT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def options_table() -> str:
    """Return the table of README's section on options."""
    rows = ["| option | what it is |", "| --- | --- |", *(f"| `{_spelling(option)}` | {option.help} |" for option in OPTIONS)]
    return "\n".join(rows)


def _spelling(option: Option) -> str:
    # A bar would end the table's cell.
    return f"{option.flag}={'/'.join(option.choices) or option.metavar}"


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_readme_lists_the_options_there_are():
    listed = re.search(r"<!-- options: .*? -->\n(.*?)\n<!-- end of options -->", README, re.S)

    assert listed
    assert listed[1] == options_table(), f"put this there:\n{options_table()}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_names_every_public_fixture():
    from pytest_chvm.plugin import fixtures as plugin

    fixtures = {name for name in re.findall(r"^def (chvm_\w+)", Path(plugin.__file__).read_text(), re.M) if name != "chvm_kernel"}

    assert {name for name in fixtures if f"| `{name}" not in README} == set()


@pytest.mark.slow
def test_the_first_tests_of_readme_pass_and_print_what_it_shows(pytester, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # Only what README's reader has installed.
    words = [word for name in ("xdist", "hypothesispytest", "randomly") for word in ("-p", f"no:{name}")]
    pytester.makepyfile(test_first=code_blocks("python")[0])

    result = pytester.runpytest_subprocess("-v", *words)

    result.assert_outcomes(passed=1)
    shown = [line for line in code_blocks("text")[0].splitlines() if line.startswith(("test_first.py", "chvm: network", "collect"))]
    assert shown
    for line in shown:
        pattern = re.sub(r"network .*", "network *", line.replace("[", "[[]"))
        assert any(fnmatch.fnmatch(printed, pattern) for printed in result.outlines), line


@pytest.mark.slow
def test_the_other_examples_of_readme_work(pytester):
    snapshot, host_root, marker, needs, inside, ktap, modules, machines, without_pytest = code_blocks("python")[1:]
    indented = without_pytest.replace("\n", "\n    ").rstrip()
    # Whatever kernel this host has: the test runs or is skipped.
    needs += "def test_of_a_kernel(chvm_vm):\n    chvm_vm()\n"
    ktap = ktap.replace(
        '"/src/linux/tools/testing/selftests/timers/posix_timers"', r'"printf", "TAP version 13\n1..1\nok 1 timers\n"'
    )
    tests = "\n\n".join(
        [snapshot, host_root, marker, needs, inside, ktap, modules, machines, f"def test_without_pytest():\n    {indented}\n"]
    )
    pytester.makepyfile(f"import os\nimport subprocess\n\nimport pytest\n\n\n{tests}")

    outcomes = pytester.runpytest_subprocess(*LIGHT).parseoutcomes()

    assert outcomes["passed"] + outcomes.get("skipped", 0) == 10
    assert not outcomes.keys() & {"failed", "errors", "error"}
