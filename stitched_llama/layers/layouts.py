"""Layouts of features and their conversion: `"tokens"` [batch, positions, width] and `"channels"` [batch, channels, height, width].

A stitching layer maps token features [batch, positions, width], `rows` below. Class and distillation tokens precede the positions
of the feature map: those of both source and target are mapped like any position, those of the source alone are dropped, those of
the target alone are taken from the target anchor.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def to_rows(feature: Tensor, layout: str) -> Tensor:
    """Token features [batch, positions, width] of a feature in either layout."""
    return feature.flatten(2).transpose(1, 2) if layout == "channels" else feature


def from_rows(rows: Tensor, layout: str, grid: tuple[int, int] | None) -> Tensor:
    """A feature in `layout` from token features [batch, positions, width]; `grid` is (height, width) of its map."""
    return rows.transpose(1, 2).unflatten(2, grid) if layout == "channels" else rows


def shared_rows(rows: Tensor, special: int, shared: int) -> Tensor:
    """Token features with `special` tokens in front, reduced to the first `shared` of them and the map."""
    return rows if special == shared else torch.cat([rows[:, :shared], rows[:, special:]], 1)


def with_own_tokens(rows: Tensor, own: Tensor | None, shared: int) -> Tensor:
    """Token features with `shared` special tokens in front, followed by the remaining ones of the target, `own` [1, tokens, width]."""
    if own is None or own.shape[1] == shared:
        return rows
    missing = own[:, shared:].expand(len(rows), -1, -1).to(rows.dtype)
    return torch.cat([rows[:, :shared], missing, rows[:, shared:]], 1)


def on_map(
    rows: Tensor,
    grid: tuple[int, int] | None,
    special: int,
    change: Callable[[Tensor], Tensor],
    change_token: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Token features [batch, special + positions, width] after `change` is applied to their map [batch, channels, height, width].

    Each special token is passed to `change_token` (default: `change`) as a map of one position: of a convolution only the centre
    applies to it.
    """
    changed = to_rows(change(from_rows(rows[:, special:], "channels", grid)), "channels")
    if not special:
        return changed
    tokens = rows[:, :special].flatten(0, 1)[:, :, None, None]
    return torch.cat([(change_token or change)(tokens).flatten(1).unflatten(0, (-1, special)), changed], 1)
