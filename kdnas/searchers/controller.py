"""AKD's searcher: an LSTM policy over architectures, trained by their scores."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from kdnas.architecture import Architecture, Choice, Value
from kdnas.randomness import initialised
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.specs import check_literals

_ATTEMPTS = 50


@final
@dataclass(frozen=True)
class Episode:
    """The choices of one sampled architecture, in order, the index of the option in each, and the log-probability."""

    choices: tuple[Choice, ...]
    indices: tuple[int, ...]
    log_probability: float


@final
class Policy(nn.Module):
    r"""$\pi(a) = \prod_t \mathrm{softmax}(W_{c_t} h_t)_{o_t}$: the LSTM's input is the previous option.

    The heads are initialised to zero, so that at first all options of a choice are equally likely.

    Args:
        choices: the space's choices.
        hidden: width of the LSTM.
        seed: of the initial weights.
    """

    def __init__(self, choices: Sequence[Choice], hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tokens: dict[tuple[str, Value], int] = {}
        for choice in choices:
            for option in choice.options:
                tokens[choice.name, option] = 1 + len(tokens)
        self.tokens = tokens
        self.embedding = nn.Embedding(1 + len(tokens), hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, len(choice.options)) for choice in choices)
        self.number = {choice.name: i for i, choice in enumerate(choices)}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.2 - 0.1)
            for parameter in self.heads.parameters():
                parameter.zero_()

    def write(self, space: SearchSpace, rng: random.Random) -> tuple[Architecture, Episode]:
        """An architecture sampled from the policy."""
        choices: list[Choice] = []
        indices: list[int] = []
        total = 0.0
        with torch.no_grad():
            state, last = self._start(1), torch.zeros(1, dtype=torch.long)

            def pick(choice: Choice) -> Value:
                nonlocal state, last, total
                state = self.cell(self.embedding(last), state)
                logs = self.heads[self.number[choice.name]](state[0])[0].double().log_softmax(0)
                index = _sample_index(logs.exp().tolist(), rng)
                total += float(logs[index])
                choices.append(choice)
                indices.append(index)
                last = torch.tensor([self.tokens[choice.name, choice.options[index]]])
                return choice.options[index]

            architecture = space.decide(pick)
        return architecture, Episode(tuple(choices), tuple(indices), total)

    def forward(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Log-probability of each episode under the current weights, and its mean entropy per choice: `[episodes]`."""
        groups: dict[tuple[Choice, ...], list[int]] = {}
        for i, episode in enumerate(episodes):
            groups.setdefault(episode.choices, []).append(i)
        sums: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        for choices, group in groups.items():  # equal sequences of choices: one batch
            options = torch.tensor([episodes[i].indices for i in group]).reshape(len(group), len(choices))
            state, last = self._start(len(group)), torch.zeros(len(group), dtype=torch.long)
            total = entropy = torch.zeros(len(group), dtype=torch.double)
            for step, choice in enumerate(choices):
                state = self.cell(self.embedding(last), state)
                logs = self.heads[self.number[choice.name]](state[0]).double().log_softmax(1)
                total = total + logs.gather(1, options[:, step, None])[:, 0]
                entropy = entropy - (logs.exp() * logs).sum(1)
                tokens = torch.tensor([self.tokens[choice.name, option] for option in choice.options])
                last = tokens[options[:, step]]
            sums |= dict(zip(group, total.unbind(), strict=True))
            entropies |= dict(zip(group, (entropy / max(1, len(choices))).unbind(), strict=True))
        order = range(len(episodes))
        return torch.stack([sums[i] for i in order]), torch.stack([entropies[i] for i in order])

    def _start(self, count: int) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(count, self.cell.hidden_size)
        return zeros, zeros.clone()


def objective(
    now: Tensor, before: Tensor, advantages: Tensor, algorithm: Literal["ppo", "reinforce"], clip: float
) -> Tensor:
    r"""The objective to maximise, a mean over episodes.

    `reinforce`: $\frac1n \sum_i A_i \log \pi(a_i)$. `ppo`: $\frac1n \sum_i \min(r_i A_i, \mathrm{clip}(r_i, 1 -
    \epsilon, 1 + \epsilon) A_i)$ with $r_i = \pi(a_i) / \pi_\text{old}(a_i)$; at $r_i = 1$ the two have the same
    gradient.

    Args:
        now: log-probabilities under the current weights, with a graph, `[episodes]`.
        before: log-probabilities under the weights that sampled the episodes.
        advantages: rewards minus the baseline.
        algorithm: `ppo` or `reinforce`.
        clip: epsilon; infinite for no clipping.
    """
    if algorithm == "reinforce":
        return (advantages * now).mean()
    ratio = (now - before).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


