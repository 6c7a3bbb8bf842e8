"""Reading backbone weights from anywhere, completely or not at all; export.py writes them for others.

Files are read with safetensors or `weights_only`: nothing in them runs.  The backbone is found in a file by its keys,
whatever the prefix; what matched is reported, and a parameter that would stay at its initial value is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fastssl.backbones import positions
from fastssl.checkpoint import store
from fastssl.config import Backbone
from fastssl.files import untrusted
from fastssl.weights import foreign

# Beside the backbone, under its own prefix, a file may hold these; they are named in the report and not loaded.
HEADS = {
    "fc",
    "head",
    "heads",
    "classifier",
    "linear",
    "projection_head",
    "prototypes",
    "projector",
    "predictor",
    "pre_logits",
    "head_dist",  # timm's older ViTs
    "mask_token",
    "decoder_embed",
    "decoder_pos_embed",
    "decoder_blocks",
    "decoder_norm",
    "decoder_pred",  # MAE
}
MOST = 100_000  # dictionaries in a file of weights
META = "fastssl.backbone"  # metadata key of our safetensors exports: the Backbone as JSON


@dataclass
class Report:
    """What load_backbone did: from which file, prefix and layout, what of it was left out."""

    file: str
    prefix: str
    loaded: int
    heads: list[str]  # keys of classifier and projection heads under the prefix
    other: dict[str, int]  # first name of keys outside the prefix -> how many
    layout: str | None = None  # of foreign.LAYOUTS, where the file's keys are not ours
    resampled: str | None = None  # what was done to positions of another size

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.file}" + (f", prefix {self.prefix!r}" if self.prefix else "")
        text += f", keys of {self.layout}" if self.layout else ""
        text += f"; {self.resampled}" if self.resampled else ""
        if self.heads:
            text += f"; heads left out: {', '.join(self.heads)}"
        if self.other:
            text += "; also in the file: " + ", ".join(f"{name} ({n})" for name, n in self.other.items())
        return text


OUR_DINO = "target.1.prototypes.weight"  # no other method's momentum encoder has prototypes; DINO evaluates the teacher


def load_backbone(
    path: str | Path, backbone: nn.Module, *, prefix: str | None = None, which: str | None = None
) -> Report:
    """Load every parameter and buffer of `backbone` from a run folder, a checkpoint folder, .safetensors, .pt or .pth;
    "torchvision" and "timm" download their default weights.

    Of several copies in the file, `which` takes the "student" or the (EMA) "teacher" and `prefix` any, for example
    "teacher.backbone."; without them it is the one that the method evaluates.  Position embeddings of another size are
    resampled.  Weights that are known to belong to another network of equal keys and shapes are refused.
    """
    net = getattr(backbone, "body", backbone)  # timm's keys are those of its own module
    spec = backbone.spec
    file, state = _read(path, spec)
    if differences := _differences(_told(path, spec), spec):
        raise ValueError(f"{file} holds another network than the backbone: {'; '.join(differences)}")
    own = net.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # absent before PyTorch 0.4.1
    layout, state = _as_ours(state, needed)
    if prefix is None:
        if which is None and OUR_DINO in state:
            which = "teacher"
        prefix = _find_prefix(file, state, needed, which)
    elif which:
        raise ValueError(f"prefix {prefix!r} and which={which!r} both choose a copy: give one of them")
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    foreign.refuse_layout(file, layout, spec.stem)
    if _told(path, spec) is None and "pos_embed" in found:
        foreign.refuse_heads(file, found["pos_embed"], net, spec)
    resampled = _resample(found, net)
    _check(file, prefix, found, needed, own)
    net.load_state_dict({name: found.get(name, own[name]) for name in own})
    heads = [prefix + name for name in found if name not in own]
    other = Counter(key.split(".")[0] for key in state if not key.startswith(prefix))
    return Report(file, prefix, sum(name in found for name in own), heads, dict(other), layout, resampled)


@contextlib.contextmanager
def unchanged(backbone: nn.Module) -> Iterator[None]:
    """A method is built inside; one that writes to the backbone, whose weights are loaded, is a ValueError."""
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    yield
    written = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    if written:
        raise ValueError(
            f"the method overwrites {len(written)} of the tensors that backbone.pretrained loaded "
            f"({_few(written)}): its Config should do so in init_backbone(backbone), which runs before"
        )


def read(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The file that `path` means and its tensors, nested dictionaries flattened to dotted keys."""
    path = Path(path)
    if path.is_dir():
        if not (path / store.MANIFEST).exists():
            run, path = path, store.newest(path)
            if path is None:
                raise ValueError(f"{run} holds no complete checkpoint: give a run folder, a checkpoint or weights")
        elif problem := store.damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {problem}")
        path = path / "weights.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return str(path), untrusted.read_safetensors(path)[1]
    value = _read_pickle(path)
    foreign.refuse(str(path), value)
    return str(path), _flat(value, str(path))


