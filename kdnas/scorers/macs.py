"""Multiply-accumulates as a score: a size control."""

from typing import final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnas.costs.count import cost
from kdnas.network import Network, batch_statistics
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Macs(Scorer):
    """The multiply-accumulates for one image, as in `kdnas.costs.count`: a size control.

    Reference: none; see Ning et al., Evaluating Efficient Performance Estimators of Neural Architectures, NeurIPS
        2021, for FLOPs as a baseline.
    """

    reads_weights = False

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        if isinstance(student, Network):
            macs = float(cost(student.blueprint).macs)
        else:
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad(), batch_statistics(student):
                student(evidence.images[:2])  # batch norm after pooling has no statistics of one image
            # The counter counts a multiplication and an addition as two operations.
            macs = float(counter.get_total_flops() // 2 // len(evidence.images[:2]))
        return Score(macs, {"macs": macs})