@final
class Controller(Searcher):
    r"""An LSTM policy samples architectures choice by choice; scores above the moving average raise their probability.

    The advantage is $A = (R - b) / s$: the score minus an exponential moving average of the scores, divided by their
    moving standard deviation, so that the score's unit does not matter. The objective also has `entropy` times the mean
    entropy per choice. Architectures over the budget are sampled again: the policy is then $\pi(a) /
    P(\text{admitted})$, and the gradient of $\log P$ adds a constant times $E[R - b]$, which the baseline makes vanish.
    Repeated architectures are told again at no cost; after `patience` batches without a new one the policy has
    collapsed, and the search ends.

    Args:
        space: the search space.
        admits: whether an architecture is within the budget.
        rng: source of all random numbers.
        algorithm: `ppo` (several steps on each batch, clipped) or `reinforce` (one).
        batch: architectures per update.
        hidden: width of the LSTM.
        learning_rate: of Adam.
        clip: PPO's epsilon.
        epochs: PPO's optimizer steps per batch.
        entropy: weight of the entropy, in units of the advantage.
        decay: of the moving averages.
        patience: successive batches without a new architecture before the search ends.

    Raises:
        ValueError: an unknown algorithm, or a number outside its range.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2 (an LSTM
        controller and PPO, the reward in `kdnas.scorers.reward`); Schulman et al., Proximal Policy Optimization
        Algorithms, 2017, equation 7; Pham et al., Efficient Neural Architecture Search via Parameter Sharing, ICML
        2018 (REINFORCE with a moving average).
    Differs: the paper states neither the controller's size nor its learning rate; those here find the optimum of small
        tables within some hundred scores. The ratio is that of whole architectures, not of single choices.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        admits: Callable[[Architecture], bool],
        rng: random.Random,
        algorithm: Literal["ppo", "reinforce"] = "ppo",
        batch: int = 8,
        hidden: int = 32,
        learning_rate: float = 0.003,
        clip: float = 0.2,
        epochs: int = 4,
        entropy: float = 0.05,
        decay: float = 0.9,
        patience: int = 20,
    ) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        check_literals(type(self), locals())
        for name, number in (("batch", batch), ("hidden", hidden), ("epochs", epochs), ("patience", patience)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        for name, value in (("learning_rate", learning_rate), ("clip", clip)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if entropy < 0 or not 0 <= decay < 1:
            raise ValueError(f"`entropy` must be non-negative and `decay` in [0, 1), got {entropy} and {decay}.")
        self.algorithm: Literal["ppo", "reinforce"] = algorithm
        self.batch, self.clip, self.entropy = batch, clip, entropy
        self.epochs = epochs if algorithm == "ppo" else 1
        self.decay, self.patience = decay, patience
        seed = rng.getrandbits(62)
        self.policy = initialised(lambda: Policy(space.choices, hidden, seed), seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self.baseline = self.spread = 0.0
        self.updates = self.num_proposed = self.stale = 0
        self._proposed: set[Architecture] = set()
        self._episodes: list[Episode] = []
        self._entropy = math.nan

    def ask(self, limit: int) -> Sequence[Architecture]:
        """A batch from the policy, which may repeat earlier architectures."""
        if self.stale >= self.patience:
            self.stopped = f"the controller has collapsed: {self.patience} batches brought no new architecture"
            return []
        batch: list[Architecture] = []
        self._episodes = []
        for _ in range(min(limit, self.batch)):
            for _ in range(_ATTEMPTS):
                architecture, episode = self.policy.write(self.space, self.rng)
                if self.admits(architecture):
                    batch.append(architecture)
                    self._episodes.append(episode)
                    break
        if not batch:
            self.stopped = "the controller sampled no architecture within the budget"
        self.stale = self.stale + 1 if self._proposed.issuperset(batch) else 0
        self._proposed.update(batch)
        self.num_proposed += len(batch)
        return batch

    def tell(self, scored: Sequence[Entry]) -> None:
        """One update of the policy."""
        rewards = torch.tensor([entry.score for entry in scored], dtype=torch.double)
        advantages = self._advantages(rewards)
        before = torch.tensor([episode.log_probability for episode in self._episodes], dtype=torch.double)
        for _ in range(self.epochs):
            now, entropies = self.policy(self._episodes)
            self._entropy = float(entropies.detach().mean())
            value = objective(now, before, advantages, self.algorithm, self.clip) + self.entropy * entropies.mean()
            self.optimizer.zero_grad()
            (-value).backward()
            self.optimizer.step()
        self.updates += 1

    def trace(self) -> dict[str, float]:
        """Mean entropy per choice, the share of distinct architectures among all proposed, and the baseline."""
        return {
            "entropy": self._entropy,
            "unique": len(self._proposed) / max(1, self.num_proposed),
            "baseline": self.baseline,
        }

    def _advantages(self, rewards: Tensor) -> Tensor:
        mean = float(rewards.mean())
        # The first batch is its own baseline: with a baseline of zero all of its advantages would have one sign.
        decay = self.decay if self.updates else 0.0
        self.baseline = decay * self.baseline + (1 - decay) * mean
        self.spread = decay * self.spread + (1 - decay) * float((rewards - self.baseline).square().mean())
        return (rewards - self.baseline) / (math.sqrt(self.spread) + 1e-8)


def _sample_index(probabilities: Sequence[float], rng: random.Random) -> int:
    left = rng.random() * sum(probabilities)
    for index, probability in enumerate(probabilities):
        left -= probability
        if left < 0:
            return index
    return len(probabilities) - 1
