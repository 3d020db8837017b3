"""Attention layers of networks that were not written to show their maps."""

import pytest
import torch
from torch import nn
from torchvision import models

from kdnas.losses.attention_layers import find_attention
from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen
from kdnas.teachers.combined import Ensemble, Route, Streamed

INPUT = Preprocessing(height=32, width=32, mean=(0.0,) * 3, std=(1.0,) * 3)


def torchvision_vit():
    return models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5).eval()


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(32, 16, embed_dim=32, depth=2, num_heads=4, num_classes=5).eval()


class Plain(nn.Module):
    """One head whose map is a softmax, with a dropout after it."""

    def __init__(self):
        super().__init__()
        self.patches, self.softmax, self.drop = nn.Conv2d(3, 8, 16, 16), nn.Softmax(-1), nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        maps = self.drop(self.softmax(tokens[:, None] @ tokens[:, None].transpose(2, 3)))
        return self.head((maps @ tokens[:, None])[:, 0].mean(1))


@pytest.mark.parametrize(("make", "layers", "tokens"), [(torchvision_vit, 2, 5), (timm_vit, 2, 5), (Plain, 1, 4)])
def test_a_teacher_shows_its_maps_when_it_is_asked_to(make, layers, tokens):
    teacher, pixels = Frozen(make(), preprocessing=INPUT), torch.rand(3, 3, 32, 32)
    plain = teacher(pixels)
    assert plain.attentions == ()
    asked = teacher.with_attentions()
    outputs = asked(pixels)
    heads = 4 if layers == 2 else 1
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, heads, tokens, tokens)] * layers
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(3), torch.ones(3, heads, tokens))
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert [f.shape for f in outputs.features] == [f.shape for f in plain.features]
    assert teacher(pixels).attentions == ()


class Channels(nn.Module):
    """Attention between channels (XCiT), whose map is no map of positions."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 16, 16), Mixing(), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.mix(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, tokens):
        return tokens @ self.drop((tokens.transpose(1, 2) @ tokens).softmax(-1)[:, None])[:, 0]


def test_attention_between_channels_is_not_taken_for_one_of_tokens():
    assert find_attention(Channels().eval(), torch.rand(2, 3, 32, 32)) == ()


def test_a_network_without_attention_has_none():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert find_attention(network, torch.rand(2, 3, 8, 8)) == ()


def test_teachers_made_of_teachers_show_the_maps_of_theirs():
    one, pixels = Frozen(torchvision_vit(), preprocessing=INPUT), torch.rand(2, 3, 32, 32)
    for teacher in (Ensemble([one, one]), Ensemble([one, one], mean="random"), Route([one]), Streamed(lambda: one)):
        assert teacher(pixels).attentions == ()
        assert len(teacher.with_attentions()(pixels).attentions) == 2
