"""What limits the speed of a run and which switch would help: the line at its end, the warning when steps wait for
data, and the settings of `speed` that were chosen for the user, with the reason."""

from __future__ import annotations

from typing import Any

from fastssl import dist
from fastssl.loader import RESIDENT_SHARE, cores, free_memory

SKIPPED = 10  # first steps of a run that are not counted: compilation, tuning, the first decoded batches
WARNED = 50  # counted steps after which waiting for data is reported
WAIT, BETWEEN = 0.05, 0.1  # shares of the time above which waiting for data, or work between steps, is the limit


class Limits:
    """Adds up the meter's records of a run. `add` returns the warning, once."""

    def __init__(self):
        self.seen = self.counted = 0
        self.spent: dict[str, float] = {}
        self._told = False

    def add(self, t: Any, records: list[dict]) -> str | None:
        for record in records:
            self.seen += 1
            if self.seen > SKIPPED:
                self.counted += 1
                for key, value in record.items():
                    if key.endswith("_ms"):
                        self.spent[key] = self.spent.get(key, 0.0) + value
        if self._told or self.counted < WARNED or self.share("data") <= WAIT:
            return None
        self._told = True
        return f"steps wait for data {100 * self.share('data'):.0f} % of the time: {data_switch(t)}"

    def share(self, *phases: str) -> float:
        return sum(self.spent.get(f"{phase}_ms", 0.0) for phase in phases) / max(self.spent.get("total_ms", 0.0), 1e-9)

    def summary(self, t: Any) -> str | None:
        """Shares of the time, the largest limit and the switch; None for a run too short to say."""
        if self.counted < SKIPPED:
            return None
        shares = {key[:-3]: self.share(key[:-3]) for key in self.spent if key != "total_ms"}
        said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items() if share >= 0.005)
        return f"time of a step: {said}; {self._limit(t)}"

    def _limit(self, t: Any) -> str:
        speed, cuda = t.run.speed, t.device.type == "cuda"
        if self.share("data") > WAIT:
            return f"the limit is loading: {data_switch(t)}"
        if self.share("other") > BETWEEN:
            return (
                "the limit is what happens between steps (kNN, probe, collapse measure, checkpoints): raise "
                "log.knn_epochs, log.collapse_every or log.checkpoint_epochs"
            )
        if self.share("views") > self.share("forward", "backward", "step"):
            plain = cuda and speed.kernels == "reference"
            return f"the limit is making views: {'try speed.kernels=auto' if plain else 'smaller or fewer ones help'}"
        if not cuda:
            return "the limit is the network on this CPU: no switch of speed helps, a GPU or a smaller network does"
        captured = self.share("step") > 0
        if not captured and speed.graph != "on" and not speed.zero and t.loader.micro == 1:
            return "the limit is the network, or the host that starts its kernels: try speed.graph=on"
        if not speed.compile and speed.zero < 3:
            return "the limit is the network's kernels: try speed.compile=True"
        if t.run.optim.precision == "fp32":
            return "the limit is the network's kernels: optim.precision=bf16 is faster, and changes results"
        return "the limit is the network's kernels: no switch of speed is left"


def data_switch(t: Any) -> str:
    """How loading becomes faster: the decoded set on the device where it fits, then decoding threads, then pixels."""
    loader, most = t.loader, cores()
    pixels = loader.card.get("max_pixels")
    if not t.run.speed.resident and pixels:
        need, free = loader.samples * pixels * 3, free_memory(t.device)
        if need <= RESIDENT_SHARE * free:
            return f"speed.resident=True holds the decoded set on the device ({need / 2**30:.1f} GiB, it fits)"
    if getattr(loader, "workers", most) < most:
        return f"speed.workers={most} decodes on all cores of this rank (now {loader.workers})"
    return "give this rank more CPU cores, or convert to smaller images (fastssl convert ... --short-side 256)"


def chosen(t: Any) -> str:
    """The settings of `speed` that were left to be chosen, each with its value and the reason."""
    speed, cuda, parts = t.run.speed, t.device.type == "cuda", []
    if speed.workers is None and hasattr(t.loader, "workers"):
        parts.append(f"workers={t.loader.workers} (the cores of this node, shared by its ranks)")
    if speed.kernels == "auto":
        parts.append("kernels=triton (a CUDA device)" if cuda else "kernels=reference (no CUDA device)")
    if speed.graph == "auto":
        why = "ZeRO and DeepSpeed's own steps are not captured" if t.graphed is None else t.graphed.reason
        if why is None or not cuda:  # on CUDA `engine.build` has said why not
            parts.append("graph=on (the same bits in less time)" if why is None else f"graph=off ({why})")
    if speed.micro_batch is None:
        parts.append(f"micro_batch={t.run.optim.batch // dist.world()} (a rank's whole share of the batch)")
    return "speed, as chosen: " + ", ".join(parts) if parts else ""
