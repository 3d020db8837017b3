"""Attentive sampling: a sandwich's random children are sampled by cost; the best or worst candidate is trained."""

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.count import cost
from kdnas.distillers._wrapping import Wrapping
from kdnas.distillers.base import Batch, Model, Parallel, Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.ranks.tensors import mean
from kdnas.space import SearchSpace
from kdnas.specs import Spec, check_literals, spec
from kdnas.supernet import Supernet
from kdnas.values import Amount


@final
class CostPrior:
    """The joint distribution of cost and options in a space: `p(F)` and, for each choice, `p(option | F)`.

    Estimated from random architectures; F is the index of a bin of multiply-accumulates.

    Args:
        space: the search space.
        bin_macs: width of a bin.
        num_sampled: number of random architectures.
        seed: seed of their sampling.
    """

    def __init__(self, space: SearchSpace, bin_macs: float, num_sampled: int, seed: int = 0) -> None:
        self.space, self.bin_macs = space, bin_macs
        rng, counts = random.Random(seed), Counter[int]()
        self.options: dict[tuple[int, str], Counter[Value]] = {}
        for _ in range(num_sampled):
            architecture = space.sample(rng)
            index = self.bin(architecture)
            counts[index] += 1
            for name, option in architecture.items():
                self.options.setdefault((index, name), Counter())[option] += 1
        self.bins = sorted(counts)
        self._cumulated = list(itertools.accumulate(counts[index] for index in self.bins))
        self.share = {index: counts[index] / num_sampled for index in self.bins}

    def bin(self, architecture: Architecture) -> int:
        """The bin of an architecture."""
        return round(cost(self.space.blueprint(architecture)).macs / self.bin_macs)

    def sample_bin(self, rng: random.Random) -> int:
        """A bin, by `p(F)`."""
        return self.bins[bisect.bisect(self._cumulated, rng.random() * self._cumulated[-1])]

    def sample(self, index: int, rng: random.Random, tries: int = 100) -> Architecture:
        """An architecture of this bin, by the product of `p(option | F)`; after all tries the nearest."""

        def pick(choice: Choice) -> Value:
            counts = self.options.get((index, choice.name))
            # A choice that no sample of the bin had: uniform.
            return rng.choice(choice.options) if counts is None else rng.choices([*counts], [*counts.values()])[0]

        nearest, distance = None, float("inf")
        for _ in range(tries):
            architecture = self.space.decide(pick)
            off = abs(self.bin(architecture) - index)
            if off < distance:
                nearest, distance = architecture, off
            if off == 0:
                break
        assert nearest is not None
        return nearest


@final
class Attentive(Wrapping):
    r"""A sandwich whose random children are the best or the worst of k candidates of one cost.

    Once, from many random networks: $p(F)$ over bins of multiply-accumulates, and $p(v_d \mid F)$ for each choice.
    Each random child: sample $F \sim p(F)$, then k candidates from $\prod_d p(v_d \mid F)$, each again until its own
    bin is F (100 times at most, then the nearest). The candidates are scored by the cross-entropy on the
    step's images without gradient, by the images' own batch statistics and without dropout: no gradient and no
    batch-norm buffer changes. `best` trains the candidate of the lowest loss, `worst` of the highest. With k = 1
    this is the sandwich with a prior on cost.

    Args:
        inner: the sandwich; distillers that add to a sandwich wrap this one.
        pick: `best` (BestUp-k) or `worst` (WorstUp-k).
        num_candidates: k.
        bin_macs: width of a bin; 0 for a fortieth of the range from the smallest to the largest network.
        num_sampled: number of random networks from which the probabilities are estimated.

    Raises:
        ValueError: another pick, or a count below 1.

    Reference: Wang, Li, Gong, Chandra, AttentiveNAS: Improving Neural Architecture Search via Attentive Sampling, CVPR
        2021, section 4.
    Differs: the accuracy-predictor variant is left out; the paper's bins are 25 M wide, for ImageNet's networks.
    """

    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self,
        *,
        inner: Spec = spec(Sandwich),
        pick: Literal["best", "worst"] = "best",
        num_candidates: int = 3,
        bin_macs: Amount = 0.0,
        num_sampled: int = 2000,
    ) -> None:
        super().__init__(inner)
        check_literals(type(self), locals())
        for name, value in (("num_candidates", num_candidates), ("num_sampled", num_sampled)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not isinstance(self.inner, Sandwich):
            raise ValueError(f"`inner` must be a sandwich, got {inner}. Distillers that add to one wrap attentive.")
        self.pick, self.num_candidates = pick, num_candidates
        self.bin_macs, self.num_sampled = bin_macs, num_sampled
        self.prior: CostPrior | None = None

    def prepare(self, model: Model, batch: Batch) -> None:
        """Estimate the probabilities; they are the same after every call, so that no checkpoint stores them."""
        super().prepare(model, batch)
        assert isinstance(model, Supernet)
        space = model.space
        low, high = (cost(space.blueprint(end)).macs for end in (space.smallest, space.largest))
        self.prior = CostPrior(space, self.bin_macs or max(1.0, (high - low) / 40), self.num_sampled)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The sandwich's."""
        assert isinstance(model, Supernet)
        assert isinstance(self.inner, Sandwich)
        rng = step.rng("attentive")
        yield from self.inner.losses_with(model, batch, step, lambda: self.child(model, batch, rng))

    def child(self, model: Supernet, batch: Batch, rng: random.Random) -> Architecture:
        """One random child."""
        assert self.prior is not None
        index = self.prior.sample_bin(rng)
        candidates = [self.prior.sample(index, rng) for _ in range(self.num_candidates)]
        if self.num_candidates == 1:
            return candidates[0]
        with torch.no_grad():
            losses = mean(torch.stack([self._loss(model, batch, candidate) for candidate in candidates]))
        return candidates[int(losses.argmin() if self.pick == "best" else losses.argmax())]

    def _loss(self, model: Supernet, batch: Batch, architecture: Architecture) -> Tensor:
        logits = model(batch.images, architecture, regularise=False, batch_statistics=True).logits
        return batch.task.loss(logits.float(), batch.labels)
