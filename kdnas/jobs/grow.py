"""AdaNAS: an ensemble grown subnet by subnet, each under the ensemble so far as teacher; the result is one student."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.budget import Budget, Cost
from kdnas.costs.count import cost, sum_costs
from kdnas.data.base import Data, Images
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import accuracy, final_measures, graded
from kdnas.jobs._mixture import fitted_weights, mixture
from kdnas.jobs._preflight import preflight
from kdnas.jobs._run import record_data
from kdnas.jobs.chain import say
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network, default_device
from kdnas.randomness import initialised, python_rng
from kdnas.report import write_report
from kdnas.runs.files import current_folder
from kdnas.runs.folder import MANIFEST, RunFolder
from kdnas.runs.steps import StudentSteps
from kdnas.settings import CandidateTeacher, Grow
from kdnas.space import SearchSpace
from kdnas.specs import spec
from kdnas.statistics import compare_accuracy
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.teachers.base import Frozen, Teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training

STUDENT, MEMBERS = "student", "members"
_CONTROLS = {
    "single network": "a single network of at most its MACs, trained on labels at equal cost",
    "random candidates": "an ensemble grown from random candidates within its cost",
    "not taught": "the same members trained without distillation",
}


class Member(NamedTuple):
    """One subnet of an ensemble, frozen."""

    architecture: Architecture
    network: Network
    cost: Cost


class SubnetEnsemble(NamedTuple):
    """Members with their weights, and the seconds and multiply-accumulates of their training."""

    members: tuple[Member, ...]
    weights: Tensor
    seconds: float
    work: float

    def network(self, data: Data) -> Network:
        """The members as one network, for images of their size, or of the data's where they have several."""
        networks = [member.network for member in self.members]
        images = {network.blueprint.image for network in networks}
        return mixture(networks, self.weights, images.pop() if len(images) == 1 else data.image)

    @property
    def cost(self) -> Cost:
        """The cost of all members together."""
        return sum_costs(member.cost for member in self.members)


def grow(settings: Grow, folder: Path) -> dict[str, Any]:
    r"""Grow an ensemble member by member, with its controls; the same call resumes it.

    Candidate $h$ of member $k$ minimises $\mathrm{CE}(y, h)$ with smoothed labels plus
    $-\frac1B \sum_b \sum_c q_c \log p_c$, where $q = \mathrm{softmax}(f_{k-1})$ is the ensemble's distribution so far
    (or the last member's) and $p$ the candidate's, both at temperature 1 with weight 1; the first member has no
    teacher. The candidate with which the ensemble has the smallest cross-entropy on the search part becomes the member.
    The ensemble is $f_k = \sum_{j \le k} w_j h_j$ in logits, $w$ uniform or fitted on the search part; members are
    never trained again.

    The folder holds `student`, the ensemble as one student folder; `members`, every candidate; a report.

    Returns:
        Accuracy on the test part, params, MACs and seconds of the grown ensemble, its members' codes and weights, and
        a row per control.

    Raises:
        ValueError: a task of pixels, the folder holds something else, no architecture is within the budget, or
            `dynamic` on a space without choices named depth or width.

    Reference: Macko et al., Improving Neural Architecture Search Image Classifiers via Ensemble Learning, 2019,
        sections 3 and 4; Furlanello et al., Born Again Neural Networks, ICML 2018 (the variant).
    Differs: members are chosen and weights fitted on the search part; AdaNet uses the training images. A deeper
        candidate has the next option of every depth, a wider one of every width, in place of three more cells or ten
        more filters.
    """
    data: Data = settings.data.build(Data)
    check_grown(data)
    if not (folder / MANIFEST).exists():
        space = data.fitted(settings.space)
        preflight(data, folder=folder, space=space, recipe=settings.recipe, budget=settings.budget)
    storage = RunFolder.create(folder, settings.to_json(), settings.recipe.seed)
    record_data(storage, data)
    growth = _Growth(settings, storage, data)
    grown = growth.grow("grown", settings)
    controls = growth.controls(grown) if settings.controls else {}
    rows = _record({"grown": grown, **controls}, storage, data)
    codes = [growth.space.code(member.architecture) for member in grown.members]
    weights = [round(float(w), 6) for w in grown.weights]
    student = storage.path(STUDENT)
    if not current_folder(student).exists():
        origin = {"grown": settings.to_json()["grow"], "members": codes, "weights": weights}
        origin |= {"data": settings.data.to_json(), "test_accuracy": rows["grown"]["accuracy"]}
        network = grown.network(data)
        write_student(student, network, Card.of(network, data, origin))
    summary = {**rows["grown"], "members": codes, "weights": weights}
    if storage.phase("grow") is None:
        storage.finish("grow", **summary)
    write_report(storage.folder)
    return {"student": str(student), **summary, "controls": {name: rows[name] for name in controls}}


def check_grown(data: Data) -> None:
    """Raise a ValueError for a task of pixels: the weights of members are fitted to classes of images."""
    if data.task.dense:
        raise ValueError(
            f"a grown ensemble answers for the whole image, the task {data.task.name} has answers for every pixel. Use "
            "kdnas run."
        )


