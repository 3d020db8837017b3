"""Tables, tars, hub data sets, lists and arrays: all become data as class folders do."""

import importlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from kdnas.data.assembly import assembled
from kdnas.data.base import Data
from kdnas.data.folders import folder
from kdnas.data.load import load_data

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own


def picture(number, size=8):
    """Another colour for each number; the class is number % 2."""
    array = np.full((size, size, 3), (10 * number % 256, 100 if number % 2 else 200, 7), np.uint8)
    return Image.fromarray(array)


def encoded(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def loaded(text) -> Data:
    return load_data(text).build(Data)


def check(data, counts=(16, 2, 2), names=("cat", "dog")):
    """Every picture is there once, with its own class."""
    assert data.class_names == names and data.image == (3, 8, 8)
    assert (len(data.train), len(data.search), len(data.test)) == counts
    reds = []
    for part in (data.train, data.search, data.test):
        for pixels, labels in part.batches():
            numbers = (pixels[:, 0, 0, 0] * 255).round().long() // 10
            assert torch.equal(numbers % 2, labels)
            reds += numbers.tolist()
    assert sorted(reds) == list(range(sum(counts)))


def write_csv(path, rows, header="path,label"):
    path.write_text("\n".join([header, *rows]), encoding="utf-8")


def write_files(root, count=20):
    for number in range(count):
        picture(number).save(root / f"{number}.png")


def write_tar(path, numbers, labels=lambda n: {"cls": str(n % 2)}, mode="w"):
    with tarfile.open(path, mode) as tar:
        for number in numbers:
            entries = {"png": encoded(number)} | {k: v.encode() for k, v in labels(number).items()}
            for suffix, content in entries.items():
                info = tarfile.TarInfo(f"a/{number:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_list_of_files_with_parts_and_texts(tmp_path):
    write_files(tmp_path)
    parts = ["train"] * 16 + ["val"] * 2 + ["test"] * 2
    rows = [f"{n}.png,{'dog' if n % 2 else 'cat'},{part}" for n, part in enumerate(parts)]
    write_csv(tmp_path / "list.csv", rows, "File,Class,split")
    check(loaded(f"csv:{tmp_path / 'list.csv'}"))


def test_a_list_without_parts_is_split_as_folders_are(tmp_path):
    write_files(tmp_path)
    write_csv(tmp_path / "list.csv", [f"{n}.png,{n % 2 + 3}" for n in range(20)])
    data = loaded(f"csv:{tmp_path / 'list.csv'},seed=1")
    check(data, (14, 2, 4), ("3", "4"))
    assert data.source.startswith("train 20")
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
    for number in range(20):
        (tmp_path / f"{number}.png").rename(
            tmp_path / "classes" / ("dog" if number % 2 else "cat") / f"{number:02}.png"
        )
    again = folder(str(tmp_path / "classes"), seed=1)
    assert torch.equal(again.search.take(torch.arange(2)), data.search.take(torch.arange(2)))


def test_tars_of_webdataset_by_parts_and_braces(tmp_path):
    write_tar(tmp_path / "x-train-00.tar", range(8))
    write_tar(tmp_path / "x-train-01.tar", range(8, 16), lambda n: {"json": json.dumps({"label": n % 2})})
    write_tar(tmp_path / "x-val-00.tar", range(16, 18))
    write_tar(tmp_path / "x-test-00.tar", range(18, 20))
    check(loaded(f"wds:{tmp_path / '*.tar'}"), names=("0", "1"))
    write_tar(tmp_path / "shard-00.tar", range(10))
    write_tar(tmp_path / "shard-01.tar", range(10, 20))
    check(loaded(f"wds:{tmp_path}/shard-{{00..01}}.tar"), (14, 2, 4), ("0", "1"))


def test_pieces_are_decoded_from_their_file_where_they_do_not_fit_into_memory(tmp_path):
    from kdnas.data.assembly import Layout
    from kdnas.data.files import FileImages, Piece

    write_tar(tmp_path / "x.tar", range(20))
    with tarfile.open(tmp_path / "x.tar") as tar:
        pieces = [Piece(tmp_path / "x.tar", m.offset_data, m.size, m.name) for m in tar if m.name.endswith("png")]
    files = {"a": pieces[::2], "b": pieces[1::2]}
    data = assembled(Layout({"train": files}, ""), "wds:x", most=0)
    assert isinstance(data.train, FileImages) and data.train.size == 8
    check(data, (14, 2, 4), ("a", "b"))
    assert data.fingerprint == assembled(Layout({"train": files}, ""), "wds:x", most=0).fingerprint


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train")])
def test_arrays_are_split(tmp_path, names):
    images = np.stack([np.asarray(picture(n)) for n in range(20)])
    np.savez(tmp_path / "a.npz", **{names[0]: images, names[1]: np.arange(20) % 2})
    check(loaded(f"npz:{tmp_path / 'a.npz'}"), (14, 2, 4), ("0", "1"))


def test_arrays_with_parts_keep_them(tmp_path):
    images = np.stack([np.asarray(picture(n)) for n in range(20)])
    cuts = {"train": slice(0, 16), "val": slice(16, 18), "test": slice(18, 20)}
    arrays = {f"{part}_images": images[cut] for part, cut in cuts.items()}
    arrays |= {f"{part}_labels": np.arange(20)[cut, None] % 2 for part, cut in cuts.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    data = loaded(f"npz:{tmp_path / 'a.npz'}")
    check(data, names=("0", "1"))
    assert torch.equal((data.search.take(torch.arange(2))[:, 0, 0, 0] * 255).round(), torch.tensor([160.0, 170.0]))


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_missing_library_is_a_sentence(tmp_path, monkeypatch, kind):
    real = importlib.import_module

    def absent(name, *rest):
        if name.partition(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=rf"is not installed\. Run: pip install 'kdnas\[{kind}\]'"):
        loaded(f"{kind}:{tmp_path}")


def broken(root):
    write_files(root)
    (root / "3.png").write_bytes(b"no picture")
    write_csv(root / "list.csv", [f"{n}.png,{n % 2}" for n in range(20)])
    write_csv(root / "none.csv", [])
    write_csv(root / "columns.csv", ["1.png,2"], "picked,value")
    write_csv(root / "empty.csv", ["1.png,"])
    write_csv(root / "parts.csv", ["1.png,0,fold1"], "path,label,split")
    write_csv(root / "long.csv", [f"1.png,{'9' * 5000}", f"2.png,{'8' * 30}"])
    write_csv(root / "minus.csv", ["1.png,-1", "2.png,0"])
    write_csv(root / "few.csv", [f"{n}.png,{n % 2}" for n in range(4, 9)])
    (root / "latin.csv").write_bytes("path,label\nä.png,0".encode("latin-1"))
    write_tar(root / "bare.tar", range(4), lambda _: {})
    write_tar(root / "packed.tar.gz", range(4), mode="w:gz")
    (root / "torn.tar").write_bytes(b"\x01" * 1000)
    write_tar(root / "y-train.tar", range(4))
    write_tar(root / "y-more.tar", range(4))
    np.savez(root / "names.npz", a=np.zeros(3))
    np.savez(root / "two.npz", x_test=np.zeros(1), test_images=np.zeros(1))
    np.savez(root / "objects.npz", images=np.array([{}], object), labels=np.zeros(1))
    (root / "torn.npz").write_bytes(b"PK")
    return root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("csv:nowhere.csv", r"there is no file"),
        ("csv:list.csv", r"1 of 20 files cannot be decoded: .*3.png cannot be read.*csv:.*,skip_broken=true"),
        ("csv:none.csv", r"must have a line with the names of its columns and one per image"),
        ("csv:columns.csv", r"must have a column of the images, it has picked, value\. Name it: image=NAME"),
        ("csv:columns.csv,image=pick", r"has no column 'pick'\. It has picked, value"),
        ("csv:empty.csv", r"line 2 of .* must have path and label, one is empty"),
        ("csv:parts.csv", r"must be named train, validation or test, got 'fold1'"),
        ("csv:minus.csv", r"must be at least 0, got -1\. Leave out images without a label"),
        ("csv:few.csv", r"every class must have at least 4 images .*class '0' has 3"),
        ("csv:latin.csv", r"cannot be read as a table .*UTF-8"),
        ("csv:list.csv,size=-1", r"`?size`? .*-1"),
        ("csv:long.csv", r"every class must have at least 4 images"),
        ("wds:none-*.tar", r"there are no files"),
        ("wds:{0..999999999}.tar", r"must stand for at most 100,000 files"),
        ("wds:a{000..9999999999999999999}.tar", r"must stand for at most 100,000 files"),
        ("wds:bare.tar", r"has no label of a/0000\. Put a/0000.cls"),
        ("wds:packed.tar.gz", r"cannot be read as an uncompressed tar .*Decompress it"),
        ("wds:torn.tar", r"cannot be read as an uncompressed tar .*Write it again"),
        ("wds:y-*.tar", r"either all files of .* or none, y-more.tar has not"),
        ("npz:names.npz", r"must have arrays images and labels.*it has a\."),
        ("npz:two.npz", r"several arrays of images for one part, test_images among them\. Keep one"),
        ("npz:objects.npz", r"cannot be read as arrays"),
        ("npz:torn.npz", r"cannot be read as arrays"),
        ("csv:", r"csv must have a path"),
        ("cvs:list.csv", r"Did you mean 'csv'"),
    ],
)
def test_what_cannot_be_data_is_refused_in_a_sentence(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(broken(tmp_path))
    with pytest.raises(ValueError, match=message):
        loaded(text)


def test_what_cannot_be_decoded_is_left_out_where_one_says_so(tmp_path):
    data = loaded(f"csv:{broken(tmp_path) / 'list.csv'},skip_broken=true")
    assert len(data.train) + len(data.search) + len(data.test) == 19
    assert "1 files that cannot be decoded are left out" in data.source


@pytest.mark.real
def test_a_data_set_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})

    def rows(numbers):
        content = {"photo": [picture(n) for n in numbers], "kind": [n % 2 for n in numbers]}
        return datasets.Dataset.from_dict(content, features=features)

    parts = {"train": range(16), "validation": range(16, 18), "test": range(18, 20)}
    datasets.DatasetDict({name: rows(numbers) for name, numbers in parts.items()}).save_to_disk(tmp_path / "d")
    check(loaded(f"hf:{tmp_path / 'd'}"))
    rows(range(20)).save_to_disk(tmp_path / "one")
    check(loaded(f"hf:{tmp_path / 'one'}"), (14, 2, 4))
    with pytest.raises(ValueError, match=r"must hold Images, it holds ClassLabel"):
        loaded(f"hf:{tmp_path / 'one'},image=kind")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"hf:.*none cannot be loaded"):
        loaded(f"hf:{tmp_path / 'none'}")


