# Written by .ci/faces.py (`make format`).

from kdnas.testing.distillers import DistillerContract as DistillerContract
from kdnas.testing.losses import LossContract as LossContract
from kdnas.testing.scorers import ScorerContract as ScorerContract
from kdnas.testing.searchers import SearcherContract as SearcherContract
from kdnas.testing.spaces import SpaceContract as SpaceContract
from kdnas.testing.tasks import TaskContract as TaskContract
