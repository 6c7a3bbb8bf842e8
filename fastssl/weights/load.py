"""Loading backbone weights, completely or not at all.

The backbone is found in a file by its keys, with any prefix.  The report lists what was loaded; a parameter that
would stay at its initial value is an error.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.config import Backbone
from fastssl.weights import foreign
from fastssl.weights.source import CONTAINERS, download, read, spec_of

# First names of keys beside the backbone's, under the same prefix.  They are reported and not loaded.
HEADS = (
    {"fc", "head", "heads", "classifier", "linear", "projection_head", "prototypes", "projector", "predictor"}
    | {"pre_logits", "head_dist"}  # timm's older ViTs
    | {"mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}  # MAE
)
# In our checkpoints DINO's alone: no other method's momentum encoder has prototypes.  DINO evaluates the teacher.
DINO_KEY = "target.1.prototypes.weight"
TRAINING_OPTIONS = re.compile(r"drop|_rate$|init|img_size|dynamic_")  # timm's, without effect on a trained network


@dataclass
class LoadReport:
    """What `load_backbone` did: the file, the prefix and layout of its keys, and what was left out."""

    file: str
    prefix: str
    loaded: int
    heads: list[str]  # keys of classifier and projection heads under the prefix
    other: dict[str, int]  # part of the model outside the prefix -> how many keys
    layout: str | None = None  # of foreign.LAYOUTS, where the file's keys are not ours
    resampled: str | None = None  # how position embeddings of another size were changed

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.file}" + (f", prefix {self.prefix!r}" if self.prefix else "")
        text += f", keys of {self.layout}" if self.layout else ""
        text += f"; {self.resampled}" if self.resampled else ""
        if self.heads:
            text += f"; heads left out: {', '.join(self.heads)}"
        if self.other:
            text += "; also in the file: " + ", ".join(f"{name} ({n})" for name, n in self.other.items())
        return text


def load_backbone(
    path: str | Path, backbone: nn.Module, *, prefix: str | None = None, which: foreign.Which | None = None
) -> LoadReport:
    """Load every parameter and buffer of `backbone` from a run folder, a checkpoint folder, .safetensors, .pt or .pth;
    "torchvision" and "timm" download their default weights.

    A file may hold several copies of the network.  `which` takes the "student" or the (EMA) "teacher", `prefix` any
    copy, such as "teacher.backbone."; the default is the one that the method evaluates.  Position embeddings of another
    size are resampled.  ValueError for incomplete weights, and for those of another network with the same keys and
    shapes, where that is known.
    """
    net = getattr(backbone, "body", backbone)  # timm's keys are those of its own module
    spec, library = backbone.spec, str(path) in ("torchvision", "timm")
    file, state = (str(path), download(str(path), spec.name)) if library else read(path)
    source = Backbone(spec.name) if library else spec_of(path)
    if differences := _differences(source, spec):
        raise ValueError(f"{file} holds another network than the backbone: {'; '.join(differences)}")
    own = net.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # absent before PyTorch 0.4.1
    layout, state = _rename_keys(state, needed)
    prefix = _prefix(file, state, needed, prefix, which)
    found = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    foreign.check_stem(file, layout, spec.stem)
    if source is None and "pos_embed" in found:
        foreign.check_num_heads(file, found["pos_embed"], net, spec)
    resampled = _resample(found, net)
    _check(file, prefix, found, needed, own)
    net.load_state_dict({name: found.get(name, own[name]) for name in own})
    heads = [prefix + name for name in found if name not in own]
    other = Counter(_part(key) for key in state if not key.startswith(prefix))
    return LoadReport(file, prefix, sum(name in found for name in own), heads, dict(other), layout, resampled)


@contextlib.contextmanager
def check_pretrained_kept(backbone: nn.Module) -> Iterator[None]:
    """For the block in which a method is built: ValueError if the method writes to the backbone's loaded weights."""
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    yield
    written = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    if written:
        raise ValueError(
            f"the method overwrites {len(written)} of the tensors that backbone.pretrained loaded "
            f"({_first(written)}): its Config should do so in init_backbone(backbone), which runs before"
        )


def _differences(source: Backbone | None, spec: Backbone) -> list[str]:
    """Differences between the network of the file and ours that change neither keys nor shapes."""
    if source is None:
        return []
    out = []
    if source.stem != spec.stem:
        out += [f"backbone.stem is {source.stem!r} there, {spec.stem!r} here"]
    for key in sorted({*source.options, *spec.options}):
        theirs, ours = (list(v) if isinstance(v := s.options.get(key), tuple) else v for s in (source, spec))
        if theirs != ours and not TRAINING_OPTIONS.search(key):
            out += [f"backbone.options.{key} is {theirs!r} there, {ours!r} here (None: not set)"]
    return out


