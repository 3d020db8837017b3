"""An image is added to a class folder after a student was trained on it, and the student is trained on.

A new split moves training images into the test part, so the change must be reported or refused.
"""

import contextlib
import io
import logging

import torch
from PIL import Image

from kdnas.costs.count import cost
from kdnas.data.folders import folder as image_folder
from kdnas.jobs.retrain import retrain
from kdnas.network import Network
from kdnas.settings import Recipe, Retrain
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.tables import load_space
from tests.cases import outcome


def save(path, red, green):
    Image.new("RGB", (8, 8), (red, green, 0)).save(path)


def colours(part):
    """The colours of a part's images, each of which has one of its own."""
    return {tuple(pixel) for pixel in part.take(torch.arange(len(part)))[:, :, 0, 0].mul(255).round().int().tolist()}


def fresh_student(place, data, source):
    """A student folder with initial weights."""
    space = load_space("toy").fitted(classes=2, image_channels=3)
    blueprint = space.blueprint(space.smallest)
    card = Card(
        architecture=None,
        space=None,
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        origin={"data": source.to_json()},
    )
    write_student(place, Network(blueprint), card, deploy=False)


def check(folder):
    images, messages = folder / "images", io.StringIO()
    for label, name in enumerate(("cold", "warm")):
        (images / name).mkdir(parents=True)
        for i in range(20):
            save(images / name / f"{i:02d}.png", 120 * label, 12 * i)
    data = image_folder(str(images))
    fresh_student(folder / "fresh", data, spec(image_folder, path=str(images)))
    settings = Retrain(
        distiller=spec("kdnas.distillers.from_labels:FromLabels"),
        recipe=Recipe(steps=1, batch_size=8),
        weights="inherited",
    )
    handler = logging.StreamHandler(messages)
    logging.getLogger("kdnas").addHandler(handler)
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            retrain(folder / "fresh", settings, folder / "trained", deploy=False)
            save(images / "cold" / "99.png", 0, 255)
            longer = outcome(lambda: retrain(folder / "trained", settings, folder / "longer", deploy=False))
    finally:
        logging.getLogger("kdnas").removeHandler(handler)
    leaked = colours(data.train) & colours(image_folder(str(images)).test)
    reported = any(word in messages.getvalue().lower() for word in ("changed", "other images", "differ"))
    assert longer is None or reported or not leaked, f"{len(leaked)} training images are in the test part now"
