"""Position embeddings of vision transformers: fixed sine-cosine tables, and resampling to another image size.

timm resamples with antialiasing; the authors of DINO, iBOT and MAE without, as here.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos(rows: int, columns: int, dim: int, *, columns_first: bool, device: torch.device | None = None) -> Tensor:
    """(rows columns, dim): for each patch, dim/4 sines and dim/4 cosines of one coordinate, then of the other.

    The first coordinate is the column in MAE (get_2d_sincos_pos_embed), the row in MoCo v3
    (build_2d_sincos_position_embedding).
    """
    if dim % 4:
        raise ValueError(f"2-d sine-cosine position embeddings need a width that is a multiple of 4, got {dim}")
    scale = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * scale for coordinate in ((column, row) if columns_first else (row, column))]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def is_sincos(table: Tensor) -> bool:
    """Whether a table (1, 1 + side side, dim) of position embeddings is that of `sincos`, in either order."""
    n, dim = table.shape[1] - 1, table.shape[2]
    side = round(n**0.5)
    if side * side != n or dim % 4:
        return False
    return any(
        torch.allclose(table[0, 1:].float(), sincos(side, side, dim, columns_first=first), atol=1e-3)
        for first in (True, False)
    )


def resample(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a table (1, prefix + patches, dim) from the grid `old` of patches (rows, columns) to the grid `new`.

    As DINO's interpolate_pos_encoding: bicubic without antialiasing, by the factor (new + 0.1) / old.  The prefix
    (class token, registers) is not changed.
    """
    if old == new:
        return table
    prefix = table.shape[1] - old[0] * old[1]
    grid = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    factor = tuple((b + 0.1) / a for a, b in zip(old, new))
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)


def use_dino_resampling_(body: nn.Module) -> None:
    """Make timm's VisionTransformer use `resample` for images of another size than that of its table."""
    from timm.models.vision_transformer import VisionTransformer

    if type(body) is VisionTransformer and body.pos_embed is not None:
        body.__class__ = _resampling()


def uses_dino_resampling(body: nn.Module | None) -> bool:
    """Whether `body` uses `resample` for images of another size than that of its table."""
    return body is not None and isinstance(body, _resampling()) and body.dynamic_img_size


@functools.cache
def _resampling() -> type[nn.Module]:
    from timm.models.vision_transformer import VisionTransformer  # takes seconds

    class Resampling(VisionTransformer):
        def _pos_embed(self, x: Tensor) -> Tensor:
            """(n, rows, columns, dim), or (n, patches, dim) where the size is fixed -> (n, prefix + patches, dim)."""
            old = tuple(self.patch_embed.grid_size)
            if x.ndim == 3 or x.shape[1:3] == old:
                return super()._pos_embed(x)
            table = resample(self.pos_embed, old, tuple(x.shape[1:3]))
            x = x.flatten(1, 2)
            tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
            if self.no_embed_class:
                return self.pos_drop(torch.cat([*tokens, x + table], 1))
            return self.pos_drop(torch.cat([*tokens, x], 1) + table)

    return Resampling
