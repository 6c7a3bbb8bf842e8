"""Pictures of images: views of a recipe, and sheets of tiles, such as nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from fastssl.inference import forward_batches
from fastssl.kernels.augment import View, make_views
from fastssl.loader import Batch, Loader
from fastssl.sampler import Sampler

SIDE = 64  # pixels of one tile


def tiles(x: Tensor, view: View) -> Tensor:
    """Normalised views (B, 3, S, S) -> (B, SIDE, SIDE, 3) in [0, 1]; small views are enlarged without smoothing."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (view.mean, view.std))
    x = (x.float() * std + mean).clamp(0, 1)
    x = interpolate(x, size=(SIDE, SIDE), mode="nearest" if view.size < SIDE else "area")
    return x.permute(0, 2, 3, 1).cpu()


def view_rows(batch: Batch, views: tuple[View, ...], seed: int, epochs: int = 3) -> Tensor:
    """Tiles (B, 1 + epochs * V, SIDE, SIDE, 3): each whole image, then its views in the first epochs."""
    full = View(max(v.size for v in views), crop="squash", mean=views[0].mean, std=views[0].std)
    columns = [tiles(make_views(batch.pixels, batch.sizes, batch.index, (full,), seed=seed, epoch=0)[0], full)]
    for epoch in range(epochs):
        made = make_views(batch.pixels, batch.sizes, batch.index, views, seed=seed, epoch=epoch)
        columns += [tiles(x, view) for x, view in zip(made, views)]
    return torch.stack(columns, 1)


def first_rows(path: str, rows: np.ndarray, *, device: torch.device | None = None, workers: int | None = None) -> Batch:
    """These rows of a file, in their order, as one batch; all of them on this rank."""
    beton = loader(path, len(rows), device, workers)
    ((batch, _),) = forward_batches(lambda batch: [], beton, stop=1, order=np.resize(rows, beton.samples))
    return batch


def images(
    path: str, rows: np.ndarray, view: View, *, device: torch.device | None = None, workers: int | None = None
) -> Tensor:
    """Tiles (len(rows), SIDE, SIDE, 3) of these rows of a file, which may repeat, as `view` shows them."""
    unique, inverse = np.unique(rows, return_inverse=True)
    beton = loader(path, min(64, len(unique)), device, workers)

    def forward(batch: Batch) -> list[Tensor]:
        return [tiles(make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=0, epoch=0)[0], view)]

    stop, order = -(-len(unique) // beton.batch), np.resize(unique, beton.samples)
    parts = [part for _, (part,) in forward_batches(forward, beton, stop=stop, order=order)]
    return torch.cat(parts)[torch.from_numpy(inverse)]  # the last batch may be filled up with repetitions


def loader(path: str, batch: int, device: torch.device | None, workers: int | None) -> Loader:
    return Loader(path, batch, Sampler.sequential(rank=0, world=1), device=device, workers=workers)


def sheet(path: Path, panels: list[tuple[str, Tensor]]) -> None:
    """Draw titled grids of tiles (rows, columns, SIDE, SIDE, 3) side by side; the first column is set apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [t.shape[1] for _, t in panels]
    figure = pyplot.figure(
        figsize=(0.6 * sum(widths) + len(panels), 0.6 * panels[0][1].shape[0] + 0.6), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)
    for axis, (title, grid) in zip(axes[0], panels):
        step, apart = SIDE + SIDE // 16, SIDE // 8
        spaced = pad(grid, (0, 0, 0, step - SIDE, 0, step - SIDE), value=1)
        rows = [torch.cat([pad(row[0], (0, 0, 0, apart), value=1), *row[1:]], 1) for row in spaced]
        axis.imshow(torch.cat(rows).numpy())
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
