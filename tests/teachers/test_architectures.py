"""Many architectures of timm and transformers, with random weights, as teachers from their folders."""

import pytest
import torch

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.load import load_teacher

NAMES = ("ant", "bee", "cat", "dog", "elk")
DATA = Preprocessing(height=40, width=40, mean=(0.3,) * 3, std=(0.2,) * 3)

# Number of stages, of attention maps, and arguments. Windows show no maps, unless one is the whole map.
SMALL = {
    "test_convnext": (4, 0, {}),
    "test_efficientnet": (5, 0, {}),
    "test_resnet": (5, 0, {}),
    "test_vit": (4, 6, {"img_size": 32}),
}
TIMM = {
    "beit_base_patch16_224": (4, 12, {"img_size": 64}),
    "coatnet_nano_rw_224": (5, 9, {"img_size": 64}),
    "convnext_atto": (4, 0, {}),
    "deit_tiny_distilled_patch16_224": (4, 12, {"img_size": 64}),
    "densenet121": (5, 0, {}),
    "edgenext_xx_small": (4, 0, {}),
    "efficientnet_b0": (5, 0, {}),
    "eva02_tiny_patch14_224": (4, 12, {"img_size": 56}),
    "fastvit_t8": (5, 0, {}),
    "ghostnet_050": (5, 0, {}),
    "hgnetv2_b0": (5, 0, {}),
    "hrnet_w18_small": (5, 0, {}),
    "levit_128s": (4, 0, {"img_size": 224}),
    "maxvit_rmlp_pico_rw_256": (5, 4, {"img_size": 64}),
    "mixer_s32_224": (4, 0, {"img_size": 64}),
    "mobilenetv3_small_050": (5, 0, {}),
    "mobilenetv4_conv_small_035": (5, 0, {}),
    "mobilevit_xxs": (5, 0, {}),
    "nfnet_l0": (5, 0, {}),
    "poolformer_s12": (4, 0, {}),
    "pvt_v2_b0": (4, 2, {}),
    "regnety_002": (5, 0, {}),
    "repvgg_a0": (5, 0, {}),
    "resnet18": (5, 0, {}),
    "resnetv2_50": (5, 0, {}),
    "swin_tiny_patch4_window7_224": (4, 10, {"img_size": 56}),
    "vgg11_bn": (6, 0, {}),
    "vit_tiny_patch16_224": (4, 12, {"img_size": 64}),
    "xcit_nano_12_p16_224": (4, 0, {"img_size": 64}),
}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
PLAIN = {**TOKENS, "image_size": 32, "patch_size": 8}
FOUR = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
HUB = {
    "BeitForImageClassification": (4, 4, PLAIN),
    "ConvNextForImageClassification": (4, 0, {**FOUR, "image_size": 64}),
    "DeiTForImageClassification": (4, 4, PLAIN),
    "Dinov2ForImageClassification": (4, 4, PLAIN),
    "EfficientNetForImageClassification": (
        5,
        0,
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    ),
    "MobileNetV2ForImageClassification": (5, 0, {"image_size": 64, "depth_multiplier": 0.35}),
    "MobileViTForImageClassification": (
        5,
        0,
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
        },
    ),
    "PoolFormerForImageClassification": (4, 0, FOUR),
    # One block in each stage, beside which the embedding looks like a block too.
    "PvtForImageClassification": (
        4,
        1,
        {**FOUR, "image_size": 64, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    ),
    "RegNetForImageClassification": (5, 0, {**FOUR, "embedding_size": 8, "groups_width": 8}),
    "ResNetForImageClassification": (5, 0, {**FOUR, "embedding_size": 8, "layer_type": "basic"}),
    "SegformerForImageClassification": (
        4,
        1,
        {**FOUR, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16},
    ),
    "SwinForImageClassification": (4, 1, {**WINDOWS, "window_size": 2}),
    "ViTForImageClassification": (4, 4, PLAIN),
}


def check(text, num_stages, num_maps, own):
    """The teacher of a text form, its stages in order, features of the documented shapes, and attention maps."""
    teacher = load_teacher(text).build(Teacher, classes=5, preprocessing=DATA, class_names=NAMES)
    assert isinstance(teacher, Frozen)
    assert teacher.preprocessing == own
    pixels = torch.rand(2, 3, 40, 40)
    outputs = teacher(pixels)
    assert outputs.logits.shape == (2, 5)
    assert teacher.class_names == NAMES or teacher.class_names is None
    assert len(teacher.stages) == len(outputs.features) == num_stages, teacher.stages
    assert all(f.dim() in (3, 4) and len(f) == 2 and torch.isfinite(f).all() for f in outputs.features)
    positions = [f.shape[2:].numel() if f.dim() == 4 else f.shape[1] for f in outputs.features]
    assert positions == sorted(positions, reverse=True), positions
    assert list(teacher.stages) == in_order(teacher, pixels)
    maps = teacher.with_attentions()(pixels).attentions
    assert len(maps) == num_maps
    for map_ in maps:
        torch.testing.assert_close(map_.sum(3), torch.ones(map_.shape[:3]))
    return teacher


def in_order(teacher, pixels):
    """The stages in the order in which they end."""
    called = []
    handles = [
        teacher.module.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        for name in teacher.stages
    ]
    teacher(pixels)
    for handle in handles:
        handle.remove()
    last = {name: place for place, name in enumerate(called)}
    return sorted(teacher.stages, key=last.__getitem__)


def timm_folder(name, options, root):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5, **options).eval()
    timm.models.save_for_hf(module, root, safe_serialization=True, model_args=options)
    config = module.pretrained_cfg
    side = options.get("img_size", config["input_size"][1])
    kind = config["interpolation"]
    own = Preprocessing(
        height=side, width=side, mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=kind
    )
    return f"timm:{root}" + (f",size={side}" if options else ""), own


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.real) for name in TIMM)])
def test_a_network_of_timm(name, tmp_path):
    stages, maps, options = (SMALL | TIMM)[name]
    text, own = timm_folder(name, options, tmp_path)
    check(text, stages, maps, own)


@pytest.mark.real
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", HUB)
def test_a_model_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    stages, maps, options = HUB[name]
    config = getattr(transformers, name).config_class(**options, num_labels=5)
    config.id2label = dict(enumerate(NAMES))
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    side = options.get("image_size", 64)
    processor = transformers.ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=mean, image_std=std, resample=3
    )
    processor.save_pretrained(tmp_path)
    own = Preprocessing(height=side, width=side, mean=mean, std=std, interpolation="bicubic")
    teacher = check(f"hf:{tmp_path}", stages, maps, own)
    assert teacher.class_names == NAMES
