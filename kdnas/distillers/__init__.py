"""Distillers: one training step of a student or a supernet, with a teacher or without."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "Batch": "kdnas.distillers.base",
        "Distiller": "kdnas.distillers.base",
        "ObjectiveDistiller": "kdnas.distillers.base",
        "Schedule": "kdnas.distillers.base",
        "Step": "kdnas.distillers.base",
    },
    with_algorithms=True,
)
