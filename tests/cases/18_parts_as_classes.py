"""Folders Training and Testing with three classes each: three classes, or a refusal; the parts are not classes."""

from PIL import Image

from kdnas.data.folders import folder as image_folder
from tests.cases import outcome


def check(folder):
    for part in ("Training", "Testing"):
        for label, name in enumerate(("ant", "bee", "fly")):
            (folder / part / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (80 * label, 10 * i, 0)).save(folder / part / name / f"{i}.png")
    data = outcome(lambda: image_folder(str(folder)))
    assert data is None or data.class_names == ("ant", "bee", "fly"), data.class_names
