import pickle

import pytest
import torch

from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import remove_drafts, write_atomically

STATE = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
    "plain": [None, True, 3, 2.5, "text"],
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_nested_state_comes_back_equal_in_value_type_and_order(tmp_path):
    save_state(tmp_path / "c.safetensors", STATE)
    assert same(load_state(tmp_path / "c.safetensors"), STATE)


def test_an_optimiser_goes_on_from_its_state(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    save_state(tmp_path / "c", optimizer.state_dict())
    other = torch.optim.AdamW([parameter])
    other.load_state_dict(load_state(tmp_path / "c"))
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    save_state(path, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)


def test_a_pickle_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    path = tmp_path / "c.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="damaged"):
        load_state(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def broken(draft):
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match="plain values"):
        save_state(tmp_path / "c", {"x": object()})


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_state(tmp_path / "none")


def test_drafts_that_kills_left_are_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("file", ".file.draft", ".other.7.draft", ".file.7.old")]
    for path in (*kept, tmp_path / ".file.7.draft", tmp_path / ".file.81.draft"):
        path.write_text("x")
    remove_drafts(tmp_path / "file")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
