"""Every file of kdnas/distillers is under contract, found by walking: -k NAME runs one distiller's."""

import pytest

from kdnas.tables import load_space
from kdnas.testing.distillers import DistillerContract
from tests.contracts import contracts
from tests.patterns import traced_once  # noqa: F401


def toy(self):
    return load_space("toy").fitted(classes=3, image_channels=3)


CONTRACTS = contracts(
    "kdnas.distillers",
    DistillerContract,
    {
        "attentive": {"arguments": {"num_sampled": 50}},
        "prioritized": {"arguments": {"size": 2, "slice_size": 3, "every": 2, "warmup": 0.1}},
        "quantization_aware": {"_space": toy, "pytestmark": pytest.mark.slow},
        "progressive": {"arguments": {"stages": (("full", 1, 1.0, 1), ("kernel", 0, 1.0, 1), ("width", 0, 2.0, 2))}},
    },
)
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})
