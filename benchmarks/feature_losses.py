"""Which loss a student without labels learns a teacher's features best by, by what its vectors then say of classes.

    python benchmarks/feature_losses.py --data cifar10_jpeg.npz --out runs/same_work   # some minutes of one CPU thread
    python benchmarks/feature_losses.py --table                                        # of the rows that there are

The teacher is the fitted ResNet of `same_work.py` (OUT/teacher-resnet.safetensors, trained there if absent) without its
classifier: 128 features of images of 16 x 16. Students have a quarter of its widths and end in as many outputs; they
learn from 4,096 training images, whose labels are not read, without augmentation. Each loss has its default weight, and
the settings are the same for all.

Measured on 1,000 test images: accuracy of weighted nearest neighbours and of a linear probe, both leaving
the image itself out (`kdnas.tasks.features`), and the mean cosine to the teacher's vector. The table has means over
seeds and paired differences to the cosine alone, with 95 % intervals over images and seeds. A training that is finished
is a row in feature_losses.csv, and is not repeated.
"""

import argparse
import base64
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import append, cifar, open_rows, rows_in, trained

from kdnas.data.base import Data, TensorImages
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.losses.feature.attention_transfer import AttentionTransfer
from kdnas.losses.feature.hint import Hint
from kdnas.losses.relation.representational import Representational
from kdnas.losses.relation.similarity_preserving import SimilarityPreserving
from kdnas.losses.response.cosine import Cosine
from kdnas.losses.response.logit_regression import LogitRegression
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.specs import resolve, spec
from kdnas.statistics import difference_interval
from kdnas.tasks.features import neighbour_hits, probe_hits
from kdnas.teachers.base import Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

ROWS = Path(__file__).with_suffix(".csv")
COLUMNS = ("loss", "seed", "steps", "neighbours", "probe", "cosine", "seconds")
TRAIN, TEST, SIDE = 4096, 1000, 16
SEEDS = (0, 1, 2)
RECIPE = Recipe(steps=256, batch_size=64, learning_rate=0.05)
TEACHER_RECIPE = Recipe(steps=3000, batch_size=128, learning_rate=0.1)
LOSSES = {
    "cosine": (Cosine,),
    "logit_regression": (LogitRegression,),
    "cosine + hint": (Cosine, Hint),
    "cosine + attention_transfer": (Cosine, AttentionTransfer),
    "cosine + similarity_preserving": (Cosine, SimilarityPreserving),
    "cosine + representational": (Cosine, Representational),
}


class Remembered(Teacher):
    """A teacher's outputs for all training images, each given for the batch of the step that the progress names."""

    def __init__(self, outputs, data, recipe):
        super().__init__()
        self.outputs, self.data, self.recipe = outputs, data, recipe
        self.freeze()

    def teach(self, pixels, labels, at: Moment):
        """The outputs of the batch's images."""
        ids = self.data.indices(self.recipe.seed, round(at.progress * self.recipe.steps), self.recipe.batch_size)
        return Outputs(self.outputs.logits[ids], tuple(feature[ids] for feature in self.outputs.features))


@torch.no_grad()
def outputs_of(network, data, part):
    """Features of a part, and for logits the last ones' means over positions."""
    network.eval()
    features = [network(data.normalise(pixels)).features for pixels, _ in part.batches(256)]
    joined = tuple(torch.cat(each) for each in zip(*features, strict=True))
    return Outputs(joined[-1].mean((2, 3)), joined)


def spread(images, count):
    """So many images of a part, evenly spread: they are ordered by class."""
    places = torch.linspace(0, len(images) - 1, count).long()
    return TensorImages(images.images[places], images.labels[places])


def prepared(path, out):
    """The data, and the teacher's outputs for its train and test part."""
    whole = cifar(path, SIDE, out / f"cifar10-{SIDE}.safetensors")
    teacher = initialised(lambda: Network(fitted_teacher(whole.image, whole.classes, blocks=1)), TEACHER_RECIPE.seed)
    place = out / "teacher-resnet.safetensors"
    trained(Training(teacher, FromLabels(), whole, None, TEACHER_RECIPE), "resnet", place)
    parts = {"train": spread(whole.train, TRAIN), "search": whole.search, "test": spread(whole.test, TEST)}
    data = Data(**parts, class_names=whole.class_names)
    return data, outputs_of(teacher, data, data.train), outputs_of(teacher, data, data.test)