def run_config(path: str | Path) -> dict | None:
    """The config of the run that a run folder or one of its checkpoints belongs to; None for anything else."""
    for folder in (Path(path), *Path(path).parents[:2]) if Path(path).is_dir() else ():
        if (folder / "config.json").is_file():
            config = untrusted.read_json(folder / "config.json")
            if not isinstance(config, dict):
                raise ValueError(f"{folder / 'config.json'} is not the config of a run")
            return config
    return None


def spec_of(path: str | Path) -> Backbone | None:
    """The architecture, where a run's config or the metadata of our safetensors exports says it; None elsewhere."""
    config, path = run_config(path), Path(path)
    spec = _backbone(config.get("backbone"), "config.json") if config else None
    if path.suffix == ".safetensors" and path.is_file():
        meta, _ = untrusted.read_safetensors(path, tensors=False)
        spec = _backbone(untrusted.parse_json(meta[META], path), path) if META in meta else None
    return spec and dataclasses.replace(spec, pretrained=None, frozen=0)  # how it was trained, not what it is


def _backbone(fields, where: str | Path) -> Backbone:
    """The Backbone of `fields`, which must be its fields, of the types of their defaults."""
    own = vars(Backbone())
    wrong = (
        [
            key
            for key, value in fields.items()
            if key not in own or not (type(value) is type(own[key]) or (key == "pretrained" and isinstance(value, str)))
        ]
        if isinstance(fields, dict)
        else ["backbone"]
    )
    if wrong:
        raise ValueError(f"{where} does not describe a backbone of this version: {wrong[0]!r:.60}")
    return Backbone(**fields)


def has_sobel(path: str | Path) -> bool:
    """Whether a ResNet's weights see the two gradients of Sobel filters: by the channels of the first convolution."""
    if not Path(path).exists():
        return False
    names = r"(?!.*(layer\d|downsample|shortcut)\.)(.*\.)?(conv1|0)\.weight"  # "0": of numbered children
    return any(
        value.ndim == 4 and value.shape[1] == 2 and re.fullmatch(names, key) for key, value in read(path)[1].items()
    )


def metadata(spec: Backbone) -> dict[str, str]:
    """What spec_of reads: the header of our safetensors files."""
    return {"format": "pt", META: json.dumps(dataclasses.asdict(dataclasses.replace(spec, pretrained=None, frozen=0)))}


def _read(path: str | Path, spec: Backbone) -> tuple[str, dict[str, Tensor]]:
    return (str(path), _download(str(path), spec.name)) if str(path) in ("torchvision", "timm") else read(path)


def _download(library: str, name: str) -> dict[str, Tensor]:
    """The library's own weights of a model, or its copy on this machine.  OSError: they cannot be had."""
    try:
        if library == "torchvision":
            return torchvision.models.get_model(name, weights="DEFAULT").state_dict()
        import timm

        return timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict()
    except OSError as error:
        cache, why = "TORCH_HOME" if library == "torchvision" else "HF_HOME", untrusted.one_line(error)
        raise OSError(
            f"the weights of {name} from {library} cannot be downloaded ({why}): without a network, name a "
            f"file of weights, or set {cache} to a cache that has them"
        ) from error


def _told(path: str | Path, spec: Backbone) -> Backbone | None:
    """What `path` says of its network, as spec_of; torchvision's and timm's own weights are those of plain networks."""
    return Backbone(spec.name) if str(path) in ("torchvision", "timm") else spec_of(path)


NOT_ARITHMETIC = re.compile(r"drop|_rate$|init|img_size|dynamic_")  # options of timm's models that training alone sees


def _differences(told: Backbone | None, spec: Backbone) -> list[str]:
    """What `told` and `spec` say differently and neither keys nor shapes would show."""
    if told is None:
        return []
    out = []
    if told.stem != spec.stem:
        out += [f"backbone.stem is {told.stem!r} there, {spec.stem!r} here"]
    for key in sorted({*told.options, *spec.options}):
        theirs, ours = (list(v) if isinstance(v := s.options.get(key), tuple) else v for s in (told, spec))
        if theirs != ours and not NOT_ARITHMETIC.search(key):
            out += [f"backbone.options.{key} is {theirs!r} there, {ours!r} here (None: not set)"]
    return out


