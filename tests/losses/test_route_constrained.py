import json

import pytest
import torch

from kdnas.losses.adversarial.conditional_adversarial import ConditionalAdversarial
from kdnas.losses.example import example, wave
from kdnas.losses.feature.feature_mse import FeatureMse
from kdnas.losses.feature.hint import Hint
from kdnas.losses.feature.route_constrained import RouteConstrained, equal_intervals
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec, spec


def test_the_value_is_the_inner_losss_whichever_way_it_is_given():
    student, teacher, labels = example()
    expected = SoftTargets(temperature=2)(student, teacher, labels).item()
    inner = spec(SoftTargets, temperature=2)
    outer = spec(RouteConstrained, loss=inner)
    for loss in (
        RouteConstrained(loss=inner),
        RouteConstrained(loss=SoftTargets(temperature=2)),
        Spec.from_json(json.loads(json.dumps(outer.to_json()))).build(),
    ):
        assert loss(student, teacher, labels).item() == expected


def test_an_inner_feature_loss_is_prepared_and_named_in_its_needs():
    student, teacher, labels = example()
    loss = RouteConstrained(loss=spec(FeatureMse))
    assert loss.needs == ("features",) and RouteConstrained.needs == ("logits",)
    loss.prepare(student, teacher, elastic=True)
    assert sum(p.numel() for p in loss.parameters()) == 3 * 4 + 6 * 8
    assert loss.double()(student, teacher, labels) == loss.loss(student, teacher, labels)


def test_an_inner_discriminator_and_the_progress_of_the_run_are_passed_on():
    student, teacher, labels = example()
    loss = RouteConstrained(loss=spec(ConditionalAdversarial))
    loss.prepare(student, teacher)
    expected = loss.double().loss.adversary(student, teacher, labels)
    moments, discriminate, at = [], loss.loss.discriminate, Moment(0.5)
    loss.loss.discriminate = lambda *arguments: moments.append(arguments[3]) or discriminate(*arguments)
    assert loss.adversary(student, teacher, labels, at) == expected and moments == [at]
    assert RouteConstrained().adversary(student, teacher, labels) is None


def test_one_stage_per_anchor():
    stages = RouteConstrained(num_anchors=4).stages()
    assert [s.name for s in stages] == ["anchor 1", "anchor 2", "anchor 3", "anchor 4"]
    assert all((s.share, s.trains, s.uses) == (0.25, "both", "both") for s in stages)


def test_an_inner_loss_with_stages_of_its_own_is_refused():
    with pytest.raises(ValueError, match="staged=False"):
        RouteConstrained(loss=Hint())
    RouteConstrained(loss=Hint(staged=False))
    with pytest.raises(ValueError, match="got int"):
        RouteConstrained(loss=3)
    with pytest.raises(ValueError, match="at least 1"):
        RouteConstrained(num_anchors=0)


def test_anchors_at_equal_intervals_end_with_the_last_checkpoint():
    assert equal_intervals(12, 4) == (2, 5, 8, 11)
    assert equal_intervals(10, 3) == (3, 6, 9)
    assert equal_intervals(5, 5) == (0, 1, 2, 3, 4)
    assert equal_intervals(7, 1) == (6,)
    for checkpoints in range(1, 12):
        for anchors in range(1, checkpoints + 1):
            chosen = equal_intervals(checkpoints, anchors)
            gaps = [b - a for a, b in zip((-1, *chosen), chosen, strict=False)]
            assert len(chosen) == anchors and chosen[-1] == checkpoints - 1
            assert min(gaps) > 0 and max(gaps) - min(gaps) <= 1


def test_more_anchors_than_checkpoints_are_refused():
    for anchors in (0, 6):
        with pytest.raises(ValueError, match="number of checkpoints, 5"):
            equal_intervals(5, anchors)


def test_a_student_that_follows_the_route_ends_nearer_than_it_began():
    # Anchors of growing confidence; the student's logits are its parameters.
    route = [Outputs(scale * wave(4, 5)) for scale in (1.0, 2.0, 3.0, 4.0)]
    loss, logits = RouteConstrained(loss=SoftTargets(temperature=1)), torch.zeros(4, 5, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.long)
    logits.requires_grad_()
    optimizer = torch.optim.SGD([logits], 2.0)
    first = loss(Outputs(logits), route[-1], labels).item()
    for step in range(40):
        optimizer.zero_grad()
        loss(Outputs(logits), route[step // 10], labels).backward()
        optimizer.step()
    assert loss(Outputs(logits), route[-1], labels).item() < 0.1 * first
