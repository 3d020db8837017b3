"""Searchers: which architectures are scored next."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "Entry": "kdnas.runs.entry",
        "Searcher": "kdnas.searchers.base",
    },
    with_algorithms=True,
)
