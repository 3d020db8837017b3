"""What a contract compares of a module before and after a call."""

from typing import Any

from torch import nn


def module_state(module: nn.Module) -> dict[str, Any]:
    """Weights, buffers, modes, gradients and the number of hooks, as values that can be compared."""
    return {
        "weights and buffers": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
        "modes": [(m.training, getattr(m, "track_running_stats", None)) for m in module.modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    }
