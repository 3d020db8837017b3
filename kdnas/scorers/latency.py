"""Latency as a score."""

import copy
import statistics
from typing import final

import torch
from torch import nn

from kdnas.costs.latency import timed
from kdnas.network import modes
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Latency(Scorer):
    """Minus the median seconds of a forward pass of one image on the evidence's device.

    Measured at each call: it depends on the machine and its load, and is not reproducible exactly. The weights do not
    matter; a student without weights (on the meta device) is timed with zeros.

    Args:
        repeats: timed passes, after two untimed ones.

    Reference: the cost of Liu et al., Search to Distill, CVPR 2020, section 3.2.
    Differs: measured on this machine, not on the device where the student is deployed.
    """

    reads_weights = False

    def __init__(self, *, repeats: int = 11) -> None:
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
        self.repeats = repeats

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        device, image = evidence.images.device, evidence.images[:1]
        if any(tensor.is_meta for tensor in student.parameters()):
            student = copy.deepcopy(student).to_empty(device=device)
            with torch.no_grad():
                for tensor in (*student.parameters(), *student.buffers()):
                    tensor.zero_()
        with modes(student):
            seconds = statistics.median(timed(lambda: student(image), device, self.repeats))
        return Score(-seconds, {"latency": seconds})
