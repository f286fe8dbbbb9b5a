"""A test that does nothing, run before others so that all is imported that a run of pytest needs."""


def test_nothing() -> None:
    """Do nothing."""
