"""Search spaces: families of architectures, and the parts that their tables hold."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "ChannelStage": "kdnas.spaces.channels",
        "Head": "kdnas.spaces.mbconv",
        "MacroOperation": "kdnas.spaces.macro",
        "ResNetStage": "kdnas.spaces.resnet",
        "SearchSpace": "kdnas.space",
        "ShuffleStage": "kdnas.spaces.shuffle",
        "Stage": "kdnas.spaces.mbconv",
        "Stem": "kdnas.spaces.mbconv",
    },
    with_algorithms=True,
)
