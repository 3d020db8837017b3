"""Conversion of a network that applies one convolution four times: shared in the space too, or refused, or reported."""

import torch.nn.functional as F
from torch import nn

from kdnas.conversion.convert import convert
from kdnas.costs.count import cost
from tests.cases import outcome


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.cell = nn.Conv2d(24, 24, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(4):
            x = x + F.relu(self.cell(x))
        return self.head(self.pool(x).flatten(1))


def check(folder):
    network = Unrolled()
    conversion = outcome(lambda: convert(network, image=(1, 8, 8)), "cell")
    if conversion is None:
        return
    params = cost(conversion.space.blueprint(conversion.space.largest)).params
    expected = sum(parameter.numel() for parameter in network.parameters())
    reported = any(word in str(conversion) for word in ("copied", "copies", "tied", "4 times", "called again"))
    assert params == expected or reported, f"{expected} parameters became {params} without a word"
