"""Generators derived from names and numbers: step i draws from (seed, i), the same on every machine."""

import hashlib
import random
from typing import Any

import torch


def seed_of(*keys: int | str) -> int:
    """A 63-bit seed from the keys; equal keys give equal seeds, other keys unrelated ones."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def python_rng(*keys: int | str) -> random.Random:
    """A generator of the standard library for these keys."""
    return random.Random(seed_of(*keys))


def torch_rng(*keys: int | str) -> torch.Generator:
    """A torch generator on the CPU for these keys."""
    return torch.Generator().manual_seed(seed_of(*keys))


def initialised(make: Any, seed: int) -> Any:
    """The result of `make()` with torch's global generator seeded from `seed`; its state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return make()
