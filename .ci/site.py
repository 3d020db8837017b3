"""A hook of mkdocs: adds the pages outside of docs/ to the site, and makes links between them and docs/ its own."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = ("experiments", "benchmarks")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def outside() -> list[str]:
    """The pages outside of docs/, from the root of the repository."""
    pages = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
    return [*pages, "CONTRIBUTING.md"]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for name in outside():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page as the site has them; what is no page of it stays as text."""
    del config, files
    return translated(markdown, page.file.src_uri)


def translated(markdown: str, name: str) -> str:
    """The text with each link to a file of the repository as the site has it.

    Args:
        markdown: the text of a page.
        name: where the page is in the site.
    """
    own = name if name in outside() else f"docs/{name}"
    pages = {*outside(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))}

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        place = {"README.md": "docs/index.md", "README.zh.md": "docs/zh.md"}.get(place, place)
        if place.rstrip("/") in FOLDERS:
            place = f"{place.rstrip('/')}/README.md"
        if place not in pages:
            return text
        there = place.removeprefix("docs/")
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(name) or '.')}{anchor})"

    # Links in code are none.
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))
