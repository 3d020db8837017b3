import dataclasses
import inspect
import json
import typing
from typing import Any, Literal

import pytest
from torch import nn

from kdnas import settings
from kdnas.jobs._arguments import load_experiment
from kdnas.scorers.base import Scorer
from kdnas.specs import Spec, algorithms, check_literals, find_spec, nearest, parse_spec, resolve, spec


def test_a_spec_builds_what_it_names_and_hands_nested_specs_on():
    made = spec("torch.nn:Linear", in_features=2, out_features=3).build(nn.Module)
    assert made.weight.shape == (3, 2)
    sandwich = find_spec("kdnas.distillers", "sandwich", soft=find_spec("kdnas.losses", "soft_targets")).build()
    assert type(sandwich.soft).__name__ == "SoftTargets"


def test_equal_specs_are_equal_hashable_and_survive_json():
    inner = spec("torch.nn:ReLU")
    one = spec("torch.nn:Linear", in_features=2, out_features=3)
    assert one == spec("torch.nn:Linear", out_features=3, in_features=2)
    assert len({one, spec(nn.Linear.__module__ + ":Linear", in_features=2, out_features=3)}) == 2
    nested = spec("a:b", terms=((0.5, inner), (1, one)), flag=True, nothing=None)
    assert Spec.from_json(json.loads(json.dumps(nested.to_json()))) == nested


def test_a_changed_argument_makes_another_spec():
    one = spec("torch.nn:Linear", in_features=2, out_features=3)
    assert one.replace(out_features=4)["out_features"] == 4
    assert one["out_features"] == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.nn:Liner", "Did you mean 'Linear'"),
        ("no_such_module:x", "cannot import"),
        ("torch", "package.module:name"),
        ("os:system", "class or a function"),
        ("math:pi", "class or a function"),
    ],
)
def test_what_cannot_be_made_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        resolve(path)


def test_an_unknown_or_a_missing_argument_is_named():
    with pytest.raises(ValueError, match=r"has no argument 'in_feature'.*in_features"):
        spec("torch.nn:Linear", in_feature=2, out_features=3).build()
    with pytest.raises(ValueError, match="needs the argument 'out_features'"):
        spec("torch.nn:Linear", in_features=2).build()


def of_any(first, /, second, *, third, **more):
    raise AssertionError("it was called")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs the argument 'first'"),
        ({"first": 1, "second": 2, "third": 3}, "must take the argument 'first' by name"),
        ({"other": 1}, "needs the argument 'first'"),
    ],
)
def test_arguments_are_looked_at_before_a_call_whatever_else_it_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        spec(of_any, **arguments).build()


def test_what_is_built_must_be_what_was_expected():
    with pytest.raises(ValueError, match="ReLU is not a subclass of Linear"):
        spec("torch.nn:ReLU").build(nn.Linear)


def test_objects_and_lambdas_are_no_arguments():
    with pytest.raises(ValueError, match="numbers, strings, tuples and specs"):
        spec("torch.nn:Linear", bias=nn.ReLU())
    with pytest.raises(ValueError, match="no importable name"):
        spec(lambda: 0)


@pytest.mark.parametrize("package", ["losses", "distillers", "scorers", "searchers"])
def test_every_algorithm_file_defines_the_class_it_is_named_for_with_a_reference(package):
    found = algorithms(f"kdnas.{package}")
    assert found
    for name, path in found.items():
        made = resolve(path)
        assert isinstance(made, type), path
        assert "Reference:" in (made.__doc__ or ""), name
        assert getattr(made, "__final__", False), name


def test_the_nearest_name_is_offered_and_all_when_none_is_near():
    assert nearest("evolutoin", ["evolution", "random"]) == " Did you mean 'evolution'?"
    assert nearest("xyz", ["evolution", "random"]) == " Known: evolution, random."
    with pytest.raises(ValueError, match="Did you mean 'evolution'"):
        find_spec("kdnas.searchers", "evolutoin")


def test_a_typed_name_carries_its_options():
    made = parse_spec("kdnas.scorers", "rdm,compare=spearman,premature=0.5")
    assert made == find_spec("kdnas.scorers", "rdm", compare="spearman", premature=0.5)
    assert made.name == "rdm"
    assert parse_spec("kdnas.searchers", "evolution,population=8") == find_spec(
        "kdnas.searchers", "evolution", population=8
    )
    assert parse_spec("kdnas.scorers", "rdm") == find_spec("kdnas.scorers", "rdm")
    assert dict(parse_spec("tests.toy", "tests.test_specs:takes,a=true,b=-1e-3,c=x+y").arguments) == {
        "a": True,
        "b": -1e-3,
        "c": "x+y",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "rank_ensemble,members=in_place,scorer=loss+nwot",
            {"members": (find_spec("kdnas.scorers", "in_place", scorer="loss"), "nwot")},
        ),
        ("rank_ensemble,members=in_place+depth,num_reference=9", {"members": "in_place+depth", "num_reference": 9}),
        (
            "rank_ensemble,members=rdm,premature=5e-1+nwot,num_reference=9",
            {"members": (find_spec("kdnas.scorers", "rdm", premature=0.5), "nwot"), "num_reference": 9},
        ),
        ("rank_ensemble,members=nwot", {"members": "nwot"}),
        ("reward,scorer=accuracy,target=5e4,exponent=-1", {"scorer": "accuracy", "target": 5e4, "exponent": -1}),
        ("reward,scorer=in_place,scorer=loss", {"scorer": find_spec("kdnas.scorers", "in_place", scorer="loss")}),
        (
            "in_place,scorer=loss,loss=soft_targets,temperature=2",
            {
                "scorer": find_spec(
                    "kdnas.scorers", "loss", loss=find_spec("kdnas.losses", "soft_targets", temperature=2)
                )
            },
        ),
        (
            "predicted,members=rdm,premature=1+macs,target=short_training,steps=4,distiller=from_labels,num_fitted=5",
            {
                "members": (find_spec("kdnas.scorers", "rdm", premature=1), "macs"),
                "target": find_spec(
                    "kdnas.scorers", "short_training", steps=4, distiller=find_spec("kdnas.distillers", "from_labels")
                ),
                "num_fitted": 5,
            },
        ),
        (
            "rank_ensemble,members=predicted,members=macs+params",
            {"members": (find_spec("kdnas.scorers", "predicted", members="macs+params"),)},
        ),
    ],
)
def test_an_option_belongs_to_the_nearest_algorithm_that_has_it(text, expected):
    typed = parse_spec("kdnas.scorers", text)
    assert typed == find_spec("kdnas.scorers", text.partition(",")[0], **expected)
    typed.build(Scorer)


