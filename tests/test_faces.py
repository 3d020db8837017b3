"""What the packages offer by name: lazily, without torch, and the same to a type checker as to a program."""

import ast
import importlib
import importlib.util
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdnas.specs import algorithms

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("ci_faces", ROOT / ".ci" / "faces.py")
faces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faces)

KINDS = ["kdnas.distillers", "kdnas.losses", "kdnas.scorers", "kdnas.searchers", "kdnas.spaces"]
NAMES = {
    package: names
    for path in sorted((ROOT / "kdnas").rglob("__init__.py"))
    for package in [".".join(path.parent.relative_to(ROOT).parts)]
    if (names := faces.offers(package, path.read_text(encoding="utf-8"))) is not None
}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_every_kind_has_a_face_with_its_base_class_and_all_its_algorithms():
    assert set(NAMES) >= {*KINDS, "kdnas.data", "kdnas.teachers", "kdnas.testing"}
    bases = ["Distiller", "Loss", "Scorer", "Searcher", "SearchSpace", "Data", "Teacher", "LossContract"]
    for package, base in zip([*KINDS, "kdnas.data", "kdnas.teachers", "kdnas.testing"], bases, strict=True):
        assert base in dir(importlib.import_module(package))
    for package in KINDS:
        classes = {path.partition(":")[2] for path in algorithms(package).values()}
        assert classes and classes <= set(dir(importlib.import_module(package)))


def test_importing_and_listing_the_faces_imports_no_torch():
    packages = ", ".join(sorted(NAMES))
    code = f"import {packages}, sys\nprint([len(dir(package)) for package in ({packages},)], 'torch' in sys.modules)"
    assert run(code).strip().endswith("False")


@pytest.mark.parametrize("package", sorted(NAMES))
def test_every_name_is_listed_and_is_what_its_module_defines(package):
    module = importlib.import_module(package)
    for name, origin in NAMES[package].items():
        assert name in dir(module)
        value = getattr(module, name)
        assert value is (
            importlib.import_module(origin)
            if origin == f"{package}.{name}"
            else getattr(importlib.import_module(origin), name)
        )
    assert "face" not in dir(module)


@pytest.mark.parametrize("package", sorted(NAMES))
def test_no_submodule_can_take_the_place_of_a_name(package):
    module = importlib.import_module(package)
    submodules = {info.name for info in pkgutil.iter_modules(module.__path__)}
    replaced = [name for name in submodules & set(NAMES[package]) if NAMES[package][name] != f"{package}.{name}"]
    assert not replaced


def test_a_name_stays_when_the_module_that_defines_it_is_imported():
    code = (
        "import kdnas.data, kdnas.losses\n"
        "folder, loss = kdnas.data.folder, kdnas.losses.Flow\n"
        "import kdnas.data.folders, kdnas.losses.relation.flow\n"
        "print(kdnas.data.folder is folder, kdnas.losses.Flow is loss)"
    )
    assert run(code).split() == ["True", "True"]


def test_an_unknown_name_is_an_attribute_error_that_offers_the_nearest():
    losses = importlib.import_module("kdnas.losses")
    with pytest.raises(
        AttributeError, match=r"'kdnas.losses' has no attribute 'SoftTarget'. Did you mean 'SoftTargets'\?"
    ):
        _ = losses.SoftTarget
    with pytest.raises(AttributeError, match=r"no attribute '_soft'\.$"):
        _ = losses._soft
    assert not hasattr(losses, "soft_targets")


def test_submodules_can_be_imported_from_a_face():
    from kdnas.losses import check
    from kdnas.scorers import base

    assert check.__name__ == "kdnas.losses.check" and base.__name__ == "kdnas.scorers.base"


def test_the_stubs_are_up_to_date():
    assert faces.main(["--check"]) == 0


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "kdnas" / "planted"
    folder.mkdir(parents=True)
    call = 'face(__name__, {"b": "kdnas.planted.b", "C": "kdnas.a"})'
    (folder / "__init__.py").write_text(f"from kdnas.specs import face\n\n__getattr__, __dir__ = {call}\n")
    return folder


