"""Contracts: what every loss must fulfil, as test classes to derive from."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "DistillerContract": "kdnas.testing.distillers",
        "LossContract": "kdnas.testing.losses",
        "ScorerContract": "kdnas.testing.scorers",
        "SearcherContract": "kdnas.testing.searchers",
        "SpaceContract": "kdnas.testing.spaces",
        "TaskContract": "kdnas.testing.tasks",
    },
)
