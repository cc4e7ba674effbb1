"""Pico image anchors of every family, small to large, with the class that stitches them and the options of their space."""

import torch
from conftest import randomise
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import stitched_llama as sl

CLASSES = 7
LABELS = {"id2label": {i: f"class {i}" for i in range(CLASSES)}}


def vit(width, depth, config=ViTConfig, model=ViTForImageClassification, size=16, **fields):
    settings = {"intermediate_size": 2 * width, "image_size": size, "patch_size": 4, **LABELS, **fields}
    return model(config(hidden_size=width, num_attention_heads=2, num_hidden_layers=depth, **settings))


def deit(width, depth):
    return vit(width, depth, DeiTConfig, DeiTForImageClassification)


def dinov2(width, depth):
    return vit(width, depth, Dinov2Config, Dinov2ForImageClassification, mlp_ratio=2)


def swin(width, depths, size=16, patch=2):
    shape = {"embed_dim": width, "depths": depths, "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(image_size=size, patch_size=patch, **shape, **LABELS))


def convnext(widths, depths):
    shape = {"hidden_sizes": widths, "depths": depths, "num_stages": 2, "layer_scale_init_value": 0.5}
    return ConvNextForImageClassification(ConvNextConfig(image_size=16, patch_size=2, **shape, **LABELS))


def resnet(widths, depths, kind):
    config = ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=depths, layer_type=kind, **LABELS)
    config.image_size = 32
    return ResNetForImageClassification(config)


def mobilenet(multiplier):
    config = MobileNetV2Config(depth_multiplier=multiplier, image_size=32, classifier_dropout_prob=0.0, **LABELS)
    return MobileNetV2ForImageClassification(config)


def basic():
    return resnet([8, 16], [2, 2], "basic")


FAMILIES = {
    "vit": (sl.StitchedViTForImageClassification, lambda: [vit(16, 3), vit(24, 3)], {"kernel_size": 2}),
    "three": (
        sl.StitchedViTForImageClassification,
        lambda: [vit(16, 3), vit(24, 3), vit(32, 4)],
        {"kernel_size": 2, "pairs": "chain"},
    ),
    "deit": (sl.StitchedViTForImageClassification, lambda: [deit(16, 3), deit(24, 5)], {}),
    "vit-deit": (sl.StitchedViTForImageClassification, lambda: [vit(16, 3), deit(24, 5)], {}),
    "dinov2": (sl.StitchedDinov2ForImageClassification, lambda: [dinov2(16, 3), dinov2(24, 3)], {}),
    "swin": (sl.StitchedSwinForImageClassification, lambda: [swin(8, [2, 2]), swin(12, [2, 4])], {"kernel_size": 2}),
    "convnext": (
        sl.StitchedConvNextForImageClassification,
        lambda: [convnext([8, 16], [2, 2]), convnext([12, 24], [2, 4])],
        {},
    ),
    "resnet": (
        sl.StitchedResNetForImageClassification,
        lambda: [basic(), resnet([32, 64], [3, 4], "bottleneck")],
        {},
    ),
    "mobilenet": (sl.StitchedMobileNetV2ForImageClassification, lambda: [mobilenet(0.1), mobilenet(0.2)], {}),
    "resnet-swin": (sl.StitchedMixedForImageClassification, lambda: [basic(), swin(12, [2, 4], 32, 4)], {}),
    "resnet-vit": (
        sl.StitchedMixedForImageClassification,
        lambda: [basic(), vit(32, 4, size=32)],
        {"direction": "both"},
    ),
}


@torch.no_grad()
def lively(model, seed):
    """Norms, biases and running statistics moved off their birth, where many faults hide."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def build(family):
    torch.manual_seed(0)
    return [lively(anchor, seed) for seed, anchor in enumerate(FAMILIES[family][1]())]


def tuned(family):
    """A stitched model of a family with PST, each trained part drawn at random."""
    stitched_class, _, options = FAMILIES[family]
    torch.manual_seed(0)
    model = stitched_class.from_anchors(build(family), **options)
    model.attach_pst(sl.PSTConfig(rank=2))
    randomise(model)
    return model
