"""The views in plain PyTorch: the definition, used on machines without a GPU.

Each operation is torchvision v2's on float images in [0, 1], with the result clamped, on (n, 3, S, S) in place.
Batched over samples; a sample's view has the same bits in any batch, since sums are in the order of the taps.
Shapes: B samples, S output side, K taps, C channels.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .params import COL, View

CHUNK = 8_000_000  # floats of the images processed at a time: of 1 to 40 million, 2 to 8 are fastest at 375 x 500
JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue; code -> order


def make_views(
    pixels: Tensor, sizes: Tensor, views: Sequence[View], tables: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    B, device = len(sizes), pixels.device
    outs = [
        torch.empty((B, 3, v.size, v.size), dtype=dtype, device=device, memory_format=torch.channels_last)
        for v in views
    ]
    if B == 0:
        return outs
    height, width = (int(n) for n in sizes.amax(0))
    ragged = bool((sizes != sizes[0]).any())
    chunk = max(1, CHUNK // (3 * height * width))
    for start in range(0, B, chunk):
        rows = slice(start, start + chunk)
        canvas = _canvas(pixels[rows], sizes[rows], ragged)
        for view, table, out in zip(views, tables, outs):
            out[rows] = _view(canvas, view, table[rows])
    return outs


def _canvas(pixels: Tensor, sizes: Tensor, ragged: bool) -> Tensor:
    """uint8 (B, P, 3), packed -> float (B, H, W, 3) in [0, 1] of the largest height and width."""
    B, P, _ = pixels.shape
    height, width = (int(n) for n in sizes.amax(0))
    if not ragged:
        return pixels[:, : height * width].reshape(B, height, width, 3) / 255
    # rows start at any offset in the flat bytes: take overlapping windows of the largest width; a short row is followed
    # by pixels of another one, which no tap reads
    flat = F.pad(pixels.reshape(-1), (0, 3 * width))
    y = torch.arange(height, device=pixels.device).minimum(sizes[:, :1].long() - 1)
    start = 3 * (torch.arange(B, device=pixels.device)[:, None] * P + y * sizes[:, 1:].long())
    return (flat.unfold(0, 3 * width, 1).index_select(0, start.flatten()) / 255).view(B, height, width, 3)


def _view(canvas: Tensor, view: View, table: Tensor) -> Tensor:
    """The finished (B, 3, S, S) float view of each sample."""
    # sorted by jitter order, so that each order is applied to a slice
    sample = table[:, COL["order"]].argsort(stable=True)
    table = table[sample]
    x = resample(canvas, sample, view, table)
    if view.rotate:
        x = rotate(x, table[:, COL["angle"]])
    for op in view.order:
        x = _OPS[op](x, view, table)
    x = (x - x.new_tensor(view.mean).view(3, 1, 1)) / x.new_tensor(view.std).view(3, 1, 1)
    out = torch.empty_like(x)
    out[sample] = x.rot90(view.quarter_turns, (2, 3))
    return out


def resample(canvas: Tensor, sample: Tensor, view: View, table: Tensor) -> Tensor:
    """Each box as (B, 3, S, S), separable and antialiased like PIL and torch; row b reads image sample[b]."""
    col = {name: table[:, i].double() for name, i in COL.items()}
    step = torch.arange(view.size, device=table.device, dtype=torch.double) + 0.5
    mirrored = torch.where(col["flip"][:, None] > 0, view.size - step, step)
    iy, wy = _taps(step.expand(len(table), -1), col["y0"], col["h"], col["top"], col["bottom"], view)
    ix, wx = _taps(mirrored, col["x0"], col["w"], col["left"], col["right"], view)
    B, H, W, _ = canvas.shape
    x = _weighted_rows(canvas.view(B * H, W * 3), iy + sample[:, None, None] * H, wy)  # (B, S, W * 3)
    x = x.view(-1, view.size, W, 3).permute(0, 2, 3, 1).reshape(-1, 3 * view.size)  # rows (sample, x) of (C, y)
    x = _weighted_rows(x, ix + torch.arange(len(table), device=x.device)[:, None, None] * W, wx)
    x = x.view(-1, view.size, 3, view.size).permute(0, 2, 3, 1).contiguous()
    return x.clamp_(0, 1) if view.interpolation == "bicubic" else x  # bicubic overshoots; a uint8 image saturates


def _taps(step: Tensor, start: Tensor, length: Tensor, low: Tensor, high: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Source index and weight (B, S, K) of each output pixel, whose centre is `step` pixels into the view."""
    scale = (length / view.size)[:, None]
    centre = start[:, None] + scale * step
    low, high = low[:, None], high[:, None]
    inside = (centre >= low) & (centre < high)
    if view.pad_mode == "reflect":
        centre = torch.where(centre < low, 2 * low + 1 - centre, centre)
        centre = torch.where(centre >= high, 2 * high - 1 - centre, centre)
        inside = (centre >= low) & (centre < high)
    stretch = scale.clamp_min(1.0)
    support = stretch * (1 if view.interpolation == "bilinear" else 2)
    first = torch.floor(centre - support + 0.5).maximum(low)
    last = torch.floor(centre + support + 0.5).minimum(high)
    taps = math.ceil(2 * float(support.max()))
    j = first[..., None] + torch.arange(taps, device=step.device)
    weight = _FILTERS[view.interpolation]((j + 0.5 - centre[..., None]) / stretch[..., None])
    weight = weight * ((j < last[..., None]) & inside[..., None])
    # in tap order, however many taps the batch's largest box needs; cumsum is not deterministic on CUDA
    total = sum(weight.unbind(-1))[..., None]
    weight = weight / total.masked_fill(~inside[..., None], 1.0)
    return j.minimum(high[..., None] - 1).clamp_min(0).long(), weight.float()


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    x, a = x.abs(), -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _weighted_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum over k of weight[..., k] * rows[index[..., k]]: EmbeddingBag is a fused gather and weighted sum."""
    K = index.shape[-1]
    out = F.embedding_bag(index.reshape(-1, K), rows, per_sample_weights=weight.reshape(-1, K), mode="sum")
    return out.view(*index.shape[:-1], rows.shape[1])


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Counter-clockwise by `angle` degrees about the centre, bilinear, black outside."""
    S = x.shape[-1]
    a = torch.deg2rad(angle)
    cos, sin = torch.cos(a)[:, None, None], torch.sin(a)[:, None, None]
    d = torch.arange(S, device=x.device) - (S - 1) / 2
    gx, gy = cos * d - sin * d[:, None], sin * d + cos * d[:, None]
    return F.grid_sample(x, torch.stack([gx, gy], -1) / (S / 2), align_corners=False)


