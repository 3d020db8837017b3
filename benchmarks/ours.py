"""kdnas's own contestants in same_work.py: the steps of `kdnas prune`, one by one, so that each has a row."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import final

import torch
from peers import Contestant, Facts, plain
from torch import Tensor

from kdnas.architecture import Architecture
from kdnas.conversion.convert import convert
from kdnas.conversion.importance import Importance, channel_importance, sort_by_importance
from kdnas.conversion.reconstruction import Reconstruction
from kdnas.conversion.removal import Removal, counts_of, units
from kdnas.conversion.scale_factors import Factors
from kdnas.conversion.shares import ShareSearch, agreement, leading
from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, Infeasible
from kdnas.costs.count import cost
from kdnas.costs.latency import LatencyTable
from kdnas.data.base import Data, Images
from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.evaluation import accuracy
from kdnas.jobs._trials import mixture
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network, calibrate
from kdnas.randomness import python_rng, torch_rng
from kdnas.runs.entry import Entry
from kdnas.searchers.evolution import Evolution
from kdnas.searchers.random_search import RandomSearch
from kdnas.settings import Prune, Recipe
from kdnas.space import Blueprint
from kdnas.spaces.converted import Converted
from kdnas.specs import spec
from kdnas.supernet import Supernet
from kdnas.teachers.base import Frozen, Teacher
from kdnas.training.loop import Training

CANDIDATES, IMAGES = Prune.num_candidates, Prune.num_images
_FORWARDS = 3  # of the images: the order of channels, the fit's covariances, the source's own outputs


class _Cut:
    """The teacher's network with its channels in order (the fit's by default) and its layers' inputs measured."""

    def __init__(self, network: Network, data: Data, seed: int, importance: Importance | None = None) -> None:
        conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
        space = conversion.space
        assert isinstance(space, Converted)
        images = _images(data, data.train, "reconstruction", seed)
        by_fit = partial(channel_importance, method="reconstruction", images=images)
        sort_by_importance(conversion.supernet, importance or by_fit)
        self.source = conversion.supernet.extract(space.largest).eval()
        self.removal = Removal(space, units(space))
        self.fit = Reconstruction(self.removal, self.source, images)
        self.images = _images(data, data.search, "shares", seed)
        with torch.no_grad():
            self.target = self.source(self.images).logits.log_softmax(1)

    def score(self, counts: dict[str, int]) -> float:
        """The agreement of what these counts leave with the source."""
        return agreement(self.network(counts), self.images, self.target)

    def network(self, counts: dict[str, int]) -> Network:
        """What these counts leave, fitted."""
        return self.fit.network(leading(self.removal, counts)).requires_grad_(True)


def _images(data: Data, part: Images, purpose: str, seed: int) -> Tensor:
    return data.normalise(part.take(torch.randperm(len(part), generator=torch_rng(purpose, seed))[:IMAGES]))


SearchOf = Callable[[_Cut], ShareSearch]


def _by_macs(budget: float) -> SearchOf:
    return lambda cut: ShareSearch(cut.removal, lambda blueprint: cost(blueprint).macs <= budget, cut.score)


def _by_latency(network: Network, seconds: float, table: LatencyTable) -> SearchOf:
    """Candidates' latencies are predicted by the table; the best ones are measured."""
    table.calibrate([network.blueprint])

    def admits(blueprint: Blueprint, times: float = 1.0) -> bool:
        return times * table.seconds(blueprint) <= seconds

    def measured(blueprint: Blueprint) -> float:
        return table.measured(blueprint) / table.seconds(blueprint)

    return lambda cut: ShareSearch(cut.removal, admits, cut.score, divisor=0, measured=measured)


def _prune(network: Network, data: Data, search_of: SearchOf, seed: int) -> tuple[Network, Facts]:
    cut = _Cut(network, data, seed)
    search = search_of(cut)
    search.run(CANDIDATES, python_rng("shares", seed))
    facts = Facts(inherited=True, images=IMAGES * (CANDIDATES + _FORWARDS), source=cut.source)
    return cut.network(search.best.counts), facts


