"""Programs of torch.export as teachers."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.load import load_teacher
from kdnas.trust import Untrusted, admit

DATA = Preprocessing(height=12, width=12, mean=(0.5,) * 3, std=(0.25,) * 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def saved(path, *, batch=2, free=True, module=None, images=None):
    module = (module or Net()).eval()
    images = torch.rand(batch, 3, 8, 8) if images is None else images
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=shapes), path)
    return module


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "n.pt2"
    saved(path)
    return path


def built(path, options=""):
    return load_teacher(f"export:{path}{options}").build(Teacher, classes=3, preprocessing=DATA)


@pytest.mark.parametrize("free", [True, False])
def test_a_program_gives_the_networks_logits_and_stages_for_any_batch(tmp_path, free):
    module = saved(tmp_path / "n.pt2", free=free)
    teacher = built(tmp_path / "n.pt2")
    assert teacher.note == ("batches of any size" if free else "batches of 2")
    own = Frozen(module, preprocessing=teacher.preprocessing)
    for count in (1, 5):
        pixels = torch.rand(count, 3, 8, 8)
        outputs, expected = teacher(pixels), own(pixels)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert [f.shape for f in outputs.features] == [f.shape for f in expected.features] and len(
            outputs.features
        ) == 2
        torch.testing.assert_close(outputs.features[1], expected.features[1])
        assert outputs.images.shape == (count, 3, 8, 8)
    assert teacher.train().training is False


class Dense(Net):
    def __init__(self):
        super().__init__()
        self.head, self.classifier = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.classifier(self.head(self.second(self.first(x))).relu())


def test_a_program_of_every_pixel_shows_the_map_that_it_classifies(tmp_path):
    module = saved(tmp_path / "n.pt2", module=Dense())
    teacher = load_teacher(f"export:{tmp_path / 'n.pt2'}").build(Teacher, classes=3, preprocessing=DATA, dense=True)
    pixels = torch.rand(2, 3, 8, 8)
    expected = Frozen(module, preprocessing=teacher.preprocessing, dense=True)(pixels)
    assert expected.classified.shape == (2, 5, 4, 4)
    torch.testing.assert_close(teacher(pixels).classified, expected.classified)


@pytest.mark.parametrize(
    ("options", "mean"),
    [("", (0.5,) * 3), (",normalise=none", (0.0,) * 3), (",normalise=imagenet", (0.485, 0.456, 0.406))],
)
def test_normalisation_is_the_datas_unless_one_says_otherwise(program, options, mean):
    teacher = built(program, options)
    assert teacher.preprocessing.mean == mean and teacher.preprocessing.height == 8


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


def test_what_is_no_program_of_images_is_refused(tmp_path, program):
    path = tmp_path / "n.pt2"
    with pytest.raises(ValueError, match=r"there is no file"):
        built(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"is damaged, or no file of torch.export"):
        built(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"export:.*n.pt2 cannot be loaded \("):
        built(path)
    torch.export.save(torch.export.export(Two(), (torch.rand(2, 3), torch.rand(2, 3))), path)
    with pytest.raises(ValueError, match=r"must take one batch of images .*it takes \(\(2, 3\), \(2, 3\)\)"):
        built(path)
    with pytest.raises(ValueError, match=r"`normalise` must be one of data, imagenet, none, got 'zoo'"):
        built(program, ",normalise=zoo")


class Harm:
    def __reduce__(self):
        return exec, ("import builtins; builtins.harmed = True",)


def test_a_program_with_a_pickle_that_would_run_is_refused(tmp_path, program):
    import builtins

    with zipfile.ZipFile(program) as archive:
        names = archive.namelist()
        contents = {name: archive.read(name) for name in names}
    inputs = [name for name in names if "sample_inputs" in name]
    assert inputs
    with zipfile.ZipFile(tmp_path / "harm.pt2", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, pickle.dumps(Harm()) if name in inputs else content)
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        built(tmp_path / "harm.pt2")
    assert not hasattr(builtins, "harmed")


def test_a_file_may_not_name_a_program_that_nobody_began_here():
    with pytest.raises(Untrusted):
        admit({"make": "kdnas.teachers.export:export_teacher", "arguments": {"path": "/elsewhere/n.pt2"}}, "run.json")
