"""How well a student's blocks imitate the teacher's: the rating of DNA."""

from typing import final

import torch
from torch import nn

from kdnas.network import Network, batch_statistics
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Blocks(Scorer):
    """Minus the sum over blocks of `mean |S_i(Y_{i-1}) - Y_i| / std(Y_i)`, the relative L1, with the trained adapters.

    `Y_i` is the teacher's feature behind block `i`, `S_i` the student's block between its adapters. 0 is best: every
    block equals the teacher's. Batch norm uses the statistics of the evidence, so that a block's rating depends on no
    other block and on no path rated before. The score adds up over blocks: `kdnas.jobs._block_rating` rates every path
    once and finds the best network exactly.

    Raises:
        ValueError: the run's supernet was not trained block-wise, so that there are no adapters.

    Reference: Li et al., Block-wisely Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020,
        section 3.3, equations 7 and 8; every block's weight is 1, as in the released search.
    Differs: batch norm uses the statistics of the evidence, not running ones, which belong to no single path.
    """

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The negative sum; the parts are the blocks' ratings."""
        if evidence.distiller is None:
            raise ValueError(
                "the score blocks needs a supernet that was trained block-wise, with its adapters. Train with "
                "--distiller block_wise, or choose another scorer."
            )
        if not isinstance(student, Network):
            raise ValueError(f"the score blocks needs a student of stages, got a {type(student).__name__}.")
        with torch.no_grad(), batch_statistics(student):
            ratings = evidence.distiller.rate(student, evidence.images, evidence.teacher)
        return Score(-sum(ratings), {f"block{i}": rating for i, rating in enumerate(ratings)})
