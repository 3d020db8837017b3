"""Tasks: what a network is for, as one value; every data set has one."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "Chance": "kdnas.tasks.base",
        "Classification": "kdnas.tasks.classification",
        "Lanes": "kdnas.tasks.lanes",
        "Segmentation": "kdnas.tasks.segmentation",
        "Task": "kdnas.tasks.base",
    },
)
