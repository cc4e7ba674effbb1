"""Specs of ViT, DeiT, DINOv2 and Swin, as Transformers builds them."""

from dataclasses import replace

from .fields import MOST_BLOCKS, Config, depths_of, label_count, pair, positive, positives, ratio, switch
from .image_parts import Entry, contract, downsampled, grid_at, linear_sizes, norm_and_classifier, patch_grid, staged
from .spec import AnchorSpec, Feature, Part


def vit_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """ViT and DeiT with one head on the class token: equal blocks on a class token, DeiT's distillation token, patches."""
    patch, channels = pair(config, "patch_size", 16), positive(config, "num_channels", 3)
    grid, width = patch_grid(config, patch), positive(config, "hidden_size", 768)
    ffn, depth = positive(config, "intermediate_size", 3072), positive(config, "num_hidden_layers", 12, MOST_BLOCKS)
    special = 2 if config["model_type"] == "deit" else 1
    heads = positive(config, "num_attention_heads", 12)
    inner = heads * positive(config, "head_dim", width // heads)
    positions, pixels = Feature(width, grid, special).positions, channels * patch[0] * patch[1]
    feature = Feature(width, grid_at(entry, 0, depth, grid), special)
    tokens = feature.positions
    linears = _attention_linears(width, inner, switch(config, "qkv_bias", True)) + [
        (width, ffn, True),
        (ffn, width, True),
    ]
    block = Part(
        **linear_sizes(linears, norms=4 * width),
        macs=tokens * sum(d_in * d_out for d_in, d_out, _ in linears) + 2 * tokens * tokens * inner,
        adapted=_adapted_attention(width, inner),
    )
    return AnchorSpec(
        family=config["model_type"],
        embedding=Part(
            params=pixels * width + width + special * width + positions * width,
            macs=grid[0] * grid[1] * pixels * width,
        ),
        head=norm_and_classifier(width, config),
        blocks=(block,) * depth,
        enters=(feature,) * depth,
        leaves=(feature,) * depth,
        contract=contract(config),
        unit="image",
    )


def dinov2_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """DINOv2: a ViT with scaled branches and a head on the class token and the mean patch; its position embeddings are those of
    `trained_size`, interpolated to the image size.

    Raises:
        ValueError: its feed-forward is SwiGLU.
    """
    width, expansion = positive(config, "hidden_size", 768), ratio(config, "mlp_ratio", 4)
    if switch(config, "use_swiglu_ffn"):
        raise ValueError(
            "DINOv2 with use_swiglu_ffn is not supported: take a checkpoint without it (small, base, large)"
        )
    patch, ffn = pair(config, "patch_size", 14), int(width * expansion)
    fields = {**config, "model_type": "dinov2", "intermediate_size": ffn, "patch_size": patch}
    plain = vit_spec(fields, entry)
    scaled = replace(plain.blocks[0], params=plain.blocks[0].params + 2 * width)
    token = width if switch(config, "use_mask_token", True) else 0
    trained = patch_grid({"image_size": config.get("trained_size", config.get("image_size", 224))}, patch)
    grid = patch_grid(config, patch)
    token += width * (trained[0] * trained[1] - grid[0] * grid[1])
    labels = label_count(config)
    return replace(
        plain,
        embedding=replace(plain.embedding, params=plain.embedding.params + token),
        blocks=(scaled,) * plain.depth,
        head=Part(params=2 * width + 2 * width * labels + labels, macs=2 * width * labels),
    )


def swin_spec(config: Config, entry: Entry | None = None) -> AnchorSpec:
    """Swin: window attention in stages, patch merging between them."""
    patch, channels = pair(config, "patch_size", 4), positive(config, "num_channels", 3)
    width, head_counts = positive(config, "embed_dim", 96), positives(config, "num_heads", (3, 6, 12, 24))
    depths = depths_of(config, (2, 2, 6, 2), ("num_heads", head_counts))
    expansion, limit = ratio(config, "mlp_ratio", 4.0), positive(config, "window_size", 7)
    grid = patch_grid(config, patch)
    pixels = channels * patch[0] * patch[1]
    embeddings = width * grid[0] * grid[1] if switch(config, "use_absolute_embeddings") else 0
    stem = Part(params=pixels * width + 3 * width + embeddings, macs=grid[0] * grid[1] * pixels * width)
    blocks: list[Part] = []
    features: list[Feature] = []
    transitions: list[Part] = []
    trained = grid
    sides = pair(config, "image_size", 224)
    grids = [tuple(side // 2**stage for side in grid) for stage in range(len(depths))]
    if any(side % size for side, size in zip(sides, patch)) or any(n % 2 for stage in grids[:-1] for n in stage):
        raise ValueError(
            f"Swin at image_size {sides} with patch_size {patch} has stages of {grids} places: an odd number cannot be "
            "merged by two; choose an image size that halves evenly at every stage"
        )
    for stage, (depth, heads) in enumerate(zip(depths, head_counts)):
        window, grid = min(limit, *trained), grid_at(entry, len(blocks), depth, grid)
        if grid != tuple(side * (grid[0] // trained[0]) for side in trained):
            raise ValueError(
                f"Swin cannot run a stage trained at {trained[0]}x{trained[1]} places at {grid[0]}x{grid[1]}, which is no "
                "multiple: rescale='bilinear' or 'strided' meets its own"
            )
        padded = (-(-grid[0] // window) * window) * (-(-grid[1] // window) * window)
        positions, ffn = grid[0] * grid[1], int(expansion * width)
        attention = _attention_linears(width, width, switch(config, "qkv_bias", True))
        linears = [*attention, (width, ffn, True), (ffn, width, True)]
        block = Part(
            **linear_sizes(linears, norms=4 * width + (2 * limit - 1) ** 2 * heads),
            macs=padded * (4 * width * width + 2 * window * window * width) + positions * 2 * width * ffn,
            adapted=_adapted_attention(width, width),
        )
        blocks += [block] * depth
        features += [Feature(width, grid)] * depth
        transitions += [Part()] * (depth if stage == 0 else depth - 1)
        if stage + 1 < len(depths):
            grid, trained = downsampled(grid, 2), downsampled(trained, 2)
            merged = 8 * width * width
            transitions.append(Part(merged + 8 * width, merged, 2 * width, macs=grid[0] * grid[1] * merged))
            width *= 2
    return staged(config, stem, blocks, features, features, transitions, norm_and_classifier(width, config))


def _attention_linears(width: int, inner: int, qkv_bias: bool) -> list[tuple[int, int, bool]]:
    return [(width, inner, qkv_bias)] * 3 + [(inner, width, True)]


def _adapted_attention(width: int, inner: int) -> tuple[tuple[str, int, int], ...]:
    return (
        ("q_proj", width, inner),
        ("k_proj", width, inner),
        ("v_proj", width, inner),
        ("o_proj", inner, width),
    )
