import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdnas.cli.commands import COMMANDS, main, parser, sub_parsers
from kdnas.cli.parser import typed
from kdnas.plain import show
from kdnas.settings import Recipe, RecipeOptions, Search
from kdnas.specs import parse_spec
from tests.data.test_base import write_images

ROOT = Path(__file__).parents[2]


def refused(capsys, *arguments):
    """The message of a command that must end with exit code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_package_runs_as_a_module_too():
    asked = [sys.executable, "-m", "kdnas", "--help"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert said.startswith("usage: kdnas ") and "retrain" in said


def test_help_and_values_need_no_torch_and_come_at_once():
    code = "from kdnas.cli.commands import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "import random; from kdnas.tables import load_space; s = load_space('nas_bench_macro'); s.count()\n"
    code += "s.validate(s.sample(random.Random(0)))"
    run = f"import sys; from tests.counting import counted; calls = counted(lambda: exec({code!r}, {{}}))[1]\n"
    run += "packages = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
    run += "print(calls, *(name for name in packages if not name.startswith('_')))"
    said = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    calls, *packages = said.splitlines()[-1].split()
    assert set(packages) <= {"attr", "attrs", "cattrs", "kdnas", "tests", "typing_extensions"}
    assert int(calls) < 600_000


def test_the_options_of_a_recipe_are_its_fields():
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    assert set(RecipeOptions.__annotations__) == set(fields)
    for name in ("run", "train", "retrain", "prune", "grow"):
        options = {action.dest: action for action in sub_parsers(parser())[name]._actions}
        for field in fields.values():
            assert options[field.name].type is type(field.default), (name, field.name)
            assert options[field.name].default is None


def test_options_and_their_defaults_are_those_of_the_functions():
    for name, command in COMMANDS.items():
        options = {action.dest: action for action in sub_parsers(parser())[name]._actions}
        for parameter in inspect.signature(command.function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD or parameter.name not in options:
                continue
            default = options[parameter.name].default
            if parameter.default is not parameter.empty:
                assert default == (list(parameter.default) if parameter.default == () else parameter.default)


def test_every_command_that_computes_takes_a_device():
    parsers = sub_parsers(parser())
    # The reference values of losses are those of a CPU.
    without = {name for name in parsers if all(action.dest != "device" for action in parsers[name]._actions)}
    assert without == {"report", "track", "push", "list", "losses"}
    for name in parsers.keys() - without:
        assert "default: a GPU" in " ".join(parsers[name].format_help().split()), name


def test_the_default_scorer_is_shown_as_it_would_be_typed():
    assert parse_spec("kdnas.scorers", typed(Search.scorer)) == Search.scorer


def test_help_shows_every_default():
    text = sub_parsers(parser())["run"].format_help()
    flat = " ".join(text.split())
    for default in (
        "(default: evolution)",
        "(default: 200)",
        "(default: 0.1)",
        "(default: sandwich)",
    ):
        assert default in flat
    assert "(default: 1000)" not in flat  # the chain's number of steps follows the data
    assert "30 epochs" in flat
    assert f"(default:{typed(Search.scorer)})" in "".join(text.split())  # too long for a line
    text = {name: " ".join(sub_parsers(parser())[name].format_help().split()) for name in ("prune", "compare", "list")}
    assert (
        "(default: 1000)" not in text["prune"] and "(default: 0.1)" not in text["prune"]
    )  # it has defaults of its own
    assert "(default: 0)" in text["compare"] and "in seconds or such as 20m (default: 1200.0)" in text["compare"]
    assert "{spaces,losses," in text["list"]


def test_every_command_has_a_line_of_help_and_every_option_too():
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    assert set(commands) >= {"demo", "run", "train", "search", "export", "retrain", "report", "list", "losses", "taps"}
    for command in commands.values():
        assert command.description
        for action in command._actions:
            assert action.help or action.choices, (command.prog, action.dest)


@pytest.mark.parametrize("what", ["spaces", "losses", "distillers", "scorers", "searchers", "data", "experiments"])
def test_every_list_names_what_there_is(capsys, what):
    main(["list", what])
    lines = capsys.readouterr().out.strip().splitlines()
    known = {
        "spaces": "digits",
        "losses": "alpha_divergence",
        "distillers": "sandwich",
        "scorers": "rdm",
        "searchers": "evolution",
        "data": "cifar10:PATH",
        "experiments": "demo",
    }
    assert any(line.startswith(known[what]) for line in lines)
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_a_misspelt_command_or_option_gets_the_nearest(capsys):
    assert "Did you mean search?" in refused(capsys, "serch", "x")
    assert "Did you mean --steps?" in refused(capsys, "train", "demo", "--out", "x", "--setps", "3")
    assert "a number and s, m or h" in refused(capsys, "search", "x", "--max-time", "soon")
    assert "Did you mean" not in refused(capsys, "export", "x", "--place", "zero")


@pytest.mark.parametrize(
    "twice",
    [
        ["--data", "digits", "--data", "toy"],
        ["--steps", "300", "--steps", "300"],
        ["--deploy", "--no-deploy"],
        ["demo", "--experiment", "demo"],
    ],
)
def test_an_option_that_is_given_twice_is_refused(capsys, twice):
    assert f"argument {twice[-2] if len(twice) > 3 else ''}" in (error := refused(capsys, "run", "--out", "x", *twice))
    assert "must be given once" in error


def test_what_an_output_cannot_spell_is_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    main(["list", "spaces"])
    show("größer → \U0001f600")
    assert output.buffer.getvalue().endswith(b"gr\\xf6\\xdfer \\u2192 \\U0001f600\n")


RUN = ["run", "--data", "tests.toy:data", "--space", "toy", "--out", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data", "digts", "--space", "toy", "--out", "OUT"], "Did you mean 'digits'"),
        (["run", "--data", "folder:/no/such", "--space", "toy", "--out", "OUT"], "there is no folder"),
        (["run", "--data", "digits", "--space", "toyy", "--out", "OUT"], "Did you mean 'toy'"),
        (["run", "--data", "digits", "--space", "no/such.toml", "--out", "OUT"], "there is no file"),
        ([*RUN, "--budget", "macs"], "name=number"),
        ([*RUN, "--budget", "mac=5"], "Did you mean 'macs'"),
        ([*RUN, "--budget", "macs=-1"], "must be positive"),
        ([*RUN, "--scorer", "rmd"], "Did you mean 'rdm'"),
        ([*RUN, "--searcher", "evoluton"], "Did you mean 'evolution'"),
        ([*RUN, "--distiller", "sandwhich"], "Did you mean 'sandwich'"),
        ([*RUN, "--distiller", "mutual,num_peers=x"], "num_peers of mutual must be a whole number, got 'x'"),
        ([*RUN, "--loss", "hint=nan"], "must be a finite number of at least 0, got 'nan'"),
        ([*RUN, "--loss", "hint,stag=2"], "hint has no option 'stag'"),
        ([*RUN, "--loss", "self_attention=x,start=0.5"], "the weight of self_attention must be a finite number"),
        ([*RUN, "--loss", "hint=-1"], "the weight of hint must be a finite number of at least 0, got '-1'"),
        ([*RUN, "--budget", "latency=5"], "the bound of latency must be a number with a unit, s, ms, us, got '5'"),
        ([*RUN, "--num-evaluations", "0"], "`--num-evaluations` must be at least 1, got 0"),
        ([*RUN, "--batch-size", "-1"], "`--batch-size` must be at least 1, got -1"),
        ([*RUN, "--max-time", "-5s"], "`--max-time` must be positive and finite, got '-5s'"),
        (
            [*RUN, "--max-time", "1h2x"],
            "must be a number and s, m or h, such as 300s or 1h30m, got '1h2x'",
        ),
        (["search", "OUT", "--top", "0"], "`--top` must be at least 1, got 0"),
        (["quantize", "OUT", "--most", "3"], "`--most` must be at most 1, got 3.0"),
        ([*RUN, "--scorer", ""], "--scorer is empty"),
        ([*RUN, "--loss", ""], "--loss is empty"),
        ([*RUN, "--teacher", "torchvision:resnet1@w.safetensors"], "torchvision has no"),
        ([*RUN, "--teacher", "checkpoint:/no/such"], "there is no student"),
        ([*RUN, "--teacher", "tests.toy:other_classes"], "has 7 classes, the data 3"),
        ([*RUN, "--optimizer", "adm"], "choose from 'sgd', 'adamw'"),
        (["run", "--space", "toy", "--out", "OUT"], "--data is missing"),
        (["run", "--experiment", "dmo", "--out", "OUT"], "Did you mean 'demo'"),
        (["train", "no_such", "--out", "OUT"], "no experiment is named"),
        (["train", "no_such.py", "--out", "OUT"], "there is no file"),
        (["search", "OUT"], "there is no run"),
        (["export", "OUT"], "there is no run"),
        (["retrain", "OUT"], "there is no student"),
        (["report", "OUT"], "there is no run"),
        (["taps", "fit", "toy", "--data", "tests.toy:data"], "exists in a run only"),
    ],
)
def test_bad_input_gets_the_rule_the_value_and_the_fix(capsys, tmp_path, arguments, message):
    out = str(tmp_path / "out")
    assert message in refused(capsys, *(out if a == "OUT" else a for a in arguments))


TABLE = """
family = "toy"
widths = [4]
depths = [1]
"""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE, "at least two architectures"),
        (TABLE + "num_stagse = 2", "Did you mean 'num_stages'"),
        (TABLE + 'num_stages = "2"', "num_stages must be an int"),
        (TABLE.replace("toy", "tooy"), "Did you mean 'toy'"),
        (TABLE + "=", "not valid TOML"),
        ("widths = [4]", "must have the key `family`"),
    ],
)
def test_a_table_with_a_mistake_is_refused(capsys, tmp_path, table, message):
    path = tmp_path / "mine.toml"
    path.write_text(table)
    error = refused(capsys, "run", "--data", "tests.toy:data", "--space", str(path), "--out", str(tmp_path / "out"))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_class_with_one_image_is_refused(capsys, tmp_path):
    write_images(tmp_path / "images", {"cat": 9, "dog": 1})
    error = refused(
        capsys, "run", "--data", f"folder:{tmp_path / 'images'}", "--space", "toy", "--out", str(tmp_path / "out")
    )
    assert "class 'dog' has 1." in error


def test_a_folder_that_holds_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("work of years")
    error = refused(capsys, "train", "tests/toy.py", "--out", str(tmp_path))
    assert "thesis.tex" in error
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_same_command_line_makes_the_same_experiment_as_python():
    from kdnas.jobs._arguments import load_experiment
    from kdnas.settings import Experiment

    for name in ("demo", "tests/toy.py"):
        made = load_experiment(name)
        assert Experiment.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_seed_of_a_whole_chain_is_that_of_its_search_too(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("kdnas.jobs.chain.chain", lambda experiment, out, **_: made.append(experiment))
    for given in ([], ["--seed", "5"]):
        main(["run", "--data", "tests.toy:data", "--space", "toy", "--out", str(tmp_path), *given])
    seeds = [(e.train.recipe.seed, e.train.teacher.recipe.seed, e.search.seed, e.retrain.recipe.seed) for e in made]
    assert seeds == [(0, 0, 0, 0), (5, 5, 5, 5)]


def test_a_loss_is_named_with_its_weight_on_the_command_line():
    from kdnas.jobs._arguments import terms_of

    made = terms_of(["attention_transfer", "hint=3"]).build()
    assert made.objective.weights == (1.0, 1000.0, 3.0)
    with pytest.raises(ValueError, match="Did you mean 'hint'"):
        terms_of(["hnt"])
    with pytest.raises(ValueError, match="must be a finite number"):
        terms_of(["hint=much"])


def test_taps_prints_a_line_per_pair(capsys):
    main(["taps", "tests.toy:cnn", "toy", "--data", "tests.toy:data"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    assert "conv1x1" in lines[1]


def test_a_command_whose_progress_nobody_reads_any_more_is_not_done(monkeypatch):
    def unread():
        """Tell a closed pipe."""
        raise BrokenPipeError

    monkeypatch.setitem(COMMANDS, "list", COMMANDS["list"]._replace(function=unread))
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 141


def test_a_working_folder_that_was_removed_is_no_error_where_none_is_needed(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    main(["list", "losses"])
    assert "hint" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["list", "spaces"], ["list", "--help"]])
def test_a_reader_that_has_enough_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)  # before the first line, so that writing fails whenever it comes
    command = [sys.executable, "-m", "kdnas", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300s", 300),
        ("20m", 1200),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("90", 90),
        (2.5, 2.5),
        ("1e3", 1000),
    ],
)
def test_times_have_units(text, expected):
    from kdnas.values import seconds

    assert seconds(text) == expected


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_a_sentence(capsys, monkeypatch, error):
    def fail(name, values):
        raise error

    monkeypatch.setattr("kdnas.cli.commands._execute", fail)
    assert "not enough memory. Lower --batch-size" in refused(capsys, "list", "losses")


def test_other_errors_of_the_program_are_not_hidden(monkeypatch):
    def fail(name, values):
        raise RuntimeError("a bug")

    monkeypatch.setattr("kdnas.cli.commands._execute", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list", "losses"])
