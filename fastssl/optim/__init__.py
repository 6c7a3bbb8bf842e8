"""Optimizers, parameter groups by regex, and schedules as pure functions of the step.

LARS is OpenSelfSup's (https://arxiv.org/abs/1708.03888; lr inside the momentum buffer), with solo-learn's as options.
It never waits for the device, and its norms are those of whole tensors although ZeRO hands it flat fragments.

Every optimizer here takes "lr" and "weight_decay" of its groups as numbers or as 0-dim tensors on the device, and has
`found_inf`: None, or a 0-dim float32 tensor on the device; where it is not zero, `step` changes nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as td
from torch import Tensor

from fastssl.config import Optim
from fastssl.kernels import multi_tensor
from fastssl.kernels.multi_tensor import LarsOptions

NORM_AND_BIAS = "ndim<=1"  # a pattern beside the regexes: names miss norms such as `downsample.1`, shapes do not
KEYS = (
    "lr",
    "lr_mult",
    "momentum",
    "momentum_mult",
    "weight_decay",
    "weight_decay_mult",
    "lars_exclude",
    "schedule",
    "freeze_epochs",
)
# Optim.lars_denominator: LARS's options in kernels.multi_tensor
DENOMINATORS = {"openselfsup": {}, "larc": {"eps": 1e-8}, "sum": {"norm_of_sum": True}}


def build(
    named_parameters: Iterable[tuple[str, Tensor]],
    optim: Optim,
    *,
    steps_per_epoch: int,
    total_steps: int | None = None,
    impl: str = "auto",
) -> tuple[torch.optim.Optimizer, Schedule]:
    """The optimizer over the trainable parameters, and the schedule that sets its rates (`schedule.table` to print).

    `impl`: which kernels update the parameters ("auto", "reference", "triton"; adamw's are torch's).
    After `deepspeed.initialize` call `attach(engine)`, and before every step `schedule.set_lr(optimizer, step)`.
    """
    schedule = Schedule(named_parameters, optim, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    groups = [{"params": g.params, **g.options} for g in schedule.groups]
    clip_each = optim.clip if optim.clip_each else 0.0
    if optim.name == "lars":
        made = Lars(
            groups,
            lr=schedule.lr,
            momentum=optim.momentum,
            dampening=optim.dampening,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            eta=optim.eta,
            clip_lr=optim.clip_lr,
            lr_in_momentum=optim.lr_in_momentum,
            clip_each=clip_each,
            impl=impl,
            **DENOMINATORS[optim.lars_denominator],
        )
    elif optim.name == "sgd":
        if optim.nesterov and (optim.dampening or not optim.momentum):
            raise ValueError(
                f"optim.nesterov=True needs optim.momentum above 0 (now {optim.momentum:g}) and "
                f"optim.dampening=0 (now {optim.dampening:g})"
            )
        made = Lars(
            groups,
            lr=schedule.lr,
            momentum=optim.momentum,
            dampening=optim.dampening,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            lr_in_momentum=False,
            lars_exclude=True,
            clip_each=clip_each,
            impl=impl,
        )
    elif optim.name == "adamw":
        made = AdamW(
            groups,
            lr=schedule.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_each=clip_each,
        )
    else:
        raise ValueError(f"optim.name={optim.name!r} is none of sgd, adamw, lars")
    schedule.set_lr(made, 0)
    return made, schedule


def frozen(optim: Optim, epochs: dict[str, float]) -> Optim:
    """`optim` in which the parameters of each pattern are frozen for so many epochs."""
    own = {pattern: {"freeze_epochs": n} for pattern, n in epochs.items() if n}
    merged = {key: {**own.get(key, {}), **optim.paramwise.get(key, {})} for key in {**own, **optim.paramwise}}
    return replace(optim, paramwise=merged)


@dataclass
class Group:
    params: list[Tensor]
    patterns: tuple[str, ...]  # that matched, in the order in which they apply
    options: dict  # what the optimizer's group holds before the schedule acts
    schedule: str | None  # "constant" exempts the group from the lr schedule (SimSiam's predictor)
    freeze_epochs: float  # the group and its optimizer state stay as they are for so long (DINO's prototypes)


def matches(pattern: str, name: str, parameter: Tensor) -> bool:
    if pattern == NORM_AND_BIAS:
        return len(getattr(parameter, "ds_shape", parameter.shape)) <= 1  # zero.Init leaves an empty 1-d placeholder
    return re.search(pattern, name) is not None


def group_parameters(named: Iterable[tuple[str, Tensor]], optim: Optim, lr: float) -> list[Group]:
    """Trainable parameters that share their options, in order of appearance.

    Every matching pattern applies and the later one wins, key by key; a `_mult` multiplies the value of `optim`.
    A pattern that matches nothing is an error: it is a typo, or a layer that went away.
    """
    for pattern, options in optim.paramwise.items():
        _check(pattern, options, optim)
    named = [(name, p) for name, p in named if p.requires_grad]
    if not named:
        raise ValueError("the method has no trainable parameter")
    groups: dict[tuple, Group] = {}
    unused = set(optim.paramwise)
    for name, p in named:
        patterns = tuple(pattern for pattern in optim.paramwise if matches(pattern, name, p))
        unused.difference_update(patterns)
        if patterns not in groups:
            groups[patterns] = Group([], patterns, *_resolve(patterns, optim, lr))
        groups[patterns].params.append(p)
    if unused:
        names = [name for name, _ in named]
        raise ValueError(
            f"optim.paramwise pattern {sorted(unused)[0]!r} matches no parameter; "
            f"their names are like {', '.join(names[:2] + names[-2:])}"
        )
    return list(groups.values())


def _check(pattern: str, options: dict, optim: Optim) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"optim.paramwise pattern {pattern!r} is no regular expression: {error}") from None
    for key, value in options.items():
        where = f"optim.paramwise[{pattern!r}][{key!r}]"
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise ValueError(
                f"{where}: unknown option{f'; did you mean {near[0]!r}?' if near else ''} (there are {', '.join(KEYS)})"
            )
        if key == "schedule":
            valid = value == "constant"
        elif key == "lars_exclude":
            valid = isinstance(value, bool)
        else:
            valid = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not valid:
            wanted = {"schedule": "'constant'", "lars_exclude": "True or False"}.get(key, "a number >= 0")
            raise ValueError(f"{where}={value!r} must be {wanted}")
        if key.startswith("momentum") and optim.name == "adamw":
            raise ValueError(f"{where}: adamw has no momentum (optim.betas is for all parameters)")


def _resolve(patterns: tuple[str, ...], optim: Optim, lr: float) -> tuple[dict, str | None, float]:
    base = {"lr": lr, "weight_decay": optim.weight_decay}
    if optim.name != "adamw":
        base["momentum"] = optim.momentum
    if optim.name == "lars":
        base["lars_exclude"] = False
    options, schedule, freeze_epochs = dict(base), None, 0.0
    for pattern in patterns:
        for key, value in optim.paramwise[pattern].items():
            if key == "schedule":
                schedule = value
            elif key == "freeze_epochs":
                freeze_epochs = value
            elif key.endswith("_mult"):
                options[key[:-5]] = base[key[:-5]] * value
            elif key in base:
                options[key] = value  # lars_exclude without LARS: there is nothing to be excluded from
    return options, schedule, freeze_epochs


def _table(groups: list[Group]) -> str:
    rows = [("patterns", "tensors", "parameters", "options")]
    for g in groups:
        options = ", ".join(f"{k} {v:g}" for k, v in g.options.items() if k != "lars_exclude")
        options += ", no LARS" * g.options.get("lars_exclude", False) + ", constant lr" * (g.schedule == "constant")
        options += f", frozen for {g.freeze_epochs:g} epochs" * bool(g.freeze_epochs)
        count = sum(getattr(p, "ds_numel", p.numel()) for p in g.params)
        rows.append((" + ".join(g.patterns) or "(no pattern)", str(len(g.params)), f"{count:,}", options))
    a, b, c = (max(len(row[i]) for row in rows) for i in range(3))
    return "\n".join(f"{row[0]:<{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]}" for row in rows)


def lr_multiplier(optim: Optim, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """lr at `step` (from 0) over the base lr.

    "cosine": linear warm-up, then a cosine over the remaining steps (SimCLR, BYOL, MoCo v3).  "cosine_epoch": constant
    inside an epoch and counted from epoch 0, multiplied by the warm-up (mmcv, hence OpenSelfSup).
    """
    warm = optim.warmup_epochs * steps_per_epoch
    ramp = 1 - (1 - step / warm) * (1 - optim.warmup_ratio) if step < warm else 1.0
    if optim.schedule == "constant":
        return ramp
    if optim.schedule == "step":
        return ramp * optim.gamma ** sum(step >= round(m * steps_per_epoch) for m in optim.milestones)
    if optim.schedule == "cosine_epoch":
        done = (step // steps_per_epoch) / max(1, math.ceil(total_steps / steps_per_epoch))
        return ramp * _cosine(done, 1.0, optim.lr_end)
    if optim.schedule == "cosine":
        return ramp if step < warm else _cosine((step - warm) / max(1, total_steps - warm), 1.0, optim.lr_end)
    raise ValueError(f"optim.schedule={optim.schedule!r} is none of cosine, cosine_epoch, step, constant")


def _cosine(done: float, start: float, end: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Schedule:
    """What every group's lr and weight decay are at a step.  Holds no state that a checkpoint would need."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], optim: Optim, *, steps_per_epoch: int, total_steps: int | None = None
    ):
        self.optim, self.steps_per_epoch = optim, steps_per_epoch
        self.total_steps = total_steps or optim.steps or optim.epochs * steps_per_epoch
        if optim.schedule == "step" and not optim.milestones:
            raise ValueError("optim.schedule='step' needs optim.milestones, the epochs where lr falls by optim.gamma")
        if optim.warmup_epochs and optim.warmup_epochs * steps_per_epoch >= self.total_steps:
            raise ValueError(
                f"optim.warmup_epochs={optim.warmup_epochs} is not shorter than the run of "
                f"{self.total_steps / steps_per_epoch:g} epochs"
            )
        if optim.weight_decay_end is not None and not optim.weight_decay:
            raise ValueError("optim.weight_decay_end needs optim.weight_decay > 0 to start from")
        lr_multiplier(optim, 0, steps_per_epoch, self.total_steps)  # an unknown name fails here, not at step 0
        self.lr = optim.lr * optim.batch / optim.base_batch if optim.base_batch else optim.lr
        self.groups = group_parameters(named, optim, self.lr)
        self.table = _table(self.groups)  # now: ZeRO-3 takes the shapes away
        if self.lr != optim.lr:
            self.table = (
                f"linear scaling: lr {optim.lr:g} x batch {optim.batch} / {optim.base_batch} = {self.lr:g}\n"
                + self.table
            )

    def multiplier(self, step: int) -> float:
        return lr_multiplier(self.optim, step, self.steps_per_epoch, self.total_steps)

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Write the options of every group (also of DeepSpeed's wrapper) for `step`; returns the lr without patterns.

        All options, not only lr: DeepSpeed's universal checkpoints restore every group with the first one's options.
        """
        groups = optimizer.param_groups
        assert len(groups) == len(self.groups), (len(groups), len(self.groups))
        factor, decay = self.multiplier(step), 1.0
        if self.optim.weight_decay_end is not None:
            decay = _cosine(step / self.total_steps, 1.0, self.optim.weight_decay_end / self.optim.weight_decay)
        for target, group in zip(groups, self.groups):
            target.update(group.options)
            target["lr"] = group.options["lr"] * (1.0 if group.schedule == "constant" else factor)
            target["weight_decay"] = group.options["weight_decay"] * decay
            target["frozen"] = step < group.freeze_epochs * self.steps_per_epoch
        return self.lr * factor


class _Whole:
    """What optimizers need to know of whole tensors although ZeRO hands them one flat partition at a time, and the
    options that they share: a group that is `frozen` is left alone with its state, as if it had no gradient, and
    `clip_each` shortens the gradient of every tensor to that length (0 does not)."""

    def __init__(self, *args, clip_each: float = 0.0, **options):
        self._whole: set[Tensor] = set()
        self._fragments: dict[Tensor, Fragments] = {}
        self.clip_each = clip_each
        self.found_inf: Tensor | None = None
        super().__init__(*args, **options)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self._whole.update(self.param_groups[-1]["params"])

    def _moving(self) -> list[tuple[dict, list[Tensor]]]:
        """The groups that are not frozen, with their parameters that have a gradient, clipped."""
        moving = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
            if not group.get("frozen")
        ]
        for _, params in moving if self.clip_each else ():
            grads = self._views(params, [p.grad for p in params])
            squares = torch.stack(torch._foreach_norm(grads)).square()[None] if grads else None
            norms = self._add_fragments(params, squares, 1)
            if grads:
                torch._foreach_mul_(grads, list((self.clip_each / (norms[0].sqrt() + 1e-6)).clamp(max=1.0).unbind()))
        return moving

    def _views(self, params: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """`values` (one per parameter) cut into the fragments of whole tensors, without ZeRO's padding."""
        out = []
        for p, value in zip(params, values):
            if p in self._fragments:
                cut = self._fragments[p]
                out += [v for v, keep in zip(value.view(-1).split(cut.sizes), cut.keep) if keep]
            elif p in self._whole:
                out.append(value)
            else:
                raise RuntimeError(
                    f"{type(self).__name__} was handed a flat partition that it does not know: call "
                    "optim.attach(engine) after deepspeed.initialize"
                )
        return out

    def _add_fragments(self, params: list[Tensor], squares: Tensor | None, rows: int) -> Tensor | None:
        """(rows, n) sums over each of n fragments -> those of the whole tensor that it is a part of: under ZeRO one
        all-reduce adds the fragments'.  `squares` is None on a rank that holds nothing but padding."""
        cuts = [self._fragments[p] for p in params if p in self._fragments]
        if cuts:
            assert len(params) == 1, "ZeRO steps one flat partition at a time"
            cut, p = cuts[0], params[0]
            whole = torch.zeros(rows, cut.tensors, dtype=p.dtype, device=p.device)
            if squares is not None:
                whole[:, cut.owner] = squares
            if td.get_world_size(cut.group) > 1:
                td.all_reduce(whole, group=cut.group)
            squares = whole[:, cut.owner]
        return squares


class AdamW(_Whole, torch.optim.AdamW):
    """torch's AdamW in its fused form, with a weight decay that may be a tensor on the device."""

    def __init__(self, groups: list[dict], **options):
        capturable = groups[0]["params"][0].is_cuda  # torch demands it inside a CUDA graph; CPUs do not have it
        super().__init__(groups, **options, fused=True, capturable=capturable)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "AdamW takes no closure"
        if self.found_inf is not None:
            self.found_inf = self.found_inf.view(())  # torch subtracts it from step counts, which have no dimension
        moving, every = self._moving(), self.param_groups
        held = [(group, group["weight_decay"]) for group, _ in moving]
        for group, params in moving:
            decay = group["weight_decay"]
            if isinstance(decay, Tensor) and params:  # torch's kernel takes a number: its decay is done here
                factor = 1 - group["lr"] * decay
                if self.found_inf is not None:
                    factor = torch.where(self.found_inf != 0, 1.0, factor)
                torch._foreach_mul_(params, factor)
                group["weight_decay"] = 0.0
        self.param_groups = [group for group, _ in moving]
        super().step()
        self.param_groups = every
        for group, decay in held:
            group["weight_decay"] = decay


class Lars(_Whole, torch.optim.Optimizer):
    """ratio = eta |w| / (|g| + wd |w| + eps), d = ratio lr (g + wd w),
    buf = momentum buf + (1 - dampening) d, w -= buf.

    A tensor whose weights or gradient are all zero, and every tensor of a `lars_exclude` group, has ratio 1: with all
    groups excluded and `lr_in_momentum=False` this is torch's SGD.  `lr_in_momentum=False` applies lr to the buffer
    instead of d; `clip_lr` bounds ratio lr by lr (both solo-learn); `norm_of_sum` divides by |g + wd w| + eps.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 1e-3,
        clip_lr: bool = False,
        lr_in_momentum: bool = True,
        lars_exclude: bool = False,
        eps: float = 0.0,
        norm_of_sum: bool = False,
        clip_each: float = 0.0,
        impl: str = "auto",
    ):
        self.impl = impl
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eta": eta,
            "clip_lr": clip_lr,
            "lr_in_momentum": lr_in_momentum,
            "lars_exclude": lars_exclude,
            "eps": eps,
            "norm_of_sum": norm_of_sum,
        }
        super().__init__(params, options, clip_each=clip_each)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None, "LARS takes no closure"
        for group, params in self._moving():
            fresh = {p for p in params if "momentum_buffer" not in self.state[p]} if group["momentum"] else set()
            if fresh and group["dampening"] and self.found_inf is not None and bool(self.found_inf):
                continue  # the first buffer that is kept must be one without dampening; this waits for the device
            for first in (True, False):
                some = [p for p in params if (p in fresh) == first]
                if some:
                    self._step(group, some, first)

    def _step(self, group: dict, params: list[Tensor], first: bool) -> None:
        exclude = group["lars_exclude"]
        views = (lambda _, values: values) if exclude else self._views
        w, g = views(params, params), views(params, [p.grad for p in params])
        squares = None if exclude else self._squares(group, params, w, g)
        buffers = None
        if group["momentum"]:
            for p in params if first else ():
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = views(params, [self.state[p]["momentum_buffer"] for p in params])
        options = LarsOptions(**{k: group[k] for k in LarsOptions._fields if k != "first"}, first=first)
        multi_tensor.lars_(w, g, buffers, squares, options, found_inf=self.found_inf, impl=self.impl)

    def _squares(self, group: dict, params: list[Tensor], w: list[Tensor], g: list[Tensor]) -> Tensor | None:
        """(3, n) sums of squares of whole tensors, for each fragment."""
        squares = multi_tensor.square_sums(w, g, group["weight_decay"], impl=self.impl) if w else None
        return self._add_fragments(params, squares, 3)


@dataclass
class Fragments:
    """What one rank's flat partition consists of, in order."""

    sizes: list[int]  # all stretches, padding included
    keep: list[bool]  # False: padding (ZeRO-3 leaves it uninitialised)
    owner: Tensor  # (n kept,) int64: which whole tensor of the partition's group a stretch belongs to
    tensors: int  # whole tensors, the same number on every rank
    group: td.ProcessGroup

    @classmethod
    def of(cls, stretches: list[tuple[int, int]], flat: Tensor, group: td.ProcessGroup) -> Fragments:
        """`stretches`: (start, stop) in the flat partition of each whole tensor, in order; none where stop <= start."""
        sizes, keep, owner, at = [], [], [], 0
        for i, (start, stop) in enumerate(stretches):
            if stop > start:
                sizes += [start - at, stop - start]
                keep += [False, True]
                owner.append(i)
                at = stop
        return cls(
            [*sizes, flat.numel() - at],
            [*keep, False],
            torch.tensor(owner, dtype=torch.int64).to(flat.device),
            len(stretches),
            group,
        )


def attach(engine) -> None:
    """Tell our optimizer how `engine` (of deepspeed.initialize) cut the parameters."""
    ours, zero = engine.basic_optimizer, engine.optimizer
    if zero is ours or not (isinstance(ours, Lars) or getattr(ours, "clip_each", 0)):
        return
    group = zero.dp_process_group
    rank = td.get_rank(group)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3: every tensor is cut into equal parts, the last padded
        for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            stretches, at = [], 0
            for p in params:
                size = p.partition_numel()
                stretches.append((at, at + min(size, p.ds_numel - rank * size)))
                at += size
            ours._fragments[flat] = Fragments.of(stretches, flat, group)
    elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2: the concatenation is cut into equal parts
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            begin, size = rank * zero.partition_size[i], zero.partition_size[i]
            stretches = []
            for meta, offset in zip(zero.round_robin_bit16_meta[i], zero.round_robin_bit16_offsets[i]):
                start, stop = offset - begin, offset + meta.numel() - begin
                stretches.append((max(start, 0), min(stop, size)))
            ours._fragments[flat] = Fragments.of(stretches, flat, group)
    else:
        raise ValueError(
            f"{type(ours).__name__} does not know how {type(zero).__name__} cuts parameters; "
            "use speed.zero 0 to 3 without other DeepSpeed optimizers"
        )
