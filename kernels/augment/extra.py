"""Further operations of a view (`View.extra`), in PyTorch on the device; the fused kernel does not have them.

They run after the kernel, on float32 crops (n, 3, S, S) in [0, 1], before `quarter_turns` and normalisation; views
without them use only the fused kernel.  Random numbers are Philox words as in the kernel, keyed by (seed, epoch,
sample, stream) and by the operation's position, so that a sample's view depends on neither batch nor rank.
Shapes: n samples, S side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..philox import below, philox4x32, uniform

if TYPE_CHECKING:
    from .params import View

FIRST_BLOCK, BLOCKS = 64, 64  # of Philox: the kernel uses blocks below 22, then each operation of a view has 64
TRIES = 10  # torchvision's RandomErasing


@dataclass(frozen=True)
class Random:
    """The random numbers of one operation for n samples."""

    index: Tensor  # int64 (n,), the samples' numbers
    seed: int
    epoch: int | Tensor
    stream: int
    position: int = 0  # of the operation in View.extra

    def words(self, count: int) -> Tensor:
        """int64 (n, count) in [0, 2**32), the same for a sample in any batch; at most 256."""
        if not 0 < count <= 4 * BLOCKS:
            raise ValueError(f"{count} random words: an operation can draw 1 to {4 * BLOCKS} for each sample")
        block = FIRST_BLOCK + self.position * BLOCKS + torch.arange(-(-count // 4), device=self.index.device)
        words = philox4x32(block, self.stream, self.index[:, None], self.epoch, self.seed)
        return torch.stack(words, -1).flatten(1)[:, :count]

    def uniform(self, count: int) -> Tensor:
        """float64 (n, count) in [0, 1)."""
        return uniform(self.words(count))


class Operation(Protocol):
    """An entry of View.extra: a frozen dataclass, which config.json records with all its fields.

    `waits = True` marks an operation that makes the host wait for the device: a step with it cannot be captured in a
    CUDA graph.
    """

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor: ...  # float32 (n, 3, S, S) -> the same shape


def require(ok: bool, operation: Any, field: str, what: str) -> None:
    if not ok:
        raise ValueError(f"{type(operation).__name__}({field}={getattr(operation, field)!r}): {what}")


@lru_cache(maxsize=64)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers, copied to the device once: a copy in every step would make the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class Lighting:
    """AlexNet's PCA noise: adds a multiple N(0, std) of each principal component of ImageNet's colours, unclamped
    (section 4.1 of Krizhevsky et al., NIPS 2012; components of fb.resnet.torch, for colours in [0, 1])."""

    std: float = 0.1
    values: tuple[float, float, float] = (0.2175, 0.0188, 0.0045)
    vectors: tuple = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))  # R, G, B

    def __post_init__(self) -> None:
        require(self.std >= 0, self, "std", "must be at least 0")

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor:
        u = random.uniform(4)  # Box-Muller
        radius, angle = (-2 * torch.log1p(-u[:, :2])).sqrt(), 2 * math.pi * u[:, 2:]
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :3]
        scaled = self.std * normal * constant(self.values, x.device, normal.dtype)
        vectors = constant(self.vectors, x.device, normal.dtype)
        shift = sum(scaled[:, i, None] * vectors[:, i] for i in range(3))
        return x + shift.float()[..., None, None]


@dataclass(frozen=True)
class Erase:
    """torchvision's RandomErasing: with probability p, a random box is set to `fill` (R, G, B in [0, 1]; None: the
    view's mean, which is 0 after normalisation).  scale: the box's share of the area, ratio: height to width."""

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, self, "p", "must be a probability, from 0 to 1")
        require(0 < self.scale[0] <= self.scale[1] <= 1, self, "scale", "needs 0 < low <= high <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], self, "ratio", "needs 0 < low <= high")

    def box(self, random: Random, size: int) -> Tensor:
        """int64 (n, 4) of top, left, height, width; height 0 where nothing is erased."""
        words = random.words(4 * (TRIES + 1)).view(-1, TRIES + 1, 4)
        u, (low, high) = uniform(words[:, :TRIES]), self.scale
        area = size * size * (low + (high - low) * u[..., 0])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * u[..., 1])
        h, w = torch.round(torch.sqrt(area * ratio)).long(), torch.round(torch.sqrt(area / ratio)).long()
        fits = (h < size) & (w < size)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        h, w, wy, wx = (t.gather(1, first)[:, 0] for t in (h, w, words[:, :TRIES, 2], words[:, :TRIES, 3]))
        top, left = below(wy, size - h + 1), below(wx, size - w + 1)
        erased = fits.any(1) & (uniform(words[:, TRIES, 0]) < self.p)
        return torch.stack([top, left, torch.where(erased, h, 0), w], 1)

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor:
        top, left, h, w = self.box(random, x.shape[-1])[..., None].unbind(1)
        i = torch.arange(x.shape[-1], device=x.device)
        rows, columns = (i >= top) & (i < top + h), (i >= left) & (i < left + w)
        fill = constant(view.mean if self.fill is None else self.fill, x.device).view(3, 1, 1)
        return torch.where((rows[:, :, None] & columns[:, None])[:, None], fill, x)


@dataclass(frozen=True)
class Transform:
    """Any callable on float tensors in [0, 1] that keeps their shape, such as torchvision.transforms.v2's, applied with
    probability p to each sample.

    per_sample=True calls it with one (3, S, S) image at a time, after seeding torch's generators by the sample: its
    parameters differ between samples and are the same in any batch and on any rank; slow, n calls.  False calls it once
    with all (n, 3, S, S): fast, but v2's transforms then draw ONE set of parameters for the whole micro-batch, and the
    views depend on the number of ranks and micro-batches.  The host waits for the device in both cases.
    """

    fn: Callable[[Tensor], Tensor] | str  # str: what config.json has of one, which cannot be applied
    p: float = 1.0
    per_sample: bool = True
    waits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, self, "p", "must be a probability, from 0 to 1")

    def apply(self, x: Tensor, random: Random, view: Any) -> Tensor:
        if isinstance(self.fn, str):
            raise ValueError(f"only the name of the transform {self.fn} is known: it cannot be read from config.json")
        words = random.words(3)
        rows = (uniform(words[:, 2]) < self.p).nonzero()[:, 0]
        if not len(rows):
            return x
        seeds = ((words[rows, 0] << 31) ^ words[rows, 1]).tolist()  # 63 bits
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.per_sample:
                made = torch.stack([self._call(self.fn, image, seed) for image, seed in zip(x[rows], seeds)])
            else:
                made = self._call(self.fn, x[rows], seeds[0])
        return x.index_copy(0, rows, made.to(x.dtype))

    def _call(self, fn: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        y = fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{fn!r} made {got} of a float tensor {tuple(x.shape)}: a view's transform must keep the "
                "shape and the range of 0 to 1"
            )
        return y


def operation(entry: Any) -> Operation:
    """An entry of View.extra as an operation.  entry: an operation, a callable, or the dict that config.json has."""
    from .randaugment import RandAugment  # imports this module

    if isinstance(entry, dict):
        kinds: dict[str, Any] = {kind.__name__: kind for kind in (Lighting, Erase, Transform, RandAugment)}
        name = str(entry.get("type", "")).rpartition(".")
        if name[2] not in kinds or kinds[name[2]].__module__ != name[0]:
            return Transform(str(entry.get("type", entry)))
        kind = kinds[name[2]]
        return kind(**{f.name: _tuple(entry[f.name]) for f in fields(kind) if f.name in entry})
    if callable(getattr(entry, "apply", None)) and is_dataclass(type(entry)):
        return entry
    if callable(entry) and not isinstance(entry, type):
        return Transform(entry)
    raise ValueError(
        f"View(extra=...): {entry!r} is not an operation: give Lighting(...), Erase(...), "
        "RandAugment(...), a callable on tensors, or a dataclass with apply(x, random, view)"
    )


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def without_extra(views: "Sequence[View]") -> "list[View]":
    """The views for the kernel, with their streams; those with operations without turns and normalisation."""
    plain = []
    for i, view in enumerate(views):
        if view.extra:
            view = replace(view, extra=(), quarter_turns=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        plain.append(replace(view, stream=i if view.stream is None else view.stream))
    return plain


def finish(x: Tensor, view: Any, random: Random, dtype: torch.dtype) -> Tensor:
    """The view's operations on crops (n, 3, S, S) in [0, 1], then its turns and normalisation; channels_last."""
    for position, op in enumerate(view.extra):
        x = op.apply(x, replace(random, position=position), view)
    mean, std = (constant(v, x.device).view(3, 1, 1) for v in (view.mean, view.std))
    x = ((x - mean) / std).rot90(view.quarter_turns, (2, 3))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
