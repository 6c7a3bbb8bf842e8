"""The table of docs/train.md: what trains at which ZeRO stage like at stage 0, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases
import ranks

from fastssl.config import Speed
from fastssl.config.zero import REFUSED

STEPS, BATCH = 6, 16  # four steps are an epoch: methods that cluster do so twice
LARS = {"name": "lars", "lr": 0.5, "paramwise": {"ndim<=1": {"weight_decay": 0.0, "lars_exclude": True}}}
# A row of the table: a case of tests/methods, settings of optim, other settings
ROWS = {
    "momentum encoder (EMA teacher) and queue; SGD": ("moco", {}, {}),
    "momentum encoder, AdamW, `optim.clip`": (
        "byol",
        {"name": "adamw", "lr": 1e-3, "clip": 0.5, "weight_decay": 0.1, "weight_decay_end": 0.2},
        {},
    ),
    "`optim.clip_each`, a group that is frozen at first": (
        "byol",
        {
            "name": "adamw",
            "lr": 1e-3,
            "clip": 0.5,
            "clip_each": True,
            "paramwise": {"^predictor": {"freeze_epochs": 1}},
        },
        {},
    ),
    "LARS": ("simclr", LARS, {}),
    "LARS, gradients of micro-batches": ("vicreg", {**LARS, "lars_denominator": "sum"}, {"micro_batch": 4}),
    "normalised prototypes and queue": ("swav queue", {}, {}),
    "memory bank": ("npid", {}, {}),
    "k-means at every epoch, a head that is set": ("deepcluster", {}, {}),
    "sharded table, k-means in the step": ("odc", LARS, {}),
    "sharded table, several clusterings": ("deepclusterv2", {}, {}),
    "vision transformer; `bf16`": ("mae", {"name": "adamw", "lr": 1e-3, "precision": "bf16"}, {}),
    "`speed.channels_last=False`": ("simsiam", {}, {"channels_last": False}),
}
TOLERANCE = {"vision transformer; `bf16`": 2e-2}


def train(row: str, stage: int, root: str) -> list[tuple[float, float]]:
    """The losses of the method and of the online probe."""
    import json

    from fastssl import dist, engine

    case, optim, more = ROWS[row]
    run = method_cases.run(case, batch=BATCH, steps=STEPS, zero=stage, **more.get("method", {}))
    run.optim = replace(run.optim, **optim)
    run.speed = replace(run.speed, **{k: v for k, v in more.items() if k != "method"})
    run.name, run.log.root, run.log.probe = f"{list(ROWS).index(row)}_{stage}", root, True
    run.log.every, run.log.checkpoint_epochs = 1, 0
    t = engine.fit(run, device="cpu", loader=method_cases.loader(run))
    dist.barrier()
    records = map(json.loads, (t.folder / "log.jsonl").read_text().splitlines())
    return [(r["loss"], r["probe_loss"]) for r in records if "loss" in r]


def worker(out: str, root: str) -> None:
    from fastssl import amp, dist

    dist.init("cpu")
    torch.set_num_threads(1)
    amp.NATIVE = {}  # also a CPU that emulates bf16
    found = {(row, stage): train(row, stage, root) for row in ROWS for stage in range(4)}
    if dist.is_main():
        torch.save(found, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    return ranks.launch(__file__, 2, folder / "out.pt", str(folder), timeout=1200)


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("row", ROWS)
def test_losses_are_those_of_stage_0(results, row, stage):
    want, got = results[row, 0], results[row, stage]
    assert len(want) == STEPS and len({loss for loss, _ in want}) == STEPS
    bound = TOLERANCE.get(row, 1e-5)
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_settings_of_deepspeed_are_refused(key):
    run = method_cases.run("simclr")
    first, _, second = key.partition(".")
    run.deepspeed = {first: {second: 1} if second else {}}
    with pytest.raises(ValueError, match=f"deepspeed: {key} is refused: ") as error:
        check(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_swap_files_are_refused(name):
    run = method_cases.run("simclr")
    run.deepspeed = {"zero_optimization": {name: {"device": "nvme"}}}
    with pytest.raises(ValueError, match=f"zero_optimization.{name} on nvme is refused"):
        check(run)


@pytest.mark.parametrize(
    "stage, section, setting, value",
    [(3, "speed", "compile", "on"), *((stage, "optim", "skip_nonfinite", 2) for stage in (1, 2, 3))],
)
def test_settings_that_a_zero_stage_cannot_use_are_refused(stage, section, setting, value):
    run = method_cases.run("simclr", zero=stage)
    setattr(getattr(run, section), setting, value)
    with pytest.raises(ValueError, match=rf"{section}.{setting}={value}.*speed.zero={stage}.*use speed.zero=0"):
        check(run)


def check(run) -> None:
    from fastssl import config

    config.validate(run)


def test_the_table_in_the_docs_has_these_rows():
    lines = (Path(__file__).parents[2] / "docs" / "train.md").read_text().splitlines()
    start = lines.index("| with | stage 0 | 1 | 2 | 3 |") + 2
    rows = lines[start : lines.index("", start)]
    tested = [f"| {row} | yes | yes | yes | yes |" for row in ROWS]
    assert rows[: len(ROWS)] == tested
    assert [row.split("|")[1].strip() for row in rows[len(ROWS) :]] == [
        "`speed.compile`",
        "`optim.skip_nonfinite`",
        "CUDA graph of the step",
    ]
    assert Speed().zero == 0


if __name__ == "__main__":
    ranks.main(worker)
