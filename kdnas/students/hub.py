"""A student folder on a hub of models."""

import re
from pathlib import Path

from kdnas.runs.files import current_folder, plain
from kdnas.runs.folder import SOURCE, STUDENT_FILES
from kdnas.runtimes import require
from kdnas.students.card import form_of
from kdnas.students.folder import read_student

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push_student(student: Path, repo: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload the files of a student, and return the address of the commit.

    Args:
        student: its folder, which is read and compared with its checksums first.
        repo: `OWNER/NAME`; created where there is none.
        private: whether it is created for its owner alone.
        revision: the branch; None for the main one.

    Raises:
        ValueError: no student there, or one without student.py; another form of the name; the extra `hub` is not
            installed; or the hub refuses.
    """
    _, card = read_student(student)
    if not _NAME.fullmatch(repo):
        raise ValueError(f"`repo` must be OWNER/NAME, got {plain(repo, 80)!r}.")
    folder = current_folder(student)
    names = sorted(path.name for path in folder.iterdir() if path.name in STUDENT_FILES)
    for name in {SOURCE, *names, *(record["file"] for record in card.forms.values() if "file" in record)}:
        form_of(student, name)
    require("hub", "kdnas push")
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=names,
            revision=revision,
            commit_message=f"A student of kdnas: {card.cost.params:,} params, {card.cost.macs:,} MACs",
        )
    except Exception as error:  # connections, logins and rights fail in many classes
        raise ValueError(f"the hub refused {repo}: {plain(str(error), 300)} Log in with `hf auth login`.") from error
    return str(getattr(commit, "commit_url", commit))
