"""The states of the global random generators: of Python, NumPy and torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def generator_states() -> tuple[Any, ...]:
    """The states of the three generators, as values that compare equal when nothing was drawn or seeded between."""
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[0], numpy[1].tolist(), numpy[2:], torch.random.get_rng_state().tolist()


@contextmanager
def generators_seeded(seed: int) -> Iterator[None]:
    """Inside, the three generators are seeded; afterwards they have their states of before again."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
