"""Which of a teacher's classes are the data's."""

from collections.abc import Sequence

from kdnas.specs import nearest

_ALL = (
    "Fine-tune it on this data: kdnas fit --network NETWORK --data DATA --out FOLDER; then --teacher FOLDER. If these "
    "are features and no classes, distil them by --unlabelled."
)


def columns_of(
    teacher: str, count: int, names: Sequence[str] | None, wanted: Sequence[str], classes: int, select: str = ""
) -> tuple[int, ...]:
    """The teacher's class of each of the data's; empty where they are the same ones, or the teacher has no names.

    A name is compared in lower case by its letters and digits; the commas in a teacher's name part synonyms.

    Args:
        teacher: its name, for messages.
        count: number of the teacher's logits.
        names: its class names; None if unknown.
        wanted: the data's class names; empty if unknown.
        classes: number of the data's classes.
        select: the teacher's class of each of the data's, in their order, by number or name, joined by `+`; empty to go
            by the names.

    Raises:
        ValueError: a class that the teacher does not have or that is named twice, another number of classes, or too few
            names that agree where the numbers of classes differ.

    Example:
        >>> columns_of("zoo", 3, ["dog", "tabby, cat", "fox"], ["cat", "dog"], 2)
        (1, 0)
        >>> columns_of("zoo", 3, None, ["cat", "dog"], 2, "2+0")
        (2, 0)
    """
    if select:
        return _selected(teacher, count, names or (), classes, select.split("+"))
    if names is not None and same_names(names, wanted):
        return ()
    places = [_places(names or (), name) for name in wanted]
    if wanted and all(len(each) == 1 for each in places) and len(set(map(tuple, places))) == len(places):
        return tuple(each[0] for each in places)
    if count == classes:
        return ()
    if count == 1 and classes == 2:
        raise ValueError(
            f"the teacher {teacher} has 1 output, the data 2 classes. Return two logits: torch.cat([0 * x, x], 1)."
        )
    absent = [name for name, each in zip(wanted, places, strict=True) if len(each) != 1]
    why = f"; its names include no class {absent[0]!r}" if names and absent else ""
    fix = f"Name its class of each of the data's: {teacher},select=NUMBER+NUMBER+... " if count > classes else ""
    raise ValueError(f"the teacher {teacher} has {count} classes, the data {classes}{why}. {fix}{_ALL}")


def same_names(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether two lists of class names agree in lower case, by their letters and digits."""
    return [_folded(name) for name in names] == [_folded(name) for name in wanted]


def _selected(teacher: str, count: int, names: Sequence[str], classes: int, chosen: Sequence[str]) -> tuple[int, ...]:
    if len(chosen) != classes:
        raise ValueError(
            f"`select` of the teacher {teacher} must name one class for each of the data's {classes}, joined by +, got "
            f"{len(chosen)}."
        )
    columns = []
    for text in chosen:
        places = [int(text)] if text.isascii() and text.isdecimal() else _places(names, text)
        if len(places) != 1:
            hint = nearest(text, list(names)) if names else " Give its number: the teacher's classes have no names."
            raise ValueError(f"`select` of the teacher {teacher} names {text!r}, which is no class of it.{hint}")
        if places[0] >= count:
            raise ValueError(
                f"`select` of the teacher {teacher} must have numbers from 0 to {count - 1}, got {places[0]}."
            )
        columns += places
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"`select` of the teacher {teacher} must name each class once, got {twice} again.")
    return tuple(columns)


def _places(names: Sequence[str], wanted: str) -> list[int]:
    """The classes of this name, else those of which it is a synonym."""
    whole = [place for place, name in enumerate(names) if _folded(name) == _folded(wanted)]
    return whole or [place for place, name in enumerate(names) if _folded(wanted) in map(_folded, name.split(","))]


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))
