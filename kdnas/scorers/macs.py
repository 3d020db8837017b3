"""Multiply-accumulates as a score: a size control."""

from typing import final

import torch
from torch import nn

from kdnas.costs.count import cost, counted_macs
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
            with counted_macs() as counted, torch.no_grad(), batch_statistics(student):
                student(evidence.images[:2])  # batch norm after pooling has no statistics of one image
            macs = float(counted() // len(evidence.images[:2]))
        return Score(macs, {"macs": macs})
