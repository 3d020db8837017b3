"""Students on the way to another student: each is trained once, so that the same call resumes."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, final

from kdnas.runs.files import Damaged, current_folder, read_json, remove_drafts, write_json
from kdnas.runs.folder import BEGUN
from kdnas.runs.lock import hold
from kdnas.runs.places import by_content
from kdnas.runs.schema import mismatch

_AGAIN = "Remove it to decide again."


class _Begun(TypedDict):
    settings: str


@final
class StudentSteps:
    """A folder of intermediate students; a finished one is kept, so that the same call resumes.

    Args:
        folder: where the students lie; created if missing.
        settings: everything that the students depend on, as JSON. None where a run's manifest holds it already.
        checkpoints: where `checkpoint` is; the folder by default.

    Raises:
        ValueError: the folder was begun with other settings, and its students would be taken for these; or another
            process writes there.
    """

    def __init__(self, folder: Path, settings: Any = None, checkpoints: Path | None = None) -> None:
        self.folder, self._checkpoints = folder, checkpoints or folder
        hold(folder)
        begun, digest = folder / BEGUN, digest_of(settings)
        if settings is not None and begun.exists() and read_json(begun, _Begun, _AGAIN)["settings"] != digest:
            raise ValueError(
                f"{folder} holds students trained with other settings, data or teachers. Remove it, or write elsewhere."
            )
        folder.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            write_json(begun, {"settings": digest})

    def student(self, name: str, train: Callable[[Path], object]) -> Path:
        """The folder of a student.

        Args:
            name: of the student, unique among the steps.
            train: writes the student to a folder; called only where it is not finished.
        """
        folder = self.folder / name
        if not current_folder(folder).exists():
            train(folder)
        # Here, so that the remains of a kill right after the student was written are removed too.
        forget_drafts(folder)
        self.checkpoint(name).unlink(missing_ok=True)
        remove_drafts(self.checkpoint(name))
        return folder

    def checkpoint(self, name: str) -> Path:
        """Where a training in progress is saved; `student` removes it."""
        return self._checkpoints / f"{name}.draft.safetensors"

    def read(self, name: str, default: Any, kind: Any = Any) -> Any:
        """What `write` recorded under a file name, or the default.

        Raises:
            ValueError: the file is damaged, or its content is of another type; see `kdnas.runs.schema.mismatch`.
        """
        path = self.folder / name
        if not path.exists():
            return default
        content = read_json(path, Any, _AGAIN)
        if isinstance(content, dict):
            content.pop("format", None)
            content = content.get("value", content)
        if reason := mismatch(content, kind):
            raise Damaged(path, reason, _AGAIN)
        return content

    def write(self, name: str, value: Any) -> None:
        """Record a decision, such as which student comes next, so that a resumed call decides alike."""
        write_json(self.folder / name, value if isinstance(value, dict) else {"value": value})


def draft_of(student: Path, settings: Any) -> Path:
    """The checkpoint of a training that will write a student folder.

    Its name has a digest of the settings, so other settings begin anew.
    """
    return student.parent / f".{student.name}.{digest_of(settings)[:12]}.draft.safetensors"


def drafts_of(student: Path) -> list[Path]:
    """Every `draft_of` a student that exists, whatever the settings."""
    own = re.compile(rf"\.?\.{re.escape(student.name)}\.[0-9a-f]{{12}}\.draft\.safetensors(\.\d+\.draft)?")
    # Not of its neighbours, whose names may begin alike.
    return [path for path in student.parent.glob(".*") if own.fullmatch(path.name)]


def forget_drafts(student: Path) -> None:
    """Remove every `draft_of` a finished student, also of a training with other settings that was never finished."""
    for path in drafts_of(student):
        path.unlink()


def digest_of(settings: Any) -> str:
    """A digest of settings as JSON, in hexadecimal; of what paths lead to, not of where it lies."""
    return hashlib.sha256(json.dumps(by_content(settings), sort_keys=True).encode()).hexdigest()
