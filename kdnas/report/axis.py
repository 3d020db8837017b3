"""The axis of a chart: values to pixels, with round ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

from kdnas.report.markup import prefix_of

_LOG_FROM = 20


@final
@dataclass(frozen=True)
class Axis:
    """Values to pixels.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixels.
        end: pixels.
        log: logarithmic.
        unit: `%` for fractions that are written as percentages, otherwise empty.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    unit: str = ""

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, end: float, *, unit: str = "", may_be_log: bool = True
    ) -> Self:
        """The axis that covers all values with a margin.

        Args:
            values: to cover.
            start: pixels of its low end.
            end: pixels of its high end.
            unit: as the attribute.
            may_be_log: make it logarithmic where the largest value is more than 20 times the smallest, a positive one.
        """
        low, high = min(values, default=0.0), max(values, default=1.0)
        if may_be_log and low > 0 and high / low > _LOG_FROM:
            margin = (high / low) ** 0.06
            return cls(low / margin, high * margin, start, end, True, unit)
        # Equal values get an axis too; a span in the last digits of a float has no ticks.
        margin = 0.06 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else (abs(high) * 0.05 or 1.0)
        low, high = low - margin, high + margin
        return cls(low, high, start, end, False, unit)

    def place(self, value: float) -> float:
        """Pixels of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values inside the axis, with their labels."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1,)):
                ticks = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(ticks) <= 8:
                    break
            ticks = ticks[:: math.ceil(len(ticks) / 8)]
            return [(t, f"{100 * t:g} %" if self.unit else _short(t)) for t in ticks]
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        ticks = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        if self.unit:
            return [(t, f"{100 * t:.{_digits(100 * step)}f} %") for t in ticks]
        most = max(abs(self.low), abs(self.high))
        size, prefix = prefix_of(most) if most >= 1e4 else (1.0, "")
        if power < 1e-6 or size >= 1e12:
            return [(t, f"{t:.3g}") for t in ticks]
        return [(t, f"{t / size:,.{_digits(step / size)}f}{prefix}" if t else "0") for t in ticks]


def _short(value: float) -> str:
    size, prefix = prefix_of(value * 1.0005)
    return f"{value / size:g}{prefix}"


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))
