"""FastNAS of nvidia-modelopt on one network, in an environment of its own: `python fastnas.py FOLDER`, for peers.py.

FOLDER holds `network.json` (the arguments of the layers, the budget in MACs, the seed) and `network.safetensors` (the
weights, images for the batch norms' statistics, images and labels for the score). The weights and the numbers of the
images used are written as `result.safetensors` and `result.json`.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import modelopt.torch.prune as mtp
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdnas.blocks.graph import Graph

DIVISOR = 8
BATCH = 64
TRIES = 5  # constraints tried: torchprofile counts normalisation and pooling too, so that the budget's own is too tight


class Counted:
    """Batches of images, each a tuple as a loader gives it, and how many images were drawn."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.count = images, 0

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for batch in self.images.split(BATCH):
            self.count += len(batch)
            yield (batch,)


def macs(module: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return counter.get_total_flops() // 2


def prune(network: nn.Module, limit: float, image: Tensor, images: Counted, score: Callable, folder: Path) -> nn.Module:
    """FastNAS under a limit of its own count; sensitivities are measured once for all limits."""
    config = mtp.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = DIVISOR
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = DIVISOR
    pruned, _ = mtp.prune(
        model=copy.deepcopy(network),
        mode=[("fastnas", config)],
        constraints={"flops": limit},
        dummy_input=image,
        config={
            "data_loader": images,
            "score_func": score,
            "checkpoint": str(folder / "sensitivities.pth"),
            "max_iter_data_loader": len(images.images) // BATCH,
        },
    )
    return pruned


def main() -> None:
    """Search, and write the largest network within the budget."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    settings = json.loads((folder / "network.json").read_text(encoding="utf-8"))
    torch.manual_seed(settings["seed"])
    tensors = load_file(folder / "network.safetensors")
    network = nn.Sequential(*(Graph(tuple(nodes)) for nodes in settings["layers"])).eval()
    network.load_state_dict({name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")})
    images, scored = Counted(tensors["images"]), Counted(tensors["search"])
    labels = tensors["labels"].split(BATCH)

    def score(module: nn.Module) -> float:
        module.eval()
        with torch.no_grad():
            hits = sum(int((module(x).argmax(1) == y).sum()) for (x,), y in zip(scored, labels, strict=True))
        return hits / len(scored.images)

    image, budget = tensors["images"][:1], settings["macs"]
    low, high = budget, 1.2 * budget
    best = prune(network, budget, image, images, score, folder)
    for _ in range(TRIES):
        middle = (low + high) / 2
        larger = prune(network, middle, image, images, score, folder)
        if macs(larger, image) <= budget:
            low, best = middle, larger
        else:
            high = middle
    save_file({name: tensor.contiguous() for name, tensor in best.state_dict().items()}, folder / "result.safetensors")
    (folder / "result.json").write_text(json.dumps({"images": images.count + scored.count}), encoding="utf-8")


if __name__ == "__main__":
    main()
