"""A space whose first options are not its cheapest, and a feasible budget below them: searchers propose networks."""

import random

from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, check_feasible
from kdnas.costs.count import cost
from kdnas.searchers.evolution import Evolution
from kdnas.searchers.random_search import RandomSearch
from kdnas.tables import load_space

TABLE = """
family = "shuffle"
source = "the space of SPOS, narrower and shorter"
stem_width = 8
stem_stride = 1
stages = [{ width = 16, depth = 3 }, { width = 32, depth = 4 }]
head_width = 32
kernels = [3, 5, 7]
classes = 5
resolutions = [16]
"""


def check(folder):
    table = folder / "short.toml"
    table.write_text(TABLE)
    space = load_space(str(table))
    macs = cost(space.blueprint(space.decide(lambda choice: choice.options[0]))).macs
    budget = BudgetCheck(space, Budget(macs=0.99 * macs))
    check_feasible(budget, random.Random(0))
    for kind in (Evolution, RandomSearch):
        proposed = kind(space=space, admits=budget.admits, rng=random.Random(0)).ask(4)
        assert proposed, f"{kind.__name__} proposes nothing"
        assert all(budget.admits(architecture) for architecture in proposed)
