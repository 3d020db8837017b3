"""Distillation losses: what a student is compared by, their sum as an objective, and stage pairs."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "FeatureLoss": "kdnas.losses.base",
        "Guide": "kdnas.losses.guide",
        "Loss": "kdnas.losses.base",
        "Moment": "kdnas.outputs",
        "Objective": "kdnas.losses.objective",
        "Outputs": "kdnas.outputs",
        "Recorder": "kdnas.losses.guide",
        "Stage": "kdnas.losses.base",
        "StagePairs": "kdnas.losses.stage_pairs",
        "Term": "kdnas.losses.objective",
    },
    with_algorithms=True,
)
