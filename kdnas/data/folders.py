"""Images in one folder per class."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdnas.data.assembly import NO_CLASS, Files, Layout, assembled, check_roles, needs_labels, role_of
from kdnas.data.base import Data
from kdnas.data.files import SUFFIXES
from kdnas.values import Seed, Side

_SYSTEM = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}


def folder(path: str, size: Side = 0, seed: Seed = 0, skip_broken: bool = False, merge: bool = False) -> Data:
    """Images in class folders, whole or in parts.

    Recognised are `train` and `training`; `val`, `valid`, `validation`, `dev`, `eval` and `evaluation`; `test`,
    `testing` and `holdout`, in any case and with a word before or after (`seg_train`, `Test Set`), above the class
    folders or inside each of them. `Data.source` says what was recognised.

    Of `train`, `val` and `test`, the second is the search part and the third the test part. Without one of the two, the
    other is the test part, and a tenth of each training class (at least one image) is for search. Without parts a fifth
    of each class (at least one image) is for test.

    Args:
        path: holds `train/CLASS/*` and so on, `CLASS/train/*` and so on, or just `CLASS/*`; inside of
            `without_labels()` also images without class folders, in it or in its parts. Left out are hidden files,
            those whose suffix is no image's, and what systems put beside files (`__MACOSX`, `@eaDir`).
        size: side in pixels of the square that images are resized and cropped to; 0 for the median of the training
            images' shorter sides, 224 at most.
        seed: random seed of the split.
        skip_broken: leave out files that cannot be decoded, and count them in `Data.source`.
        merge: merge the sub-folders of each class where no class has images of its own.

    Raises:
        ValueError: no such folder, no class folders, other classes in a part, a class with too few images, folders
            whose role is not clear, a file that links put into two classes or parts, or files that cannot be decoded.
    """
    root = Path(path)
    if not root.is_dir():
        if root.exists():
            raise ValueError(f"{root} is a file. Unpack it, and give the folder that holds one folder per class.")
        raise ValueError(f"there is no folder {root}. Use a folder that holds one folder per class.")
    layout = _without_classes(root) or _layout(_unwrapped(root), merge)
    _check_links(layout)
    return assembled(layout, f"folder:{path}", size=size, seed=seed, skip_broken=skip_broken)


def _without_classes(root: Path) -> Layout | None:
    """The images of a folder that has no class folders, where images without labels are allowed; else None.

    They lie in it, or in parts (`train`, `val`, `test`).
    """
    if needs_labels():
        return None
    inside = _folders(root)
    parts = {role: folder for folder in inside if (role := role_of(folder.name)) and _own_images(folder)}
    if "train" in parts and not any(_image_files(folder) for folder in inside if folder not in parts.values()):
        files: dict[str, Files] = {role: {NO_CLASS: _image_files(folder)} for role, folder in parts.items()}
        named = ", ".join(f"{folder.name} ({role})" for role, folder in parts.items())
        return Layout(files, f"folders {named} of images without classes", _left_out(list(parts.values())))
    if _own_images(root) and not any(map(_image_files, inside)):
        return Layout({"train": {NO_CLASS: _image_files(root)}}, "images without classes", _left_out([root]))
    return None


def _layout(root: Path, merge: bool) -> Layout:
    """What a folder's sub-folders are: parts with class folders, class folders with parts, or class folders.

    Raises:
        ValueError: it is not clear which.
    """
    inside = _folders(root)
    parts = {folder: role for folder in inside if (role := role_of(folder.name)) and _holds_folders(folder)}
    if "train" in parts.values():
        return _parts_above_classes(root, inside, parts, merge)
    if inside and all(role_of(folder.name) for folder in inside):
        names = ", ".join(folder.name for folder in inside)
        raise ValueError(
            f"{root} holds {names}: parts of a data set, but no training part with one folder per class. Sort the "
            "images as train/CLASS/image.jpg, or give the folder whose sub-folders are the classes; images without "
            "classes need --unlabelled."
        )
    below = [{part: role_of(part.name) for part in _folders(folder)} for folder in inside]
    if below and all("train" in each.values() and None not in each.values() for each in below):
        for folder, each in zip(inside, below, strict=True):
            check_roles(folder, each)
        roles = [{role: part for part, role in each.items()} for each in below]
        return _classes_above_parts(root, inside, roles, merge)
    _check_nesting(root, inside, merge)
    files = _by_class(inside)
    return Layout({"train": files}, f"{len(files)} class folders{_merged(inside)}", _left_out(inside))


def _parts_above_classes(root: Path, inside: Sequence[Path], parts: Mapping[Path, str], merge: bool) -> Layout:
    check_roles(root, parts)
    others = [folder for folder in inside if folder not in parts]
    flat = next((folder for folder in others if role_of(folder.name) and _image_files(folder)), None)
    if flat is not None:
        raise ValueError(
            f"{flat} must hold one folder per class, as the training part does, but holds images. Sort them into class "
            "folders, or move them away."
        )
    files: dict[str, Files] = {}
    inner: list[Path] = []
    for folder, role in parts.items():
        top = _unwrapped(folder)
        inner += _folders(top)
        _check_nesting(top, _folders(top), merge)
        files[role] = _by_class(_folders(top))
    named = ", ".join(f"{folder.name} ({role})" for folder, role in parts.items())
    left = [f"folder {folder.name}" for folder in others]
    return Layout(files, f"folders {named}{_merged(inner)}", _left_out(list(parts), left))


def _classes_above_parts(
    root: Path, inside: Sequence[Path], roles: Sequence[Mapping[str | None, Path]], merge: bool
) -> Layout:
    files: dict[str, dict[str, list[Path]]] = {}
    _check_nesting(root, [parts["train"] for parts in roles], merge)
    for folder, parts in zip(inside, roles, strict=True):
        for role, part in parts.items():
            files.setdefault(str(role), {})[folder.name] = _image_files(part)
    return Layout(dict(files), f"{len(inside)} class folders with {', '.join(files)} inside", _left_out(inside))


def _folders(folder: Path) -> list[Path]:
    """Sub-folders, by name; hidden ones and those that systems make are none."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _is_system(p))