def test_a_missing_or_outdated_stub_fails_the_check_and_is_written(package, capsys):
    root, target = package.parents[1], package / "__init__.pyi"
    assert faces.main(["--check"], root) == 1
    assert "kdnas/planted/__init__.pyi is out of date" in capsys.readouterr().out
    assert not target.exists()
    assert faces.main([], root) == 0
    assert target.read_text().splitlines()[2:] == ["from kdnas.a import C as C", "from kdnas.planted import b as b"]
    assert faces.main(["--check"], root) == 0
    target.write_text(target.read_text() + "from kdnas.a import D as D\n")
    assert faces.main(["--check"], root) == 1


def test_long_imports_are_wrapped_as_the_formatter_wraps_them():
    text = faces.stub("kdnas.x", {"N" * 60: "kdnas.x.y"}, "")
    assert text.endswith(f"from kdnas.x.y import (\n    {'N' * 60} as {'N' * 60},\n)\n")
    ast.parse(text)


NO_CHECKER = shutil.which("pyrefly", path=Path(sys.executable).parent) is None


@pytest.mark.skipif(NO_CHECKER, reason="pyrefly is not installed")
def test_a_user_s_program_has_no_unknown_type(tmp_path):
    program = (ROOT / "tests" / "typed_program.py").read_text()
    assert len(program.splitlines()) > 40
    config = f'project-includes = ["*.py"]\nsearch-path = ["{ROOT}"]\npreset = "strict"\n'
    (tmp_path / "pyrefly.toml").write_text(config)
    command = [Path(sys.executable).with_name("pyrefly"), "check", "--python-interpreter-path", sys.executable]
    for text, errors in ((program, 0), (program + "unknown: int = run.no_such_thing\n", 1)):
        (tmp_path / "program.py").write_text(text)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == errors, done.stdout


@pytest.mark.skipif(NO_CHECKER, reason="pyrefly is not installed")
def test_a_user_script_is_typed_through_the_faces(tmp_path):
    (tmp_path / "pyrefly.toml").write_text(
        f'project-includes = ["*.py"]\nsearch-path = ["{ROOT}"]\npreset = "default"\n'
    )
    script = tmp_path / "user.py"
    script.write_text(
        "from typing import assert_type\n"
        "import kdnas.data\nimport kdnas.losses\nimport kdnas.scorers\nimport kdnas.spaces\n"
        "from kdnas.searchers import Evolution\n\n"
        "loss = kdnas.losses.SoftTargets(temperature=4.0)\n"
        "assert_type(loss, kdnas.losses.SoftTargets)\n"
        "assert_type(loss.temperature, float)\n"
        "assert_type(kdnas.data.digits(), kdnas.data.Data)\n"
        "assert_type(kdnas.spaces.ResNet, type[kdnas.spaces.ResNet])\n"
        "scorer: kdnas.scorers.Scorer = kdnas.scorers.Rdm(compare='spearman')\n"
        "searcher: type[kdnas.scorers.Scorer] = Evolution  # wrong\n"
        "kdnas.losses.SoftTargets(form='kk')  # wrong\n"
        "kdnas.losses.SoftTarget  # wrong\n"
    )
    binary = Path(sys.executable).with_name("pyrefly")
    command = [binary, "check", "--python-interpreter-path", sys.executable, "--output-format", "min-text"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout
    lines = script.read_text().splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}
    reported = {int(line.split("user.py:")[1].split(":")[0]) for line in out.splitlines() if "ERROR" in line}
    assert reported == wrong, out


def test_a_job_starts_without_what_is_slow_to_import():
    """What is slow to import is imported by what uses it: scipy.stats alone takes longer than all of kdnas."""
    jobs = ", ".join(f"kdnas.jobs.{path.stem}" for path in sorted((ROOT / "kdnas" / "jobs").glob("[!_]*.py")))
    slow = "scipy.stats sklearn triton rich optuna torchvision onnx networkx timm sqlalchemy".split()
    assert run(f"import sys, {jobs}; print([name for name in {slow} if name in sys.modules])").strip() == "[]"
