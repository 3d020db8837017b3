"""Files of every kind that is read, with bits flipped, bytes changed, put in or cut off: one sentence, or no harm.

What kdnas itself writes has checksums: it is refused, or holds the same values. A sample in `make test`, and with fixed
seeds 500 damages of each kind in `make fuzz`; of a run's own JSON and weights see `tests/jobs/test_damage.py`.
"""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdnas.costs import latency
from kdnas.costs.elsewhere import adopt
from kdnas.data.base import Data
from kdnas.data.load import load_data
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.runtimes import pt2_bytes
from kdnas.students.card import digest_of, form_of
from kdnas.students.load import load_student
from kdnas.tables import load_space
from kdnas.teachers.cache import TeacherCache
from kdnas.teachers.load import load_teacher
from kdnas.teachers.weights import load_weights
from kdnas.teachers.zoo import write_zoo_teacher
from tests.costs.test_target import table_file
from tests.teachers.test_cache import DATA, teacher, written

GOLDEN = Path(__file__).parent / "golden"
SEEN = Preprocessing(height=8, width=8, mean=(0.5,), std=(0.25,))
COUNT = 60


def picture(number, form="PNG", size=8):
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def used(text):
    """All images of a data set, decoded."""
    data = load_data(text).build(Data)
    for part in (data.train, data.search, data.test):
        part.take(torch.arange(len(part)))


def arrays(folder):
    pixels, labels = np.zeros((COUNT, 8, 8, 3), np.uint8), np.arange(COUNT) % 3
    np.savez(folder / "plain.npz", images=pixels, labels=labels)
    np.savez_compressed(folder / "small.npz", images=pixels, labels=labels)
    return lambda path: used(f"npz:{path}")


def packed(folder):
    pictures = [picture(number, "JPEG", 32) for number in range(COUNT)]
    ends, labels = np.cumsum([0, *map(len, pictures)]), np.arange(COUNT) % 10
    content = np.frombuffer(b"".join(pictures), np.uint8)
    parts = {"jpeg": content, "offsets": ends, "labels": labels}
    np.savez(folder / "a.npz", **{f"{part}_{name}": a for part in ("train", "test") for name, a in parts.items()})
    return lambda path: used(f"cifar10:{path},search=20")


def binary(folder):
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        (folder / name).write_bytes(b"".join(bytes([number % 10, *bytes(3072)]) for number in range(20)))
    return lambda path: used(f"cifar10:{path.parent},search=20")


def listed(folder):
    (folder / "images").mkdir()
    for number in range(24):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
    rows = [f"images/{n}.png,{'abc'[n % 3]},{'train' if n < 12 else 'test'}\n" for n in range(24)]
    (folder / "a.csv").write_text("path,label,split\n" + "".join(rows))
    return lambda _: used(f"csv:{folder}/a.csv")


def tars(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(24):
            label = ("cls", b"%d" % (number % 3)) if number % 2 else ("json", json.dumps({"y": number % 3}).encode())
            for suffix, content in (("png", picture(number)), label):
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return lambda path: used(f"wds:{path}")


def classes(folder):
    suffixes = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "WEBP": "webp", "PPM": "ppm"}
    for name in "ab":
        (folder / name).mkdir()
        for form, suffix in suffixes.items():
            (folder / name / f"x.{suffix}").write_bytes(picture(0, form))
    return lambda _: used(f"folder:{folder}")


def graphs(folder):
    shutil.copyfile(GOLDEN / "teacher" / "student.onnx", folder / "a.onnx")
    return lambda path: taught(f"onnx:{path}")


def programs(folder):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    (folder / "a.pt2").write_bytes(pt2_bytes(network.eval(), torch.rand(2, 1, 8, 8)))
    return lambda path: taught(f"export:{path}")


def taught(text):
    load_teacher(text).build(classes=10, preprocessing=SEEN)(torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))


def layers():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def weights(folder):
    for is_new, name in ((True, "a.pth"), (False, "b.pth")):
        torch.save(layers().state_dict(), folder / name, _use_new_zipfile_serialization=is_new)
    return lambda path: load_weights(layers(), path)


