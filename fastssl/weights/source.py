"""What a run folder, a checkpoint or a file of weights holds: its tensors, and which network they belong to.

Files are read with safetensors or `weights_only`: nothing in them is executed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor

from fastssl.checkpoint import disk
from fastssl.config import Backbone, checks, settings, with_defaults
from fastssl.files import untrusted
from fastssl.weights import foreign

MAX_DICTS = 100_000  # dictionaries inside each other, or beside each other, in one file of weights
SPEC_KEY = "fastssl.backbone"  # metadata key of our safetensors exports: the Backbone as JSON
# First names of keys that hold the state of a training.  Other optimizers' states have numbers for keys.
TRAINING_STATE = (
    {"optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "scaler", "amp", "meta"}
    | {"scheduler", "lr_scheduler", "lr_schedulers", "param_schedulers"}
    | {"loops", "callbacks", "message_hub"}
)
CONTAINERS = {"state_dict", "model"}  # keys under which a checkpoint has all its weights


def read(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The file of weights in a run or checkpoint folder (or `path` itself), and its tensors.  Keys of nested
    dictionaries are joined by dots.  ValueError for anything incomplete, damaged or unsafe."""
    path = Path(path)
    if path.is_dir():
        path = _checkpoint(path) / "weights.safetensors"
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return str(path), untrusted.read_safetensors(path)[1]
    value = _read_pickle(path)
    foreign.check_variant(str(path), value)
    return str(path), flatten(value, str(path))


def _checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run folder, or `folder` itself where it is a checkpoint."""
    if (folder / disk.MANIFEST).exists():
        if problem := disk.damage(folder):
            raise ValueError(f"checkpoint {folder} is damaged: {problem}")
        return folder
    newest = disk.newest(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no complete checkpoint: give a run folder, a checkpoint or weights")
    return newest


def read_model(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """As `read`, without the state of the training and without the dictionary that holds all weights."""
    file, state = read(path)
    model = {key: value for key, value in state.items() if key.split(".")[0] not in TRAINING_STATE}
    first = {key.split(".")[0] for key in model}
    if len(first) == 1 and first <= CONTAINERS:
        model = {key.partition(".")[2]: value for key, value in model.items()}
    return file, model


def run_config(path: str | Path) -> dict | None:
    """The config of the run that a run folder or one of its checkpoints belongs to; None for anything else."""
    for folder in (Path(path), *Path(path).parents[:2]) if Path(path).is_dir() else ():
        if (folder / "config.json").is_file():
            return _checked_config(untrusted.read_json(folder / "config.json"), folder / "config.json")
    return None


def _checked_config(config: Any, path: Path) -> dict:
    """A config as `dump` writes it, with the defaults of fields that it lacks.  ValueError where a part has another
    type: anyone may have made the folder."""

    def require(good: bool, key: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{path} is not the config of a run: {key} is {value!r:.60}")

    require(isinstance(config, dict), "it", config)
    for name, kind in checks.SECTIONS.items():
        require(isinstance(config.get(name, {}), dict), name, config.get(name))
        config[name] = with_defaults(config.get(name, {}), kind())
        for key, annotation in settings.field_types(kind).items():
            if (name, key) not in (("data", "views"), ("data", "eval_view")):
                try:
                    settings.coerce(config[name][key], annotation, key)
                except ValueError:
                    require(False, f"{name}.{key}", config[name][key])
    views, method = config["data"]["views"], config.setdefault("method", {"type": "unknown.unknown.Config"})
    require(isinstance(views, list) and all(isinstance(view, dict) for view in views), "data.views", views)
    require(isinstance(config["data"]["eval_view"], dict | None), "data.eval_view", config["data"]["eval_view"])
    require(isinstance(method, dict) and "." in str(method.get("type")), "method", method)
    require(isinstance(config.setdefault("name", ""), str), "name", config["name"])
    require(type(config.setdefault("seed", 0)) is int, "seed", config["seed"])
    return config


def spec_of(path: str | Path) -> Backbone | None:
    """The architecture according to the run's config or to the metadata of our safetensors exports; None where neither
    is there."""
    config, path = run_config(path), Path(path)
    spec = _backbone(config.get("backbone"), "config.json") if config else None
    if path.suffix == ".safetensors" and path.is_file():
        meta, _ = untrusted.read_safetensors(path, tensors=False)
        spec = _backbone(untrusted.parse_json(meta[SPEC_KEY], path), path) if SPEC_KEY in meta else None
    return spec and _architecture(spec)


def _backbone(fields: Any, source: str | Path) -> Backbone:
    """The Backbone with these fields; ValueError for unknown names and impossible values."""
    try:
        spec = Backbone(**fields)
        checks.check_section("backbone", spec, Backbone)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} does not describe a backbone of this version: {error}") from None
    return spec


def _architecture(spec: Backbone) -> Backbone:
    """Without the settings that say how the backbone is trained."""
    return dataclasses.replace(spec, pretrained=None, frozen=0)


def metadata(spec: Backbone) -> dict[str, str]:
    """The metadata of our safetensors files, which `spec_of` reads."""
    return {"format": "pt", SPEC_KEY: json.dumps(dataclasses.asdict(_architecture(spec)))}


def has_sobel(path: str | Path) -> bool:
    """Whether a ResNet's weights take the two gradients of Sobel filters, by the channels of the first convolution."""
    if not Path(path).exists():
        return False
    names = r"(?!.*(layer\d|downsample|shortcut)\.)(.*\.)?(conv1|0)\.weight"  # "0": where children are numbered
    return any(
        value.ndim == 4 and value.shape[1] == 2 and re.fullmatch(names, key) for key, value in read(path)[1].items()
    )


def download(library: str, name: str) -> dict[str, Tensor]:
    """The default weights of a model from "torchvision" or "timm", or their copy on this machine.  OSError where
    neither can be had."""
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


def _read_pickle(path: Path) -> Any:
    try:  # DINO's, MAE's and timm's checkpoints hold an argparse.Namespace, which is created without calling anything
        return untrusted.read_pt(path, allow=(argparse.Namespace,))
    except untrusted.CodeRefused as error:
        program = (
            "import torch; keep = lambda v: {k: keep(x) for k, x in v.items() if isinstance(x, (dict, torch.Tensor))} "
            f'if isinstance(v, dict) else v; c = torch.load({json.dumps(str(path))}, "cpu", weights_only=False); '
            'torch.save(keep(getattr(c, "state_dict", lambda: c)()), "weights.pth")'
        )
        raise ValueError(
            f"{error}. If you trust its author, keep its tensors alone, once, and give the new file:\n"
            f"  python -c {shlex.quote(program)}"
        ) from None


def flatten(value: Any, file: str) -> dict[str, Tensor]:
    """Tensors of nested dictionaries with string keys.  Optimizer states, whose keys are numbers, are left out."""
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a dictionary of tensors")
    out, stack, seen = {}, [(value, "")], 0
    while stack:
        level, prefix = stack.pop()
        seen += 1
        if seen > MAX_DICTS or prefix.count(".") > 100:  # a dictionary may contain itself
            raise ValueError(f"{file} is nested too deeply for a dictionary of tensors")
        for key, item in level.items():
            if isinstance(item, Tensor) and isinstance(key, str):
                out[prefix + key] = item
            elif isinstance(item, dict) and isinstance(key, str):
                stack.append((item, f"{prefix}{key}."))
    return out
