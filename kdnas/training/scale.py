"""The scale of losses in half precision."""

from dataclasses import dataclass
from typing import final

_GROWS_AFTER = 2000  # steps


@final
@dataclass
class LossScale:
    """A power of two by which losses are multiplied before the backward pass, and gradients divided after it.

    Small gradients are 0 in float16 (below 6e-8) without it, and large ones infinite (above 65,504) with too large a
    one. A step whose gradient is not finite is left out, and the scale halved; after 2,000 steps in turn that were
    taken it is doubled.

    Attributes:
        value: the scale.
        taken: steps in turn since it was changed.

    Example:
        >>> scale = LossScale()
        >>> scale.left_out()
        >>> scale.value
        32768.0

    Reference: Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.2.
    """

    value: float = 2.0**16
    taken: int = 0

    def step_taken(self) -> None:
        """A step's gradient was finite."""
        self.taken += 1
        if self.taken == _GROWS_AFTER:
            self.value, self.taken = 2 * self.value, 0

    def left_out(self) -> None:
        """A step's gradient was not finite."""
        self.value, self.taken = self.value / 2, 0
