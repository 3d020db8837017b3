"""AKD's searcher: an LSTM that writes architectures choice by choice and is rewarded for good ones."""

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
    """One architecture as it was written: the choices that came up and the place of the option taken in each."""

    choices: tuple[Choice, ...]
    taken: tuple[int, ...]
    log_probability: float


@final
class Policy(nn.Module):
    r"""$\pi(a) = \prod_t \mathrm{softmax}(W_{c_t} h_t)_{o_t}$: an LSTM reads the option it took last.

    The heads begin at zero, so that at first every option of every choice is equally likely.

    Args:
        choices: of the space.
        hidden: width of the LSTM.
        seed: of its first weights.
    """

    def __init__(self, choices: Sequence[Choice], hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        places: dict[tuple[str, Value], int] = {}
        for choice in choices:
            for option in choice.options:
                places[choice.name, option] = 1 + len(places)
        self.places = places
        self.embedding = nn.Embedding(1 + len(places), hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, len(choice.options)) for choice in choices)
        self.number = {choice.name: i for i, choice in enumerate(choices)}
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.2 - 0.1)
            for parameter in self.heads.parameters():
                parameter.zero_()

    def write(self, space: SearchSpace, rng: random.Random) -> tuple[Architecture, Episode]:
        """An architecture drawn from the policy."""
        choices: list[Choice] = []
        taken: list[int] = []
        total = 0.0
        with torch.no_grad():
            state, last = self._start(1), torch.zeros(1, dtype=torch.long)

            def pick(choice: Choice) -> Value:
                nonlocal state, last, total
                state = self.cell(self.embedding(last), state)
                logs = self.heads[self.number[choice.name]](state[0])[0].double().log_softmax(0)
                place = _drawn(logs.exp().tolist(), rng)
                total += float(logs[place])
                choices.append(choice)
                taken.append(place)
                last = torch.tensor([self.places[choice.name, choice.options[place]]])
                return choice.options[place]

            architecture = space.decide(pick)
        return architecture, Episode(tuple(choices), tuple(taken), total)

    def forward(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Log-probability of each episode under the weights of now, and its mean entropy per choice: `[episodes]`."""
        alike: dict[tuple[Choice, ...], list[int]] = {}
        for i, episode in enumerate(episodes):
            alike.setdefault(episode.choices, []).append(i)
        sums: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        for choices, places in alike.items():  # the same choices came up: one batch
            taken = torch.tensor([episodes[i].taken for i in places]).reshape(len(places), len(choices))
            state, last = self._start(len(places)), torch.zeros(len(places), dtype=torch.long)
            total = entropy = torch.zeros(len(places), dtype=torch.double)
            for step, choice in enumerate(choices):
                state = self.cell(self.embedding(last), state)
                logs = self.heads[self.number[choice.name]](state[0]).double().log_softmax(1)
                total = total + logs.gather(1, taken[:, step, None])[:, 0]
                entropy = entropy - (logs.exp() * logs).sum(1)
                known = torch.tensor([self.places[choice.name, option] for option in choice.options])
                last = known[taken[:, step]]
            sums |= dict(zip(places, total.unbind(), strict=True))
            entropies |= dict(zip(places, (entropy / max(1, len(choices))).unbind(), strict=True))
        order = range(len(episodes))
        return torch.stack([sums[i] for i in order]), torch.stack([entropies[i] for i in order])

    def _start(self, count: int) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(count, self.cell.hidden_size)
        return zeros, zeros.clone()


def objective(
    now: Tensor, before: Tensor, advantages: Tensor, algorithm: Literal["ppo", "reinforce"], clip: float
) -> Tensor:
    r"""What the policy ascends, a mean over episodes.

    `reinforce`: $\frac1n \sum_i A_i \log \pi(a_i)$. `ppo`: $\frac1n \sum_i \min(r_i A_i, \mathrm{clip}(r_i, 1 -
    \epsilon, 1 + \epsilon) A_i)$ with $r_i = \pi(a_i) / \pi_\text{old}(a_i)$; at $r_i = 1$ the two have the same
    gradient.

    Args:
        now: log-probabilities under the weights of now, with a graph, `[episodes]`.
        before: log-probabilities under those that drew the episodes.
        advantages: rewards less the baseline.
        algorithm: which of the two.
        clip: epsilon; infinite for none.
    """
    if algorithm == "reinforce":
        return (advantages * now).mean()
    ratio = (now - before).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


@final
class Controller(Searcher):
    r"""An LSTM writes architectures, choice by choice; those with more than the usual reward become likelier.

    The advantage is $A = (R - b) / s$: the score less an exponential moving average of the scores, over their moving
    standard deviation, so that a score's unit does not matter. To it comes `entropy` times the mean entropy per choice.
    A spelling over the budget is drawn again: the policy is then $\pi(a) / P(\text{admitted})$, and what the
    gradient of $\log P$ adds is a constant times $E[R - b]$, which the baseline makes vanish. A network that was
    scored before is told again and costs nothing; when `patience` batches in a row bring nothing new, the controller
    has collapsed onto what it knows, and the search ends with that word.

    Args:
        space: the search space.
        admits: the budget's test.
        rng: draws everything.
        algorithm: `ppo` (several steps on each batch, clipped) or `reinforce` (one).
        batch: architectures per update.
        hidden: width of the LSTM.
        learning_rate: of Adam.
        clip: PPO's epsilon.
        epochs: PPO's steps per batch.
        entropy: weight of the entropy, in units of the advantage.
        decay: of the moving averages.
        patience: batches without anything new before the search ends.

    Raises:
        ValueError: an unknown algorithm, or a number out of its range.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2 (an LSTM
        controller and PPO, the reward in `kdnas.scorers.reward`); Schulman et al., Proximal Policy Optimization
        Algorithms, 2017, equation 7; Pham et al., Efficient Neural Architecture Search via Parameter Sharing, ICML
        2018 (REINFORCE with a moving average).
    Differs: the paper gives neither the controller's sizes nor its rates; those here find the optimum of small tables
        within some hundred scores. The ratio is of whole architectures, not of single choices.
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
                raise ValueError(f"{name} must be at least 1, got {number}.")
        for name, value in (("learning_rate", learning_rate), ("clip", clip)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if entropy < 0 or not 0 <= decay < 1:
            raise ValueError(f"entropy must not be negative and decay be in [0, 1), got {entropy} and {decay}.")
        self.algorithm: Literal["ppo", "reinforce"] = algorithm
        self.batch, self.clip, self.entropy = batch, clip, entropy
        self.epochs = epochs if algorithm == "ppo" else 1
        self.decay, self.patience = decay, patience
        seed = rng.getrandbits(62)
        self.policy = initialised(lambda: Policy(space.choices, hidden, seed), seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self.baseline = self.spread = 0.0
        self.updates = self.num_asked = self.stale = 0
        self._seen: set[Architecture] = set()
        self._episodes: list[Episode] = []
        self._entropy = math.nan

    def ask(self, limit: int) -> Sequence[Architecture]:
        """A batch from the policy; repetitions of what is known are among it."""
        if self.stale >= self.patience:
            self.stopped = f"the controller has collapsed: {self.patience} batches brought no new architecture"
            return []
        asked: list[Architecture] = []
        self._episodes = []
        for _ in range(min(limit, self.batch)):
            for _ in range(_ATTEMPTS):
                architecture, episode = self.policy.write(self.space, self.rng)
                if self.admits(architecture):
                    asked.append(architecture)
                    self._episodes.append(episode)
                    break
        if not asked:
            self.stopped = "the controller wrote no architecture within the budget"
        self.stale = self.stale + 1 if self._seen.issuperset(asked) else 0
        self._seen.update(asked)
        self.num_asked += len(asked)
        return asked

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
        """Mean entropy per choice, the share of new architectures among those asked, and the baseline."""
        return {
            "entropy": self._entropy,
            "unique": len(self._seen) / max(1, self.num_asked),
            "baseline": self.baseline,
        }

    def _advantages(self, rewards: Tensor) -> Tensor:
        mean = float(rewards.mean())
        # The first batch is its own baseline: one of zero would praise or blame all of it.
        keep = self.decay if self.updates else 0.0
        self.baseline = keep * self.baseline + (1 - keep) * mean
        self.spread = keep * self.spread + (1 - keep) * float((rewards - self.baseline).square().mean())
        return (rewards - self.baseline) / (math.sqrt(self.spread) + 1e-8)


def _drawn(probabilities: Sequence[float], rng: random.Random) -> int:
    left = rng.random() * sum(probabilities)
    for place, probability in enumerate(probabilities):
        left -= probability
        if left < 0:
            return place
    return len(probabilities) - 1
