"""DNA's rating of a student's blocks, with the adapters of block-wise training."""

from typing import final

import torch
from torch import nn

from kdnas.network import Network, batch_statistics
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Blocks(Scorer):
    """Minus the sum over blocks of `mean |S_i(Y_{i-1}) - Y_i| / std(Y_i)`, the relative L1, with the trained adapters.

    `Y_i` is the teacher's feature map after block `i`, `S_i` the student's block between its adapters. 0, where every
    block equals the teacher's, is best. Batch norm uses the statistics of the evidence, so that a block's rating is
    independent of all other blocks and paths. The score is a sum over blocks: `kdnas.jobs._block_rating` rates every
    path once and finds the best network exactly.

    Raises:
        ValueError: the supernet was not trained block-wise, or the student is no Network.

    Reference: Li et al., Block-wisely Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020,
        section 3.3, equations 7 and 8; every block's weight is 1, as in the released search.
    Differs: batch norm uses the statistics of the evidence, not running ones, which belong to no single path.
    """

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The negative sum; the parts are the blocks' ratings."""
        if evidence.distiller is None:
            raise ValueError(
                "scorer 'blocks' needs a supernet that was trained block-wise, with its adapters. Train with "
                "--distiller block_wise or use another scorer."
            )
        if not isinstance(student, Network):
            raise ValueError(f"scorer 'blocks' needs a Network, got a {type(student).__name__}.")
        with torch.no_grad(), batch_statistics(student):
            ratings = evidence.distiller.rate(student, evidence.images, evidence.teacher)
        return Score(-sum(ratings), {f"block{i}": rating for i, rating in enumerate(ratings)})
