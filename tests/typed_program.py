"""A program of a user, which no test runs: type checkers know every name of it (tests/test_faces.py)."""

from typing import assert_type

import torch
from torch import nn

import kdnas
from kdnas.settings import Search, Train

images = torch.rand(4, 1, 8, 8)
space = kdnas.load_space("digits")
data = kdnas.load_data("digits")
teacher = kdnas.load_teacher("fit")
budget = kdnas.Budget(macs="600k", params=1e6)
recipe = kdnas.Recipe(steps=100, learning_rate=0.05)
fit = kdnas.FitTeacher(recipe=recipe, members=2)
soft = kdnas.losses.SoftTargets(temperature=4.0)
hint = kdnas.losses.Hint()
scorer = kdnas.scorers.Rdm()
searcher = kdnas.spec(kdnas.searchers.Evolution, population=16)
sandwich = kdnas.distillers.Sandwich()
module: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

run = kdnas.run(
    data="digits", teacher=module, space=space, budget=budget, out="runs/user", scorer="in_place", steps=100, seed=1
)
ranking = run.ranking()
for entry in ranking[:5]:
    print(entry.code, entry.score, entry.macs, dict(entry.architecture))
print(ranking.front()[0].params, ranking.to_json()[0])
again = kdnas.search(run, scorer="macs", budget="macs=300k", max_time="20s")
exported = kdnas.export(run, place=2, out="runs/user-student")
row = kdnas.retrain("runs/user-student", loss=["soft_targets", "hint=10"], steps=50, weights="fresh")
student = kdnas.load_student("runs/user/students/student")
logits = student(images)
names = student.class_names
training = Train(space=space, data=data, teacher=fit, recipe=recipe)
experiment = kdnas.Experiment(train=training, search=Search(budget=budget))
trained = kdnas.train(experiment, out="runs/trained", steps=10)
supernet = kdnas.Supernet(space)
outputs = supernet(images, space.largest)
print(outputs.logits.shape, trained.folder, again, exported["params"], row["accuracy"], logits.shape, names, soft, hint)
assert_type(run, kdnas.Run)
assert_type(soft, kdnas.losses.SoftTargets)
assert_type(ranking[0].macs, int)
assert_type(again[0].score, float)
