"""Situations from other people's networks, data and spaces, one per file: `check(folder)` asserts the right behaviour.

`ISSUE` is the number of the issue that mends the fault, where it is not mended yet.
"""

from collections.abc import Callable
from typing import Any


def outcome(call: Callable[[], Any], *words: str, raw: type[Exception] | None = None) -> Any:
    """What the call returns, or None where it raises a ValueError: a refusal, which must contain all words.

    An error of the type `raw` is the library's own and a failed assertion; any other error is an error of the case.
    """
    try:
        return call()
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"the message lacks {missing}: {error}"
        return None
    except Exception as error:
        assert raw is None or not isinstance(error, raw), f"{type(error).__name__} instead of a message: {error}"
        raise