def takes(a, b, c):
    return a, b, c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rdm,compar=spearman", "rdm has no option 'compar'. Did you mean 'compare'"),
        ("rdm,compare", "NAME,key=value"),
        ("rdm,=3", "NAME,key=value"),
        ("rmd", "Did you mean 'rdm'"),
        ("rdm,premature=much", "premature of rdm must be a number, got 'much'"),
        ("rdm,premature=nan", "premature of rdm must be a number, got nan"),
        ("short_training,steps=2.5", "steps of short_training must be a whole number, got 2.5"),
        ("short_training,steps=true", "steps of short_training must be a whole number, got True"),
        ("short_training,distiller=from_lables", "Did you mean 'from_labels'"),
        ("rank_ensemble,weights=2", "weights of rank_ensemble must be made in an experiment file, got 2"),
        (
            "rank_ensemble,members=in_place,scorrer=loss+nwot",
            "in_place and rank_ensemble have no option 'scorrer'. Did",
        ),
        ("rank_ensemble,members=nwot,scorer=loss", "nwot and rank_ensemble have no option 'scorer'"),
        ("rank_ensemble,members=in_place,scorer=los+nwot", "'los' is not in kdnas.scorers. Did you mean 'loss'"),
        ("rank_ensemble,members=in_place+nwto", "Did you mean 'nwot'"),
        ("rank_ensemble,members=in_place++nwot", "'in_place\\+' is not in kdnas.scorers"),
        ("rank_ensemble,members=in_place,nwot", "got 'nwot' in .* Several members are joined by \\+"),
        ("in_place,scorer=loss,scorer=cka", "scorer of in_place must be given once"),
        ("rdm,compare=spearman,compare=pearson", "compare of rdm must be given once"),
    ],
)
def test_options_that_are_not_there_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec("kdnas.scorers", text)


def blur(
    *,
    mode: Literal["box", "gaussian"] = "box",
    levels: Literal[1, 2] = 1,
    sizes: Literal["all"] | tuple[int, ...] = "all",
    edge: Literal["wrap"] | None = None,
    name: str = "",
) -> None:
    check_literals(blur, locals())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "`mode` must be one of box, gaussian, got 'median'."),
        ({"mode": None}, "`mode` must be one of box, gaussian, got None."),
        ({"levels": 3}, "`levels` must be one of 1, 2, got 3."),
        ({"sizes": "some"}, "`sizes` must be one of all or tuple[int, ...], got 'some'."),
        ({"edge": "cut"}, "`edge` must be one of wrap or None, got 'cut'."),
    ],
)
def test_an_argument_outside_its_literal_is_refused_with_the_known_values(options, message):
    with pytest.raises(ValueError) as error:
        blur(**options)
    assert str(error.value) == message


def test_values_of_a_literal_and_of_the_types_beside_it_are_accepted():
    blur()
    blur(mode="gaussian", levels=2, sizes=(1, 2), edge="wrap", name="any")


def literals(target: Any) -> list[str]:
    """The parameters that take one of a few strings or numbers."""
    kinds = {
        name: (parameter.annotation, *typing.get_args(parameter.annotation))
        for name, parameter in inspect.signature(target).parameters.items()
        if typing.get_origin(parameter.annotation) is not tuple
    }
    return [name for name, parts in kinds.items() if any(typing.get_origin(part) is Literal for part in parts)]


KINDS = ("losses", "scorers", "searchers", "distillers")
ALGORITHMS = [resolve(path) for kind in KINDS for path in algorithms(f"kdnas.{kind}").values()]
SETTINGS = [
    value
    for value in vars(settings).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == "kdnas.settings"
]
CHECKED = [(target, name) for target in (*ALGORITHMS, *SETTINGS) for name in literals(target)]


@pytest.mark.parametrize(("target", "name"), CHECKED, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_of_an_algorithm_or_setting_that_takes_a_few_values_refuses_another(target, name):
    required = {
        parameter.name: None
        for parameter in inspect.signature(target).parameters.values()
        if parameter.default is parameter.empty
    }
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got 'another'"):
        target(**(required | {name: "another"}))


@pytest.mark.parametrize(
    "text", ["1 / 0", "raise KeyError('\\x1b[2J')", "def experiment(x): ...", "experiment = 3", "("]
)
def test_code_of_a_person_that_fails_is_a_sentence_with_its_place(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(f"\n{text}\n")
    with pytest.raises(ValueError, match=r"mine\.py cannot be run: \w+Error: .*line \d+.*\. Mend it\.") as error:
        load_experiment(str(path))
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match=r"subprocess:run cannot be run: TypeError: .*line \d+ of subprocess.py"):
        spec("subprocess:run").build()
