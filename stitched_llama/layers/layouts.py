"""How features lie, converted by name: `"tokens"` [batch, places, width] and `"channels"` [batch, width, rows, columns].

A stitching layer maps rows [batch, places, width]. Class and distillation tokens stand in front of the places of a map:
those that both sides have are mapped like any place, those that only the head has are dropped, those that only the tail
has are the tail's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def to_rows(feature: Tensor, layout: str) -> Tensor:
    """[batch, places, width] of a feature in either layout."""
    return feature.flatten(2).transpose(1, 2) if layout == "channels" else feature


def from_rows(rows: Tensor, layout: str, grid: tuple[int, int] | None) -> Tensor:
    """A feature in `layout` of rows [batch, places, width]; `grid` is (height, width) of its map."""
    return rows.transpose(1, 2).unflatten(2, grid) if layout == "channels" else rows


def shared_rows(rows: Tensor, special: int, shared: int) -> Tensor:
    """Rows with `special` tokens in front, cut down to the first `shared` of them and the map."""
    return rows if special == shared else torch.cat([rows[:, :shared], rows[:, special:]], 1)


def with_own_tokens(rows: Tensor, own: Tensor | None, shared: int) -> Tensor:
    """Rows with `shared` special tokens in front, filled up with the tail's own [1, tokens, width] that follow those."""
    if own is None or own.shape[1] == shared:
        return rows
    missing = own[:, shared:].expand(len(rows), -1, -1).to(rows.dtype)
    return torch.cat([rows[:, :shared], missing, rows[:, shared:]], 1)


def on_map(
    rows: Tensor,
    grid: tuple[int, int],
    special: int,
    change: Callable[[Tensor], Tensor],
    change_token: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Rows [batch, special + places, width] after `change` of their map [batch, width, rows, columns].

    Each special token is a map of one place to `change_token` (`change` by default): a convolution meets it with its
    centre alone.
    """
    changed = to_rows(change(from_rows(rows[:, special:], "channels", grid)), "channels")
    if not special:
        return changed
    tokens = rows[:, :special].flatten(0, 1)[:, :, None, None]
    return torch.cat([(change_token or change)(tokens).flatten(1).unflatten(0, (-1, special)), changed], 1)
