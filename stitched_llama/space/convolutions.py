"""Specs of ConvNeXt, ResNet and MobileNetV2, as Transformers builds them."""

from .fields import Config, depths_of, pair, positive, positives, ratio, switch
from .image_parts import Entry, classifier, downsampled, grid_at, linear_sizes, norm_and_classifier, patch_grid, staged
from .spec import AnchorSpec, Feature, Part


def convnext_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """ConvNeXt: depthwise 7x7 convolutions and pointwise linear layers in stages, strided convolutions between."""
    patch, channels = pair(config, "patch_size", 4), positive(config, "num_channels", 3)
    widths = positives(config, "hidden_sizes", (96, 192, 384, 768))
    depths = depths_of(config, (3, 3, 9, 3), ("hidden_sizes", widths))
    scale = 1 if ratio(config, "layer_scale_init_value", 1e-6, least=-1) > 0 else 0
    grid, pixels = patch_grid(config, patch), channels * patch[0] * patch[1]
    stem = Part(params=pixels * widths[0] + 3 * widths[0], macs=grid[0] * grid[1] * pixels * widths[0])
    blocks: list[Part] = []
    features: list[Feature] = []
    transitions: list[Part] = []
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        between = Part()
        if stage:
            before, grid = widths[stage - 1], (grid[0] // 2, grid[1] // 2)
            if min(grid) < 1:
                raise ValueError(
                    f"image_size {config.get('image_size')} leaves stage {stage} of {len(depths)} no place: take a larger one"
                )
            between = Part(params=2 * before + 4 * before * width + width, macs=grid[0] * grid[1] * 4 * before * width)
        grid = grid_at(entry, len(blocks), depth, grid)
        linears = [(width, 4 * width, True), (4 * width, width, True)]
        block = Part(
            **linear_sizes(linears, norms=49 * width + width + 2 * width + scale * width),
            macs=grid[0] * grid[1] * (49 * width + 8 * width * width),
            adapted=(("pwconv1", width, 4 * width), ("pwconv2", 4 * width, width)),
        )
        blocks += [block] * depth
        features += [Feature(width, grid)] * depth
        transitions += [between] + [Part()] * (depth - 1)
    return staged(config, stem, blocks, features, features, transitions, norm_and_classifier(widths[-1], config))


def resnet_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """ResNet: basic or bottleneck blocks; the first block of a later stage halves the map itself."""
    widths = positives(config, "hidden_sizes", (256, 512, 1024, 2048))
    depths = depths_of(config, (3, 4, 6, 3), ("hidden_sizes", widths))
    channels, stem_width = positive(config, "num_channels", 3), positive(config, "embedding_size", 64)
    kind = "bottleneck" if config.get("layer_type") is None else config["layer_type"]
    if kind not in ("basic", "bottleneck") or (kind == "bottleneck" and min(widths) < 4):
        raise ValueError(
            f"layer_type {kind!r} with hidden_sizes {list(widths)}: 'basic', or 'bottleneck' from 4 channels on, is needed"
        )
    bottleneck = kind == "bottleneck"
    early, inside = switch(config, "downsample_in_first_stage"), switch(config, "downsample_in_bottleneck")
    size = pair(config, "image_size")
    half = downsampled(size, 2)
    stem = Part(params=49 * channels * stem_width + 2 * stem_width, macs=half[0] * half[1] * 49 * channels * stem_width)
    grid = downsampled(half, 2)  # after the max-pooling
    blocks: list[Part] = []
    enters: list[Feature] = []
    leaves: list[Feature] = []
    before = stem_width
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for index in range(depth):
            grid = grid_at(entry, len(blocks), 1, grid)
            stride = 2 if index == 0 and (stage or early) else 1
            after = downsampled(grid, stride)
            convolutions = _resnet_convolutions(before, width, stride, bottleneck, inside)
            positions = {1: grid[0] * grid[1], stride: after[0] * after[1]}
            params = sum(d_in * d_out + 2 * d_out for _, d_in, d_out, _ in convolutions)
            macs = sum(positions[down] * d_in * d_out for _, d_in, d_out, down in convolutions)
            adapted = tuple(
                (name, d_in, d_out) for name, d_in, d_out, _ in convolutions if name != "shortcut.convolution"
            )
            blocks.append(Part(params=params, macs=macs, adapted=adapted))
            enters.append(Feature(before, grid))
            leaves.append(Feature(width, after))
            before, grid = width, after
    head = classifier(widths[-1], config)
    return staged(config, stem, blocks, enters, leaves, [Part()] * len(blocks), head)


def _resnet_convolutions(
    before: int, width: int, stride: int, bottleneck: bool, stride_inside: bool
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
    first = stride if stride_inside else 1
    return [
        *found,
        ("layer.0.convolution", before, inner, first),
        ("layer.1.convolution", 9 * inner, inner, stride),
        ("layer.2.convolution", inner, width, stride),
    ]


def mobilenet_v2_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """MobileNetV2: a stem, sixteen inverted residuals of fixed plan, and a head of a 1x1 convolution and a classifier."""
    multiplier, divisor = ratio(config, "depth_multiplier", 1.0), positive(config, "depth_divisible_by", 8)
    least, expansion = positive(config, "min_depth", 8), ratio(config, "expand_ratio", 6.0)

    def scaled(channels: int) -> int:
        return _divisible(round(channels * multiplier), divisor, least)

    widths = [scaled(width) for width in _MOBILENET_WIDTHS]
    channels, stem_width = positive(config, "num_channels", 3), scaled(32)
    grid = downsampled(pair(config, "image_size"), 2)
    positions = grid[0] * grid[1]
    convolutions = [(9 * channels, stem_width), (9, stem_width), (stem_width, widths[0])]
    if not switch(config, "first_layer_is_expansion", True):
        convolutions.insert(1, (stem_width, stem_width))
    matrix = sum(d_in * d_out for d_in, d_out in convolutions)
    stem = Part(params=matrix + sum(2 * d_out for _, d_out in convolutions), macs=positions * matrix)
    blocks: list[Part] = []
    enters: list[Feature] = []
    leaves: list[Feature] = []
    stride_so_far = 2
    for before, width, stride in zip(widths, widths[1:], _MOBILENET_STRIDES):
        if stride_so_far == positive(config, "output_stride", 32):
            stride = 1  # dilated instead
        stride_so_far *= stride
        grid = grid_at(entry, len(blocks), 1, grid)
        inner = _divisible(round(before * expansion), divisor, least)
        after = downsampled(grid, stride)
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
    last = 1280 if switch(config, "finegrained_output", True) and multiplier < 1.0 else scaled(1280)
    linear = classifier(last, config)
    head = Part(
        params=widths[-1] * last + 2 * last + linear.params, macs=grid[0] * grid[1] * widths[-1] * last + linear.macs
    )
    return staged(config, stem, blocks, enters, leaves, [Part()] * len(blocks), head)


_MOBILENET_WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_MOBILENET_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


def _divisible(value: float, divisor: int, least: int) -> int:
    """`value` as a multiple of `divisor`, at least `least`, never more than a tenth below."""
    found = max(least, int(value + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * value else found
