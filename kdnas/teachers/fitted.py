"""The network that is trained as a teacher if a user has none."""

from kdnas.space import Blueprint, layer


def fitted_teacher(
    image: tuple[int, int, int], classes: int, blocks: int = 0, width: int | None = None, *, dense: bool = False
) -> Blueprint:
    """The network that `--teacher fit` trains: a ResNet of three stages for small images, four for larger ones.

    Args:
        image: channels, height and width.
        classes: number of classes.
        blocks: per stage; 0 for one on images of at most 16 x 16, two on larger ones.
        width: channels of the first stage, doubled at each later one; by default 32 on images of at most 16 x 16,
            64 on larger ones.
        dense: whether it answers for every pixel: then the stem has stride 2, the last maps are an eighth of the image,
            and the head is `kdnas.blocks.dense:Aspp`.
    """
    channels, height, _ = image
    first = width or (32 if height <= 16 else 64)
    widths = tuple(first * 2**stage for stage in range(3 if height <= 64 else 4))
    stride = 2 if dense else 1 if height <= 64 else 4
    stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=channels, outputs=widths[0], stride=stride)
    inputs, stages = widths[0], []
    for index, width in enumerate(widths):
        stage = []
        for block in range(blocks or (1 if height <= 16 else 2)):
            stride = 2 if index > 0 and block == 0 and not (dense and index > 2) else 1
            stage.append(layer("kdnas.blocks.resnet:BasicBlock", inputs=inputs, outputs=width, stride=stride))
            inputs = width
        stages.append(tuple(stage))
    if dense:
        head = layer("kdnas.blocks.dense:Aspp", inputs=inputs, width=widths[1], classes=classes, depth=1)
    else:
        head = layer("kdnas.blocks.basic:PoolLinear", inputs=inputs, classes=classes)
    return Blueprint(stem, tuple(stages), head, image, dense)