def _record(ensembles: dict[str, SubnetEnsemble], storage: RunFolder, data: Data) -> dict[str, dict[str, Any]]:
    """Measure the ensembles on the test part, and record their rows and the controls."""
    rows: dict[str, dict[str, Any]] = {}
    hits = {}
    for name, ensemble in ensembles.items():
        is_right = graded(ensemble.network(data).to(default_device()), data.test, data)
        hits[name] = is_right.double().numpy()
        rows[name] = {**final_measures(is_right, data, f"the ensemble {name!r}"), **ensemble.cost._asdict()}
        rows[name]["seconds"] = round(ensemble.seconds, 3)
    storage.record_controls(
        {
            name: compare_accuracy("ensemble", hits["grown"][None], hits[name][None], words, **data.task.claims)
            for name, words in _CONTROLS.items()
            if name in hits
        }
    )
    for name, row in rows.items():
        storage.record_result({"name": name, **row})
    return rows


@final
class _Growth:
    """The settings, data and folder that the ensembles of one command share."""

    def __init__(self, settings: Grow, storage: RunFolder, data: Data) -> None:
        self.settings, self.storage, self.data = settings, storage, data
        self.space = data.fitted(settings.space)

    def grow(self, name: str, settings: Grow) -> SubnetEnsemble:
        """An ensemble, each member chosen among candidates."""
        ensemble = SubnetEnsemble((), torch.zeros(0), 0.0, 0.0)
        for number in range(settings.num_members):
            candidates = self.candidates(settings, ensemble, python_rng(settings.recipe.seed, name, number))
            if not candidates:
                if number:
                    say(f"{name}: no further member is within the budget; {number} of {settings.num_members} are grown")
                break
            teacher = teacher_of(settings.teacher, ensemble, self.data)
            trials = []
            for place, architecture in enumerate(candidates, 1):
                member, seconds = self.train_member(f"{name} {number + 1}.{place}", architecture, number, teacher)
                ensemble = ensemble._replace(
                    seconds=ensemble.seconds + seconds,
                    work=ensemble.work + member.cost.macs * settings.recipe.steps,
                )
                weights, loss = self.mix((*ensemble.members, member))
                trials.append((loss, member.cost.macs, place, member, weights))
            loss, _, place, member, weights = min(trials, key=lambda trial: trial[:3])
            ensemble = ensemble._replace(members=(*ensemble.members, member), weights=weights)
            code = self.space.code(member.architecture)
            say(f"{name}: member {number + 1} is {code}, of {len(trials)} tried; search loss {loss:.4f}")
        if not ensemble.members:
            params, macs = cost(self.space.blueprint(self.first()))
            raise ValueError(
                f"the first member has {params:,} params and {macs:,} MACs, more than the budget ({settings.budget}). "
                "Raise the budget, or begin with another --architecture."
            )
        return ensemble

    def first(self) -> Architecture:
        """The architecture that growth begins with."""
        return self.space.parse(self.settings.architecture) if self.settings.architecture else self.space.smallest

    def candidates(self, settings: Grow, ensemble: SubnetEnsemble, rng: random.Random) -> list[Architecture]:
        """The architectures to train as the next member: distinct, and within the rest of the budget."""
        left = settings.num_members - len(ensemble.members)

        def admits(architecture: Architecture) -> bool:
            own = cost(self.space.blueprint(architecture))
            # Random members must leave room for those after them.
            count = left if settings.generator == "random" else 1
            return settings.budget.admits(sum_costs([ensemble.cost, *count * [own]]))

        if settings.generator == "random":
            samples = [a for a in (self.space.sample(rng) for _ in range(500)) if admits(a)]
            distinct = list(dict.fromkeys(samples))[: settings.num_candidates]
            return distinct or [a for a in (self.space.smallest,) if admits(a)]
        if settings.generator == "simple" or not ensemble.members:
            return [a for a in (self.first(),) if admits(a)]
        last = ensemble.members[-1].architecture
        larger = [next_larger(self.space, last, word) for word in ("depth", "width")]
        distinct = [a for a in dict.fromkeys(larger) if a != last and admits(a)]
        return distinct or [a for a in (last,) if admits(a)]

    def train_member(
        self, name: str, architecture: Architecture, number: int, teacher: Teacher | None, steps: int = 0
    ) -> tuple[Member, float]:
        """A trained candidate and the seconds it took; one that is finished in the folder is read.

        Args:
            name: of the candidate, unique in the run.
            architecture: its architecture.
            number: of members before it; added to the recipe's seed.
            teacher: its teacher, or None for labels alone.
            steps: other than the recipe's, where not 0.
        """
        blueprint = self.space.blueprint(architecture)
        students = StudentSteps(self.storage.path(MEMBERS), checkpoints=self.storage.folder)
        folder_name = name.replace(" ", "-")

        def train(folder: Path) -> None:
            settings = self.settings
            recipe = dataclasses.replace(
                settings.recipe, seed=settings.recipe.seed + number, steps=steps or settings.recipe.steps
            )
            network = initialised(lambda: Network(blueprint), recipe.seed)
            smoothing = settings.label_smoothing
            distiller = FromLabels(label_smoothing=smoothing) if teacher is None else _distiller(smoothing)
            training = Training(network, distiller, self.data, teacher, recipe, default_device())
            watch = lambda: {"accuracy": accuracy(network, self.data.search, self.data)}  # noqa: E731
            seconds = train_with_checkpoints(training, name, students.checkpoint(folder_name), self.storage, watch)
            card = Card.of(network, self.data, {"seconds": seconds, "member": name}, architecture, self.space)
            write_student(folder, network.cpu(), card, deploy=False)

        network, card = read_student(students.student(folder_name, train))
        network = network.to(default_device()).requires_grad_(False)
        return Member(architecture, network, card.cost), float(card.origin["seconds"])

    def mix(self, members: Sequence[Member]) -> tuple[Tensor, float]:
        """The members' weights, and the ensemble's cross-entropy on the search part."""
        part = self.data.search
        logits = torch.stack([_logits(member.network, part, self.data) for member in members])
        weights = torch.full((len(members),), 1 / len(members))
        if self.settings.mixture == "learned":
            weights = fitted_weights(logits, part.labels)
        return weights, float(self.data.task.loss(torch.einsum("k,kbc->bc", weights, logits), part.labels))

    def controls(self, grown: SubnetEnsemble) -> dict[str, SubnetEnsemble]:
        """The controls of an ensemble, by name."""
        ensembles = {"single network": self.single(grown), "random candidates": self.random(grown)}
        if self.settings.teacher != "none" and len(grown.members) > 1:
            ensembles["not taught"] = self.without_teacher(grown)
        return ensembles

    def single(self, grown: SubnetEnsemble) -> SubnetEnsemble:
        """One network of at most the ensemble's MACs, trained on labels for as many multiply-accumulates in all."""
        rng = python_rng(self.settings.recipe.seed, "single")
        samples = [self.space.smallest, self.space.largest, *(self.space.sample(rng) for _ in range(300))]
        costs = {a: cost(self.space.blueprint(a)) for a in dict.fromkeys(samples)}
        within = [a for a, c in costs.items() if c.macs <= grown.cost.macs]
        largest = max(within or [self.space.smallest], key=lambda a: costs[a].macs)
        steps = max(1, round(grown.work / costs[largest].macs))
        member, seconds = self.train_member("single network", largest, 0, None, steps)
        return SubnetEnsemble((member,), torch.ones(1), seconds, grown.work)

    def random(self, grown: SubnetEnsemble) -> SubnetEnsemble:
        """An ensemble of random candidates within the cost of the grown ensemble, as many of them per member."""
        settings = dataclasses.replace(
            self.settings,
            generator="random",
            num_members=len(grown.members),
            num_candidates=2 if self.settings.generator == "dynamic" else 1,
            budget=Budget(params=grown.cost.params, macs=grown.cost.macs),
        )
        return self.grow("random candidates", settings)

    def without_teacher(self, grown: SubnetEnsemble) -> SubnetEnsemble:
        """The same members, trained on labels alone from the same seeds."""
        trainings = [
            self.train_member(f"not taught {number}", member.architecture, number - 1, None)
            for number, member in enumerate(grown.members, 1)
        ]
        members = tuple(member for member, _ in trainings)
        return SubnetEnsemble(members, self.mix(members)[0], sum(seconds for _, seconds in trainings), 0.0)


