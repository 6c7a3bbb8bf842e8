"""Pictures of what a run does: the views that its recipe draws, and the nearest neighbours of its features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastssl.kernels.augment import View, make_views
from fastssl.loader import Batch, Loader

SIDE = 64  # pixels of one tile


def tiles(x: Tensor, view: View) -> Tensor:
    """Normalised views (B, 3, S, S) -> (B, SIDE, SIDE, 3) in [0, 1]; small ones keep their pixels visible."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (view.mean, view.std))
    x = (x.float() * std + mean).clamp(0, 1)
    x = interpolate(x, size=(SIDE, SIDE), mode="nearest" if view.size < SIDE else "area")
    return x.permute(0, 2, 3, 1).cpu()


def view_rows(batch, views: tuple[View, ...], seed: int, epochs: int = 3) -> Tensor:
    """(B, 1 + epochs * V, SIDE, SIDE, 3): each image whole, then its views in the first epochs."""
    whole = View(max(v.size for v in views), crop="squash", mean=views[0].mean, std=views[0].std)
    columns = [tiles(make_views(batch.pixels, batch.sizes, batch.index, (whole,), seed=seed, epoch=0)[0], whole)]
    for epoch in range(epochs):
        made = make_views(batch.pixels, batch.sizes, batch.index, views, seed=seed, epoch=epoch)
        columns += [tiles(x, view) for x, view in zip(made, views)]
    return torch.stack(columns, 1)


def batches(
    path: str, rows: np.ndarray, *, batch: int = 256, device=None, workers: int | None = None
) -> Iterator[Batch]:
    """These rows of a file, each at most once, in their order; all of them on this rank."""
    loader = Loader(path, batch, device=device, workers=workers, shuffle=False, drop_last=False, rank=0, world=1)
    left = len(rows)
    with closing(loader.epoch(0, order=np.resize(rows, loader.samples))) as source:  # an epoch has as many rows as the
        for made in source:  # file: what comes after ours is not asked for
            keep = min(left, len(made.index))
            yield Batch(made.pixels[:keep], made.sizes[:keep], made.index[:keep], made.label[:keep], 0, made.step)
            left -= keep
            if not left:
                return


def images(path: str, rows: np.ndarray, view: View, *, device=None, workers: int | None = None) -> Tensor:
    """Tiles (len(rows), SIDE, SIDE, 3) of these rows of a file, which may repeat, as `view` shows them."""
    once, places = np.unique(rows, return_inverse=True)
    made = [
        tiles(make_views(b.pixels, b.sizes, b.index, (view,), seed=0, epoch=0)[0], view)
        for b in batches(path, once, batch=min(64, len(once)), device=device, workers=workers)
    ]
    return torch.cat(made)[torch.from_numpy(places)]


def sheet(path: Path, panels: list[tuple[str, Tensor]]) -> None:
    """Draw titled grids of tiles (rows, columns, SIDE, SIDE, 3) side by side; the first column stands apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [t.shape[1] for _, t in panels]
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
        figsize=(0.6 * sum(widths) + len(panels), 0.6 * panels[0][1].shape[0] + 0.6),
    )
    for axis, (title, grid) in zip(axes[0], panels):
        rows, columns, step, apart = *grid.shape[:2], SIDE + SIDE // 16, SIDE // 8
        canvas = torch.ones(rows * step, columns * step + apart, 3)
        for r in range(rows):
            for c in range(columns):
                top, left = r * step, c * step + (apart if c else 0)
                canvas[top : top + SIDE, left : left + SIDE] = grid[r, c]
        axis.imshow(canvas.numpy())
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
