"""Reading backbone weights from anywhere, completely or not at all, and writing them for others.

Files are read with safetensors or `weights_only`: nothing in them runs.  The backbone is found in a file by its keys,
whatever the prefix; what matched is reported, and a parameter that would stay at its initial value is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastssl import backbones, checkpoint
from fastssl.config import Backbone

# Beside the backbone, under its own prefix, a file may hold these; they are named in the report and not loaded.
HEADS = {"fc", "head", "heads", "classifier", "projection_head", "prototypes", "projector", "predictor"}
# Of several complete copies (MoCo's two encoders, DINO's two networks) the one below such a name is not evaluated.
SECOND = {"encoder_k", "momentum_encoder", "momentum_backbone", "target", "target_net", "target_encoder", "student"}
META = "fastssl.backbone"  # metadata key of our safetensors exports: the Backbone as JSON


@dataclass
class Report:
    """What load_backbone did: from which file and prefix, what of it was left out."""

    file: str
    prefix: str
    loaded: int
    heads: list[str]  # keys of classifier and projection heads under the prefix
    other: dict[str, int]  # first name of keys outside the prefix -> how many

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.file}" + (f", prefix {self.prefix!r}" if self.prefix else "")
        if self.heads:
            text += f"; heads left out: {', '.join(self.heads)}"
        if self.other:
            text += "; also in the file: " + ", ".join(f"{name} ({n})" for name, n in self.other.items())
        return text


def load_backbone(path: str | Path, backbone: nn.Module, *, prefix: str | None = None) -> Report:
    """Load every parameter and buffer of `backbone` from a run folder, a checkpoint folder, .safetensors, .pt or .pth;
    "torchvision" and "timm" download their default weights.

    `prefix` chooses among several copies in the file, for example "teacher.backbone."; None finds it.
    """
    net = getattr(backbone, "body", backbone)  # timm's keys are those of its own module
    file, state = _read(path, backbone.spec)
    own = net.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # absent before PyTorch 0.4.1
    if prefix is None:
        prefix = _find_prefix(file, state, needed)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    _check(file, prefix, found, needed, own)
    net.load_state_dict({name: found.get(name, own[name]) for name in own})
    heads = [prefix + name for name in found if name not in own]
    other = Counter(key.split(".")[0] for key in state if not key.startswith(prefix))
    return Report(file, prefix, sum(name in found for name in own), heads, dict(other))


def read(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The file that `path` means and its tensors, nested dictionaries flattened to dotted keys."""
    path = Path(path)
    if path.is_dir():
        if not (path / checkpoint.MANIFEST).exists():
            run, path = path, checkpoint.newest(path)
            if path is None:
                raise ValueError(f"{run} holds no complete checkpoint: give a run folder, a checkpoint or weights")
        elif problem := checkpoint.damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {problem}")
        path = path / "weights.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        try:
            return str(path), safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no complete safetensors file: {error}") from None
    return str(path), _flat(_read_pickle(path))


def run_config(path: str | Path) -> dict | None:
    """The config of the run that a run folder or one of its checkpoints belongs to; None for anything else."""
    for folder in (Path(path), *Path(path).parents[:2]) if Path(path).is_dir() else ():
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text())
    return None


def spec_of(path: str | Path) -> Backbone | None:
    """The architecture, where a run's config or the metadata of our safetensors exports says it; None elsewhere."""
    config, path = run_config(path), Path(path)
    spec = Backbone(**config["backbone"]) if config else None
    if path.suffix == ".safetensors" and path.is_file():
        with safetensors.safe_open(path, "pt") as f:
            meta = f.metadata() or {}
        spec = Backbone(**json.loads(meta[META])) if META in meta else None
    return spec and dataclasses.replace(spec, pretrained=None)


def _read(path: str | Path, spec: Backbone) -> tuple[str, dict[str, Tensor]]:
    if str(path) == "torchvision":
        return "torchvision", torchvision.models.get_model(spec.name, weights="DEFAULT").state_dict()
    if str(path) == "timm":
        import timm

        return "timm", timm.create_model(spec.name.removeprefix("timm/"), pretrained=True).state_dict()
    return read(path)