def tables(folder):
    shutil.copyfile(Path("search_spaces") / "toy.toml", folder / "a.toml")
    return lambda path: load_space(path).name and None


def parquet(folder):
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [picture(n) for n in range(24)], "label": [n % 3 for n in range(24)]}
    tables.write_table(arrow.table(columns), folder / "a.parquet")
    return lambda path: used(f"parquet:{path}")


FOREIGN = (arrays, packed, binary, listed, tars, classes, graphs, weights, tables, programs, parquet)


# What kdnas writes: each gives a reader that returns everything that was written.


def latencies(folder):
    table_file(folder / "a.json")
    (folder / "a.py").unlink()

    def read(path):
        target = adopt(path)
        return repr(target)[: repr(target).index("table=")], latency.adopted(target.table)

    return read


def forms(folder):
    shutil.copytree(GOLDEN / "format_1" / "students" / "student", folder, dirs_exist_ok=True)
    (folder / "student.pt2").write_bytes(bytes(999))
    digests = {name: digest_of(folder / name) for name in ("student.py", "student.onnx", "student.pt2")}
    card = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(card | {"files": digests}))

    def read(path):
        if path.name not in digests:
            return {name: tensor.tolist() for name, tensor in load_student(folder).state_dict().items()}
        return form_of(folder, path.name).read_bytes()

    return read


def cached(folder):
    written(folder)
    ids = torch.arange(0, 300, 37)
    pixels = DATA.view(ids, 3, 1)

    def read(_):
        outputs: Outputs = TeacherCache(folder / "cache", teacher(), DATA, seed=3, views=2).outputs(ids, 1, pixels)
        return [tensor.tolist() for tensor in (outputs.logits, *outputs.features)]

    return read


def fitted(folder):
    from torchvision import models

    network = models.get_model("squeezenet1_1", num_classes=2)
    seen = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    source = {"zoo": "torchvision", "name": "squeezenet1_1", "size": 0}
    write_zoo_teacher(folder / "teacher", network, source, seen, ("a", "b"))

    def read(_):
        module = load_teacher(f"checkpoint:{folder / 'teacher'}").build(classes=2, preprocessing=seen)
        return module.state_dict()["module.classifier.1.bias"].tolist()

    return read


OWN = (latencies, forms, cached, fitted)


def damaged(content, rng, kind):
    """The content with one bit flipped, some bytes changed or put in, or the end cut off."""
    place = rng.randrange(len(content))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    return content[:place] + rng.randbytes(rng.randint(0, 16)) + content[place + rng.randint(0, 16) :]


def check(folder, make, count, kinds=("flip", "flip", "flip", "change", "cut")):
    """Damage the files of a kind so many times; how many of these were refused."""
    read, rng, refused = make(folder), random.Random(make.__name__), 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    wholes = {path: read(path) for path in files[:1] + files[-1:]}
    for _ in range(count):
        path, kind = rng.choice(files), rng.choice(kinds)
        content = path.read_bytes()
        if path not in wholes:
            wholes[path] = read(path)
        path.write_bytes(damaged(content, rng, kind))
        try:
            value = read(path)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 500 and str(error).isprintable(), error
        else:
            assert value == wholes[path], (path, kind)
        finally:
            path.write_bytes(content)
    return refused


@pytest.mark.parametrize("make", [m for m in (*FOREIGN, *OWN) if m not in (programs, parquet, fitted)])
def test_some_damaged_files_are_refused_in_a_sentence_or_read_as_they_were(tmp_path, make):
    assert check(tmp_path, make, 12)


@pytest.mark.fuzz
@pytest.mark.parametrize("make", (*FOREIGN, *OWN))
def test_damaged_files_are_refused_in_a_sentence_or_read_as_they_were(tmp_path, make):
    assert check(tmp_path, make, 500) > 100


@pytest.mark.real
def test_damaged_parquet(tmp_path):
    assert check(tmp_path, parquet, 100) > 20
