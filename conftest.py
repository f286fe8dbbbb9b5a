"""What all tests of the project share: pytest's own fixture for testing plugins."""

pytest_plugins = ["pytester"]
