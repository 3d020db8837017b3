"""Time of every loss, forward and backward, as a share of a training step of ResNet-18.

    python -m benchmarks.loss_speed                                  # all losses, a table
    python -m benchmarks.loss_speed --only singular_value flow       # some of them
    python -m benchmarks.loss_speed --limit 40                       # fails if a loss's share is above 40 %

One thread. A step is forward and backward of torchvision's ResNet-18 on 64 images of 64x64, 1000 classes. The outputs
are of a batch of 64: logits of 1000 classes and two stages of 256 channels at 14x14, larger than that network's own.
The shortest of several calls counts, of the step and of a loss in turn, so that other processes weigh on both alike.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from kdnas.losses import Loss, Outputs
from kdnas.losses.check import losses

BATCH, CLASSES, MAP, TOKENS = 64, 1000, (256, 14, 14), 50


def outputs(seed: int, *, dense: bool) -> Outputs:
    """Outputs of a network: normal logits, rectified normal maps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    logits = normal(21, 33, 33) if dense else normal(CLASSES)
    maps = (normal(*MAP).relu(), normal(*MAP).relu())
    return Outputs(logits, maps, (normal(4, TOKENS, TOKENS).softmax(-1),), normal(3, 64, 64))


def call_of(make: type[Loss]) -> Callable[[], None]:
    """Forward and backward of a loss, to the outputs and to its parts."""
    student, teacher = outputs(0, dense=make.dense), outputs(1, dense=make.dense)
    labels = torch.arange(BATCH * (33 * 33 if make.dense else 1)) % (21 if make.dense else CLASSES)
    labels = labels.reshape(BATCH, 33, 33) if make.dense else labels
    torch.manual_seed(0)
    loss = make()
    loss.prepare(student, teacher)
    loss.mark_trained()
    student = student.map(lambda x: x.requires_grad_())

    def call() -> None:
        loss(student, teacher, labels).backward()

    return call


def step_of() -> Callable[[], None]:
    """Forward and backward of ResNet-18."""
    torch.manual_seed(0)
    network, images, labels = resnet18(), torch.randn(BATCH, 3, 64, 64), torch.arange(BATCH) % CLASSES

    def call() -> None:
        cross_entropy(network(images), labels).backward()

    return call


def seconds(call: Callable[[], None]) -> float:
    """The processor time of one call: other processes do not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    """The table, the slowest loss first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of losses")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each, the shortest counts")
    parser.add_argument("--limit", type=float, default=float("inf"), help="largest share of a step in percent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    step, rows = step_of(), []
    for name, make in losses().items():
        if not issubclass(make, Loss) or (options.only and name not in options.only):
            continue
        call = call_of(make)
        call()
        times = [(seconds(step), seconds(call)) for _ in range(options.rounds)]
        whole, own = (min(column) for column in zip(*times, strict=True))
        rows.append((100 * own / whole, 1000 * own, name))
    print("| loss | ms | % of a step |\n| --- | --- | --- |")
    for share, milliseconds, name in sorted(rows, reverse=True):
        print(f"| `{name}` | {milliseconds:.1f} | {share:.1f} |")
    slow = [name for share, _, name in rows if share > options.limit]
    if slow:
        sys.exit(f"above {options.limit:g} % of a step: {', '.join(slow)}.")


if __name__ == "__main__":
    main()
