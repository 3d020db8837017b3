import pytest
from torch import nn

from kdnas.cli.commands import main
from kdnas.conversion.convert import convert


def plain(width):
    """Two blocks of convolutions and a classifier."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).eval()


@pytest.mark.parametrize(("divisor", "least"), [(0, 8), (16, 16), (24, 24)])
def test_narrower_widths_are_multiples_of_the_divisor_and_the_source_stays(divisor, least):
    space = convert(plain(40), image=(3, 16, 16), divisor=divisor).space
    options = [choice.options for choice in space.choices if "width" in choice.name]
    assert options and {widths[-1] for widths in options} == {40, 80}
    for widths in options:
        narrower = widths[:-1]
        assert narrower and all(width % (divisor or 4) == 0 for width in narrower) and narrower[0] >= least


def test_a_divisor_that_is_none_is_refused(tmp_path, capsys):
    for command in (
        ["convert", "torchvision:resnet18", "--out", str(tmp_path / "a"), "--divisor", "-8"],
        ["run", "--data", "digits", "--space", "toy", "--divisor", "8", "--out", str(tmp_path / "a")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "`--divisor` must be at least 0, got -8" in said
    assert "`--divisor` is for a run without --space, whose table has the widths, got 8" in said
