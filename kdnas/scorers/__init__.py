"""Scorers: numbers by which a search ranks architectures."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "CombinedScorer": "kdnas.scorers.base",
        "Evidence": "kdnas.scorers.base",
        "OutputScorer": "kdnas.scorers.base",
        "Score": "kdnas.scorers.base",
        "Scorer": "kdnas.scorers.base",
    },
    with_algorithms=True,
)