def _resample(found: dict[str, Tensor], net: nn.Module) -> str | None:
    """Bring the position embeddings in `found` to the size of those of `net`, if both are square grids; says so."""
    table, own = found.get("pos_embed"), getattr(net, "pos_embed", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if table is None or own is None or grid is None or table.ndim != 3 or table.shape[1] == own.shape[1]:
        return None
    prefix = own.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    if side == 0 or side * side != table.shape[1] - prefix or table.shape[2] != own.shape[2]:
        return None
    found["pos_embed"] = positions.resample(table, (side, side), tuple(grid))
    return f"positions resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"


def _read_pickle(path: Path):
    try:  # DINO's, MAE's and timm's checkpoints hold an argparse.Namespace, whose making runs nothing of the file's
        return untrusted.read_pt(path, allow=(argparse.Namespace,))
    except untrusted.CodeRefused as error:
        raise ValueError(
            f"{error}. If you trust whoever made it, keep its tensors alone, once, and give the new file:\n"
            '  python -c "import torch; keep = lambda v: {k: keep(x) for k, x in v.items() if isinstance(x, (dict, '
            f"torch.Tensor))}} if isinstance(v, dict) else v; c = torch.load({str(path)!r}, 'cpu', "
            "weights_only=False); torch.save(keep(getattr(c, 'state_dict', lambda: c)()), 'weights.pth')\""
        ) from None


def _flat(value, file: str) -> dict[str, Tensor]:
    """Tensors of nested dictionaries with string keys; optimizer states have numbers for keys and stay out."""
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a dictionary of tensors")
    out, waiting, seen = {}, [(value, "")], 0
    while waiting:
        level, prefix = waiting.pop()
        seen += 1
        if seen > MOST or prefix.count(".") > 100:  # a dictionary may hold itself, or another a hundred times
            raise ValueError(f"{file} is nested too deeply for a dictionary of tensors")
        for key, item in level.items():
            if isinstance(item, Tensor) and isinstance(key, str):
                out[prefix + key] = item
            elif isinstance(item, dict) and isinstance(key, str):
                waiting.append((item, f"{prefix}{key}."))
    return out


def _as_ours(state: dict[str, Tensor], needed: list[str]) -> tuple[str | None, dict[str, Tensor]]:
    """The layout and `state` under our keys, where a layout fits the backbone better than the keys as they are."""
    best = (max(_matches(state, needed).values(), default=0), None, state)
    if best[0] < len(needed):
        for layout, names in foreign.renamed(list(state)):
            candidate = {names[key]: value for key, value in state.items()}
            count = max(_matches(candidate, needed).values(), default=0)
            best = max(best, (count, layout, candidate), key=lambda option: option[0])
    return best[1:]


def _matches(state: dict[str, Tensor], needed: list[str]) -> dict[str, int]:
    """Prefix -> how many of the needed names stand below it."""
    by_last: dict[str, list[str]] = {}
    for key in state:
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    starts = {
        key[: -len(name)] for name in needed for key in by_last.get(name.rpartition(".")[2], ()) if key.endswith(name)
    }
    return {p: sum(p + name in state for name in needed) for p in starts if p == "" or p.endswith(".")}


def _find_prefix(file: str, state: dict[str, Tensor], needed: list[str], which: str | None) -> str:
    """The prefix under which most of the backbone lies; of equals the one that is evaluated, then the shortest."""
    count = _matches(state, needed)
    if not count:
        raise ValueError(f"{file} has none of the backbone's keys ({needed[0]}, ...); it has {_few(state)}")
    copies = sorted(p for p in count if count[p] == max(count.values()))
    chosen = foreign.choose(copies, which) if which else copies
    if not chosen:
        held = ", ".join(map(repr, copies))
        raise ValueError(
            f"{file} has no {which} that is known as such, only {held}: leave out --which, or choose one by --prefix"
        )

    def order(p: str) -> tuple:
        return foreign.rank(p), len(p)

    first, *rest = sorted(chosen, key=order)
    twin = next((p for p in rest if order(p) == order(first)), None)
    if twin is not None and not all(
        torch.equal(state[first + name], state[twin + name])
        for name in needed
        if first + name in state and twin + name in state
    ):
        raise ValueError(f"{file} holds this backbone at {first!r} and at {twin!r}: choose one by --prefix")
    return first


def _check(file: str, prefix: str, found: dict[str, Tensor], needed: list[str], own: dict[str, Tensor]) -> None:
    where = f"{file}" + (f" (prefix {prefix!r})" if prefix else "")
    missing = [name for name in needed if name not in found]
    extra = [
        name
        for name in found
        if name not in own and name.split(".")[0] not in HEADS and not name.endswith("num_batches_tracked")
    ]  # a frozen batch norm has none
    if missing or extra:
        parts = []
        if missing:
            parts += [f"{len(missing)} of the backbone's {len(needed)} tensors are not in it: {_few(missing)}"]
        if extra:
            parts += [f"{len(extra)} of its tensors load nowhere: {_few(extra)}"]
        raise ValueError(f"{where} does not fit the backbone; " + "; ".join(parts))
    for name, tensor in found.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            stem = name == "conv1.weight" and (tensor.shape[1] == 2) != (own[name].shape[1] == 2)
            hint = "; is backbone.stem right?" if name == "conv1.weight" else ""
            hint = "; two channels are those of Sobel filters: is backbone.sobel right?" if stem else hint
            theirs, ours = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"{where}: {name} is {theirs} in the file and {ours} in the backbone{hint}")
        if tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity; that training diverged")


def _few(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"
