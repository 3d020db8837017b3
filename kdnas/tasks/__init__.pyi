# Written by .ci/faces.py (`make format`).

from kdnas.tasks.base import Chance as Chance
from kdnas.tasks.base import Task as Task
from kdnas.tasks.classification import Classification as Classification
from kdnas.tasks.lanes import Lanes as Lanes
from kdnas.tasks.segmentation import Segmentation as Segmentation
