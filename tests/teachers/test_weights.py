import argparse
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdnas.teachers.weights import load_weights


def network(classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


SOURCE = network()
WEIGHTS = SOURCE.state_dict()


def prefixed(prefix):
    return {prefix + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        {"model": prefixed("module."), "optimizer": {"state": {0: {"momentum": torch.ones(2)}}, "param_groups": [{}]}},
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("model.net."),
        {"student": {"0.weight": torch.ones(1)}, "teacher": prefixed("module.backbone.")},
        {"model_ema": {name: 0.5 * value for name, value in WEIGHTS.items()}, "model": WEIGHTS},
        {"model": WEIGHTS, "random": np.random.RandomState(0).get_state()},
        {"n_averaged": torch.tensor(3), **prefixed("module.")},
        {name: value for name, value in WEIGHTS.items() if "num_batches" not in name},
    ],
)
def test_weights_are_read_however_they_were_saved(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    loaded = network()
    load_weights(loaded, tmp_path / "w.pth")
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in loaded.state_dict().items())


def test_older_files_and_other_suffixes_are_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False)
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    for name in ("w.pth.tar", "w.safetensors"):
        loaded = network()
        load_weights(loaded, tmp_path / name)
        assert torch.equal(loaded[3].weight, WEIGHTS["3.weight"])


def test_the_content_decides_and_not_the_suffix(tmp_path):
    save_file(prefixed(""), tmp_path / "w.safetensors")
    torch.save(WEIGHTS, tmp_path / "w.pth")
    for name, other in (("w.safetensors", "x.pth"), ("w.pth", "x.safetensors")):
        (tmp_path / name).rename(tmp_path / other)
        loaded = network()
        load_weights(loaded, tmp_path / other)
        assert torch.equal(loaded[3].weight, WEIGHTS["3.weight"])


def test_of_several_equal_sets_the_one_that_is_loaded_is_named(tmp_path, log):
    torch.save({"state_dict_ema": WEIGHTS, "state_dict": WEIGHTS}, tmp_path / "w.pth")
    load_weights(network(), tmp_path / "w.pth")
    assert "at state_dict_ema and state_dict; those at state_dict are loaded" in log.text


def written(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", network(5).state_dict(), r"its head \(3\) has 5 classes, the data 2.*kdnas fit"),
        ("w.safetensors", network(5).state_dict(), r"its head \(3\) has 5 classes, the data 2"),
        ("w.pth", SOURCE, r"more than weights \(torch.nn.modules.container.Sequential\).*state_dict"),
        ("w.pth", {"state_dict": WEIGHTS, "evil": Evil()}, "more than weights"),
        ("w.pth", b"", "damaged or cut short"),
        ("w.pth", b"no file of torch", "damaged or"),
        ("w.safetensors", b"", "damaged: it is cut short"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS.*git lfs pull"),
        ("w.safetensors", b"<!DOCTYPE html>", "is a web page"),
        ("w.pth", {name: (9 * value).to(torch.int8) for name, value in WEIGHTS.items()}, "floats, 0.weight has int8"),
        (
            "w.pth",
            {**WEIGHTS, "3.weight": torch.empty(2, 16, device="meta")},
            "dense tensors with values, 3.weight is none",
        ),
        ("w.pth", [1, 2], "holds no weights"),
        (
            "w.pth",
            {"a": torch.ones(1)},
            r"8 tensors of the network missing, such as 0.weight; 1 tensor that the network does not have, such as a",
        ),
        (
            "w.pth",
            {**WEIGHTS, "0.weight": torch.ones(4, 1, 3, 3)},
            r"1 of another shape, such as 0.weight with \(4, 1, 3, 3\) instead of \(4, 3, 3, 3\)",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path, capsys, name, content, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load_weights(network(), written(tmp_path / name, content))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    assert not capsys.readouterr().out


def test_a_name_in_a_file_is_printable_and_short_in_a_message(tmp_path):
    torch.save({"\x1b[2J" + "x" * 5000: torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pth")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_file_that_is_cut_short_is_said_to_be(tmp_path):
    whole = written(tmp_path / "w.pth", WEIGHTS).read_bytes()
    written(tmp_path / "half.pth", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pth is damaged or cut short"):
        load_weights(network(), tmp_path / "half.pth")


def test_a_torchscript_file_is_told_from_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"TorchScript program.*torch.jit.load\(PATH\).state_dict\(\)"):
        load_weights(network(), tmp_path / "w.pt")


def test_positions_of_another_image_size_point_to_the_size(tmp_path):
    class Positions(nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, 4))

    path = written(tmp_path / "w.pth", Positions(16).state_dict())
    with pytest.raises(ValueError, match=r"pos_embed with \(1, 16, 4\) instead of \(1, 4, 4\).*NAME@WEIGHTS,size=N"):
        load_weights(Positions(4), path)


def test_a_new_head_keeps_its_weights_and_the_body_is_loaded(tmp_path):
    source, loaded = network(5), network(2)
    before = loaded[3].weight.clone()
    load_weights(loaded, written(tmp_path / "w.pth", source.state_dict()), new_head=True)
    assert torch.equal(loaded[0].weight, source[0].weight) and torch.equal(loaded[3].weight, before)
    with pytest.raises(ValueError, match="of another shape"):
        content = {**source.state_dict(), "0.weight": torch.ones(4, 1, 3, 3)}
        load_weights(network(2), written(tmp_path / "x.pth", content), new_head=True)
