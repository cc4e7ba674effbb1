"""Specs of image classifiers, as Transformers builds them: ViT, DeiT, DINOv2, Swin, ConvNeXt, ResNet, MobileNetV2.

Costs count one image. Sources: the papers of the families, and the shapes of Transformers' modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .spec import AnchorSpec, Feature, Part

Config = Mapping[str, Any]


def vit_spec(config: Config) -> AnchorSpec:
    """ViT and DeiT with one head on the class token: equal blocks on a class token, DeiT's distillation token, patches."""
    grid, channels = _grid(config, config.get("patch_size", 16)), config.get("num_channels", 3)
    patch, width = _pair(config.get("patch_size", 16)), config.get("hidden_size", 768)
    ffn, depth = config.get("intermediate_size", 3072), config.get("num_hidden_layers", 12)
    special = 2 if config["model_type"] == "deit" else 1
    heads = config.get("num_attention_heads", 12)
    inner = heads * (config.get("head_dim") or width // heads)
    feature = Feature(width, grid, special)
    tokens, pixels = feature.positions, channels * patch[0] * patch[1]
    linears = _attention_linears(width, inner, config.get("qkv_bias", True)) + [(width, ffn, True), (ffn, width, True)]
    block = Part(
        **_linear_sizes(linears, norms=4 * width),
        macs=tokens * sum(d_in * d_out for d_in, d_out, _ in linears) + 2 * tokens * tokens * inner,
        adapted=_adapted_attention(width, inner),
    )
    return AnchorSpec(
        family=config["model_type"],
        embedding=Part(
            params=pixels * width + width + special * width + tokens * width,
            macs=grid[0] * grid[1] * pixels * width,
        ),
        head=_head(width, config),
        blocks=(block,) * depth,
        enters=(feature,) * depth,
        leaves=(feature,) * depth,
        contract=_contract(config),
        unit="image",
    )


def dinov2_spec(config: Config) -> AnchorSpec:
    """DINOv2: a ViT whose two branches are scaled, and whose head reads class token and mean patch."""
    width, ratio = config.get("hidden_size", 768), config.get("mlp_ratio", 4)
    if config.get("use_swiglu_ffn"):
        raise ValueError(
            "DINOv2 with use_swiglu_ffn is not supported: take a checkpoint without it (small, base, large)"
        )
    patch = config.get("patch_size", 14)
    plain = vit_spec({**config, "model_type": "dinov2", "intermediate_size": int(width * ratio), "patch_size": patch})
    scaled = replace(plain.blocks[0], params=plain.blocks[0].params + 2 * width)
    token = width if config.get("use_mask_token", True) else 0
    labels = _label_count(config)
    return replace(
        plain,
        embedding=replace(plain.embedding, params=plain.embedding.params + token),
        blocks=(scaled,) * plain.depth,
        head=Part(params=2 * width + 2 * width * labels + labels, macs=2 * width * labels),
    )


def swin_spec(config: Config) -> AnchorSpec:
    """Swin: window attention in stages, patch merging between them."""
    patch, channels = _pair(config.get("patch_size", 4)), config.get("num_channels", 3)
    width, depths = config.get("embed_dim", 96), config.get("depths", (2, 2, 6, 2))
    head_counts, ratio, limit = (
        config.get("num_heads", (3, 6, 12, 24)),
        config.get("mlp_ratio", 4.0),
        config.get("window_size", 7),
    )
    grid = _grid(config, patch)
    pixels = channels * patch[0] * patch[1]
    positions = width * grid[0] * grid[1] if config.get("use_absolute_embeddings") else 0
    stem = Part(params=pixels * width + 3 * width + positions, macs=grid[0] * grid[1] * pixels * width)
    blocks, features, transitions = [], [], []
    for stage, (depth, heads) in enumerate(zip(depths, head_counts)):
        window = min(limit, *grid)
        padded = (-(-grid[0] // window) * window) * (-(-grid[1] // window) * window)
        places, ffn = grid[0] * grid[1], int(ratio * width)
        attention = _attention_linears(width, width, config.get("qkv_bias", True))
        linears = [*attention, (width, ffn, True), (ffn, width, True)]
        block = Part(
            **_linear_sizes(linears, norms=4 * width + (2 * limit - 1) ** 2 * heads),
            macs=padded * (4 * width * width + 2 * window * window * width) + places * 2 * width * ffn,
            adapted=_adapted_attention(width, width),
        )
        blocks += [block] * depth
        features += [Feature(width, grid)] * depth
        transitions += [Part()] * (depth if stage == 0 else depth - 1)
        if stage + 1 < len(depths):
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            merged = 8 * width * width
            transitions.append(Part(merged + 8 * width, merged, 2 * width, macs=grid[0] * grid[1] * merged))
            width *= 2
    return _staged(config, stem, blocks, features, features, transitions, _head(width, config))


def convnext_spec(config: Config) -> AnchorSpec:
    """ConvNeXt: depthwise 7x7 convolutions and pointwise linear layers in stages, strided convolutions between."""
    patch, channels = _pair(config.get("patch_size", 4)), config.get("num_channels", 3)
    widths, depths = config.get("hidden_sizes") or (96, 192, 384, 768), config.get("depths") or (3, 3, 9, 3)
    scale = 1 if config.get("layer_scale_init_value", 1e-6) > 0 else 0
    grid, pixels = _grid(config, patch), channels * patch[0] * patch[1]
    stem = Part(params=pixels * widths[0] + 3 * widths[0], macs=grid[0] * grid[1] * pixels * widths[0])
    blocks, features, transitions = [], [], []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        between = Part()
        if stage:
            before, grid = widths[stage - 1], (grid[0] // 2, grid[1] // 2)
            between = Part(params=2 * before + 4 * before * width + width, macs=grid[0] * grid[1] * 4 * before * width)
        linears = [(width, 4 * width, True), (4 * width, width, True)]
        block = Part(
            **_linear_sizes(linears, norms=49 * width + width + 2 * width + scale * width),
            macs=grid[0] * grid[1] * (49 * width + 8 * width * width),
            adapted=(("pwconv1", width, 4 * width), ("pwconv2", 4 * width, width)),
        )
        blocks += [block] * depth
        features += [Feature(width, grid)] * depth
        transitions += [between] + [Part()] * (depth - 1)
    return _staged(config, stem, blocks, features, features, transitions, _head(widths[-1], config))


def resnet_spec(config: Config) -> AnchorSpec:
    """ResNet: basic or bottleneck blocks; the first block of a later stage halves the map itself."""
    widths, depths = config.get("hidden_sizes") or (256, 512, 1024, 2048), config.get("depths") or (3, 4, 6, 3)
    channels, stem_width = config.get("num_channels", 3), config.get("embedding_size", 64)
    bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
    size = _pair(config["image_size"])
    half = tuple(-(-side // 2) for side in size)
    stem = Part(params=49 * channels * stem_width + 2 * stem_width, macs=half[0] * half[1] * 49 * channels * stem_width)
    grid = tuple(-(-side // 2) for side in half)  # after the max-pooling
    blocks, enters, leaves = [], [], []
    before = stem_width
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for index in range(depth):
            stride = 2 if index == 0 and (stage or config.get("downsample_in_first_stage", False)) else 1
            after = tuple(-(-side // stride) for side in grid)
            convolutions = _resnet_convolutions(before, width, stride, bottleneck, config)
            places = {1: grid[0] * grid[1], stride: after[0] * after[1]}
            params = sum(d_in * d_out + 2 * d_out for _, d_in, d_out, _ in convolutions)
            macs = sum(places[down] * d_in * d_out for _, d_in, d_out, down in convolutions)
            adapted = tuple(
                (name, d_in, d_out) for name, d_in, d_out, _ in convolutions if name != "shortcut.convolution"
            )
            blocks.append(Part(params=params, macs=macs, adapted=adapted))
            enters.append(Feature(before, grid))
            leaves.append(Feature(width, after))
            before, grid = width, after
    head = Part(*_head_sizes(widths[-1], config))
    return _staged(config, stem, blocks, enters, leaves, [Part()] * len(blocks), head)


def mobilenet_v2_spec(config: Config) -> AnchorSpec:
    """MobileNetV2: a stem, sixteen inverted residuals of fixed plan, and a head of a 1x1 convolution and a classifier."""
    multiplier, divisor = config.get("depth_multiplier", 1.0), config.get("depth_divisible_by", 8)
    least, expansion = config.get("min_depth", 8), config.get("expand_ratio", 6.0)

    def scaled(channels: int) -> int:
        return _divisible(round(channels * multiplier), divisor, least)

    widths = [scaled(width) for width in _MOBILENET_WIDTHS]
    channels, stem_width = config.get("num_channels", 3), scaled(32)
    grid = tuple(-(-side // 2) for side in _pair(config["image_size"]))
    places = grid[0] * grid[1]
    convolutions = [(9 * channels, stem_width), (9, stem_width), (stem_width, widths[0])]
    if not config.get("first_layer_is_expansion", True):
        convolutions.insert(1, (stem_width, stem_width))
    matrix = sum(d_in * d_out for d_in, d_out in convolutions)
    stem = Part(params=matrix + sum(2 * d_out for _, d_out in convolutions), macs=places * matrix)
    blocks, enters, leaves = [], [], []
    stride_so_far = 2
    for before, width, stride in zip(widths, widths[1:], _MOBILENET_STRIDES):
        if stride_so_far == config.get("output_stride", 32):
            stride = 1  # dilated instead
        stride_so_far *= stride
        inner = _divisible(round(before * expansion), divisor, least)
        after = tuple(-(-side // stride) for side in grid)
        inside, outside = grid[0] * grid[1], after[0] * after[1]
        blocks.append(
            Part(
                params=before * inner + 9 * inner + inner * width + 4 * inner + 2 * width,
                macs=inside * before * inner + outside * (9 * inner + inner * width),
                adapted=(
                    ("expand_1x1.convolution", before, inner),
                    ("reduce_1x1.convolution", inner, width),
                ),
            )
        )
        enters.append(Feature(before, grid))
        leaves.append(Feature(width, after))
        grid = after
    last = 1280 if config.get("finegrained_output", True) and multiplier < 1.0 else scaled(1280)
    params, _, _, macs = _head_sizes(last, config)
    head = Part(params=widths[-1] * last + 2 * last + params, macs=grid[0] * grid[1] * widths[-1] * last + macs)
    return _staged(config, stem, blocks, enters, leaves, [Part()] * len(blocks), head)


_MOBILENET_WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_MOBILENET_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def _divisible(value: float, divisor: int, least: int) -> int:
    """`value` as a multiple of `divisor`, at least `least`, never more than a tenth below."""
    found = max(least, int(value + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * value else found


def _resnet_convolutions(
    before: int, width: int, stride: int, bottleneck: bool, config: Config
) -> list[tuple[str, int, int, int]]:
    """`(name, inputs with kernel, outputs, total stride at its output)` of each convolution of a block."""
    found = []
    if before != width or stride != 1:
        found.append(("shortcut.convolution", before, width, stride))
    if not bottleneck:
        return [
            *found,
            ("layer.0.convolution", 9 * before, width, stride),
            ("layer.1.convolution", 9 * width, width, stride),
        ]
    inner = width // 4
    first = stride if config.get("downsample_in_bottleneck", False) else 1
    return [
        *found,
        ("layer.0.convolution", before, inner, first),
        ("layer.1.convolution", 9 * inner, inner, stride),
        ("layer.2.convolution", inner, width, stride),
    ]


def _staged(
    config: Config,
    stem: Part,
    blocks: Sequence[Part],
    enters: Sequence[Feature],
    leaves: Sequence[Feature],
    transitions: Sequence[Part],
    head: Part,
) -> AnchorSpec:
    return AnchorSpec(
        family=config["model_type"],
        embedding=stem,
        head=head,
        blocks=tuple(blocks),
        enters=tuple(enters),
        leaves=tuple(leaves),
        transitions=tuple(transitions),
        contract=_contract(config),
        unit="image",
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _grid(config: Config, patch: Any) -> tuple[int, int]:
    """Patches along height and width.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    size, patch = _pair(config.get("image_size", 224)), _pair(patch)
    grid = size[0] // patch[0], size[1] // patch[1]
    if min(grid) < 1:
        raise ValueError(f"image_size {size} is smaller than patch_size {patch}: no patch is left")
    return grid


def _contract(config: Config) -> dict[str, Any]:
    size = _pair(config.get("image_size", 224))
    return {
        "image_size": size[0] if size[0] == size[1] else list(size),
        "num_channels": config.get("num_channels", 3),
        "num_labels": _label_count(config),
    }


def _label_count(config: Config) -> int:
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def _attention_linears(width: int, inner: int, qkv_bias: bool) -> list[tuple[int, int, bool]]:
    return [(width, inner, qkv_bias)] * 3 + [(inner, width, True)]


def _adapted_attention(width: int, inner: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("q_proj", width, inner),
        ("k_proj", width, inner),
        ("v_proj", width, inner),
        ("o_proj", inner, width),
    )


def _linear_sizes(linears: list[tuple[int, int, bool]], norms: int) -> dict[str, int]:
    """Parameters of a block: its linear layers and everything else (`norms`)."""
    matrices = sum(d_in * d_out for d_in, d_out, _ in linears)
    biases = sum(d_out for _, d_out, bias in linears if bias)
    return {
        "params": matrices + biases + norms,
        "linear_params": matrices,
        "linear_rows": sum(d_out for _, d_out, _ in linears),
    }


def _head_sizes(width: int, config: Config) -> tuple[int, int, int, int]:
    labels = _label_count(config)
    return width * labels + labels, 0, 0, width * labels


def _head(width: int, config: Config) -> Part:
    """A norm and a linear classifier."""
    params, _, _, macs = _head_sizes(width, config)
    return Part(params=params + 2 * width, macs=macs)
