import pickle

import pytest
import torch
from safetensors.torch import save_file

from kdnas.runs.checkpoint import load_state, part_of, save_state, save_tensors
from kdnas.runs.files import FORMAT, remove_drafts, write_atomically

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


def test_every_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    save_state(path, STATE)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"c\.safetensors (is damaged|has format)") as refusal:
            load_state(path)
        assert len(str(refusal.value)) < 500


def test_a_file_without_a_checksum_is_read_and_one_of_a_newer_version_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"t0": torch.ones(2)}, path, metadata={"structure": '{"dict": [["a", {"tensor": "t0"}]]}'})
    assert same(load_state(path), {"a": torch.ones(2)})
    save_state(path, STATE)
    path.write_bytes(path.read_bytes().replace(b'"kdnas":"%d ' % FORMAT, b'"kdnas":"7 '))
    with pytest.raises(ValueError, match="has format 7"):
        load_state(path)


def test_equal_states_are_equal_files(tmp_path):
    for name in "ab":
        save_state(tmp_path / name, STATE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "structure", ["", "null", "[]", "{}", '"text"', '{"tensor": "t9"}', '{"dict": [[[], 1]]}', "[" * 999]
)
def test_metadata_of_wrong_content_is_refused_in_a_sentence(tmp_path, structure):
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"t0": torch.ones(2)}, structure)
    with pytest.raises(ValueError, match="is damaged"):
        part_of(path, "training", "model")
