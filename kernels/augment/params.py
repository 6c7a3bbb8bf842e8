"""Specification of a view (`View`), and its random parameters for each sample (`draw`).

Every kind of crop is the same operation: a source box (float y0, x0, h, w) is resampled to size x size; taps outside a
clip region (torchvision: the area that is cropped before the resize) are left out and the others renormalised.
Random words are Philox4x32-10 with key = seed and counter = (block, stream, sample index, epoch), four words a block:
blocks 0 to 9 are the tries of the random-resized crop (area, ratio, top, left), the others are named below.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..philox import below, philox4x32, uniform
from . import extra as operations

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# columns of the parameter table; `order` is -1 for a sample without jitter, `sigma` 0 for one without blur
COLUMNS = (
    "y0",
    "x0",
    "h",
    "w",
    "top",
    "left",
    "bottom",
    "right",
    "flip",
    "angle",
    "order",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gray",
    "sigma",
    "solarize",
)
COL = {name: i for i, name in enumerate(COLUMNS)}

TRIES, FLAGS, JITTER, OTHER, PATCH, BLOCKS = 10, 10, 11, 12, 13, 14  # Philox blocks of one (sample, stream)
Crop = Literal["resized", "center", "random", "patch", "squash"]
Interpolation = Literal["bilinear", "bicubic"]
PadMode = Literal["zero", "reflect"]
CROPS = get_args(Crop)
OPS = ("jitter", "gray", "blur", "solarize")


@dataclass(frozen=True)
class View:
    """One view of an image.  All probabilities are 0 by default, so View(224) is only a random resized crop.

    crop: "resized" (torchvision's RandomResizedCrop), "center" (Resize(resize) and CenterCrop(size) in one resample;
    resize=None: only the crop), "random" (RandomCrop(size), after Resize(resize) if given and after padding
    by `pad` pixels of `pad_mode`), "patch" (cell 0..8 of the 3x3 grid over a random crop of side `window`, randomly
    cropped to size), "squash" (the whole image, aspect ratio ignored).
    A pixel whose centre is outside the image is black, or mirrored with pad_mode="reflect".
    The operations are applied in this order: crop, flip, rotation, those of `order` (jitter must precede blur; an
    operation that is not in it gets probability 0), `extra` (see extra.py), `quarter_turns` (counter-clockwise),
    normalisation.  Views with equal `stream` draw the same random numbers; None is the view's position in the recipe.
    """

    size: int
    crop: Crop = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"  # both antialiased as in PIL, bicubic with a = -0.5
    resize: int | None = None  # short side
    pad: int = 0
    pad_mode: PadMode = "zero"
    window: int | None = None
    cell: int | None = None
    flip: float = 0.0
    rotate: float = 0.0  # degrees, drawn from +-rotate; bilinear, black outside
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # of PIL's GaussianBlur(radius=sigma)
    solarize: float = 0.0
    solarize_threshold: float = 128 / 255
    order: tuple[str, ...] = OPS
    quarter_turns: int = 0
    stream: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    extra: tuple = ()  # Lighting(...), Erase(...), RandAugment(...), Transform(fn), a callable, your own operation

    if TYPE_CHECKING:  # set by __post_init__; an annotation would make it a field

        @property
        def json(self) -> str: ...

    def __post_init__(self) -> None:
        for f in fields(self):  # lists, as read back from a dumped config, become tuples again
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
            _check_type(f.name, getattr(self, f.name), f.default)
        object.__setattr__(self, "extra", tuple(operations.operation(entry) for entry in self.extra))
        self._complete_order()
        # how the custom op receives this view: it takes strings, and torch.compile can read attributes
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        object.__setattr__(self, "json", json.dumps(known))

        def require(ok: bool, field: str, what: str) -> None:
            operations.require(ok, self, field, what)

        require(self.size >= 1, "size", "needs at least 1 pixel")
        for field, choices in (("crop", Crop), ("interpolation", Interpolation), ("pad_mode", PadMode)):
            names = get_args(choices)
            require(getattr(self, field) in names, field, f"choose one of {', '.join(names)}")
        require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "needs 0 < low <= high <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "needs 0 < low <= high")
        require(self.pad >= 0 and (self.pad == 0 or self.crop == "random"), "pad", "only a random crop can be padded")
        require(
            self.resize is None or self.crop in ("center", "random", "patch"),
            "resize",
            f"has no meaning for a {self.crop} crop",
        )
        for field in ("flip", "jitter_p", "gray", "blur", "solarize"):
            require(0 <= getattr(self, field) <= 1, field, "must be a probability, from 0 to 1")
        require(
            len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "jitter",
            "needs four strengths (brightness, contrast, saturation, hue) >= 0 and hue <= 0.5",
        )
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "needs 0 < low <= high")
        require(0 <= self.rotate <= 180, "rotate", "must be the largest angle in degrees, from 0 to 180")
        require(self.order.index("jitter") < self.order.index("blur"), "order", "must have jitter before blur")
        require(self.quarter_turns in (0, 1, 2, 3), "quarter_turns", "must be 0, 1, 2 or 3")
        require(self.stream is None or 0 <= self.stream < 2**32, "stream", "must be None or from 0 to 2**32 - 1")
        require(min(self.std) > 0, "std", "must be above 0")
        if self.crop == "patch":
            require(self.cell is not None and 0 <= self.cell <= 8, "cell", "a patch crop needs a cell from 0 to 8")
            require(
                self.window is not None and self.window // 3 >= self.size,
                "window",
                f"a patch crop needs a window of at least 3 x {self.size}",
            )
            fits = self.resize is None or (self.window is not None and self.resize >= self.window)
            require(fits, "resize", f"must not be below window={self.window}")
        else:
            require(self.cell is None, "cell", "is for crop='patch'")
            require(self.window is None, "window", "is for crop='patch'")
            available = None if self.resize is None else self.resize + 2 * self.pad
            require(available is None or available >= self.size, "resize", f"must not be below size={self.size}")

    @property
    def blur_radius(self) -> int:
        """The largest radius of a blur in pixels, 0 without blur."""
        return min(math.ceil(4 * self.blur_sigma[1]), self.size - 1) if self.blur else 0

    def _complete_order(self) -> None:
        """Operations that `order` leaves out get probability 0 and a position: the kernels take orders of all four."""
        if len(set(self.order)) < len(self.order) or not set(self.order) <= set(OPS):
            raise ValueError(f"View(order={self.order!r}): may name each of {', '.join(OPS)} once")
        left_out = [op for op in OPS if op not in self.order]
        for op in left_out:
            object.__setattr__(self, "jitter_p" if op == "jitter" else op, 0.0)
        before = [op for op in left_out if op == "jitter"]
        object.__setattr__(self, "order", (*before, *self.order, *(op for op in left_out if op != "jitter")))


def _check_type(name: str, value: object, default: object) -> None:
    """ValueError if the value is not of the kind that the field takes: a number, a string or several numbers."""

    def number(v: object) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

    whole = name in ("size", "pad", "quarter_turns", "resize", "window", "cell", "stream")
    if name == "size" and isinstance(value, tuple):
        raise ValueError(f"View(size={value!r}): views are square, give one number")
    if whole:
        what = "a whole number" + " or None" * (default is None)
        ok = (number(value) and isinstance(value, int)) or (value is None and default is None)
    elif isinstance(default, str):
        what, ok = "a string", isinstance(value, str)
    elif isinstance(default, tuple) and name not in ("order", "extra"):
        what = f"{len(default)} numbers"
        ok = isinstance(value, tuple) and len(value) == len(default) and all(map(number, value))
    elif isinstance(default, tuple):
        what, ok = "a tuple", isinstance(value, tuple)
    else:
        what, ok = "a number", number(value)
    if not ok:
        raise ValueError(f"View({name}={value!r}): must be {what}")


def streams(views: Sequence[View]) -> list[int]:
    return [i if view.stream is None else view.stream for i, view in enumerate(views)]


def draw(sizes: Tensor, index: Tensor, views: Sequence[View], *, seed: int, epoch: int) -> Tensor:
    """Parameters of every view and sample: float32 (V, B, len(COLUMNS)).

    Computed in float64, so that a rounding difference of exp or sqrt on another device does not move a crop by a pixel.
    """
    drawn = sorted(set(streams(views)))
    stream = torch.tensor(drawn, device=index.device)[:, None, None]
    block = torch.arange(BLOCKS + 8, device=index.device)  # PATCH is one block for each of nine cells
    words = torch.stack(philox4x32(block, stream, index[None, :, None], epoch, seed), -1)  # (streams, B, blocks, 4)
    sizes = sizes.long()
    tables = []
    for view, s in zip(views, streams(views)):
        w = words[drawn.index(s)]
        box, clip = _crop(view, sizes[:, 0], sizes[:, 1], w)
        tables.append(torch.stack([c.float() for c in (*box, *clip, *_colour(view, w))], -1))
    return torch.stack(tables) if tables else torch.empty(0, len(index), len(COLUMNS), device=index.device)


def _crop(view: View, H: Tensor, W: Tensor, w: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Box (y0, x0, h, w) and clip region (top, left, bottom, right) of each sample, float64 and int64 (B,)."""
    zero = torch.zeros_like(H)
    image = (zero, zero, H, W)
    if view.crop == "squash":
        return image, image
    if view.crop == "resized":
        y, x, h, w = _random_resized(view, H, W, w)
        return (y, x, h, w), (y, x, y + h, x + w)
    nh, nw = H, W
    if view.resize is not None:  # torchvision's Resize(int): the long side is int(resize * long / short)
        short = torch.minimum(H, W)
        nh, nw = H * view.resize // short, W * view.resize // short
    if view.crop == "patch":
        assert view.window is not None and view.cell is not None
        cell, shift = view.window // 3, w[:, PATCH + view.cell]
        num_offsets = cell - view.size + 1
        top = _offset(nh, view.window, w[:, 0, 2]) + cell * (view.cell // 3) + below(shift[:, 0], num_offsets)
        left = _offset(nw, view.window, w[:, 0, 3]) + cell * (view.cell % 3) + below(shift[:, 1], num_offsets)
    elif view.crop == "random":
        top = _offset(nh + 2 * view.pad, view.size, w[:, 0, 2]) - view.pad
        left = _offset(nw + 2 * view.pad, view.size, w[:, 0, 3]) - view.pad
    else:
        top, left = _centre(nh, view.size), _centre(nw, view.size)
    fy, fx = H.double() / nh, W.double() / nw
    return (top * fy, left * fx, view.size * fy, view.size * fx), image


def _centre(n: Tensor, size: int) -> Tensor:
    """torchvision's CenterCrop: round half to even, and a smaller image is padded with the odd pixel at the end."""
    return torch.where(n < size, -((size - n) // 2), torch.round((n - size) / 2).long())


def _offset(n: Tensor, size: int, word: Tensor) -> Tensor:
    return torch.where(n < size, _centre(n, size), below(word, (n - size + 1).clamp_min(1)))


def _random_resized(view: View, H: Tensor, W: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's algorithm: the first of ten tries that fits, else the largest central crop of allowed ratio."""
    tries = w[:, :TRIES]
    area = (H * W)[:, None] * _between(tries[..., 0], *view.scale)
    ratio = torch.exp(_between(tries[..., 1], math.log(view.ratio[0]), math.log(view.ratio[1])))
    tw, th = torch.round(torch.sqrt(area * ratio)).long(), torch.round(torch.sqrt(area / ratio)).long()
    fits = (tw > 0) & (tw <= W[:, None]) & (th > 0) & (th <= H[:, None])
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # argmax: the first of equals
    tw, th, wy, wx = (t.gather(1, first)[:, 0] for t in (tw, th, tries[..., 2], tries[..., 3]))
    low, high, shape = view.ratio[0], view.ratio[1], W.double() / H
    fw = torch.where(shape > high, torch.round(H.double() * high).long(), W)
    fh = torch.where(shape < low, torch.round(W.double() / low).long(), H)
    fits = fits.any(1)
    h, w = torch.where(fits, th, fh), torch.where(fits, tw, fw)
    top = torch.where(fits, below(wy, H - h + 1), (H - h) // 2)
    left = torch.where(fits, below(wx, W - w + 1), (W - w) // 2)
    return top, left, h, w


def _between(word: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform(word)


def _colour(view: View, w: Tensor) -> tuple[Tensor, ...]:
    """The columns from `flip` on."""
    flags, jitter, other = w[:, FLAGS], w[:, JITTER], w[:, OTHER]
    order = torch.where(uniform(flags[:, 1]) < view.jitter_p, below(other[:, 0], 24), -1)
    factors = [_between(jitter[:, i], max(0.0, 1 - view.jitter[i]), 1 + view.jitter[i]) for i in range(3)]
    hue = _between(jitter[:, 3], -view.jitter[3], view.jitter[3])
    sigma = torch.where(uniform(flags[:, 3]) < view.blur, _between(other[:, 1], *view.blur_sigma), 0.0)
    return (
        uniform(flags[:, 0]) < view.flip,
        _between(other[:, 3], -view.rotate, view.rotate),
        order,
        *factors,
        hue,
        uniform(flags[:, 2]) < view.gray,
        sigma,
        uniform(other[:, 2]) < view.solarize,
    )
