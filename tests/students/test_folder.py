import dataclasses
import json
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kdnas.students.folder
import kdnas.students.forms
from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.data.builtin import digits
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.runs.files import Damaged
from kdnas.space import layer
from kdnas.students.card import Card, form_of
from kdnas.students.folder import read_student, write_student
from kdnas.students.integers import quantize
from kdnas.students.source import load_source
from kdnas.supernet import Supernet
from kdnas.tables import load_space, shared_folder, table_of
from tests.alone import run_alone

FILES = ["README.md", "config.json", "student.json", "student.onnx", "student.py", "weights.safetensors"]
SPACE = load_space("toy")
PREPROCESSING = Preprocessing(height=8, width=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
ORIGIN = {"run": "first", "place": 1, "scores": {"similarity": 0.5}, "note": None}


class BatchDependent(nn.Module):
    """A layer no exported form can follow: it looks at the other images of its batch."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Counting(nn.Module):
    """Its result does not depend on the batch, but its graph does."""

    def forward(self, x):
        return x.reshape(int(x.shape[0]), -1).reshape(x.shape)


class Sized(nn.Module):
    """As `Counting`, with the batch size by len."""

    def forward(self, x):
        return x.reshape(len(x), -1).reshape(x.shape)


def card_of(blueprint, **changes):
    space = None if changes.get("architecture", 0) is None else table_of(SPACE)
    given = {
        "architecture": SPACE.largest,
        "space": space,
        "blueprint": blueprint,
        "cost": cost(blueprint),
        "preprocessing": PREPROCESSING,
        "class_names": tuple(f"class {i}" for i in range(10)),
        "origin": ORIGIN,
    }
    return Card(**(given | changes))


def trained(blueprint, seed=0):
    """A network whose batch-norm statistics and logits are of the size that training gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(blueprint).train()
        for _ in range(5):
            network(torch.randn(16, *blueprint.image))
        with torch.no_grad():
            network.head.linear.weight.mul_(10)
    return network.train()


@pytest.fixture(scope="module")
def blueprint():
    return SPACE.blueprint(SPACE.largest)


@pytest.fixture(scope="module")
def student(tmp_path_factory, blueprint):
    """Folder, network, card and parity numbers of one written student."""
    folder = tmp_path_factory.mktemp("run") / "students" / "best"
    network, card = trained(blueprint), card_of(blueprint)
    return folder, network, card, write_student(folder, network, card)


@pytest.fixture
def without_exporter(student, monkeypatch):
    """The graph of the written student in the place of every other, which would take seconds each."""
    graph = (student[0] / "student.onnx").read_bytes()
    monkeypatch.setattr(kdnas.students.forms, "graph_of", lambda *_, **__: graph)


@pytest.fixture
def copied(student, tmp_path):
    """A copy of the written student to damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((student[0] / name).read_bytes())
    return folder


def test_the_files_of_a_student_folder_compute_the_same(student):
    folder, _, _, parity = student
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert set(parity) == {"largest_logit", "student.py", "student.onnx"}
    assert parity["student.py"] <= 1e-5 and parity["student.onnx"] <= 1e-5 and parity["largest_logit"] > 0.1


def test_what_is_read_is_what_was_written(student):
    folder, network, card, _ = student
    before = torch.random.get_rng_state()
    found, found_card = read_student(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found_card == card and found_card.origin == ORIGIN
    assert not found.training and all(p.requires_grad for p in found.parameters())
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_writing_leaves_the_network_and_the_global_generator_alone(blueprint, tmp_path, without_exporter):
    network = trained(blueprint)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = torch.random.get_rng_state()
    write_student(tmp_path / "a", network, card_of(blueprint))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_the_graph_takes_any_batch_of_raw_images_and_resizes_none(student):
    import onnxruntime

    folder, _, card, _ = student
    graph = onnx.load(folder / "student.onnx")
    assert "Resize" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", [3, 8, 8])]
    images = torch.rand(5, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std))
    with torch.inference_mode():
        expected = read_student(folder)[0]((images - mean) / std).logits
    assert torch.allclose(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), expected, atol=1e-5)
    assert torch.allclose(load_source(folder)(images), expected, atol=1e-6)


def test_no_file_names_a_path_of_this_machine(student):
    folder, *_ = student
    roots = {str(Path(m.__file__).parents[1]) for m in (kdnas, torch)} | {str(folder.parents[1])}
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not any(root.encode() in content for root in roots), path.name


def test_the_card_tells_how_to_feed_the_files(student):
    held = json.loads((student[0] / "student.json").read_text())
    assert held["input"]["shape"] == ["batch", 3, 8, 8] and "not normalised" in held["input"]["values"]
    assert held["output"] == {"name": "logits", "shape": ["batch", 10]}
    assert held["cost"] == {"params": 2286, "macs": 80720}


def test_an_extracted_subnet_and_a_network_of_no_space_are_students_too(tmp_path, without_exporter):
    network = Supernet(SPACE).extract(SPACE.smallest)
    card = card_of(network.blueprint, architecture=None, space=None)
    write_student(tmp_path / "a", network, card, deploy=False)
    found, found_card = read_student(tmp_path / "a")
    assert found_card == card and found_card.architecture is None
    assert torch.equal(found.head.linear.weight, network.head.linear.weight)


@pytest.mark.slow
def test_writing_again_replaces_a_student_by_the_same_bytes(student):
    folder, network, card, _ = student
    before = {name: (folder / name).read_bytes() for name in FILES}
    write_student(folder, network, card)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_an_image_size_that_is_not_the_networks_is_resized_in_every_form(tmp_path, blueprint):
    preprocessing = dataclasses.replace(PREPROCESSING, height=12, width=10)
    parity = write_student(tmp_path / "a", trained(blueprint), card_of(blueprint, preprocessing=preprocessing))
    assert parity["student.onnx"] <= 1e-5
    assert "Resize" in {node.op_type for node in onnx.load(tmp_path / "a" / "student.onnx").graph.node}


def refuse(folder, network, card, message):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write_student(folder, network, card)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["params", "macs"])
def test_a_card_that_promises_another_cost_is_refused(tmp_path, blueprint, name):
    promised = cost(blueprint)._replace(**{name: 1234})
    refuse(tmp_path / "a", trained(blueprint), card_of(blueprint, cost=promised), "`Card.cost` is .*1,234")


def test_a_card_that_fits_the_network_in_no_other_way_is_refused(tmp_path, blueprint):
    network = trained(blueprint)
    smallest = SPACE.blueprint(SPACE.smallest)
    refuse(tmp_path / "a", network, card_of(smallest), "built from another blueprint")
    refuse(tmp_path / "a", network, card_of(blueprint, class_names=("a", "b")), "10 logits, .* has 2 names")
    refuse(tmp_path / "a", network, card_of(blueprint, origin={"score": float("nan")}), "plain JSON")
    refuse(tmp_path / "a", network, card_of(blueprint, origin={"path": Path("a")}), "plain JSON")
    refuse(tmp_path / "a", network, card_of(blueprint, origin={"pair": (1, 2)}), "plain JSON")
    with pytest.raises(ValueError, match="each of the network's 3 channels, got 1"):
        card_of(blueprint, preprocessing=dataclasses.replace(PREPROCESSING, mean=(0.5,), std=(0.5,)))
    with pytest.raises(ValueError, match="`class_names` must not be empty"):
        card_of(blueprint, class_names=())


def test_logits_that_prove_nothing_are_refused(tmp_path, blueprint):
    network = trained(blueprint)
    with torch.no_grad():
        network.head.linear.weight.fill_(float("nan"))
    refuse(tmp_path / "a", network, card_of(blueprint), "not finite")
    with torch.no_grad():
        network.head.linear.weight.zero_(), network.head.linear.bias.zero_()
    refuse(tmp_path / "a", network, card_of(blueprint), "every logit .* is zero")


def test_a_graph_of_other_weights_is_left_out_and_the_card_says_so(tmp_path, blueprint, without_exporter, log):
    network = trained(blueprint)
    with torch.no_grad():
        network.head.linear.bias[3] += 1e-3
    parity = write_student(tmp_path / "a", network, card_of(blueprint))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f for f in FILES if f != "student.onnx"]
    forms = read_student(tmp_path / "a")[1].forms
    assert "student.onnx gives other logits" in forms["onnx"]["problem"] and "student.onnx" not in parity
    assert "student.onnx is left out: student.onnx gives other logits" in log.text
    assert "`onnx` is left out" in (tmp_path / "a" / "README.md").read_text()


def test_small_logits_are_compared_by_their_own_size(tmp_path, blueprint, monkeypatch):
    network, source = trained(blueprint), kdnas.students.folder.student_source
    with torch.no_grad():
        network.head.linear.weight.mul_(1e-6), network.head.linear.bias.mul_(1e-6)
    monkeypatch.setattr(
        kdnas.students.folder,
        "student_source",
        lambda *a: source(*a).replace("return self.head", "return 1.0001 * self.head"),
    )
    refuse(tmp_path / "a", network, card_of(blueprint), "student.py gives other logits .* difference is 0.0001,")


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("stride=2", "stride=2, activation='swish'", "student.py gives other logits"),
        ("outputs=8", "outputs=7", "does not run alone .*size mismatch"),
        ("x = (resize", "import kdnas\n        x = (resize", "imports 'kdnas'"),
        ("return self.head", "return torch.zeros(1) * self.head", "student.py gives other logits"),
        ("import sys", "import sys\nimport numpy", "does not run alone .*imports 'numpy'"),
        ("return self.head(self.stages(self.stem(x)))", "return self.stem(x)", "student.py gives logits of shape"),
    ],
)
def test_code_that_computes_something_else_is_refused(tmp_path, blueprint, monkeypatch, written, instead, message):
    source = kdnas.students.folder.student_source
    monkeypatch.setattr(kdnas.students.folder, "student_source", lambda *a: source(*a).replace(written, instead))
    refuse(tmp_path / "a", trained(blueprint), card_of(blueprint), message)


def test_a_network_whose_logits_depend_on_the_batch_is_refused(tmp_path, blueprint):
    first, *rest = blueprint.stages
    changed = dataclasses.replace(blueprint, stages=((*first, layer(BatchDependent)), *rest))
    refuse(tmp_path / "a", trained(changed), card_of(changed), "student.py gives other logits .*depends on the batch")


@pytest.mark.slow
def test_a_layer_that_makes_a_number_of_the_batch_size_has_no_graph_and_len_has(tmp_path, blueprint):
    first, *rest = blueprint.stages
    for block in (Counting, Sized):
        changed = dataclasses.replace(blueprint, stages=((*first, layer(block)), *rest))
        if block is Sized:
            assert write_student(tmp_path / "a", trained(changed), card_of(changed))["student.onnx"] <= 1e-5
        else:
            write_student(tmp_path / "a", trained(changed), card_of(changed))
            problem = read_student(tmp_path / "a")[1].forms["onnx"]["problem"]
            assert "one batch size only" in problem and "x.shape[0]" in problem


def test_another_form_is_written_into_the_folder_and_its_measurements_are_returned(tmp_path, student, without_exporter):
    def more(draft):
        (draft / "student-int8.onnx").write_text("another form")
        return {"another": 0.25}

    parity = write_student(tmp_path / "a", *student[1:3], more=more)
    assert parity == student[3] | {"another": 0.25}
    assert (tmp_path / "a" / "student-int8.onnx").read_text() == "another form"


def test_a_refusal_keeps_the_student_that_was_there(copied, blueprint, student):
    before = {name: (copied / name).read_bytes() for name in FILES}
    refuse(copied, student[1], card_of(blueprint, cost=Cost(1, 1)), "`Card.cost` is")
    assert {name: (copied / name).read_bytes() for name in FILES} == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path, copied, blueprint, student):
    network, card = student[1:3]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("")
    refuse(other, network, card, "holds cat.png, which is no part of a student")
    refuse(other / "cat.png", network, card, "holds cat.png")
    refuse(other / "cat.png" / "a", network, card, "is a file")
    (copied / "notes.txt").write_text("mine")
    refuse(copied, network, card, "holds notes.txt")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "weights.safetensors").write_text("")
    refuse(tmp_path / "weights", network, card, "holds weights.safetensors")


def test_an_empty_folder_and_one_whose_code_was_run_are_written_to(tmp_path, copied, student, without_exporter):
    (tmp_path / "empty").mkdir()
    (copied / "__pycache__").mkdir()
    for folder in (tmp_path / "empty", copied):
        write_student(folder, *student[1:3], deploy=False)
        assert sorted(path.name for path in folder.iterdir()) == ["student.json", "weights.safetensors"]


def test_what_is_missing_is_named(tmp_path, copied):
    with pytest.raises(ValueError, match=r"there is no student .*nothing\. Write"):
        read_student(tmp_path / "nothing")
    (copied / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has no weights\.safetensors"):
        read_student(copied)
    (copied / "student.json").unlink()
    with pytest.raises(ValueError, match=r"it has no student\.json"):
        read_student(copied)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_weights_cut_short_are_refused(copied, kept):
    content = (copied / "weights.safetensors").read_bytes()
    (copied / "weights.safetensors").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: .*Export"):
        read_student(copied)


def test_weights_of_another_network_are_refused(copied):
    for name in ("extra", "stem.0.weight"):
        weights = load_file(copied / "weights.safetensors")
        weights[name] = torch.zeros(3)
        save_file(weights, copied / "weights.safetensors")
        with pytest.raises(ValueError, match=f"another network than student.json.*{name}"):
            read_student(copied)
        del weights[name]
        save_file(weights, copied / "weights.safetensors")
    with pytest.raises(ValueError, match="Missing key"):
        read_student(copied)


def change(folder, **changes):
    held = json.loads((folder / "student.json").read_text()) | {"format": 1} | changes
    (folder / "student.json").write_text(json.dumps({k: v for k, v in held.items() if v is not ...}, default=str))


def test_a_broken_card_is_refused(copied):
    text = (copied / "student.json").read_text()
    for broken in (text[:-20], "", "[]", "null", text.replace('"make"', '"made"'), "\udcff"):
        (copied / "student.json").write_bytes(broken.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"student\.json is damaged"):
            read_student(copied)


@pytest.mark.parametrize("junk", [None, 3, "text", [1], {"a": {}}, [[]], True])
def test_a_card_with_a_wrong_value_is_refused(copied, junk):
    text = (copied / "student.json").read_text()
    for key in ("architecture", "space", "blueprint", "cost", "preprocessing", "class_names", "origin", "format"):
        allowed = {"architecture": [None], "space": [None, {"a": {}}], "origin": [{"a": {}}], "format": [True]}
        if junk in allowed.get(key, []):
            continue
        change(copied, **{key: junk})
        with pytest.raises(ValueError, match=r"student\.json (is damaged|has format 3)"):
            read_student(copied)
        (copied / "student.json").write_text(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("blueprint", "stages", 0, 0, "arguments", "stride"), 2),
        (("preprocessing", "mean", 0), 0.41),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_card_that_computes_something_else_than_was_written_is_refused(copied, path, value):
    file = copied / "student.json"
    card = place = json.loads(file.read_text(encoding="utf-8"))
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    change(copied, **(card | {"format": 1}))
    with pytest.raises(ValueError, match="is damaged or was edited: the blueprint or the preprocessing"):
        read_student(copied)


@pytest.mark.parametrize("name", ["student.py", "student.onnx", "student-int8.onnx", "weights.safetensors"])
def test_every_form_of_a_student_is_compared_with_its_checksum_when_it_is_read(
    tmp_path, student, copied, blueprint, without_exporter, name
):
    _, network, card, _ = student
    more = lambda draft: (draft / "student-int8.onnx").write_text("another form") and {}  # noqa: E731
    write_student(copied, network, card, more=more)
    path, read = copied / name, partial(form_of, copied, name)
    if name in ("student.py", "weights.safetensors"):
        read = partial(load_source, copied)
    elif name == "student.onnx":
        read = partial(quantize, copied, tmp_path / "int8.onnx", None, None)
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(Damaged, match="checksum is another than"):
        read()
    assert form_of(copied, "student.py" if name != "student.py" else "student.onnx").is_file()


def test_the_origin_and_the_class_names_of_a_card_may_be_edited(copied):
    file = copied / "student.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    card["origin"]["remark"] = "of the second week"
    card["class_names"][0] = "another"
    file.write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(Damaged, match="of a file that you edited, set 'format' to 1"):
        read_student(copied)
    file.write_text(json.dumps(card | {"format": 1}), encoding="utf-8")
    _, card = read_student(copied)
    assert card.origin["remark"] == "of the second week" and card.class_names[0] == "another"


def test_a_card_of_another_format_or_with_other_keys_says_so(copied):
    text = (copied / "student.json").read_text()
    for changes, message in (
        ({"format": 99}, r"student\.json has format 99, and kdnas .* reads formats up to \d: a newer .* Update kdnas"),
        ({"orign": {}}, "unknown key 'orign'.*'origin'"),
        ({"cost": ...}, "`cost` is missing"),
    ):
        held = {k: v for k, v in (json.loads(text) | {"format": 1} | changes).items() if v is not ...}
        (copied / "student.json").write_text(json.dumps(held))
        with pytest.raises(ValueError, match=message):
            read_student(copied)


@pytest.mark.parametrize("path", ["shutil:rmtree", "subprocess:Popen", "os:system", "nowhere:Block"])
def test_reading_a_card_calls_nothing_but_layers(copied, tmp_path, path):
    keep = tmp_path / "keep"
    keep.mkdir()
    blueprint = json.loads((copied / "student.json").read_text())["blueprint"]
    blueprint["stem"] |= {"make": path, "arguments": {"path": str(keep)}}
    change(copied, blueprint=blueprint)
    with pytest.raises(ValueError, match=r"student\.json names code that is none"):
        read_student(copied)
    assert keep.is_dir()


def test_the_code_prints_the_network_and_classifies_a_tensor(copied, tmp_path, capsys):
    torch.save(torch.rand(3, 3, 8, 8), tmp_path / "images.pt")
    names = {"__name__": "student", "__file__": str(copied / "student.py")}
    exec((copied / "student.py").read_text(), names)
    names["main"]([])
    assert "2,286 parameters, 10 classes" in capsys.readouterr().out
    names["main"]([str(tmp_path / "images.pt")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.rpartition(" ")[0] in names["CLASS_NAMES"] for line in lines)


WITH_TORCH = """
sys.path.insert(0, sys.argv[1])
Blocker.admitted.add("student")
import json, student, torch
module = student.load(sys.argv[1] + "/weights.safetensors")
with torch.inference_mode():
    print(json.dumps(module(torch.tensor(json.loads(sys.argv[2]))).tolist()))
assert not {"safetensors", "numpy", "kdnas"} & {name.partition(".")[0] for name in sys.modules}
"""
WITH_ONNXRUNTIME = """
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/student.onnx", providers=["CPUExecutionProvider"])
images = numpy.array(json.loads(sys.argv[2]), numpy.float32)
print(json.dumps(session.run(["logits"], {"images": images})[0].tolist()))
assert not {"torch", "onnx", "kdnas"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("distribution", "code"), [("torch", WITH_TORCH), ("onnxruntime", WITH_ONNXRUNTIME)])
def test_a_student_runs_where_nothing_else_is_installed(student, tmp_path, distribution, code):
    folder, _, card, _ = student
    images = torch.rand(2, 3, 8, 8)
    logits = json.loads(run_alone(distribution, code, folder, json.dumps(images.tolist()), folder=tmp_path))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std))
    with torch.inference_mode():
        expected = read_student(folder)[0]((images - mean) / std).logits
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)


