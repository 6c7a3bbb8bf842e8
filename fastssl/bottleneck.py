"""Which part of a step limits the speed of a run, and which setting would help: a line at the end of the run, a warning
when steps wait for data, and the settings of `speed` that were chosen automatically, with the reason."""

from __future__ import annotations

from fastssl import dist
from fastssl.loader import RESIDENT_FRACTION, cores, free_memory
from fastssl.trainer import Trainer

SKIPPED_STEPS = 10  # first steps of a run, which do not count: compilation, tuning, the first decoded batches
WARN_AFTER = 50  # counted steps after which waiting for data is reported
MAX_DATA, MAX_OTHER = 0.05, 0.1  # fractions of the time above which loading, or work between steps, is the bottleneck


class StepTimes:
    """Sums the times of phases over the meter's records of a run."""

    def __init__(self) -> None:
        self.seen = self.counted = 0  # steps
        self.total: dict[str, float] = {}  # milliseconds of each phase
        self._warned = False

    def add(self, t: Trainer, records: list[dict]) -> str | None:
        """Add records; returns the warning that steps wait for data, once in a run."""
        for record in records:
            self.seen += 1
            if self.seen > SKIPPED_STEPS:
                self.counted += 1
                for key, value in record.items():
                    if key.endswith("_ms"):
                        self.total[key] = self.total.get(key, 0.0) + value
        if self._warned or self.counted < WARN_AFTER or self.fraction("data") <= MAX_DATA:
            return None
        self._warned = True
        return f"steps wait for data {100 * self.fraction('data'):.0f} % of the time: {faster_loading(t)}"

    def fraction(self, *phases: str) -> float:
        """Of the time that the phases take together."""
        return sum(self.total.get(f"{phase}_ms", 0.0) for phase in phases) / max(self.total.get("total_ms", 0.0), 1e-9)

    def summary(self, t: Trainer) -> str | None:
        """The time by phases, the bottleneck and the setting that would help; None for a run that is too short."""
        if self.counted < SKIPPED_STEPS:
            return None
        fractions = {key[:-3]: self.fraction(key[:-3]) for key in self.total if key != "total_ms"}
        phases = ", ".join(f"{name} {100 * part:.0f} %" for name, part in fractions.items() if part >= 0.005)
        return f"time of a step: {phases}; the bottleneck is {self._bottleneck(t)}"

    def _bottleneck(self, t: Trainer) -> str:
        speed, cuda = t.run.speed, t.device.type == "cuda"
        if self.fraction("data") > MAX_DATA:
            return f"loading: {faster_loading(t)}"
        if self.fraction("other") > MAX_OTHER:
            return (
                "what happens between steps (kNN, probe, collapse measure, checkpoints): raise "
                "log.knn_epochs, log.collapse_every or log.checkpoint_epochs"
            )
        if self.fraction("views") > self.fraction("forward", "backward", "step"):
            plain = cuda and speed.kernels == "reference"
            return f"augmentation: {'try speed.kernels=auto' if plain else 'use smaller or fewer views'}"
        if not cuda:
            return "the network on this CPU: no setting of speed helps; use a GPU or a smaller network"
        captured = self.fraction("step") > 0
        if not captured and speed.graph != "on" and not speed.zero and t.loader.sampler.micro_per_step == 1:
            return "the network, or the CPU that starts its kernels: try speed.graph=on"
        if t.not_compiled is not None and speed.zero < 3:
            return "the network's kernels: try speed.compile=on"
        if t.run.optim.precision == "fp32":
            return "the network's kernels: optim.precision=bf16 is faster, and changes results"
        return "the network's kernels: no setting of speed is left to try"


def faster_loading(t: Trainer) -> str:
    """What makes loading faster: the decoded set on the device if it fits, else more threads, else smaller images."""
    loader, available = t.loader, cores()
    if not t.run.speed.resident:
        need, free = loader.samples * loader.card.max_pixels * 3, free_memory(t.device)
        if need <= RESIDENT_FRACTION * free:
            return f"speed.resident=True holds the decoded set on the device ({need / 2**30:.1f} GiB, it fits)"
    if getattr(loader, "workers", available) < available:
        return f"speed.workers={available} decodes on all cores of this rank (now {loader.workers})"
    return "give this rank more CPU cores, or convert to smaller images (fastssl convert ... --short-side 256)"


def automatic_settings(t: Trainer) -> str:
    """The settings of `speed` that were chosen automatically, each with its value and the reason; "" for none."""
    speed, cuda, parts = t.run.speed, t.device.type == "cuda", []
    if speed.workers is None and hasattr(t.loader, "workers"):
        parts.append(f"workers={t.loader.workers} (the cores of this node, shared by its ranks)")
    if speed.kernels == "auto":
        parts.append("kernels=triton (a CUDA device)" if cuda else "kernels=reference (no CUDA device)")
    if speed.graph == "auto":
        why = (
            "ZeRO and DeepSpeed's own steps are not captured" if t.capturable_step is None else t.capturable_step.reason
        )
        if why is None or not cuda:  # on CUDA `build` has printed why not
            monitors = any(getattr(hook, "capturable", False) for hook in t.hooks)
            outside = "; monitors follow it, speed.graph=on captures the probe, too" * monitors
            parts.append(f"graph=on (the same bits in less time{outside})" if why is None else f"graph=off ({why})")
    if speed.compile == "auto":
        why = t.not_compiled
        parts.append("compile=on (equal losses in less time)" if why is None else f"compile=off ({why})")
    if speed.micro_batch is None:
        parts.append(f"micro_batch={t.run.optim.batch // dist.world()} (all images of a rank)")
    return "\n  ".join(["speed, chosen automatically:", *parts]) if parts else ""