def _read_pickle(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)|Unsupported \w+ \d+", str(error))
        what = (culprit[1] or culprit[0]) if culprit else str(error)
        raise ValueError(
            f"{path} is refused: it is no pickle of tensors alone ({what}), and reading any other can run code. If you "
            "trust whoever made it, keep its tensors alone, once, and give the new file:\n"
            f'  python -c "import torch; c = torch.load({str(path)!r}, \'cpu\', weights_only=False); '
            "torch.save(c.get('state_dict', c), 'weights.pth')\""
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive: save its state_dict() instead") from None
        raise ValueError(f"{path} is no complete PyTorch file ({error!r:.200})") from None


def _flat(value, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested dictionaries with string keys; optimizer states have numbers for keys and stay out."""
    if not isinstance(value, dict):
        raise ValueError(f"the file holds a {type(value).__name__}, not a dictionary of tensors")
    out = {}
    for key, item in value.items():
        if isinstance(item, Tensor) and isinstance(key, str):
            out[prefix + key] = item
        elif isinstance(item, dict) and isinstance(key, str):
            out |= _flat(item, f"{prefix}{key}.")
    return out


def _find_prefix(file: str, state: dict, needed: list[str]) -> str:
    """The prefix under which most of the backbone lies; of equals the one that is no second copy, then the shortest."""
    starts = {key[: -len(name)] for name in needed for key in state if key.endswith(name)}
    count = {p: sum(p + name in state for name in needed) for p in starts if p == "" or p.endswith(".")}
    if not count:
        raise ValueError(f"{file} has none of the backbone's keys ({needed[0]}, ...); it has {_few(state)}")

    def order(p: str) -> tuple:
        return -count[p], bool(SECOND & set(p.split("."))), len(p)

    first, *rest = sorted(sorted(count), key=order)
    if rest and order(rest[0]) == order(first):
        raise ValueError(f"{file} holds this backbone at {first!r} and at {rest[0]!r}: choose one by prefix")
    return first


def _check(file: str, prefix: str, found: dict[str, Tensor], needed: list[str], own: dict[str, Tensor]) -> None:
    where = f"{file}" + (f" (prefix {prefix!r})" if prefix else "")
    missing = [name for name in needed if name not in found]
    extra = [name for name in found if name not in own and name.split(".")[0] not in HEADS]
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
            hint = "; is backbone.stem right?" if name == "conv1.weight" else ""
            theirs, ours = tuple(tensor.shape), tuple(own[name].shape)
            raise ValueError(f"{where}: {name} is {theirs} in the file and {ours} in the backbone{hint}")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity; that training diverged")


def _few(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def export(backbone: nn.Module, path: str | Path, to: str = "torchvision") -> str:
    """Write the backbone's tensors and return the Python that loads them.

    "torchvision": a .pth for torchvision's network of that name.  "safetensors": any backbone, with its description.
    """
    path, spec = Path(path), backbone.spec
    state = {k: v.detach().cpu().contiguous() for k, v in getattr(backbone, "body", backbone).state_dict().items()}
    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty: this backbone is partitioned by ZeRO-3; export from its run folder")
    if to == "safetensors":
        meta = json.dumps(dataclasses.asdict(dataclasses.replace(spec, pretrained=None)))
        with _complete(path) as temporary:
            safetensors.torch.save_file(state, temporary, {"format": "pt", META: meta})
        return f"import safetensors.torch\nstate = safetensors.torch.load_file({str(path)!r})"
    if to != "torchvision":
        raise ValueError(f"export to {to!r}: known are 'torchvision' and 'safetensors'")
    recipe = _torchvision_recipe(spec)
    with _complete(path) as temporary:
        torch.save(state, temporary)
    return f"{recipe}\nnet.load_state_dict(torch.load({str(path)!r}), strict=False)  # misses fc alone"


def _torchvision_recipe(spec: Backbone) -> str:
    if not hasattr(torchvision.models, spec.name) or spec.width != 64:
        raise ValueError(f"torchvision has no {spec.name} of width {spec.width}: export to safetensors")
    norm = "norm_layer=lambda c: torch.nn.GroupNorm(32, c)" if spec.norm == "gn" else ""
    lines = ["import torch, torchvision", f"net = torchvision.models.{spec.name}({norm})"]
    if spec.stem == "cifar":
        lines += [f"net.conv1 = torch.nn.Conv2d({spec.in_channels}, 64, 3, padding=1, bias=False)",
                  "net.maxpool = torch.nn.Identity()"]  # fmt: skip
    elif spec.in_channels != 3:
        lines += [f"net.conv1 = torch.nn.Conv2d({spec.in_channels}, 64, 7, stride=2, padding=3, bias=False)"]
    return "\n".join(lines)


@contextlib.contextmanager
def _complete(path: Path):
    """A temporary name beside `path` that is renamed to it when written, and removed when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """`fastssl export RUN --to torchvision|safetensors`"""
    parser = argparse.ArgumentParser("fastssl export", description="Write the backbone of a run for other tools.")
    parser.add_argument("run", help="run folder, checkpoint folder or one of our .safetensors exports")
    parser.add_argument("--to", choices=("torchvision", "safetensors"), default="torchvision")
    parser.add_argument("--out", help="default: backbone.pth or backbone.safetensors in the run folder")
    parser.add_argument("--prefix", help="export another copy, e.g. target.0. for MoCo's momentum encoder")
    args = parser.parse_args(argv)
    try:
        spec = spec_of(args.run)
        if spec is None:
            raise ValueError(f"{args.run} is no run folder and no export of ours: what its backbone is stands nowhere")
        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        out = args.out or folder / f"backbone.{'pth' if args.to == 'torchvision' else 'safetensors'}"
        backbone = backbones.build(spec)
        print(load_backbone(args.run, backbone, prefix=args.prefix))
        print(f"wrote {out}; load it with\n\n{export(backbone, out, args.to)}")
    except (ValueError, OSError) as error:
        print(f"fastssl export: {error}", file=sys.stderr)
        return 2
    return 0
