"""The model card of a student, `README.md`: what it is, how it is loaded, and what its controls say."""

from collections.abc import Mapping
from typing import Any

from kdnas.runs.files import plain
from kdnas.runs.folder import GRAPH, SOURCE, WEIGHTS
from kdnas.students.card import Card

_MOST_CLASSES = 20
_HEADER = """---
library_name: kdnas
pipeline_tag: {pipeline}
tags:
- {pipeline}
- knowledge-distillation
- neural-architecture-search
---

# {title}, chosen and distilled by kdnas
"""
_TITLES = {
    "image-classification": "An image classifier",
    "image-segmentation": "A classifier of pixels",
    "image-feature-extraction": "Features of images",
}
_USE = f"""
## Use

Python, with torch alone:

```python
from {SOURCE.removesuffix(".py")} import load

student = load("{WEIGHTS}")
LOGITS = student(images)  # [batch, channels, height, width] in [0, 1]
```
"""


def readme_text(card: Card, controls: Mapping[str, Any]) -> str:
    """The model card in Markdown, with the header that hubs read.

    Args:
        card: the student's.
        controls: of the run whose student this is, by name, each with its `sentence`; empty where it has none.
    """
    p, origin = card.preprocessing, card.origin
    size = f"{len(p.mean)} x {p.height} x {p.width}{' or any other size' if card.blueprint.dense else ''}"
    # Of a run's own trainings it is that of the student, of others that of the subnet it was.
    searched = "search part" if "training" in origin else "search part, before retraining"
    accuracies = [
        f"| {_cell(card.measure)} on the {words} | {origin[key]:.2%} |"
        for key, words in (("test_accuracy", "test part"), ("search_accuracy", searched))
        if _number(origin, key)
    ]
    classes = ", ".join(_cell(name) for name in card.class_names[:_MOST_CLASSES])
    more = f" and {len(card.class_names) - _MOST_CLASSES} more" if len(card.class_names) > _MOST_CLASSES else ""
    sentences = [_cell(c["sentence"], 1000) for c in controls.values() if isinstance(c, Mapping) and "sentence" in c]
    words = [f"- {sentence}" for sentence in sentences] or ["No controls are recorded for this student."]
    lines = [
        _HEADER.format(pipeline=_cell(card.pipeline), title=_TITLES.get(card.pipeline, "A network")),
        *("| | |", "| --- | --- |"),
        f"| images | {size}, values in [0, 1]; normalised inside |",
        f"| {card.answers} | {len(card.class_names)}: {classes}{more} |",
        *(f"| parameters | {card.cost.params:,} |", f"| multiply-accumulates | {card.cost.macs:,} |", *accuracies),
        _USE.replace("LOGITS", "logits, image_logits" if card.image_outputs else "logits"),
        *_forms(card),
        *("## Controls", "", *words, ""),
    ]
    return "\n".join(lines)


def _forms(card: Card) -> list[str]:
    written = {name: record for name, record in card.forms.items() if "problem" not in record}
    if not written:
        return []
    rows = []
    for record in written.values():
        milliseconds = record.get("milliseconds")
        time = "" if milliseconds is None else f"{milliseconds:.3g} ({record['threads']})"
        rows.append(f"| `{record['file']}` | {record['bytes']:,} | {time} |")
    left = [f"`{name}` is left out: {_cell(r['problem'], 300)}" for name, r in card.forms.items() if "problem" in r]
    header = ["| file | bytes | ms for one image where it was exported (threads) |", "| --- | --- | --- |"]
    graph = [f"`{GRAPH}` has the class names in its metadata, as a JSON list.", ""] if "onnx" in written else []
    return ["## Forms", "", *header, *rows, "", *graph, *(line for text in left for line in (text, ""))]


def _number(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(text: object, most: int = 60) -> str:
    return plain(str(text), most).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
