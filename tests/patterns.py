"""torchao traces the same patterns for every network that it prepares, which takes half a minute.

Once will do, and only for convolutions of two dimensions: the networks of the tests have no others.
"""

import copy

import pytest
import torch


def _described(value):
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """The graph of a pattern, by its code, what it closes over, and the shapes of its inputs."""
    utils = pytest.importorskip("torchao.quantization.pt2e.utils")
    from torchao.quantization.pt2e import qat_utils

    trace = utils._get_aten_graph_module_for_pattern

    def of(pattern, inputs, is_cuda=False, **options):
        closure = tuple(cell.cell_contents for cell in pattern.fn.__closure__ or ())
        described = *map(_described, inputs), *((name, _described(value)) for name, value in sorted(options.items()))
        key = (pattern.fn.__code__, closure, is_cuda, described)
        if key not in _GRAPHS:
            _GRAPHS[key] = trace(pattern, inputs, is_cuda, **options)
        return copy.deepcopy(_GRAPHS[key])

    def of_two_dimensions(helper):
        return lambda graph, conv, *rest, **options: (
            helper(graph, conv, *rest, **options) if conv is torch.nn.functional.conv2d else graph
        )

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_fold_conv_bn_qat_helper", "_fuse_conv_bn_qat_helper"):
            patch.setattr(qat_utils, name, of_two_dimensions(getattr(qat_utils, name)))
        for module in (utils, qat_utils):
            patch.setattr(module, "_get_aten_graph_module_for_pattern", of)
        yield


_GRAPHS = {}
