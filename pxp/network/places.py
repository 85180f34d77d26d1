"""Where tokens lie: windows and their masks, biases by distance, and fewer queries or keys than tokens.

What ``pxp.network.attentions`` says of a class; each function takes the attention's replacement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Restore = Callable[[Tensor], Tensor]


def by_place(table: Tensor, attention: Any) -> Tensor:
    """A table (distances, heads) as (1, heads, tokens, tokens)."""
    index = attention.relative_position_index
    tokens = math.isqrt(index.numel())
    return table[index.flatten()].unflatten(0, (tokens, tokens)).permute(2, 0, 1)[None]


def table_of_distances(attention: Any) -> Tensor | None:
    """The relative position bias of Swin, MaxViT and BEiT."""
    table = attention.relative_position_bias_table
    return None if table is None else by_place(table, attention)


def continuous_distances(attention: Any) -> Tensor:
    """Swin v2's relative position bias, from a small MLP of the coordinates.

    Its layers see no signal but constants, so they are not called: they would count as layers of the network.
    """
    first, _, second = attention.cpb_mlp
    hidden = F.relu(F.linear(attention.relative_coords_table, first.weight, first.bias))
    return 16 * by_place(F.linear(hidden, second.weight).flatten(0, -2), attention).sigmoid()


def tiles(image: Tensor, rows: int, columns: int) -> tuple[Callable[[Tensor], Tensor], Restore]:
    """Into windows of that many rows and columns, and back."""
    down, right = image.shape[1] // rows, image.shape[2] // columns

    def part(image: Tensor) -> Tensor:
        windows = image.unflatten(2, (right, columns)).unflatten(1, (down, rows)).transpose(2, 3)
        return windows.flatten(3, 4).flatten(0, 2)

    def restore(windows: Tensor) -> Tensor:
        tiles = windows.unflatten(0, (-1, down, right)).unflatten(3, (rows, columns))
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return part, restore


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Windows cover (N, height, width, channels)."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % columns, 0, -x.shape[1] % rows))


def groups(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, None, Restore]:
    """The windows of Twins."""
    height, width = size
    image = padded(x.unflatten(1, (height, width)), attention.ws, attention.ws)
    part, restore = tiles(image, attention.ws, attention.ws)
    return part(image), None, lambda made: restore(made)[:, :height, :width].flatten(1, 2)


def reduced(attention: Any, x: Tensor, size: Any) -> Tensor:
    """Fewer tokens, of which PVT and Twins compute keys and values."""
    pool, reduce, act = (getattr(attention, name, None) for name in ("pool", "sr", "act"))
    if reduce is None:
        return x
    image = x.transpose(1, 2).unflatten(2, tuple(size))
    image = reduce(image if pool is None else pool(image))
    x = attention.norm(image.flatten(2).transpose(1, 2))
    return x if act is None else act(x)


def shifted_windows(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, Tensor | None, Restore]:
    """torchvision's (N, height, width, channels) in windows, padded and shifted as its function does."""
    _, height, width, _ = x.shape
    rows, columns = attention.window_size
    x = padded(x, rows, columns)
    full = x.shape[1:3]
    # a window as large as the image needs no shift
    down, right = (
        0 if window >= side else shift
        for window, side, shift in zip(attention.window_size, full, attention.shift_size, strict=True)
    )
    part, together = tiles(x, rows, columns)

    def restore(windows: Tensor) -> Tensor:
        return together(windows).roll((down, right), (1, 2))[:, :height, :width]

    if not down and not right:
        return part(x), None, restore
    # what a shift brings together from opposite edges does not see each other
    regions = torch.zeros(1, *full, 1, device=x.device)
    steps = [
        (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for window, shift in ((rows, down), (columns, right))
    ]
    for number, (vertical, horizontal) in enumerate(itertools.product(*steps)):
        regions[:, vertical, horizontal] = number
    region = part(regions)[..., 0]
    apart = region[:, None, :] != region[:, :, None]
    return part(x.roll((-down, -right), (1, 2))), -100 * apart.to(x.dtype), restore


def mask_units(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, None, Restore]:
    """The mask units of Hiera, whose tokens lie one unit apart from another."""
    number = x.shape[1] // (attention.q_stride * attention.window_size) if attention.use_mask_unit_attn else 1
    units = x.unflatten(1, (-1, number)).transpose(1, 2).flatten(0, 1)
    return units, None, lambda made: made.unflatten(0, (-1, number)).transpose(1, 2).flatten(1, 2)


def strongest(attention: Any, q: Tensor) -> Tensor:
    """Hiera's queries are the largest of several, channel by channel."""
    return q.unflatten(2, (attention.q_stride, -1)).amax(2) if attention.q_stride > 1 else q


def flat(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, None, Restore]:
    """Tokens that lie as in an image, (N, …, channels)."""
    shape = x.shape[1:-1]
    return x.flatten(1, -2), None, lambda made: made.unflatten(1, shape)


def biases(attention: Any) -> Tensor:
    """The attention biases of LeViT and what came from it."""
    return attention.attention_biases[:, attention.attention_bias_idxs][None]


def relative(attention: Any) -> Tensor | None:
    """What timm's modules of relative positions give, MLPs as in :func:`continuous_distances`."""
    own = attention.rel_pos
    if own is None:
        return None
    if not hasattr(own, "mlp"):
        table = own.relative_position_bias_table
        return own.get_bias() if table.ndim == 3 else by_place(table, own)
    first, last = own.mlp.fc1, own.mlp.fc2
    hidden = F.relu(F.linear(own.rel_coords_log, first.weight, first.bias))
    bias = by_place(F.linear(hidden, last.weight, last.bias).flatten(0, -2), own)
    bias = bias if own.bias_gain is None else own.bias_gain * bias.sigmoid()
    return F.pad(bias, (own.prefix_tokens, 0, own.prefix_tokens, 0))


def relative_parts(attention: Any) -> tuple[tuple[str, int], ...]:
    own = attention.rel_pos
    if own is None:
        return ()
    if hasattr(own, "mlp"):
        return (("rel_pos.mlp.fc2", 0),)
    return (("rel_pos.relative_position_bias_table", 0 if own.relative_position_bias_table.ndim == 3 else 1),)


def grid(attention: Any, x: Tensor, size: Any) -> tuple[Tensor, None, Restore]:
    """torchvision's MaxViT gives (N, windows, tokens, channels)."""
    windows = x.shape[1]
    return x.flatten(0, 1), None, lambda made: made.unflatten(0, (-1, windows))


def decomposed(attention: Any, q: Tensor, k: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """SAM's biases are products of queries with a vector for each distance, in rows and in columns.

    As channels: a query's products with all rows and all columns, and which of them a key is in.
    """
    if not attention.use_rel_pos:
        return q, k
    from timm.models.vision_transformer_sam import get_rel_pos

    height, width = size
    image = q.unflatten(2, (height, width))
    down = torch.einsum("nhrcd,rkd->nhrck", image, get_rel_pos(height, height, attention.rel_pos_h))
    right = torch.einsum("nhrcd,ckd->nhrck", image, get_rel_pos(width, width, attention.rel_pos_w))
    added = torch.cat([down, right], -1).flatten(2, 3)
    if attention.rule is not None:  # of a product with constants, the other factor's half of the relevance too
        added = 2 * added - added.detach()
    rows = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    which = torch.cat([rows, columns], -1).expand(*k.shape[:2], -1, -1)
    old, new = (math.sqrt(channels) for channels in (q.shape[-1], q.shape[-1] + height + width))
    return torch.cat([q / old, added], -1) * new, torch.cat([k, which], -1)
