"""kdnas's own contestants in same_work.py: the steps of `kdnas prune`, one by one, so that each has a row."""

import copy
from functools import partial

import torch
from peers import Contestant, Facts, plain
from torch import Tensor

from kdnas.conversion.convert import convert
from kdnas.conversion.importance import channel_importance, sort_by_importance
from kdnas.conversion.reconstruction import Reconstruction
from kdnas.conversion.removal import Removal, units
from kdnas.conversion.scale_factors import Factors
from kdnas.conversion.shares import ShareSearch, agreement, leading
from kdnas.costs.budget import Budget
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.costs.latency import LatencyTable
from kdnas.data.base import Data, Images
from kdnas.network import Network
from kdnas.randomness import python_rng, torch_rng
from kdnas.settings import Prune
from kdnas.space import Blueprint
from kdnas.spaces.converted import Converted
from kdnas.teachers.base import Teacher
from kdnas.training.loop import Training

CANDIDATES, IMAGES = Prune.num_candidates, Prune.num_images
_FORWARDS = 3  # of the images: the order of channels, the fit's covariances, the source's own outputs


class _Cut:
    """The teacher's network with its channels in order and its layers' inputs measured."""

    def __init__(self, network: Network, data: Data, seed: int) -> None:
        conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
        space = conversion.space
        assert isinstance(space, Converted)
        images = _images(data, data.train, "reconstruction", seed)
        sort_by_importance(conversion.supernet, partial(channel_importance, method="reconstruction", images=images))
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


def prune(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """`kdnas prune`: shares searched under the teacher, layers fitted by least squares, channels matched."""
    cut = _Cut(network, data, seed)
    search = ShareSearch(cut.removal, lambda blueprint: cost(blueprint).macs <= budget, cut.score)
    search.run(CANDIDATES, python_rng("shares", seed))
    facts = Facts(inherited=True, images=IMAGES * (CANDIDATES + _FORWARDS), source=cut.source)
    return cut.network(search.best.counts), facts


def equal(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """The same without the search: equal shares."""
    cut = _Cut(network, data, seed)
    counts = ShareSearch(cut.removal, lambda blueprint: cost(blueprint).macs <= budget, cut.score).equal_shares()
    if counts is None:
        raise Infeasible(f"no equal shares cost at most {budget:.6g}")
    return cut.network(counts), Facts(inherited=True, images=_FORWARDS * IMAGES, source=cut.source)


def factors(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """`kdnas prune --method scale_factors`."""
    conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
    assert isinstance(conversion.space, Converted)
    source = conversion.supernet.extract(conversion.space.largest)
    bound = Budget(macs=budget)
    distiller = Factors(conversion.space, budget=bound)
    training = Training(copy.deepcopy(source), distiller, data, teacher, Prune.recipe)
    while not training.done:
        training.step()
    assert isinstance(training.model, Network)
    recipe = Prune.recipe
    return distiller.removed(training.model, distiller.within(bound)), Facts(
        inherited=True, images=2 * recipe.steps * recipe.batch_size
    )


def under_latency(
    network: Network, teacher: Teacher, data: Data, seconds: float, table: LatencyTable, seed: int
) -> tuple[Network, Facts]:
    """`kdnas prune --budget latency=...`: as `prune`, but a candidate's latency is predicted by the table."""
    cut = _Cut(network, data, seed)

    def search(bound: float) -> tuple[Network, float]:
        def admits(blueprint: Blueprint) -> bool:
            return table.seconds(blueprint) <= bound

        found = ShareSearch(cut.removal, admits, cut.score, divisor=8)
        found.run(CANDIDATES, python_rng("shares", seed))
        left = cut.network(found.best.counts)
        return left, table.whole(left.blueprint)

    table.calibrate([network.blueprint])
    bound = seconds
    for _ in range(4):  # the table predicts; what is measured must be within the budget
        left, measured = search(bound)
        if measured <= seconds:
            return left, Facts(inherited=True, images=IMAGES * (CANDIDATES + _FORWARDS), source=cut.source)
        bound *= 0.98 * seconds / measured
    raise Infeasible(f"no network was measured within {1e3 * seconds:.3g} ms")


OURS: dict[str, Contestant] = {"kdnas-prune": prune, "kdnas-equal": equal, "kdnas-factors": factors}
