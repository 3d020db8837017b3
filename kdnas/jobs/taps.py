"""The table of `kdnas taps`: which stages are compared, and by what adapter."""

import torch

from kdnas.data.base import Data, normalise
from kdnas.jobs._run import build_teacher
from kdnas.jobs._unlabelled import data_of
from kdnas.losses.stage_pairs import StagePairs
from kdnas.randomness import initialised
from kdnas.specs import Spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.load import load_teacher


def taps_table(teacher: str, space: str, data: str, by: str, *, unlabelled: bool = False) -> str:
    """Student stage, teacher stage, their shapes, the adapter and its parameters, one line per pair.

    Args:
        teacher: a teacher's text form, other than `fit`.
        space: a table or its name.
        data: the data whose image size and channels are used.
        by: `resolution`, `rdm`, `order` or `classified`, as in `StagePairs`.
        unlabelled: whether the teacher gives features and no classes.

    Raises:
        ValueError: the teacher is `fit` or cannot be loaded, or a pair cannot be matched.
    """
    source = load_teacher(teacher)
    if not isinstance(source, Spec):
        raise ValueError("the teacher fit exists in a run only. Give checkpoint:RUN/teacher.")
    loaded: Data = data_of(data, source, unlabelled=unlabelled).build(Data)
    module = build_teacher(source, loaded)
    fitted = loaded.fitted(load_space(space))
    supernet = initialised(lambda: Supernet(fitted), 0).eval()
    pixels = loaded.search.take(torch.arange(min(8, len(loaded.search))))
    with torch.no_grad():
        student = supernet(normalise(pixels, loaded.preprocessing), fitted.largest)
        rows = StagePairs(pairs=by, alignment="channels").prepare(student, module(pixels), elastic=True)
    lines = [f"{'student':<8}{'shape':<18}{'teacher':<8}{'shape':<18}{'adapter':<18}{'params':>10}"]
    for row in rows:
        lines.append(
            f"{row.student:<8}{_shape(row.student_shape):<18}{row.teacher:<8}{_shape(row.teacher_shape):<18}"
            f"{row.adapter:<18}{row.parameters:>10,}"
        )
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
