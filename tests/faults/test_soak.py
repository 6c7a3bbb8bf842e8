"""A run that is killed again and again ends with the bits of an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

SECONDS = 6 * 3600  # after which the full version makes no further kill


def losses(folder: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def check_same(root: Path, steps: int) -> None:
    """Weights, optimizer and log of the run that was killed and of the undisturbed one."""
    killed, whole = (root / name / "checkpoints" / f"step_{steps:08d}" for name in ("killed", "whole"))
    for file in ("weights.safetensors", "rank_0.safetensors"):
        a, b = (safetensors.torch.load_file(path / file) for path in (killed, whole))
        assert a.keys() == b.keys() and len(a) > 10
        assert not [k for k, v in a.items() if not torch.equal(v, b[k])]
    assert losses(root / "killed") == losses(root / "whole")
    assert [step for step, _ in losses(root / "whole")] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    "kills, steps",
    [(5, 30), pytest.param(500, 1200, marks=[pytest.mark.full, pytest.mark.timeout(SECONDS + 600)])],
    ids=["5", "500"],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, kills, steps):
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of dist.init in this process
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), str(tmp_path), str(kills), str(steps), "1", str(SECONDS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] == kills == sum(found["places"].values())
    check_same(tmp_path, steps)
