"""What a latency is measured on: a runtime, its threads, and the batch."""

import re
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from kdnas.specs import nearest

Runtime = Literal["eager", "compile", "onnxruntime", "executorch"]
_MOST = {"threads": 1024, "batch": 65536}


@final
@dataclass(frozen=True)
class Target:
    """A runtime with its settings.

    Attributes:
        runtime: `eager` (PyTorch's layers as they are), `compile` (`torch.compile`), `onnxruntime` (on the CPU, in
            float32) or `executorch` (XNNPACK on the CPU, in float32).
        threads: that the runtime may use; 0 for as many as PyTorch uses here.
        batch: images per call; a latency is that of the whole call.
        table: digest of a table that was measured on another device; empty to measure on this one.

    Raises:
        ValueError: another runtime, or a number out of range.

    Example:
        >>> Target.parse("onnxruntime,threads=2")
        Target(runtime='onnxruntime', threads=2, batch=1, table='')
        >>> str(Target("compile", batch=8))
        'compile,batch=8'
    """

    runtime: Runtime = "eager"
    threads: int = 0
    batch: int = 1
    table: str = ""

    def __post_init__(self) -> None:
        known = get_args(Runtime)
        if self.runtime not in known:
            raise ValueError(
                f"the runtime of a latency must be {', '.join(known[:-1])} or {known[-1]}, got {self.runtime!r}."
                f"{nearest(str(self.runtime), known)}"
            )
        for name, least in (("threads", 0), ("batch", 1)):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST[name]:
                raise ValueError(f"`{name}` of a target must be from {least} to {_MOST[name]}, got {value!r}.")
        if not re.fullmatch("([0-9a-f]{16})?", self.table):
            raise ValueError(f"`table` of a target must be a digest of 16 hexadecimal digits, got {self.table!r}.")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """The target of a text such as `onnxruntime,threads=2,batch=8`.

        Raises:
            ValueError: another form, or a value out of range.
        """
        runtime, *options = [part.strip() for part in text.split(",")]
        values: dict[str, Any] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in ("threads", "batch", "table") or name in values:
                raise ValueError(
                    "a target has `threads` and `batch` once each, such as onnxruntime,threads=2,batch=1, got "
                    f"{option!r}. Write another bound by itself: --budget macs=20M."
                )
            is_number = name != "table" and re.fullmatch("[0-9]{1,9}", value) is not None
            values[name] = int(value) if is_number else value
        return cls(runtime, **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        options = [f"{name}={getattr(self, name)}" for name in ("threads", "batch", "table")]
        defaults = [f"{name}={getattr(type(self), name)}" for name in ("threads", "batch", "table")]
        return ",".join([self.runtime, *(o for o, default in zip(options, defaults, strict=True) if o != default)])

    @property
    def words(self) -> str:
        """The target as people read it."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "PyTorch's number of threads"
        elsewhere = f", as measured in table {self.table}" if self.table else ""
        return f"{self.runtime} ({threads}, batch {self.batch}{elsewhere})"
