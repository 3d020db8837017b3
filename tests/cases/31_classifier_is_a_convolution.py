"""A converted network whose classifier is a convolution of 6 channels, and data of 10 classes.

The command adapts it or ends with a message (exit code 2), not with an index error.
"""

import contextlib
import io
import sys
from unittest import mock

import torch
from torch import nn

from kdnas.cli.commands import main


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 6, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def exit_code(*arguments):
    with mock.patch.object(sys, "path", list(sys.path)), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as error:
            return error.code
        except (IndexError, RuntimeError) as error:
            raise AssertionError(f"{type(error).__name__} instead of a message: {error}") from error
    return 0


def check(folder):
    space, run = str(folder / "space"), str(folder / "run")
    converted = exit_code("convert", f"{__name__}:network", "--size", "8", "--channels", "1", "--out", space)
    if converted != 2:
        sizes = ("--steps", "1", "--batch-size", "8", "--num-evaluations", "3", "--loss", "feature_mse")
        table = f"{space}/space.toml"
        assert exit_code("run", "--data", "digits", "--space", table, *sizes, "--out", run) in (0, 2)
