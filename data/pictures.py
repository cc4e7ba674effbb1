"""Rendered pictures to pretrain small vision anchors on: twelve outlines in four textures, 48 classes, as many as are wanted.

Each outline stands somewhere, turned, scaled and squeezed, in a colour of its own on a cloudy background, under noise. Nothing
of it comes from a data set, so a ViT pretrained on it has seen no picture of the task it is adapted to.
"""

from __future__ import annotations

import numpy as np

SIDE = 32
OUTLINES = (
    "disc", "square", "triangle", "star", "cross", "ring", "ellipse", "crescent", "corner", "half", "hexagon", "flower",
)  # fmt: skip
TEXTURES = ("plain", "stripes", "checks", "dots")
NAMES = [f"{texture} {outline}" for outline in OUTLINES for texture in TEXTURES]


def render(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures [images, 32, 32, 3] of uint8 and their classes [images]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(NAMES), size=count)
    x, y = _places(rng, count)
    mask = np.zeros((count, SIDE, SIDE))
    for number in range(len(OUTLINES)):
        own = labels // len(TEXTURES) == number
        mask[own] = _inside(number, x[own], y[own])
    mask *= _texture(labels % len(TEXTURES), x * rng.uniform(3, 6, (count, 1, 1)), y * rng.uniform(3, 6, (count, 1, 1)))
    front, back = rng.uniform(0, 1, (2, count, 1, 1, 3))
    near = np.abs(front - back).max(-1, keepdims=True) < 0.35  # an outline must be seen
    front = np.where(near, (back + 0.5) % 1, front)
    cloud = _cloud(rng, count)[..., None] * rng.uniform(0.1, 0.4, (count, 1, 1, 3))
    picture = np.where(mask[..., None] > 0, front, back + cloud) + rng.normal(0, 0.06, (count, SIDE, SIDE, 3))
    return (picture.clip(0, 1) * 255).astype(np.uint8), labels.astype(np.int64)


def _places(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [images, 32, 32] of every pixel in the outline's own frame, in which it fills -1..1."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    turn, size = rng.uniform(-0.6, 0.6, (count, 1, 1)), rng.uniform(0.4, 0.8, (count, 1, 1))
    squeeze = rng.uniform(0.8, 1.25, (count, 1, 1))
    across, down = rng.uniform(-0.3, 0.3, (2, count, 1, 1))
    u, v = columns - across, rows - down
    x, y = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    return x / size * squeeze, y / size / squeeze


def _inside(outline: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    wide, high = np.abs(x), np.abs(y)
    return {
        "disc": radius < 0.9,
        "square": np.maximum(wide, high) < 0.8,
        "triangle": (y < 0.75) & (y > 2 * wide - 0.9),
        "star": radius < 0.55 + 0.4 * np.cos(5 * angle + np.pi / 2),
        "cross": np.minimum(wide, high) < 0.28,
        "ring": (radius < 0.95) & (radius > 0.5),
        "ellipse": np.hypot(x, 2.2 * y) < 0.95,
        "crescent": (radius < 0.95) & (np.hypot(x - 0.4, y) > 0.75),
        "corner": (np.maximum(wide, high) < 0.85) & ~((x > -0.25) & (y < 0.25)),
        "half": (radius < 0.95) & (y > 0),
        "hexagon": np.maximum(wide * 0.866 + high * 0.5, high) < 0.75,
        "flower": radius < 0.65 + 0.25 * np.cos(6 * angle),
    }[OUTLINES[outline]] & (np.maximum(wide, high) < 1)


def _texture(kind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kind = kind[:, None, None]
    stripes, checks = np.sin(x * 2) > -0.3, np.sin(x * 2) * np.sin(y * 2) > -0.1
    dots = np.cos(x * 2) + np.cos(y * 2) < 0.9
    return np.select([kind == 0, kind == 1, kind == 2], [np.ones_like(x), stripes, checks], dots)


def _cloud(rng: np.random.Generator, count: int) -> np.ndarray:
    """Smooth noise [images, 32, 32] in -1..1: coarse grids interpolated."""
    from PIL import Image

    coarse = rng.uniform(-1, 1, (count, 5, 5)).astype(np.float32)
    return np.stack(
        [np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for grid in coarse]
    )
