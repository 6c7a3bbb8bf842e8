"""Parameters at any of DeepSpeed's ZeRO stages, which keep them in shards (stage 3) or beside float32 copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as td
from torch import Tensor, nn

from fastssl import dist
from fastssl.sharded_table import ShardedTable

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which ZeRO-3's parameters are whole; at other stages it does nothing."""
    import deepspeed  # late: it picks its accelerator when it is imported, and a config imports methods

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


@torch.no_grad()
def overwrite_(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a trainable parameter a new value, equal on all ranks, at any ZeRO stage: also in the fp32 copy that its
    optimizer keeps and would write back over it after the next step."""
    value = value.to(parameter)
    if hasattr(parameter, "ds_id"):  # ZeRO-3: this rank's shard, and the optimizer's copy of the shard
        with gathered([parameter], modifier_rank=0):
            parameter.copy_(value)
        kept, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
        kept.view(-1).copy_(parameter.ds_tensor.view(-1)[: kept.numel()])
        return
    parameter.copy_(value)
    if getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO-1 and 2, where this rank owns a piece of it
        parameter.set_full_hp_param(value)


@torch.no_grad()
def full_state_dict(
    module: nn.Module,
    everywhere: bool = False,
    *,
    tables: bool = True,
    copy: Callable[[str, Tensor], Tensor] = lambda name, value: value.clone(memory_format=torch.contiguous_format),
) -> dict[str, Tensor]:
    """A copy of the state dict with ZeRO-3's shards and, if `tables`, sharded tables gathered, a submodule at a time:
    on rank 0 (elsewhere empty), or on every rank.  `copy(name, value)` makes the copies."""
    mine, out = everywhere or dist.is_main(), {}
    for name, child in module.named_modules():
        with gathered(list(child.parameters(recurse=False))):
            if mine:
                own: dict[str, Tensor] = {}
                child._save_to_state_dict(own, name + "." if name else "", False)
                out.update({key: copy(key, value.detach()) for key, value in own.items()})
        if tables and isinstance(child, ShardedTable):
            table = child.full_table(everywhere)
            if table is not None:
                out[name] = table
    return out


@torch.no_grad()
def load_full_state_dict(engine: DeepSpeedEngine, state: Mapping[str, Tensor]) -> None:
    """Give the engine's module, at any ZeRO stage, the values of a state dict of whole tensors, equal on all ranks.
    ValueError where names or shapes differ."""
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    used: set[str] = set()
    for name, child in engine.module.named_modules():
        prefix = name + "." if name else ""
        keys = [prefix + key for key in (*child._parameters, *child._buffers) if prefix + key in state]
        own = {key: state[key] for key in keys}
        used.update(keys)
        with gathered(list(child.parameters(recurse=False)), modifier_rank=0):
            child._load_from_state_dict(own, prefix, {}, True, missing, unexpected, errors)
    unexpected += [key for key in state if key not in used]
    for what, found in (("is missing", missing), ("belongs to nothing", unexpected), ("", errors)):
        if found:
            raise ValueError(f"{len(found)} tensors do not fit: {found[0]} {what}".strip())
    if engine.optimizer is not engine.basic_optimizer:
        engine.optimizer.refresh_fp32_params()


@dataclass(frozen=True)
class Fragment:
    """The elements [start, stop) of a flattened parameter, which begin at `offset` in a flat partition."""

    name: str
    start: int
    stop: int
    offset: int


def partitions(engine: DeepSpeedEngine) -> list[tuple[Tensor, list[Fragment]]]:
    """Each tensor that the optimizer steps on this rank, and the fragment in it of every parameter of its group, which
    may be empty.  At ZeRO 0 the tensors are parameters, else flat partitions of groups.  ValueError for other
    optimizers of DeepSpeed."""
    names = {p: name for name, p in engine.module.named_parameters()}
    ours, zero = engine.basic_optimizer, engine.optimizer
    if zero is ours:
        return [(p, [Fragment(names[p], 0, p.numel(), 0)]) for group in ours.param_groups for p in group["params"]]
    found = []
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3: every tensor is cut into equal parts, the last padded
        rank = td.get_rank(zero.dp_process_group)
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            fragments, position = [], 0
            for p in params:
                size = p.partition_numel()
                start, stop = (min(size * r, p.ds_numel) for r in (rank, rank + 1))
                fragments.append(Fragment(names[p], start, stop, position))
                position += size
            found.append((flat, fragments))
    elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2: the concatenation is cut into equal parts
        rank = td.get_rank(zero.dp_process_group)
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin, fragments = rank * zero.partition_size[i], []
            for p, meta, offset in zip(
                zero.round_robin_bit16_groups[i], zero.round_robin_bit16_meta[i], zero.round_robin_bit16_offsets[i]
            ):
                start, stop = (
                    min(max(edge - offset, 0), meta.numel()) for edge in (begin, begin + zero.partition_size[i])
                )
                fragments.append(Fragment(names[p], start, stop, max(offset - begin, 0)))
            found.append((flat, fragments))
    else:
        raise ValueError(
            f"deepspeed={{...}}: how DeepSpeed's {type(zero).__name__} cuts parameters is not known, which checkpoints "
            "and LARS need; use speed.zero 0 to 3 without other optimizers of DeepSpeed"
        )
    return found


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether all parameters are finite, on all ranks; under ZeRO-3 each rank checks its shards."""
    wrong = sum(~getattr(p, "ds_tensor", p).isfinite().all() for p in module.parameters())
    return not dist.sum_(wrong.float())