def measured(vectors, wanted, labels):
    """Hits of neighbours and probe, and cosines, one per image."""
    cosines = F.cosine_similarity(vectors.float(), wanted, 1)
    return neighbour_hits(vectors, labels), probe_hits(vectors, labels), cosines


def packed(hits):
    """Which images are hits, as text."""
    return base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()


def student(name, seed, data, outputs):
    """A network that has learnt by a loss, and the seconds that it took."""
    recipe = Recipe(steps=RECIPE.steps, batch_size=RECIPE.batch_size, learning_rate=RECIPE.learning_rate, seed=seed)
    blueprint = fitted_teacher(data.image, outputs.logits.shape[1], blocks=1, width=8)
    terms = tuple((resolve(spec(loss).make).weight, spec(loss)) for loss in LOSSES[name])
    network = initialised(lambda: Network(blueprint), seed)
    training = Training(network, FromTeacher(terms=terms), data, Remembered(outputs, data, recipe), recipe)
    while not training.done:
        training.step()
    return network.eval()


def table(rows):
    """Means over seeds, and differences to the cosine alone."""
    names = [name for name in LOSSES if any(row["loss"] == name for row in rows)]

    def hits(name, column):
        seeds = [row for row in rows if row["loss"] == name]
        bits = [np.unpackbits(np.frombuffer(base64.b64decode(r[column]), np.uint8))[:TEST] for r in seeds]
        return np.stack(bits).astype(float), [row["seed"] for row in seeds]

    yield "| loss | seeds | cosine to the teacher | neighbours | to cosine alone | probe | to cosine alone |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name in names:
        cells = [name, str(len(hits(name, "probe")[1]))]
        cells.append(f"{np.mean([float(row['cosine']) for row in rows if row['loss'] == name]):.3f}")
        for column in ("neighbours", "probe"):
            own, seeds = hits(name, column)
            base, known = hits("cosine", column)
            base = base[[known.index(seed) for seed in seeds if seed in known]]
            cells.append(f"{100 * own.mean():.1f} %")
            if name == "cosine" or len(base) < len(own):
                cells.append("-")
            else:
                value, low, high = (100 * x for x in difference_interval(own, base))
                cells.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10's binary files, or an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, default=Path("runs/same_work"), help="of data and teacher")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that there are")
    options = parser.parse_args()
    if not options.table:
        run(options)
    print("\n".join(table(rows_in(options.rows))))


def run(options):
    """Train what has no row yet, seed by seed."""
    torch.set_num_threads(1)
    data, outputs, test = prepared(options.data, options.out)
    labels = data.test.labels
    neighbours, probe, _ = measured(test.logits, test.logits, labels)
    print(f"the teacher: neighbours {neighbours.double().mean():.1%}, probe {probe.double().mean():.1%}", flush=True)
    handle = open_rows(options.rows, COLUMNS)
    there = {(row["loss"], int(row["seed"])) for row in rows_in(options.rows)}
    for seed in SEEDS:
        for name in LOSSES:
            if (name, seed) in there:
                continue
            began = time.process_time()
            network = student(name, seed, data, outputs)
            seconds = time.process_time() - began
            with torch.no_grad():
                vectors = torch.cat([network(data.normalise(p)).logits for p, _ in data.test.batches(250)])
            neighbours, probe, cosines = measured(vectors, test.logits, labels)
            row = {"loss": name, "seed": seed, "steps": RECIPE.steps, "neighbours": packed(neighbours)}
            row |= {"probe": packed(probe), "cosine": round(float(cosines.mean()), 4), "seconds": round(seconds, 1)}
            append(handle, COLUMNS, row)
            print(f"{name}, seed {seed}: probe {probe.double().mean():.1%}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
