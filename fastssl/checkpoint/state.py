"""What a checkpoint holds of a run, in a form that depends neither on the number of ranks nor on the ZeRO stage.

`weights.safetensors`: the complete parameters and buffers of the method, which evaluation and export also read.
`rank_R.safetensors`: rank R's pieces (pieces.py) of the optimizer's state and of sharded tables, and its random states.
`state.pt`: step, loss scale, hooks, config.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import backbones, dist, zero
from fastssl.checkpoint.pieces import Pieces, piece
from fastssl.config import dump
from fastssl.files import untrusted
from fastssl.sharded_table import ShardedTable
from fastssl.trainer import Trainer

WEIGHTS, STATE = "weights.safetensors", "state.pt"
Contents = dict[str, bytes | dict[str, Tensor]]  # file name -> bytes, or tensors by name


def rank_file(rank: int) -> str:
    return f"rank_{rank}.safetensors"


def snapshot(t: Trainer, copy: Callable[[str, Tensor], Tensor]) -> Contents:
    """What this rank writes into a checkpoint of the present step; all ranks must call it.  `copy(key, value)` copies a
    tensor to host memory."""
    dist.sync_buffers(t.method)
    values = {**dict(_optimizer_pieces(t)), **dict(_table_pieces(t.method))}
    mine = {key: copy(key, value) for key, value in values.items()}
    mine |= {piece(f"random/{dist.rank()}/{i}", 0): value for i, value in enumerate(random_states(t.device))}
    contents: Contents = {rank_file(dist.rank()): mine}
    weights = zero.full_state_dict(t.method, tables=False, copy=copy)
    if dist.is_main():
        contents[WEIGHTS] = weights
        file = io.BytesIO()
        torch.save(
            {
                "step": t.step,
                "scale": t.loss_scaler.state_dict(),
                "config": dump(t.run),
                "world": dist.world(),
                "hooks": {name: h.state_dict() for name, h in _named(t.hooks) if hasattr(h, "state_dict")},
            },
            file,
        )
        contents[STATE] = file.getvalue()
    return contents


def _optimizer_pieces(t: Trainer) -> Iterator[tuple[str, Tensor]]:
    """(key, values) of the optimizer's state on this rank: "optimizer/KIND/PARAMETER" has an entry for each element of
    the flattened parameter, "scalar/KIND/PARAMETER" one.  At ZeRO 0, where all ranks hold everything, each takes a
    shard of every parameter."""
    replicated = t.deepspeed.optimizer is t.deepspeed.basic_optimizer
    for target, fragments in zero.partitions(t.deepspeed):
        state = t.deepspeed.basic_optimizer.state.get(target, {})
        for fragment in fragments if state else ():
            shard = dist.shard(fragment.stop) if replicated else slice(fragment.start, fragment.stop)
            for kind, value in state.items():
                if value.ndim == 0 and shard.start == 0 < shard.stop:
                    yield piece(f"scalar/{kind}/{fragment.name}", 0), value[None]
                elif value.ndim and shard.start < shard.stop:
                    offset = fragment.offset + shard.start - fragment.start
                    values = value.detach().view(-1)[offset : offset + shard.stop - shard.start]
                    yield piece(f"optimizer/{kind}/{fragment.name}", shard.start), values


def _table_pieces(method: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in method.named_modules():
        if isinstance(module, ShardedTable):
            yield piece(f"table/{name}", module.local_range.start), module.local_rows


def load(t: Trainer, path: Path) -> list[str]:
    """Bring a newly built trainer to the state of a checkpoint.  Returns a line for each hook that differs; ValueError
    for a checkpoint that does not fit the run."""
    values = read(path)
    try:
        _, weights = untrusted.read_safetensors(path / WEIGHTS)
        zero.load_full_state_dict(t.deepspeed, weights)
        saved = Pieces(path / rank_file(rank) for rank in range(values["world"]))
        for name, module in t.method.named_modules():
            if isinstance(module, ShardedTable):
                module.load_(saved[f"table/{name}"])
        _load_optimizer(t, saved, values["config"]["speed"].get("channels_last"))
        t.step = t.deepspeed.global_steps = values["step"]
        t.deepspeed.global_samples = t.step * t.run.optim.batch
        t.loss_scaler.load_state_dict(values["scale"])
        notes = _load_hooks(t.hooks, values["hooks"], path)
        own = sorted(name for name in saved if name.startswith(f"random/{dist.rank()}/"))
        if dist.rank() < values["world"]:  # ranks that the run has gained keep those of their start
            if not own:
                raise ValueError(f"{rank_file(dist.rank())} has no random states")
            set_random_states([saved[name][:] for name in own], t.device)
    except (untrusted.CodeRefused, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any type, from a file whose contents have other types or shapes
        why = str(error) if type(error) is ValueError else untrusted.one_line(error)
        raise ValueError(f"{path} does not fit this run ({why}); start a new run with another name=...") from error
    return notes


def read(path: Path) -> dict:
    """state.pt of a checkpoint, with the types of its fields checked."""
    if (path / "deepspeed").is_dir():
        raise ValueError(
            f"{path} was written by fastssl 0.1.0, in files of DeepSpeed that later versions do not read: continue "
            "with 0.1.0, or start a new run from its weights (backbone.pretrained)"
        )
    values = untrusted.read_pt(path / STATE)
    fields = {"step": int, "scale": dict, "config": dict, "world": int, "hooks": dict}
    if (
        not isinstance(values, dict)
        or not all(isinstance(values.get(k), kind) for k, kind in fields.items())
        or not isinstance(values["config"].get("speed"), dict)
    ):
        raise ValueError(f"{path / STATE} is not the state of a run: it needs {', '.join(fields)}")
    return values


@torch.no_grad()
def _load_optimizer(t: Trainer, saved: Pieces, channels_last: bool) -> None:
    """Fill the optimizer's state from the pieces of all ranks.  `channels_last`: whether they were saved with it."""
    kinds: dict[str, dict[str, str]] = {}  # parameter -> {kind: name in `saved`}
    for name in saved:
        where, kind, parameter = (*name.split("/", 2), "", "")[:3]
        if where in ("optimizer", "scalar"):
            kinds.setdefault(parameter, {})[kind] = name
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in t.method.named_parameters()}
    orders = _changed_layouts(t, channels_last)
    for target, fragments in zero.partitions(t.deepspeed):
        found = [kinds.pop(fragment.name, {}) for fragment in fragments]
        if any(each.keys() != found[0].keys() for each in found):
            raise ValueError(f"{fragments[0].name} and others of its group have different optimizer states")
        for kind in found[0] if found else ():
            parts = [(fragment, saved[each[kind]]) for fragment, each in zip(fragments, found)]
            if found[0][kind].startswith("scalar/"):
                value = torch.stack([saved_tensor[:].reshape(()) for _, saved_tensor in parts]).unique()
                if len(value) != 1:
                    raise ValueError(f"{fragments[0].name} and others of its group have different {kind}")
                t.deepspeed.basic_optimizer.state[target][kind] = value[0].to(target.device)
                continue
            flat = torch.zeros_like(target.detach()).view(-1)
            for fragment, saved_tensor in parts:
                size = sizes[fragment.name]
                if saved_tensor.shape != (size,):
                    raise ValueError(f"{saved_tensor.name} has {saved_tensor.shape[0]} elements, not {size}")
                if fragment.start == fragment.stop:
                    continue
                part = _permuted(saved_tensor, orders[fragment.name]) if fragment.name in orders else saved_tensor
                values = part[fragment.start : fragment.stop]
                flat[fragment.offset : fragment.offset + len(values)] = values
            t.deepspeed.basic_optimizer.state[target][kind] = flat.view(target.shape)
    if kinds:
        raise ValueError(f"the optimizer has no parameter {next(iter(kinds))}")


