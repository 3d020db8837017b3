import copy
from collections import Counter

import torch
import torch.nn.functional as F

from kdnas.distillers.base import Step
from kdnas.distillers.single_path import SinglePath
from kdnas.settings import Recipe
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, OPERATIONS, batch, gradients, supernet


def test_a_step_is_one_path_one_loss_and_its_gradient():
    model, one, step = supernet(OPERATIONS), batch(), Step(4, 10, 0)
    found = []
    for name, loss in SinglePath().losses(model, one, step):
        loss.backward()
        found.append(name)
    assert found == ["path"]
    ours = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(one.images, OPERATIONS.sample(step.rng("architectures"))).logits, one.labels).backward()
    for name, gradient in gradients(model).items():
        assert (gradient is None) == (ours[name] is None), name
        assert gradient is None or torch.allclose(gradient, ours[name], atol=1e-7), name


def test_every_operation_is_drawn_about_equally_often():
    counts = Counter()
    for index in range(2000):
        counts.update(OPERATIONS.sample(Step(index, 2000, 0).rng("architectures")).items())
    for choice in OPERATIONS.choices:
        for option in choice.options:
            share = counts[choice.name, option] / 2000
            assert abs(share - 1 / len(choice.options)) < 0.05, (choice.name, option, share)


def test_banks_outside_the_path_keep_weights_buffers_and_momentum_bit_for_bit():
    made = Training(supernet(OPERATIONS), SinglePath(), DATA, None, Recipe(steps=8, batch_size=12, weight_decay=0.1))
    touched = 0
    for index in range(8):
        path = OPERATIONS.sample(Step(index, 8, 0).rng("architectures"))
        used = {f"{n}:{layer.bank}".replace(".", "_") for n, layer in OPERATIONS.blueprint(path).named_layers()}
        weights = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
        momenta = {n: copy.deepcopy(made.optimizer.state.get(p)) for n, p in made.model.named_parameters()}
        made.step()
        for name, tensor in made.model.state_dict().items():
            if name.split(".")[1] in used:
                continue
            assert torch.equal(tensor, weights[name]), name
            touched += 1
        for name, parameter in made.model.named_parameters():
            if name.split(".")[1] not in used and momenta[name]:
                before = momenta[name]["momentum_buffer"]
                assert torch.equal(made.optimizer.state[parameter]["momentum_buffer"], before), name
    assert touched > 0
    # After several steps some bank has momentum and is left out by a later path: the comparison above was made.
    assert any(state.get("momentum_buffer") is not None for state in made.optimizer.state.values())
