"""What a check says: a fact, a note, or a fault."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["fact", "note", "fault"]


class Finding(NamedTuple):
    """One sentence of a check; a note or a fault has its cause and what to do.

    Attributes:
        subject: what was checked, such as data, teacher or device.
        text: the sentence.
        kind: a fact; a note, which stops nothing; or a fault, which a training refuses.
    """

    subject: str
    text: str
    kind: Kind = "fact"


def notes(subject: str, *texts: str) -> list[Finding]:
    """A note for each text that is not empty."""
    return [Finding(subject, text, "note") for text in texts if text]


def faults(subject: str, texts: Iterable[str]) -> list[Finding]:
    """A fault for each text."""
    return [Finding(subject, text, "fault") for text in texts]


def block(findings: Iterable[Finding]) -> str:
    """Facts and notes, a line each, beside their subjects."""
    lines = [("note" if f.kind == "note" else f.subject, f.text) for f in findings if f.kind != "fault"]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines)
