"""Checks of a user's method and hooks (docs/extending.md), before the first step and in it; each error is one sentence.

The checks in a step read attributes and shapes only, which takes microseconds.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import Tensor, nn

from fastssl.log.records import RESERVED
from fastssl.parsing import did_you_mean
from fastssl.trainer import Context, Trainer

METHOD = {
    "backbone": "the backbone given to build, as an attribute",
    "views": "the number of views, or None for any",
    "forward": "forward(views, batch) -> dict of tensors with a row for each sample",
    "loss": "loss(out, batch) -> dict with 'loss'",
    "after_step": "after_step(out, batch, progress), which may do nothing",
}
CONTEXT = tuple(field.name for field in dataclasses.fields(Context))
HOOK = ("before_epoch", "after_step", "after_epoch")


def check_method(method: Any, config: Any) -> None:
    """ValueError where the object returned by `config.build(...)` is not a method."""
    kind = type(method).__name__
    if not isinstance(method, nn.Module):
        raise ValueError(
            f"{type(config).__name__}.build(...) returned {kind}, not an nn.Module: it must return the method"
        )
    missing = [name for name in METHOD if not hasattr(method, name)]
    if type(method).forward is nn.Module.forward:
        missing.append("forward")
    if missing:
        lacking = "; ".join(f"{name} ({METHOD[name]})" for name in missing)
        raise ValueError(f"the method {kind} has no {lacking}; see docs/extending.md")
    _check_call(f"{kind}.forward", method.forward, ("views", "batch"))
    _check_call(f"{kind}.loss", method.loss, ("out", "batch"))
    _check_call(f"{kind}.after_step", method.after_step, ("out", "batch", "progress"))
    if not isinstance(getattr(method, "mean_loss", False), bool):
        raise ValueError(f"{kind}.mean_loss={method.mean_loss!r} must be True (a mean over samples) or False")
    if hasattr(method, "total_weight"):
        _check_call(f"{kind}.total_weight", method.total_weight, ("batch",))


def _check_call(owner: str, function: Callable, arguments: tuple[str, ...]) -> None:
    """ValueError where the function cannot be called with these positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"{owner} is called as {function.__name__}({', '.join(arguments)}) and is written as "
            f"{function.__name__}{inspect.signature(function)}: {error}"
        ) from None


def check_config(config: Any) -> None:
    """ValueError where build does not take a backbone and a context."""
    owner = f"{type(config).__name__}.build"
    _check_call(owner, config.build, ("backbone", "context"))
    old = [name for name in inspect.signature(config.build).parameters if name in CONTEXT]
    if old:
        raise ValueError(
            f"{owner} takes {', '.join(old)} as arguments of their own: write build(self, backbone, context) and read "
            f"context.{', context.'.join(old)} (docs/extending.md)"
        )


def check_output(method: nn.Module, out: Any, rows: int) -> dict[str, Tensor]:
    """`out` of forward itself; ValueError unless it is a dict of tensors of `rows` rows, with "features"."""
    kind = type(method).__name__
    if not isinstance(out, dict):
        raise ValueError(
            f"{kind}.forward returned {type(out).__name__}: it must return a dict of tensors, such as "
            '{"z": z, "features": h.detach()}'
        )
    for name, value in out.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{kind}.forward returned {name!r} of type {type(value).__name__}: every value is a "
                "tensor with a row for each sample"
            )
        if not value.ndim or len(value) != rows:
            raise ValueError(
                f"{kind}.forward returned {name!r} of shape {tuple(value.shape)} for {rows} samples: the "
                "first dimension is the sample; stack the views in the second, torch.stack(z, 1)"
            )
    if "features" not in out:
        raise ValueError(
            f'{kind}.forward returned {", ".join(out) or "nothing"} without "features": the backbone\'s '
            "output for one view of each sample, h.detach(); the monitors and evaluations read it"
        )
    return out


def check_losses(method: nn.Module, losses: Any) -> dict[str, Any]:
    """`losses` itself; ValueError unless it is a dict whose "loss" is a scalar tensor with a gradient."""
    kind = type(method).__name__
    if not isinstance(losses, dict) or "loss" not in losses:
        got = f"a dict of {', '.join(losses) or 'nothing'}" if isinstance(losses, dict) else type(losses).__name__
        raise ValueError(
            f'{kind}.loss returned {got}: it must return a dict with "loss", {{"loss": loss}}, and '
            "scalars to log beside it"
        )
    loss = losses["loss"]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f'{kind}.loss returned {got} as "loss": it must be one number, the mean over the batch')
    if not loss.requires_grad:
        raise ValueError(
            f'{kind}.loss returned a "loss" without a gradient: it must depend on an output of forward '
            "that is not detached"
        )
    _check_names(f"{kind}.loss returned", losses)
    return losses


def _check_names(who: str, names: Iterable[str], taken: Container[str] = ()) -> None:
    """ValueError for a scalar whose name is one of the trainer's own or in `taken`: one would overwrite the other."""
    for name in names:
        if name in RESERVED or name in taken:
            owner = "the trainer" if name in RESERVED else "the method or another hook"
            raise ValueError(f"{who} {name!r}, which {owner} logs, too: give it another name")


def call_hook(hook: Any, name: str, t: Trainer, *arguments: Any) -> None:
    """hook.name(t, *arguments); ValueError where it logs a scalar by a name that is taken."""
    before = dict(t.scalars)
    getattr(hook, name)(t, *arguments)
    logged = [key for key, value in t.scalars.items() if key not in before or value is not before[key]]
    _check_names(f"the hook {type(hook).__name__} has logged", logged, before)


def check_captured(scalars: dict[str, Any]) -> None:
    """ValueError unless all `scalars`, which hooks have logged in the step's CUDA graph, are 0-dim tensors."""
    for name, value in scalars.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"a hook with capturable=True has logged {name!r} of type {type(value).__name__}: it must log 0-dim "
                "tensors, because a replay of the step's CUDA graph executes none of its Python"
            )


def check_hook(hook: Any) -> Any:
    """`hook` itself; ValueError where one of its methods is missing or misspelt."""
    kind = type(hook).__name__
    if isinstance(hook, type):
        raise ValueError(f"the hook {hook.__name__} is a class: give an instance, {hook.__name__}()")
    missing = [name for name in HOOK if not callable(getattr(hook, name, None))]
    if missing:
        raise ValueError(
            f"the hook {kind} has no {' and no '.join(missing)}: derive it from fastssl.hooks.Hook, whose "
            "methods do nothing, and write those that it needs"
        )
    if not isinstance(getattr(hook, "capturable", False), bool):
        raise ValueError(f"{kind}.capturable={hook.capturable!r} must be True (it may be in a CUDA graph) or False")
    for name, arguments in zip(HOOK, (("t",), ("t", "out", "batch"), ("t",))):
        _check_call(f"{kind}.{name}", getattr(hook, name), arguments)
    own = [name for name in vars(type(hook)) if name not in HOOK and name[0] != "_"]
    for name in own:
        similar = did_you_mean(name, HOOK)
        if similar and name.startswith(("before", "after", "on_")):
            raise ValueError(f"the hook {kind} has a method {name!r} that nothing calls{similar}")
    return hook
