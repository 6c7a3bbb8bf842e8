"""Parameters at any of DeepSpeed's ZeRO stages, which keep them in shards (stage 3) or beside float32 copies."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.sharded_table import ShardedTable


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
def full_state_dict(module: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """A copy of the state dict with ZeRO-3's shards and sharded tables gathered, a submodule at a time: on rank 0
    (elsewhere empty), or on every rank."""
    mine, out = everywhere or dist.is_main(), {}
    for name, child in module.named_modules():
        with gathered(list(child.parameters(recurse=False))):
            if mine:
                own: dict[str, Tensor] = {}
                child._save_to_state_dict(own, name + "." if name else "", False)
                out.update(
                    {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in own.items()}
                )
        if isinstance(child, ShardedTable):
            table = child.full(everywhere)
            if table is not None:
                out[name] = table
    return out


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter is, on all ranks; under ZeRO-3 each rank looks at its shards."""
    wrong = sum(~getattr(p, "ds_tensor", p).isfinite().all() for p in module.parameters())
    return not dist.sum_(wrong.float())
