# Written by .ci/faces.py (`make format`).

from kdnas.runs.entry import Entry as Entry
from kdnas.searchers.base import Searcher as Searcher
from kdnas.searchers.controller import Controller as Controller
from kdnas.searchers.evolution import Evolution as Evolution
from kdnas.searchers.exhaustive import Exhaustive as Exhaustive
from kdnas.searchers.gaussian_process import GaussianProcess as GaussianProcess
from kdnas.searchers.nsga2 import Nsga2 as Nsga2
from kdnas.searchers.optuna_sampler import OptunaSampler as OptunaSampler
from kdnas.searchers.random_search import RandomSearch as RandomSearch
