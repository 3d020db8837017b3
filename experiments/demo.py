"""The chain on scikit-learn's digits: a small elastic supernet under a ResNet teacher.

kdnas demo --out runs/demo                 # the whole chain, two to three minutes on two CPU cores
kdnas train demo --out runs/mine           # or phase by phase
"""

from kdnas import Budget, Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.data import digits
from kdnas.settings import Finals, Retrain, Search, Train


def experiment() -> Experiment:
    return Experiment(
        train=Train(
            space=load_space("digits"),
            data=spec(digits),
            recipe=Recipe(steps=150, learning_rate=0.1),
            teacher=FitTeacher(recipe=Recipe(steps=200, learning_rate=0.1)),
        ),
        # A fifteenth of the teacher's: with more, all students are as good as it is.
        search=Search(budget=Budget(macs=2e5), num_evaluations=200, num_images=220),
        retrain=Retrain(recipe=Recipe(steps=120, learning_rate=0.1)),
        finals=Finals(seeds=3, controls=("labels", "random", "largest", "longer")),
    )