def _resample(found: dict[str, Tensor], net: nn.Module) -> str | None:
    """Resample the position embeddings in `found` to the size of the network's, where both are square grids.  Returns a
    note for the report, None where nothing was changed."""
    table, own = found.get("pos_embed"), getattr(net, "pos_embed", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if table is None or own is None or grid is None or table.ndim != 3 or table.shape[1] == own.shape[1]:
        return None
    tokens = own.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(table.shape[1] - tokens, 0))
    if side == 0 or side * side != table.shape[1] - tokens or table.shape[2] != own.shape[2]:
        return None
    found["pos_embed"] = positions.resample(table, (side, side), tuple(grid))
    return f"positions resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"


def _part(key: str) -> str:
    """The part of a model that a key belongs to: "head" of "state_dict.module.head.fc.weight"."""
    names = key.split(".")
    return next((name for name in names if name not in CONTAINERS | {"module"}), names[-1])


def _rename_keys(state: dict[str, Tensor], needed: list[str]) -> tuple[str | None, dict[str, Tensor]]:
    """The layout of the keys and `state` under our keys, where some layout fits better than the keys as they are."""
    best: tuple[int, str | None, dict[str, Tensor]]
    best = (max(_count_matches(state, needed).values(), default=0), None, state)
    if best[0] < len(needed):
        for layout, names in foreign.matching_layouts(list(state)):
            candidate = {names[key]: value for key, value in state.items()}
            count = max(_count_matches(candidate, needed).values(), default=0)
            best = max(best, (count, layout, candidate), key=lambda option: option[0])
    return best[1:]


def _count_matches(state: dict[str, Tensor], needed: list[str]) -> dict[str, int]:
    """Prefix -> how many of the needed names are in `state` with this prefix."""
    by_last: dict[str, list[str]] = {}
    for key in state:
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    starts = {
        key[: -len(name)] for name in needed for key in by_last.get(name.rpartition(".")[2], ()) if key.endswith(name)
    }
    return {p: sum(p + name in state for name in needed) for p in starts if p == "" or p.endswith(".")}


def _prefix(
    file: str, state: dict[str, Tensor], needed: list[str], prefix: str | None, which: foreign.Which | None
) -> str:
    """The prefix of the copy to load: the given one, or the one found."""
    if prefix is None:
        if which is None and DINO_KEY in state:
            which = "teacher"
        return _find_prefix(file, state, needed, which)
    if which:
        raise ValueError(f"prefix {prefix!r} and which={which!r} both choose a copy: give one of them")
    return prefix if prefix == "" or prefix.endswith(".") else prefix + "."


def _find_prefix(file: str, state: dict[str, Tensor], needed: list[str], which: foreign.Which | None) -> str:
    """The prefix with most of the backbone's keys.  Among equals: the copy that is evaluated, then the shortest."""
    count = _count_matches(state, needed)
    if not count:
        raise ValueError(f"{file} has none of the backbone's keys ({needed[0]}, ...); it has {_first(state)}")
    copies = sorted(p for p in count if count[p] == max(count.values()))
    chosen = foreign.select_copies(copies, which) if which else copies
    if not chosen:
        names = ", ".join(map(repr, copies))
        raise ValueError(
            f"{file} has no {which} that is known as such, only {names}: leave out --which, or choose one by --prefix"
        )

    def order(p: str) -> tuple:
        return foreign.priority(p), len(p)

    first, *rest = sorted(chosen, key=order)
    second = next((p for p in rest if order(p) == order(first)), None)
    if second is not None and not all(
        torch.equal(state[first + name], state[second + name])
        for name in needed
        if first + name in state and second + name in state
    ):
        raise ValueError(f"{file} holds this backbone at {first!r} and at {second!r}: choose one by --prefix")
    return first


def _check(file: str, prefix: str, found: dict[str, Tensor], needed: list[str], own: dict[str, Tensor]) -> None:
    """ValueError unless `found` has every needed tensor, each of the right shape and finite, and no unknown one."""
    where = f"{file}" + (f" (prefix {prefix!r})" if prefix else "")
    missing = [name for name in needed if name not in found]
    extra = [name for name in found if name not in own and name.split(".")[0] not in HEADS]
    extra = [name for name in extra if not name.endswith("num_batches_tracked")]  # a frozen batch norm has none
    if missing or extra:
        parts = [f"{len(missing)} of the backbone's {len(needed)} tensors are not in it: {_first(missing)}"]
        parts = parts * bool(missing) + [f"{len(extra)} of its tensors load nowhere: {_first(extra)}"] * bool(extra)
        raise ValueError(f"{where} does not fit the backbone; " + "; ".join(parts))
    for name, tensor in found.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            stem = name == "conv1.weight" and tensor.ndim == 4 and (tensor.shape[1] == 2) != (own[name].shape[1] == 2)
            hint = "; is backbone.stem right?" if name == "conv1.weight" else ""
            hint = "; two channels are those of Sobel filters: is backbone.sobel right?" if stem else hint
            theirs, ours = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"{where}: {name} is {theirs} in the file and {ours} in the backbone{hint}")
        if tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity; that training diverged")


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"
