"""A subnet's score explained by stages and choices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.count import cost, layer_costs, sum_costs
from kdnas.jobs._run import Run
from kdnas.jobs.predict import beliefs_of
from kdnas.runs.files import write_json
from kdnas.runs.folder import WHY
from kdnas.scorers.base import Evidence, Score, score_all
from kdnas.similarity import dissimilarity, rdm_similarity
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import Spec


def why(
    run: Run, code: str, *, scorer: Spec | None = None, num_images: int | None = None, read_only: bool = False
) -> dict[str, Any]:
    """Explain one subnet of a run; writes `why.json`, which the report draws, and returns its content.

    - `similarity`: Pearson correlation of the dissimilarity matrices of every student stage (rows; the logits are the
      last) and every teacher stage (columns), with batch statistics.
    - `stages`: cost of stem, stages and head, and their shares of the whole.
    - `choices`: for every other option of every choice, score, params and macs of the network with that option, and
      their differences to this one; choices that exist only in that network take their first option. Sorted by score.
    - `trainings`: where a search has trainings, the accuracy that their predictor believes in, with its 90 % interval;
      every element of `choices` then has the believed `accuracy difference` and the ends `low` and `high` of its 90 %
      interval, and the choices are sorted by it.

    Args:
        run: a run with a trained supernet.
        code: of the architecture, in the space's code.
        scorer: by default that of the run's search.
        num_images: search images; by default as many as the run's search uses.
        read_only: do not write `why.json`.

    Raises:
        ValueError: the code is invalid in the space, or the supernet is not trained.
    """
    space, settings = run.space, run.experiment.search
    architecture = space.parse(code)
    scorer = scorer or settings.scorer
    evidence = run.evidence(settings.num_images if num_images is None else num_images, settings.seed)
    changes = list(neighbours(space, architecture))
    networks = [architecture, *dict.fromkeys(other for _, _, other in changes)]
    scores = dict(zip(networks, score_all(run.supernet, networks, run.scorer(scorer), evidence), strict=True))
    explanation: dict[str, Any] = {
        "code": space.code(architecture),
        "architecture": dict(architecture),
        "scorer": scorer.name,
        "score": scores[architecture].value,
        "parts": scores[architecture].parts,
        **cost(space.blueprint(architecture))._asdict(),
        "images": len(evidence.labels),
        "similarity": _similarity(run, architecture, evidence),
        "stages": _stages(space.blueprint(architecture)),
        "choices": _choices(space, architecture, changes, scores),
    }
    beliefs = beliefs_of(run, networks)
    if beliefs is not None:
        believed = dict(zip(map(space.code, networks[1:]), beliefs.pop("changes"), strict=True))
        for choice in explanation["choices"]:
            choice.update(zip(("accuracy difference", "low", "high"), believed[choice["code"]], strict=True))
        explanation["choices"].sort(key=lambda choice: -choice["accuracy difference"])
        explanation["trainings"] = beliefs
    if not read_only:
        run.storage.own()
        write_json(run.storage.path(WHY), explanation)
    return explanation


def _similarity(run: Run, architecture: Architecture, evidence: Evidence) -> dict[str, Any]:
    with torch.no_grad():
        outputs = run.supernet(evidence.images, architecture, batch_statistics=True)
        student = [dissimilarity(f) for f in (*outputs.features, outputs.logits)]
        teacher = [dissimilarity(f) for f in (*evidence.teacher.features, evidence.teacher.logits)]
        values = [[round(float(rdm_similarity(s, t)), 6) for t in teacher] for s in student]
    names = ([*(f"stage {i}" for i in range(len(side) - 1)), "logits"] for side in (student, teacher))
    return {**dict(zip(("student", "teacher"), names, strict=True)), "values": values}


def _stages(blueprint: Blueprint) -> list[dict[str, Any]]:
    whole = cost(blueprint)
    layers: dict[str, list[Any]] = {}
    for position, layer in layer_costs(blueprint).items():
        layers.setdefault(_stage_of(position), []).append(layer)
    stages = []
    for name, costs in layers.items():
        c = sum_costs(costs)
        shares = {f"share of {n}": round(getattr(c, n) / max(1, getattr(whole, n)), 6) for n in c._fields}
        stages.append({"stage": name, "layers": len(costs), **c._asdict(), **shares})
    return stages


def _choices(
    space: SearchSpace,
    architecture: Architecture,
    changes: Sequence[tuple[Choice, Value, Architecture]],
    scores: Mapping[Architecture, Score],
) -> list[dict[str, Any]]:
    whole, score = cost(space.blueprint(architecture)), scores[architecture].value
    choices: list[dict[str, Any]] = []
    for choice, option, other in changes:
        c, value = cost(space.blueprint(other)), scores[other].value
        choices.append(
            {
                "choice": choice.name,
                "from": architecture[choice.name],
                "to": option,
                "code": space.code(other),
                "score": value,
                "score difference": value - score,
                **c._asdict(),
                "params difference": c.params - whole.params,
                "macs difference": c.macs - whole.macs,
            }
        )
    return sorted(choices, key=lambda c: (-c["score"], c["macs"], c["code"]))


def neighbours(space: SearchSpace, architecture: Architecture) -> Iterator[tuple[Choice, Value, Architecture]]:
    """Every network that differs in one choice: the choice, the other option, and the network.

    Options that are another spelling of the same network are left out.
    """
    for choice in space.choices:
        if choice.name in architecture:
            for option in choice.options:
                if option != architecture[choice.name]:
                    changed: Mapping[str, Value] = {**architecture, choice.name: option}
                    other = space.decide(lambda c, changed=changed: changed.get(c.name, c.options[0]))
                    if other != architecture:
                        yield choice, option, other


def _stage_of(position: str) -> str:
    first, _, rest = position.partition(".")
    return first if first != "stages" else f"stage {rest.partition('.')[0]}"


def why_table(explanation: Mapping[str, Any]) -> str:
    """What `why` returns, as tables."""
    columns = explanation["similarity"]["teacher"]
    lines = [
        "{code}: {scorer} {score:.4f}, {params:,} params, {macs:,} MACs".format(**explanation),
        "parts of the score: " + ", ".join(f"{name} {value:.4f}" for name, value in explanation["parts"].items()),
        "",
        "similarity of dissimilarity matrices, student (down) to teacher (across); * the best of a column",
        f"{'':<10}" + "".join(f"{'teacher ' + c:>18}" for c in columns),
    ]
    values = explanation["similarity"]["values"]
    tops = [max(column) for column in zip(*values, strict=True)]
    for name, row in zip(explanation["similarity"]["student"], values, strict=True):
        cells = [f"{v:.3f}{'*' if v == top else ' '}" for v, top in zip(row, tops, strict=True)]
        lines.append(f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells))
    lines += ["", f"{'cost':<10}{'layers':>8}{'params':>14}{'':>8}{'MACs':>16}"]
    for s in explanation["stages"]:
        lines.append(
            f"{s['stage']:<10}{s['layers']:>8}{s['params']:>14,}{s['share of params']:>8.1%}{s['macs']:>16,}"
            f"{s['share of macs']:>8.1%}"
        )
    believed = explanation.get("trainings")
    if believed:
        text = "{measure} on the search part, as {results} trainings predict it: {accuracy:.2%} [{low:.2%}, {high:.2%}]"
        lines += ["", text.format(**believed)]
    width = max((len(c["choice"]) for c in explanation["choices"]), default=6)
    code = max((len(c["code"]) for c in explanation["choices"]), default=4)
    lines += [
        "",
        "what changing one choice does, best first",
        f"{'choice':<{width}}  {'from':>9}  {'to':>9}  {'score':>9}{'params':>14}{'MACs':>16}"
        f"{believed['measure'] + ', points' if believed else '':>{26 if believed else 0}}  {'code':<{code}}",
    ]
    for c in explanation["choices"]:
        lines.append(
            f"{c['choice']:<{width}}  {c['from']!s:>9}  {c['to']!s:>9}  {c['score difference']:>+9.4f}"
            f"{c['params difference']:>+14,}{c['macs difference']:>+16,}{_points(c) if believed else ''}  "
            f"{c['code']:<{code}}"
        )
    if not explanation["choices"]:
        lines.append("the space has one network")
    return "\n".join(lines)


def _points(choice: Mapping[str, Any]) -> str:
    """The believed difference of accuracy in points, with its 90 % interval."""
    middle, low, high = (100 * choice[name] for name in ("accuracy difference", "low", "high"))
    return f"{middle:>+10.2f} [{low:+.2f}, {high:+.2f}]".rjust(26)
