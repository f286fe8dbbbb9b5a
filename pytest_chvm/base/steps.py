"""Steps of an end, all of which are taken: one that fails keeps none of the others from being taken, nor does an interrupt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Step = Callable[[], list[str] | None]


def take_all(steps: Sequence[Step]) -> list[str]:
    """Take each step, in order, whatever becomes of the others; returns what went wrong, in words.

    A step says what it could not do by what it returns, or by an `Exception`. Any other exception (KeyboardInterrupt, SystemExit,
    what pytest-timeout raises) is raised after the last step.
    """
    if not steps:
        return []
    if len(steps) == 1:
        try:
            return list(steps[0]() or ())
        except Exception as error:
            return [str(error) or type(error).__name__]
    failures = []
    # By halves: a loop could be interrupted between two steps, and one call within another for each would be too deep.
    middle = len(steps) // 2
    try:
        failures += take_all(steps[:middle])
    finally:
        failures += take_all(steps[middle:])
    return failures
