"""What all tests of the project share: pytest's own fixture for testing plugins, and runs of pytest that can be looked at."""

pytest_plugins = ["pytester", "tests.runs"]
