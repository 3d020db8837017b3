"""Work as a count of function calls, which is the same on every machine and under every load, where seconds are not."""

import cProfile
from collections.abc import Callable
from typing import Any


def counted(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and the number of calls within it, of Python's functions and of built-in ones."""
    with cProfile.Profile() as profile:
        result = function()
    return result, sum(entry.callcount for entry in profile.getstats())