def _equal(network: Network, data: Data, search_of: SearchOf, seed: int) -> tuple[Network, Facts]:
    cut = _Cut(network, data, seed)
    counts = search_of(cut).equal_shares()
    if counts is None:
        raise Infeasible("no equal shares are within the budget")
    return cut.network(counts), Facts(inherited=True, images=_FORWARDS * IMAGES, source=cut.source)


def prune(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """`kdnas prune`: shares searched under the teacher, layers fitted by least squares, channels matched."""
    return _prune(network, data, _by_macs(budget), seed)


def equal(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """The same without the search: equal shares."""
    return _equal(network, data, _by_macs(budget), seed)


def fit_alone(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Equal shares, fitted, and retrained by the mixture of labels and teacher alone: no channels are matched."""
    left, facts = equal(network, teacher, data, budget, seed)
    return left, dataclasses.replace(facts, source=None)


def finalists(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """`kdnas run` without a space: the best three of twice as many removals, and equal shares, in short trainings."""
    return _finalists(network, data, _by_macs(budget), seed)


def _finalists(network: Network, data: Data, search_of: SearchOf, seed: int) -> tuple[Network, Facts]:
    cut = _Cut(network, data, seed)
    search = search_of(cut)
    equal = search.equal_shares()
    search.run(2 * CANDIDATES, python_rng("shares", seed))
    best = [candidate.counts for candidate in search.finalists(3)]
    tried = best if equal is None or equal in best else [*best, equal]
    recipe = Recipe(steps=70, batch_size=64, learning_rate=0.05, seed=seed)
    distiller = mixture("half labels, half teacher", recipe.steps, data.task, features=True)
    source = Frozen(cut.source, preprocessing=data.preprocessing)
    accuracies = []
    for counts in tried:
        training = Training(cut.network(counts), distiller.build(FromTeacher), data, source, recipe)
        while not training.done:
            training.step()
        accuracies.append(accuracy(training.model, data.search, data))
    chosen = tried[max(range(len(tried)), key=accuracies.__getitem__)]
    seen = IMAGES * (2 * CANDIDATES + _FORWARDS) + len(tried) * (2 * recipe.steps * recipe.batch_size)
    return cut.network(chosen), Facts(inherited=True, images=seen, source=cut.source)


@final
class _Paths(SinglePath):
    """Single paths out of a list."""

    def __init__(self, paths: Sequence[Architecture]) -> None:
        # Twice the mixture of half labels and half teacher: the learning rate is halved for it.
        super().__init__(terms=((1.0, spec(SoftTargets, temperature=4.0)),))
        self._paths = paths

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(model, Supernet)
        path = step.rng("architectures").choice(self._paths)
        yield from self.student_losses("path", model(batch.images, path), model, batch, step, path)


def supernet(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """The converted network trained as a supernet for 350 steps by the sandwich rule, and its best subnet."""
    recipe = Recipe(steps=350, batch_size=64, learning_rate=0.05, seed=seed)
    return _of_supernet(network, teacher, data, budget, recipe, lambda _: Sandwich(), 2 + Sandwich().num_random)


def no_supernet(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """The same without a step: the best subnet of the converted network as it is."""
    return _of_supernet(network, teacher, data, budget, Recipe(steps=1, batch_size=64, seed=seed), None, 0)


def near_supernet(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """The same, trained for 700 steps where the student will be: one network of 0.7 to 1.5 times the budget a step."""

    def paths(space: Converted) -> _Paths:
        rng = python_rng("paths", seed)
        search = RandomSearch(space=space, admits=BudgetCheck(space, Budget(macs=1.5 * budget)).admits, rng=rng)
        near = []
        while len(near) < 200:
            near += [a for a in search.ask(64) if cost(space.blueprint(a)).macs >= 0.7 * budget]
        return _Paths(near)

    recipe = Recipe(steps=700, batch_size=64, learning_rate=0.025, seed=seed)
    return _of_supernet(network, teacher, data, budget, recipe, paths, 1)


def _of_supernet(
    network: Network,
    teacher: Teacher,
    data: Data,
    budget: float,
    recipe: Recipe,
    distiller: Callable[[Converted], Distiller] | None,
    subnets: int,
) -> tuple[Network, Facts]:
    """The best subnet of a supernet that starts from the source, and trains so many subnets a step, or none."""
    conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
    space, images = conversion.space, _images(data, data.train, "reconstruction", recipe.seed)
    assert isinstance(space, Converted)
    sort_by_importance(conversion.supernet, partial(channel_importance, method="reconstruction", images=images))
    source = conversion.supernet.extract(space.largest).eval()
    if distiller is not None:
        training = Training(conversion.supernet, distiller(space), data, teacher, recipe)
        while not training.done:
            training.step()
    check, rng = BudgetCheck(space, Budget(macs=budget)), python_rng("shares", recipe.seed)
    search, best = _images(data, data.search, "shares", recipe.seed), (-math.inf, space.smallest)
    with torch.no_grad():
        target = source(search).logits.log_softmax(1)
    evolution = Evolution(space=space, admits=check.admits, rng=rng)
    for _ in range(CANDIDATES):
        (proposal,) = evolution.ask(1)
        score = agreement(conversion.supernet.extract(proposal), search, target)
        size = cost(space.blueprint(proposal))
        evolution.tell([Entry(proposal, space.code(proposal), score, {}, size.params, size.macs, 0, 0.0)])
        if score > best[0]:
            best = score, proposal
    left = conversion.supernet.extract(best[1])
    calibrate(left, images.split(250))
    steps = 0 if distiller is None else recipe.steps
    seen = steps * recipe.batch_size * (1 + subnets) + CANDIDATES * IMAGES
    return left.requires_grad_(True), Facts(inherited=True, images=seen, source=source)


def factors(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """`kdnas prune --method scale_factors`."""
    conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
    assert isinstance(conversion.space, Converted)
    source = conversion.supernet.extract(conversion.space.largest)
    bound = Budget(macs=budget)
    distiller = Factors(conversion.space, budget=bound, rounds=Prune.rounds)
    training = Training(copy.deepcopy(source), distiller, data, teacher, Prune.recipe)
    while not training.done:
        training.step()
    cut = _Cut(network, data, seed, distiller.importance)
    left = cut.network(cut.removal.sizes | counts_of(distiller.within(bound)))
    seen = 2 * Prune.recipe.steps * Prune.recipe.batch_size + _FORWARDS * IMAGES
    return left, Facts(inherited=True, images=seen, source=cut.source)


UnderLatency = Callable[[Network, Frozen, Data, float, LatencyTable, int], tuple[Network, Facts]]
"""(the teacher's network, the teacher, data, seconds, table, seed) to the network to retrain."""


def _under_latency(way: Callable[[Network, Data, SearchOf, int], tuple[Network, Facts]]) -> UnderLatency:
    """The same under `--budget latency=...`."""

    def under(
        network: Network, teacher: Frozen, data: Data, seconds: float, table: LatencyTable, seed: int
    ) -> tuple[Network, Facts]:
        return way(network, data, _by_latency(network, seconds, table), seed)

    return under


UNDER_LATENCY: dict[str, UnderLatency] = {
    "kdnas-prune": _under_latency(_prune),
    "kdnas-run": _under_latency(_finalists),
    "kdnas-equal": _under_latency(_equal),
}
OURS: dict[str, Contestant] = {
    "kdnas-prune": prune,
    "kdnas-run": finalists,
    "kdnas-equal": equal,
    "kdnas-fit": fit_alone,
    "kdnas-no-supernet": no_supernet,
    "kdnas-supernet": supernet,
    "kdnas-supernet-near": near_supernet,
    "kdnas-factors": factors,
}
