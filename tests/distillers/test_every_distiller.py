"""Every file of kdnas/distillers is under contract, found by walking: -k NAME runs one distiller's."""

import copy
import functools

import pytest

from kdnas.distillers.quantization_aware import QuantizationAware
from kdnas.tables import load_space
from kdnas.testing.distillers import DistillerContract
from tests.contracts import contracts


class Traced(DistillerContract):
    """Every training begins with a trace of seconds, so the demands that do not compare two preparations share one."""

    make = QuantizationAware

    def _space(self):
        return load_space("toy").fitted(classes=3, image_channels=3)


@functools.cache
def prepared():
    return Traced()._training()


COMPARE = (
    "test_preparing_depends_on_the_seed_alone",
    "test_the_global_generators_are_left_alone",
    "test_its_state_gives_the_same_next_losses",
)
TRACED = {
    "pytestmark": pytest.mark.slow,
    "_training": lambda self: copy.deepcopy(prepared()),
    **{name: lambda self, name=name: getattr(Traced(), name)() for name in COMPARE},
}
CONTRACTS = contracts(
    "kdnas.distillers",
    DistillerContract,
    {
        "attentive": {"arguments": {"num_sampled": 50}},
        "prioritized": {"arguments": {"size": 2, "slice_size": 3, "every": 2, "warmup": 0.1}},
        "quantization_aware": TRACED,
        "progressive": {"arguments": {"stages": (("full", 1, 1.0, 1), ("kernel", 0, 1.0, 1), ("width", 0, 2.0, 2))}},
    },
)
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})