@pytest.mark.real
def test_a_folder_that_datasets_reads_as_class_folders(tmp_path):
    pytest.importorskip("datasets")
    for number in range(20):
        place = tmp_path / "train" / ("dog" if number % 2 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number}.png")
    check(loaded(f"hf:{tmp_path}"), (14, 2, 4))


@pytest.mark.real
def test_parquet_of_a_hub_with_its_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for part, numbers in {"train": range(16), "validation": range(16, 18), "test": range(18, 20)}.items():
        content = {"image": [picture(n) for n in numbers], "label": [n % 2 for n in numbers]}
        rows = datasets.Dataset.from_dict(content, features=features)
        rows.to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    check(loaded(f"parquet:{tmp_path / '*.parquet'}"))


@pytest.mark.real
def test_parquet_of_plain_bytes_and_what_is_none(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = ["dog" if n % 2 else "cat" for n in range(20)]
    pq.write_table(pa.table({"img": [encoded(n) for n in range(20)], "y": labels}), tmp_path / "a.parquet")
    check(loaded(f"parquet:{tmp_path / 'a.parquet'}"), (14, 2, 4))
    with pytest.raises(ValueError, match=r"row 0 of .* must have bytes in 'y', got str"):
        loaded(f"parquet:{tmp_path / 'a.parquet'},image=y")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as Parquet"):
        loaded(f"parquet:{tmp_path / 'b.parquet'}")


@pytest.mark.real
def test_tars_that_webdataset_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(20):
            writer.write({"__key__": f"s{number:03}", "png": picture(number), "cls": number % 2})
    check(loaded(f"wds:{tmp_path / 'a.tar'}"), (14, 2, 4), ("0", "1"))