def test_the_code_reads_weights_as_the_library_does_and_refuses_damaged_ones(copied):
    names = {"__name__": "student"}
    exec((copied / "student.py").read_text(), names)
    path = copied / "weights.safetensors"
    theirs, ours = load_file(path), names["read_weights"](path)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in theirs)
    assert all(theirs[n].dtype == ours[n].dtype and theirs[n].shape == ours[n].shape for n in theirs)
    content = path.read_bytes()
    for damaged in (b"", content[:4], content[:100], content[:-1], b"x" * 64, content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged or no safetensors file"):
            names["load"](path)


def shallow(space):
    """The first options everywhere; to look for the smallest network would count the costs of all options."""
    return space.decide(lambda choice: choice.options[0])


def families():
    """Of every family the space whose shallow network has the fewest layers."""
    spaces = [load_space(path.stem) for path in sorted(shared_folder("search_spaces").glob("*.toml"))]
    spaces.sort(key=lambda space: -len(list(space.blueprint(shallow(space)).named_layers())))
    return {type(space).__name__: space for space in spaces}


FAMILIES = families()
SHORTER = {
    "ViT": {"depths": (2,), "cuts": (1,)},
    "Shuffle": {"stages": tuple(dataclasses.replace(stage, depth=2) for stage in FAMILIES["Shuffle"].stages[:2])},
}
"""The exporter's time grows with the layers, which are all alike."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_student_of_every_family_is_written(tmp_path, name):
    space = dataclasses.replace(FAMILIES[name], **SHORTER.get(name, {}))
    if min(space.resolutions) > 32:
        space = dataclasses.replace(space, resolutions=(32,))
    architecture = shallow(space)
    blueprint = space.blueprint(architecture)
    channels, side, _ = blueprint.image
    torch.manual_seed(0)
    network = Network(blueprint).train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(4, *blueprint.image))
    card = Card(
        architecture=architecture,
        space=table_of(space),
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=Preprocessing(height=side, width=side, mean=(0.5,) * channels, std=(0.25,) * channels),
        class_names=tuple(map(str, range(space.classes))),
    )
    parity = write_student(tmp_path / "a", network, card)
    assert parity["student.py"] <= 1e-5 and parity["student.onnx"] <= 1e-5
    assert read_student(tmp_path / "a")[1] == card


def test_the_card_of_a_network_takes_classes_and_preprocessing_from_the_data():
    data = digits()
    space = SPACE.fitted(classes=data.classes, image_channels=data.channels)
    network = Network(space.blueprint(space.smallest))
    card = Card.of(network, data, ORIGIN, space.smallest, space)
    assert card == Card(
        architecture=space.smallest,
        space=table_of(space),
        blueprint=network.blueprint,
        cost=cost(network.blueprint),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        origin={**ORIGIN, "fingerprint": data.fingerprint},
    )
    alone = Card.of(network, data, {})
    assert alone.architecture is None and alone.space is None
