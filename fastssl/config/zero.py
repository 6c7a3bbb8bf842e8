"""Settings that ZeRO and the dictionary `deepspeed` cannot be combined with."""

from __future__ import annotations

from fastssl.config.sections import Run

AUTOCAST = "set optim.precision, which keeps weights, normalisation and statistics in fp32"
PARTITION = "its parts of the parameters are not those that checkpoints, LARS and momentum encoders know: leave it out"
OTHER_PARTITIONS = (
    "mics_shard_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "stage3_param_persistence_threshold",
)
# Settings of DeepSpeed, and those below "zero_optimization", that are refused, with the remedy.
REFUSED = {
    **dict.fromkeys(("bf16", "fp16", "amp", "torch_autocast", "data_types"), AUTOCAST),
    **dict.fromkeys(("optimizer", "scheduler"), "set optim.name, optim.lr, optim.schedule"),
    "gradient_clipping": "set optim.clip",
    "train_batch_size": "set optim.batch",
    "train_micro_batch_size_per_gpu": "set speed.micro_batch",
    "gradient_accumulation_steps": "set speed.micro_batch; the loss is then that of the whole batch",
    **dict.fromkeys(("checkpoint", "load_universal_checkpoint"), "set log.checkpoint_epochs"),
    "zero_optimization.stage": "set speed.zero",
    **{f"zero_optimization.{name}": PARTITION for name in OTHER_PARTITIONS},
}


def check_zero(run: Run) -> None:
    """ValueError for settings that cannot be combined, with the reason and the remedy."""
    if run.speed.compile == "on" and run.speed.zero == 3:
        raise ValueError("speed.compile=on: the hooks of speed.zero=3 break the graph; use speed.zero=0, 1 or 2")
    if run.optim.skip_nonfinite and run.speed.zero:
        raise ValueError(
            f"optim.skip_nonfinite={run.optim.skip_nonfinite} is not possible with speed.zero={run.speed.zero}, whose "
            "gradients are in parts: use speed.zero=0"
        )
    below = run.deepspeed.get("zero_optimization", {})
    if not isinstance(below, dict):
        raise ValueError(f"deepspeed['zero_optimization'] must be a dictionary, got {below!r}")
    for key in (*run.deepspeed, *(f"zero_optimization.{name}" for name in below)):
        if key in REFUSED:
            raise ValueError(f"deepspeed: {key} is refused: {REFUSED[key]}")
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(below.get(name), dict) and below[name].get("device") == "nvme":
            raise ValueError(
                f"deepspeed: zero_optimization.{name} on nvme is refused: checkpoints do not read DeepSpeed's swap "
                "files; use the device cpu"
            )
