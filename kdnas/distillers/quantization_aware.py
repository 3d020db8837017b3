"""Quantisation-aware training: weights and activations are rounded to 8 bits during the training."""

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import DropPath
from kdnas.data.base import Data
from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Step
from kdnas.network import BATCH_NORMS, Network
from kdnas.outputs import Outputs
from kdnas.plain import reason
from kdnas.specs import Spec
from kdnas.students.integers import write_trained

_LEAST = 1e-3


@final
class QuantizationAware(ObjectiveDistiller):
    r"""A weighted sum of losses, as `FromTeacher`, of the network in simulated 8-bit integers.

    Convolutions, linear layers and sums compute with rounded numbers,
    $\hat x = s\,(\mathrm{clip}(\mathrm{round}(x / s) + z) - z)$: weights symmetric (z = 0) with a scale per output
    channel from its present largest value, activations asymmetric with one scale from moving averages of their least
    and largest values. Batch norm is folded into the weights before they are rounded. The gradient passes a rounding
    unchanged where x was not clipped. The network's own weights are trained; scales belong to this distiller.

    The first `begin` of the steps train without rounding, while ranges are measured; in the last `1 - freeze` the
    ranges of activations and batch norm's statistics are fixed. `student-int8.onnx` is written into the student's
    folder and compared with the simulated network in ONNX Runtime.

    Args:
        terms: pairs of weight and loss; by default as in `FromTeacher`.
        begin: share of the steps before rounding begins.
        freeze: share of the steps after which activations' ranges and statistics are fixed.

    Raises:
        ValueError: shares out of order, torchao not installed, or a network that cannot be traced.

    Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference, CVPR 2018, section 3 (equations 11 and 12; folding: 3.2; delayed activations: 3.1); Krishnamoorthi,
        Quantizing Deep Convolutional Networks, 2018, section 3.2.2 (frozen statistics). With a teacher: Mishra, Marr,
        Apprentice, ICLR 2018, scheme B. The passes are torchao's (export and quantiser for x86).
    Differs: rounding of weights and activations begins together. Dropout and drop path are off. A normalisation's
        weight of exactly 0, as in the last one of a residual branch at first, becomes 0.001.
    """

    model_type: ClassVar[type[Network]] = Network

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = (), begin: float = 0.1, freeze: float = 0.7) -> None:
        super().__init__(terms or None)
        if not 0 <= begin <= freeze <= 1:
            raise ValueError(f"0 <= begin <= freeze <= 1 must hold, got {begin=}, {freeze=}.")
        self.begin, self.freeze = begin, freeze
        # The ranges are state; the graph around them is built anew and shares the network's tensors.
        self.observers = nn.ModuleList()
        self._graph: list[torch.fx.GraphModule] = []

    def prepare(self, model: Model, batch: Batch) -> None:
        """Trace the network, insert the rounding, and build the losses' parts."""
        assert isinstance(model, Network)
        with torch.no_grad():
            for norm in (module for module in model.modules() if isinstance(module, BATCH_NORMS)):
                norm.weight.masked_fill_(norm.weight == 0, _LEAST)  # folding divides by it
        graph = _rounding_graph(model, batch.images)
        self._graph = [graph]
        self.observers = nn.ModuleList(_observers(graph))
        student = self.outputs(batch.images)
        self.objective.prepare(student, self.teacher_outputs(batch, student))

    def outputs(self, images: Tensor) -> Outputs:
        """The network's outputs in simulated integers."""
        logits, features, classified = self._graph[0](images)
        return Outputs(logits, tuple(features), images=images, classified=classified)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The objective's losses of the network in simulated integers."""
        assert isinstance(model, Network)
        self._set(step)
        yield from self.student_losses("student", self.outputs(batch.images), model, batch, step)

    def export_extras(self, model: Network, data: Data, folder: Path) -> dict[str, float]:
        """The integer graph, and how it compares with the simulated and the float network."""
        self._set(Step(1, 1, 0))
        graph = copy.deepcopy(self._graph[0]).cpu()
        return write_trained(graph, folder, data, model)

    def _set(self, step: Step) -> None:
        from torchao.quantization import pt2e

        fixed = step.progress >= self.freeze
        observers: Any = self.observers
        for observer in observers:
            weights = observer.qscheme == torch.per_channel_symmetric
            (pt2e.enable_fake_quant if step.progress >= self.begin else pt2e.disable_fake_quant)(observer)
            (pt2e.disable_observer if fixed and not weights else pt2e.enable_observer)(observer)
            # Weights have their present range, activations an average over a twentieth of the training.
            observer.activation_post_process.averaging_constant = 1.0 if weights else min(1.0, 20 / step.total)
        (pt2e.move_exported_model_to_eval if fixed else pt2e.move_exported_model_to_train)(self._graph[0])


class _Tensors(nn.Module):
    """A network as a module of plain tensors, for the tracer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        outputs = self.network(images)
        return outputs.logits, outputs.features, outputs.classified


def _rounding_graph(network: Network, images: Tensor) -> torch.fx.GraphModule:
    """The network as a graph with rounding, on the network's own parameters and statistics."""
    log = logging.getLogger("torch.utils._pytree")
    level = log.level
    log.setLevel(logging.ERROR)  # so are torch's of torchao
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's own, of the interpreter and of deprecations
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
            from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
                X86InductorQuantizer,
                get_default_x86_inductor_quantization_config,
            )
    except ImportError as error:
        raise ValueError(f"quantisation-aware training needs torchao ({error}): pip install 'kdnas[qat]'") from error
    finally:
        log.setLevel(level)
    wrapper = _Tensors(network).train()
    for module in wrapper.modules():
        if isinstance(module, DropPath):
            module.eval()  # a trace has one mode, and its random numbers would stay in the student
    example = images[:2].contiguous()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's own deprecations
            # Of some versions of torch only the strict trace says which layer an operation is of, which the quantiser
            # asks; without it nothing is rounded.
            for strict in (False, True):
                shapes = ({0: torch.export.Dim.AUTO},)
                program = torch.export.export(wrapper, (example,), dynamic_shapes=shapes, strict=strict)
                traced: Any = program.module()
                _without_dropout(traced)
                graph: torch.fx.GraphModule = prepare_qat_pt2e(traced, quantizer)
                if _observers(graph):
                    break
    except OSError:  # a full disk, not the network
        raise
    except Exception as error:  # a tracer runs layers in ways of its own, which may raise anything
        raise ValueError(f"the student cannot be traced for quantisation: {reason(error)}.") from error
    if not _observers(graph):
        raise ValueError(
            "the student must have a layer that is rounded, such as a convolution, but torchao finds none in its trace "
            f"by torch {torch.__version__}. Use another version of torch or torchao, or another distiller."
        )
    for name, parameter in wrapper.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(graph.get_submodule(owner), leaf, parameter)
    for name, buffer in wrapper.named_buffers():
        owner, _, leaf = name.rpartition(".")
        graph.get_submodule(owner)._buffers[leaf] = buffer
    return graph


def _without_dropout(traced: torch.fx.GraphModule) -> None:
    """Remove dropout: torchao gives every one in a graph the rate 0.5 when it changes the graph's mode."""
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()


def _observers(graph: nn.Module) -> list[nn.Module]:
    from torchao.quantization.pt2e import FakeQuantizeBase

    return [module for module in graph.modules() if isinstance(module, FakeQuantizeBase)]
