"""Every file of kdnas/distillers is under contract, found by walking: -k NAME runs one distiller's."""

import copy
import functools

import pytest

from kdnas.distillers.quantization_aware import QuantizationAware
from kdnas.tables import load_space
from kdnas.testing.distillers import DistillerContract
from tests.contracts import contracts


def toy(self):
    return load_space("toy").fitted(classes=3, image_channels=3)


@functools.cache
def traced():
    """A training whose preparation, a trace, took seconds."""
    return type("Traced", (DistillerContract,), {"make": QuantizationAware, "_space": toy})()._training()


def first_copied(self):
    """A copy of a prepared training, and new ones for what a test compares with it."""
    if "first" in vars(self):
        return DistillerContract._training(self)
    self.first = copy.deepcopy(traced())
    return self.first


CONTRACTS = contracts(
    "kdnas.distillers",
    DistillerContract,
    {
        "attentive": {"arguments": {"num_sampled": 50}},
        "prioritized": {"arguments": {"size": 2, "slice_size": 3, "every": 2, "warmup": 0.1}},
        "quantization_aware": {"_space": toy, "_training": first_copied, "pytestmark": pytest.mark.slow},
        "progressive": {"arguments": {"stages": (("full", 1, 1.0, 1), ("kernel", 0, 1.0, 1), ("width", 0, 2.0, 2))}},
    },
)
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})