def _changed_layouts(t: Trainer, channels_last: bool) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Weights of convolutions that were saved with the other `speed.channels_last`: name -> (saved shape, permutation
    of its dimensions)."""
    now = t.run.speed.channels_last
    if channels_last == now:
        return {}
    order = (0, 2, 3, 1) if now else (0, 3, 1, 2)
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, module in t.method.named_modules():
        if type(module) is (backbones.Conv2d if now else nn.Conv2d):
            shape = tuple(getattr(module.weight, "ds_shape", module.weight.shape))
            found[f"{name}.weight"] = tuple(shape[order.index(i)] for i in range(4)), order
    return found


def _permuted(saved_tensor: Any, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    shape, order = layout
    return saved_tensor[:].view(shape).permute(order).reshape(-1)


def _load_hooks(hooks: list, saved: dict, path: Path) -> list[str]:
    """Load each hook's state by its name.  Returns a line for each hook without a saved state and for saved states
    without a hook."""
    notes = []
    for name, hook in _named(hooks):
        if name in saved:
            hook.load_state_dict(saved[name])
        elif hasattr(hook, "load_state_dict"):
            notes.append(f"the hook {name} is not in {path.name} and starts anew")
    gone = saved.keys() - dict(_named(hooks))
    if gone:
        notes.append(f"hooks of {path.name} that are no longer there: {', '.join(sorted(gone))}")
    return notes


def _named(hooks: list) -> list[tuple[str, Any]]:
    """Hooks with the names of their classes; "Name#1" is the second of its class."""
    names = [type(hook).__qualname__ for hook in hooks]
    return [(f"{n}#{k}" if (k := names[:i].count(n)) else n, h) for i, (n, h) in enumerate(zip(names, hooks))]


def random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:  # a run that began on a CPU has none of a GPU
        torch.cuda.set_rng_state(states[1], device)
