"""A table whose widths are not ascending: refused when it is loaded, or every subnet of it runs."""

import torch

from kdnas.supernet import Supernet
from kdnas.tables import load_space
from tests.cases import outcome


def check(folder):
    table = folder / "unordered.toml"
    table.write_text('family = "toy"\nsource = "ours"\nwidths = [8, 4, 6]\ndepths = [1]\nnum_stages = 1\n')
    supernet = outcome(lambda: Supernet(load_space(str(table))).eval(), "widths")
    if supernet is None:
        return
    for architecture in supernet.space.all():
        try:
            supernet(torch.rand(2, 3, 8, 8), architecture)
        except ValueError as error:
            raise AssertionError(f"{dict(architecture)} fails after the table was accepted: {error}") from error
