"""A ConvNeXt, whose blocks compute in [batch, height, width, channels]: stages are maps with channels first."""

from functools import partial

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt, LayerNorm2d

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen

WIDTHS = (6, 10, 14, 18)


def check(folder):
    configs = [CNBlockConfig(a, b, 1) for a, b in zip(WIDTHS, (*WIDTHS[1:], None), strict=True)]
    module = ConvNeXt(configs, num_classes=3, norm_layer=partial(LayerNorm2d, eps=1e-6))
    assert any(isinstance(part, nn.LayerNorm) for part in module.modules())
    teacher = Frozen(module, preprocessing=Preprocessing(height=64, width=64, mean=(0.5,) * 3, std=(0.5,) * 3))
    shapes = [tuple(feature.shape[1:]) for feature in teacher(torch.rand(1, 3, 64, 64)).features]
    for channels, height, width in shapes:
        assert channels in WIDTHS and height == width, f"{teacher.stages} have shapes {shapes}"
    assert len({height for _, height, _ in shapes}) >= 3, f"resolutions are missing: {shapes}"
