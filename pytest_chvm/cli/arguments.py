"""The options' converters as argparse has them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """Return a converter of the options' as one of argparse's, which shows the text of its own error only."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return converted