def luma(x: Tensor) -> Tensor:
    return x[:, 0].mul(0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)


def brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor[:, None]).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> None:
    mean = luma(x).mean(-1, keepdim=True).mean(-2, keepdim=True)  # by rows first: a single sum would be split
    x.mul_(factor[:, None]).add_((mean * (1 - factor))[:, None]).clamp_(0, 1)  # over threads if the batch is one sample


def saturation(x: Tensor, factor: Tensor) -> None:
    gray = luma(x)
    x.mul_(factor[:, None]).add_(gray.mul_(1 - factor)[:, None]).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> None:
    """Through HSV; back by rgb = min + (max - min) * ramp(hue), which equals the six-case form."""
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    spread = high - low
    inverse = torch.where(spread == 0, 1.0, spread).reciprocal_()
    h = torch.where(
        high == r,
        (g - b).mul_(inverse),
        torch.where(high == g, (b - r).mul_(inverse).add_(2), (r - g).mul_(inverse).add_(4)),
    )
    h.add_(6 * shift)
    h.sub_((h / 6).floor_().mul_(6))  # into [0, 6]
    r.copy_((h - 3).abs_().sub_(1).clamp_(0, 1))
    g.copy_((h - 2).abs_().neg_().add_(2).clamp_(0, 1))
    b.copy_((h - 4).abs_().neg_().add_(2).clamp_(0, 1))
    x.mul_(spread[:, None]).add_(low[:, None])


def jitter(x: Tensor, view: View, table: Tensor) -> Tensor:
    """Rows are sorted by `order`; each order is a slice small enough to stay in the cache."""
    if not view.jitter_p:
        return x
    factor = table[:, COL["brightness"] : COL["hue"] + 1].T[..., None, None]
    ops = (brightness, contrast, saturation, hue)
    codes, counts = table[:, COL["order"]].unique_consecutive(return_counts=True)
    start = 0
    for code, count in zip(codes.int().tolist(), counts.tolist()):
        if code >= 0:
            for op in JITTER_ORDERS[code]:
                if view.jitter[op]:
                    ops[op](x[start : start + count], factor[op, start : start + count])
        start += count
    return x


def gray(x: Tensor, view: View, table: Tensor) -> Tensor:
    drawn = table[:, COL["gray"]].nonzero()[:, 0] if view.gray else ()
    if len(drawn):
        x[drawn] = luma(x[drawn])[:, None].expand(-1, 3, -1, -1)
    return x


def blur(x: Tensor, view: View, table: Tensor) -> Tensor:
    """torchvision's gaussian_blur with sigma = PIL's radius and kernel_size = 2 * min(ceil(4 sigma), S - 1) + 1.
    PIL approximates the same Gaussian by three box blurs; the weight beyond 4 sigma is under 1e-4."""
    S, sigma = view.size, table[:, COL["sigma"]]
    drawn = sigma.nonzero()[:, 0] if view.blur_radius else ()
    if not len(drawn):
        return x
    sigma = sigma[drawn, None]
    radius = torch.ceil(4 * sigma).clamp_max(S - 1)
    widest = view.blur_radius  # not the batch's maximum: the order of the sum would depend on it
    offset = torch.arange(-widest, widest + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma) ** 2) * (offset.abs() <= radius)
    weight = (weight / weight.sum(-1, keepdim=True))[:, None].expand(-1, S, -1)
    i = (torch.arange(S, device=x.device)[:, None] + offset).abs()
    i = torch.where(i >= S, 2 * (S - 1) - i, i).clamp_min(0)  # reflected, the edge not repeated
    index = i + torch.arange(len(drawn), device=x.device)[:, None, None] * S
    y = x[drawn].permute(0, 2, 1, 3).reshape(-1, 3 * S)  # rows (sample, y) of (C, x)
    y = _weighted_rows(y, index, weight).view(-1, S, 3, S).permute(0, 3, 2, 1).reshape(-1, 3 * S)  # (sample, x), (C, y)
    x[drawn] = _weighted_rows(y, index, weight).view(-1, S, 3, S).permute(0, 2, 3, 1)
    return x


def solarize(x: Tensor, view: View, table: Tensor) -> Tensor:
    drawn = table[:, COL["solarize"]].nonzero()[:, 0] if view.solarize else ()
    if len(drawn):
        y = x[drawn]
        x[drawn] = torch.where(y >= view.solarize_threshold, 1 - y, y)
    return x


_OPS = {"jitter": jitter, "gray": gray, "blur": blur, "solarize": solarize}