def teacher_of(kind: CandidateTeacher, ensemble: SubnetEnsemble, data: Data) -> Teacher | None:
    """The teacher of the next member: the ensemble so far, its last member, or None, as for the first member."""
    if kind == "none" or not ensemble.members:
        return None
    network = ensemble.network(data) if kind == "ensemble" else ensemble.members[-1].network
    return Frozen(network, preprocessing=data.preprocessing)


def next_larger(space: SearchSpace, architecture: Architecture, word: str) -> Architecture:
    """The architecture with the next option of every choice whose last name is `word`; new choices start at the first.

    Raises:
        ValueError: the space has no such choice.
    """
    names = {choice.name for choice in space.choices if choice.name.rpartition(".")[2] == word}
    if not names:
        raise ValueError(
            f"{space.name or 'this space'} has no choice named {word}, which --generator dynamic needs. Use simple or "
            "random."
        )

    def pick(choice: Choice) -> Value:
        option = architecture.get(choice.name)
        if option is None:
            return choice.options[0]
        index = choice.options.index(option) + (choice.name in names)
        return choice.options[min(index, len(choice.options) - 1)]

    return space.decide(pick)


def _distiller(label_smoothing: float) -> FromTeacher:
    task = spec(CrossEntropy, label_smoothing=label_smoothing)
    return FromTeacher(terms=((1.0, task), (1.0, spec(SoftTargets, form="soft_cross_entropy", temperature=1.0))))


@torch.no_grad()
def _logits(network: Network, part: Images, data: Data) -> Tensor:
    """Logits of all images of a part, `[images, classes]`, on the CPU."""
    device = next(network.parameters()).device
    network.eval()
    return torch.cat([network(data.normalise(pixels.to(device))).logits.cpu() for pixels, _ in part.batches()])
