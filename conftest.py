"""What all tests of the project share: pytest's own fixture for testing plugins, runs of pytest to look at, and the lab."""

pytest_plugins = ["pytester", "tests.runs", "tests.relay"]