def _is_system(path: Path) -> bool:
    """Whether it is hidden, or what macOS leaves in archives, or a folder that a file system makes for itself."""
    return path.name.startswith((".", "__MACOSX")) or path.name.casefold() in _SYSTEM


def _by_class(folders: Sequence[Path]) -> dict[str, Sequence[Path]]:
    """The image files of class folders, by their names with composed letters: macOS writes them decomposed."""
    files: dict[str, Sequence[Path]] = {}
    for folder in folders:
        name = unicodedata.normalize("NFC", folder.name)
        files[name] = [*files.get(name, ()), *_image_files(folder)]
    return files


def _unwrapped(folder: Path) -> Path:
    """The only sub-folder, as often as there is nothing else and it holds folders itself."""
    while len(inside := _folders(folder)) == 1 and _holds_folders(inside[0]) and not _own_images(folder):
        folder = inside[0]
    return folder


def _holds_folders(folder: Path) -> bool:
    """Whether it holds folders and no images beside them."""
    return bool(_folders(folder)) and not _own_images(folder)


def _own_images(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _visible(folder: Path, passed: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Everything below that is no folder, and neither hidden nor in a hidden folder; links are followed, but not up."""
    passed |= {folder.resolve(), *folder.resolve().parents}
    for path in sorted(folder.iterdir()):
        if _is_system(path):
            continue
        if not path.is_dir():
            yield path
        elif not (path.is_symlink() and path.resolve() in passed):
            yield from _visible(path, passed)


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if _is_image(path)]


def _left_out(folders: Sequence[Path], others: Sequence[str] = ()) -> str:
    """A sentence on files that are no images, and on folders that are no parts."""
    suffixes = Counter(p.suffix.lower() or "no suffix" for f in folders for p in _visible(f) if not _is_image(p))
    words = [*others, *(f"{count} files with {suffix}" for suffix, count in suffixes.most_common(5))]
    return f"left out: {', '.join(words)}" if words else ""


def _merged(classes: Sequence[Path]) -> str:
    """A note on the class folders whose sub-folders are merged, if there are any."""
    names = sorted({each.name for each in classes if len([p for p in _folders(each) if _image_files(p)]) > 1})
    return f", the sub-folders of {', '.join(names[:3])}{', ...' * (len(names) > 3)} merged" if names else ""


def _check_nesting(root: Path, classes: Sequence[Path], merge: bool) -> None:
    """Raise a ValueError where every folder taken for a class holds folders alone, and some of them several."""
    inside = [[folder.name for folder in _folders(each) if _image_files(folder)] for each in classes]
    if len(classes) > 1 and max(map(len, inside)) > 1 and not merge and all(map(_holds_folders, classes)):
        names = ", ".join(str(each.relative_to(root)) for each in classes[:3])
        below = ", ".join(dict.fromkeys(name for folders in inside for name in folders[:2]))
        raise ValueError(
            f"the class folders of {root} ({names}) hold folders and no images ({below}), which may be the classes. "
            "Give a folder of class folders, name the parts train and test, or merge what is inside by "
            "folder:PATH,merge=true."
        )


def _check_links(layout: Layout) -> None:
    """Raise a ValueError for a file that links put into two classes, or into two parts."""
    places: dict[Path, tuple[str, str, Any]] = {}
    for part, classes in layout.parts.items():
        for name, files in classes.items():
            for file, real in zip(files, _real_paths(files), strict=True):
                first = places.setdefault(real, (part, name, file))
                if first[:2] != (part, name):
                    roles = " and ".join(dict.fromkeys((f"{first[1]!r} of {first[0]}", f"{name!r} of {part}")))
                    raise ValueError(f"{first[2]} and {file} are one file, in {roles}. Remove one of the links.")


def _real_paths(files: Sequence[Any]) -> Iterator[Path]:
    """Files without links; each folder is resolved once."""
    parents: dict[Path, Path] = {}
    for file in files:
        if file.parent not in parents:
            parents[file.parent] = file.parent.resolve()
        yield file.resolve() if file.is_symlink() else parents[file.parent] / file.name
