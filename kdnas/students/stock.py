"""A student under the names and files of other libraries, where their own classes compute the same network."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.data.base import normalise
from kdnas.runs.checkpoint import save_tensors
from kdnas.runs.files import write_text
from kdnas.runs.folder import CONFIG, MODEL
from kdnas.runtimes import Function
from kdnas.space import Blueprint
from kdnas.specs import Spec
from kdnas.students.card import Card

_PATCHES, _BLOCK, _HEAD = (f"kdnas.blocks.vit:{name}" for name in ("PatchTokens", "EncoderBlock", "TokensLinear"))
# timm's functions differ by the constant of their layer norms, which a configuration in JSON cannot set.
_OF_EPS = {1e-6: "vit_tiny_patch16_224", 1e-5: "vit_base_patch16_clip_224"}

_IN_BLOCK = {"norm1": "norm1", "norm2": "norm2", "attention.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}


def config_text(card: Card, *, timm: bool) -> str:
    """The text of `config.json`.

    Args:
        card: the student's.
        timm: whether the weights lie beside it in timm's form, so that timm and transformers load the folder; else the
            file describes the student, and says why they do not.
    """
    common = {"num_classes": len(card.class_names), "label_names": list(card.class_names)}
    p = card.preprocessing
    inputs = {"input_size": [len(p.mean), p.height, p.width], "mean": list(p.mean), "std": list(p.std)}
    inputs |= {"interpolation": p.interpolation, "crop_pct": 1.0, "fixed_input_size": not card.blueprint.dense}
    if timm:
        architecture, arguments = timm_arguments(card.blueprint)
        inputs |= {"num_classes": len(card.class_names), "first_conv": "patch_embed.proj", "classifier": "head"}
        content = {"architecture": architecture, **common, "model_args": arguments, "pretrained_cfg": inputs}
    else:
        own = {"library_name": "kdnas", "pipeline_tag": card.pipeline, "code": "student.py"}
        content = {**own, **common, "pretrained_cfg": inputs}
        content["timm"] = why_not_timm(card.blueprint) or "kdnas export STUDENT --forms timm writes it for timm"
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def why_not_timm(blueprint: Blueprint) -> str:
    """Why timm has no class that computes this network; empty where it has."""
    try:
        timm_arguments(blueprint)
    except ValueError as error:
        return str(error)
    return ""


def timm_arguments(blueprint: Blueprint) -> tuple[str, dict[str, Any]]:
    """The name of timm's function and the arguments that make it this network.

    Raises:
        ValueError: timm has no such network.
    """
    stem, head = blueprint.stem.make, blueprint.head.make
    makes = [layer.make for stage in blueprint.stages for layer in stage]
    for make in (stem, *makes, head):
        if make.make not in (_PATCHES, _BLOCK, _HEAD):
            raise ValueError(
                f"timm has no network with the layer {make.make} by its name; only plain transformers are."
            )
    if not makes or stem.make != _PATCHES or head.make != _HEAD or {make.make for make in makes} != {_BLOCK}:
        raise ValueError("timm has transformers with patches, encoder blocks and a classifier alone.")
    first = _options(makes[0])
    for key in ("heads", "hidden"):
        values = sorted({_options(make)[key] for make in makes})
        if len(values) > 1:
            raise ValueError(f"timm's blocks are equal, this network's have `{key}` {values}.")
    width, heads, hidden = first["width"], first["heads"], first["hidden"]
    if first["reach"]:
        raise ValueError("timm's transformers have no relative positions as these.")
    if heads * first["head_width"] != width:
        raise ValueError(
            f"timm's heads are together as wide as a token, these are {heads} x {first['head_width']} for {width}."
        )
    eps = {_options(make)["eps"] for make in makes} | {_options(head)["eps"]}
    if len(eps) > 1 or not eps <= set(_OF_EPS):
        raise ValueError(f"timm's layer norms have the constant 1e-6 or 1e-5, these {sorted(eps)}.")
    if int(width * (hidden / width)) != hidden:
        raise ValueError(f"{hidden} channels are no multiple of {width} as timm computes them.")
    channels, side, _ = blueprint.image
    arguments = {"img_size": side, "patch_size": _options(stem)["patch"], "in_chans": channels, "embed_dim": width}
    arguments |= {"depth": len(makes), "num_heads": heads, "mlp_ratio": hidden / width, "qkv_bias": first["bias"]}
    arguments |= {"global_pool": "token" if _options(head)["pool"] == "class" else "avg", "fc_norm": False}
    return _OF_EPS[eps.pop()], arguments | {"pre_norm": False}


def _options(make: Spec) -> dict[str, Any]:
    defaults = {"head_width": 64, "reach": 0, "eps": 1e-5, "bias": True, "pool": "mean"}
    return defaults | dict(make.arguments)


def write_timm(folder: Path, student: nn.Module, card: Card) -> Function:
    """Write `config.json` and `model.safetensors`, and return what timm loads from them as a function of pixels.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers'
    `AutoModelForImageClassification.from_pretrained(FOLDER)` load them; both take normalised images.

    Raises:
        ValueError: timm has no such network.
    """
    import timm

    text = config_text(card, timm=True)
    save_tensors(folder / MODEL, _timm_weights(student.state_dict(), card.blueprint))
    write_text(folder / CONFIG, text)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: model(normalise(images, card.preprocessing))


def _timm_weights(state: Mapping[str, Tensor], blueprint: Blueprint) -> dict[str, Tensor]:
    width = state["stem.class_token"].numel()
    positions = state["stem.positions"].flatten(2).transpose(1, 2)
    weights = {
        "cls_token": state["stem.class_token"].view(1, 1, width),
        "pos_embed": torch.cat([torch.zeros(1, 1, width), positions], 1),
    }
    renamed = {"stem.patches": "patch_embed.proj", "head.norm": "norm", "head.linear": "head"}
    places = [(s, b) for s, stage in enumerate(blueprint.stages) for b in range(len(stage))]
    for number, (stage, block) in enumerate(places):
        ours, theirs = f"stages.{stage}.{block}", f"blocks.{number}"
        parts = {
            "norm1": "norm1",
            "norm2": "norm2",
            "attention.out": "attn.proj",
            "mlp.0": "mlp.fc1",
            "mlp.2": "mlp.fc2",
        }
        renamed |= {f"{ours}.{old}": f"{theirs}.{new}" for old, new in parts.items()}
        for kind in ("weight", "bias"):
            rows = [f"{ours}.attention.{name}.{kind}" for name in ("queries", "keys", "values")]
            if rows[0] in state:
                weights[f"{theirs}.attn.qkv.{kind}"] = torch.cat([state[name] for name in rows])
    for old, new in renamed.items():
        for kind in ("weight", "bias"):
            weights[f"{new}.{kind}"] = state[f"{old}.{kind}"]
    return weights
