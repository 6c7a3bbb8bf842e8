"""Every method on W ranks with K micro-batches compared with one rank and one batch: loss, gradients, and state after
two steps.  `python tests/methods/test_exact.py docs/exactness.md` measures the differences and writes them to the
table."""

import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import method_cases as cases
import ranks

STEPS, BATCH = 2, 16
# (ranks, micro-batches) to compare with (1, 1): for heads without batch norm, and with it
PLAIN, WITH_NORM = ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)), ((1, 1), (2, 1), (4, 1))
MICRO = ((1, 1), (1, 4), (2, 2))
ZERO = (2, 2, 3)  # (ranks, micro-batches, ZeRO stage)
RUNS = [
    (name, norm, world, micro, zero)  # (case, batch norm in its heads, ranks, micro-batches, ZeRO stage)
    for name, case in cases.CASES.items()
    for norm in ((False, True) if case.norm else (False,))
    for world, micro, zero in ((*s, 0) for s in (WITH_NORM if norm else MICRO if case.norm else PLAIN))
]
RUNS += [(name, False, *ZERO) for name in cases.CASES]
RUNS += [(name, False, 2, 1, zero) for name in ("deepcluster", "swav") for zero in (1, 2)]  # they overwrite parameters


def in_double() -> None:
    """Make the engine train in float64, where exact computations differ by 1e-15 times their condition number and
    others by much more.  (In float32, two steps with a sharp softmax can amplify one rounding to 1e-2.)"""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine.communication_data_type = torch.float64
    from fastssl import build, step

    prepare, batch_views, dtypes = build.prepare, step.batch_views, get_accelerator().supported_dtypes()
    get_accelerator().supported_dtypes = lambda: [*dtypes, torch.float64]
    get_accelerator().is_fp16_supported = lambda: False  # ZeRO 3 refuses float64 where there is fp16
    build.prepare = lambda *args: prepare(*args).double()
    step.batch_views = lambda *args: [view.double() for view in batch_views(*args)]


def measure(name: str, norm: bool, micro: int, zero: int) -> dict:
    """Losses of both steps, gradients of the first, state after the second."""
    from fastssl import dist, engine
    from fastssl.step import step
    from fastssl.zero import full_state_dict

    t = cases.build(cases.run(name, norm=norm, batch=BATCH, micro=BATCH // dist.world() // micro, zero=zero))
    update, losses, grads = t.deepspeed.optimizer.step, [], {}

    def spy():
        if not grads and not zero:
            grads.update({n: p.grad.clone() for n, p in t.method.named_parameters() if p.grad is not None})
        return update()

    t.deepspeed.optimizer.step = spy
    for _, micro_batches in engine.batches(t):
        step(t, micro_batches)
        losses.append(dist.mean(t.scalars["loss"]).item())
    dist.sync_buffers(t.method)
    trainable = [n for n, p in t.method.named_parameters() if p.requires_grad]
    return {"losses": losses, "grads": grads, "trainable": trainable, "state": full_state_dict(t.method)}


def clustering() -> dict:
    """K-means, whitening and power iteration clustering of rows that are distributed unevenly and in random order."""
    from fastssl import clustering, dist

    g = torch.Generator().manual_seed(0)
    x, order = torch.randn(403, 6, generator=g).double(), torch.randperm(403, generator=g)
    x[200:230] = x[200]  # equal rows, so that some clusters are empty
    cuts = {1: [], 2: [300], 4: [1, 150, 151]}[dist.world()]
    index = order.tensor_split(cuts)[dist.rank()]
    variants = {"random": {}, "spherical": {"spherical": True}, "many": {"clusters": 300}}
    if importlib.util.find_spec("faiss"):
        variants["faiss"] = {"backend": "faiss"}
    found = {}
    for name, options in variants.items():
        result = clustering.KMeans(**{"clusters": 30, "seed": 4, **options}).fit(x[index], index)
        found |= {
            f"{name} centroids": result.centroids,
            f"{name} counts": result.counts,
            f"{name} objective": torch.tensor(result.objective, dtype=torch.float64),
            f"{name} labels": clustering.scatter(result.labels, index, 403),
        }
    found["white"] = clustering.scatter(clustering.pca_whiten(x[index], 4), index, 403)
    found["pic"] = clustering.scatter(clustering.pic(x[index], 100, index), index, 403)
    return found


def worker(out: str) -> None:
    from fastssl import dist, engine  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage at every start; what the imports have made stays
    dist.init("cpu")
    torch.set_num_threads(1)
    in_double()
    results = {key: measure(*key[:2], *key[3:]) for key in RUNS if key[2] == dist.world()}
    results["clustering", dist.world()] = clustering()
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


def all_results(folder: Path) -> dict:
    found = {}
    for world in (1, 2, 4):
        found.update(ranks.launch(__file__, world, folder / f"{world}.pt"))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return all_results(tmp_path_factory.mktemp("exact"))


def difference(got: dict, want: dict) -> float:
    """Largest difference between two dicts of tensors, relative to each tensor's largest entry (at least 1)."""
    assert got.keys() == want.keys()
    largest = 0.0
    for key, value in want.items():
        scale = max(1.0, value.double().abs().max().item()) if value.numel() else 1.0
        error = (got[key].double() - value.double()).abs().max().item() / scale if value.numel() else 0.0
        assert error == error, f"{key} has NaN"
        largest = max(largest, error)
    return largest


def compare(results: dict, key: tuple) -> tuple[float, float, float]:
    """Differences of loss, gradients (0 under ZeRO, which does not expose them) and state."""
    got, want = results[key], results[(*key[:2], 1, 1, 0)]
    loss = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(got["losses"], want["losses"]))
    return loss, 0.0 if key[4] else difference(got["grads"], want["grads"]), difference(got["state"], want["state"])


OTHERS = [key for key in RUNS if key[2:] != (1, 1, 0)]


@pytest.mark.parametrize("key", OTHERS, ids=lambda k: f"{k[0]}{' bn' * k[1]} {k[2]}x{k[3]} zero{k[4]}")
def test_ranks_and_micro_batches_equal_one_rank(results, key):
    reference = results[(*key[:2], 1, 1, 0)]
    assert len(set(reference["losses"])) == STEPS
    loss, grads, state = compare(results, key)
    if key[4]:  # its optimizer keeps float32 weights
        assert loss <= 1e-6 and state <= 5e-5, (loss, state)
    else:
        assert loss <= 1e-11 and grads <= 1e-11 and state <= 1e-8, (loss, grads, state)


@pytest.mark.parametrize("world", [2, 4])
def test_clusters_on_several_ranks_equal_those_on_one(results, world):
    got, want = results["clustering", world], results["clustering", 1]
    for key, value in want.items():
        if "labels" in key or "counts" in key or key == "pic":
            assert torch.equal(got[key], value), key
        else:
            torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    assert want["pic"].unique().numel() > 10 and (want["random counts"] > 0).all()


@pytest.mark.parametrize("name", cases.CASES)
def test_every_trainable_parameter_has_a_gradient(results, name):
    """Otherwise the comparisons above would show nothing."""
    norm = cases.CASES[name].norm
    found = results[(name, norm, 1, 1, 0)]
    assert set(found["grads"]) == set(found["trainable"]) and len(found["grads"]) > 10
    without = [n for n, g in found["grads"].items() if not g.abs().max() > 1e-7]
    # a bias before batch norm has no effect
    assert all(n.endswith("bias") and norm for n in without), without


def test_state_dict_holds_all_state():
    """A new run that loads the state dict has the same loss, bit for bit, in the next step."""
    from fastssl import dist, engine
    from fastssl.step import step

    dist.init("cpu")
    for name in cases.CASES:
        run, saved, losses = cases.run(name, norm=cases.CASES[name].norm, steps=3), {}, []
        for resumed in (False, True):
            t = cases.build(run)
            if resumed:
                t.method.load_state_dict(saved)
                t.step = 2
            for _, micro_batches in engine.batches(t):
                if t.step == 2:
                    saved = {k: v.clone() for k, v in t.method.state_dict().items()}
                    torch.manual_seed(0)  # of MoCo's shuffle
                step(t, micro_batches)
            losses.append(float(t.scalars["loss"]))
        assert losses[0] == losses[1], name


def table(results: dict) -> str:
    rows = [
        "| method | heads | ranks x micro-batches | loss | gradients | state after two steps |",
        "|---|---|---|---|---|---|",
    ]
    for key in OTHERS:
        name, norm, world, micro, zero = key
        heads = "batch norm over all ranks" if norm else "no batch norm" if cases.CASES[name].norm else "its own"
        loss, grads, state = (f"{v:.0e}" if v else "0" for v in compare(results, key))
        rows.append(
            f"| {name} | {heads} | {world} x {micro}{f', ZeRO {zero}' * bool(zero)} | {loss} | "
            f"{'' if zero else grads} | {state} |"
        )
    return "\n".join(rows)


def write_table(file: str) -> None:
    import re
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        text = table(all_results(Path(folder)))
    path = Path(file)
    marks = "<!-- methods: begin -->", "<!-- methods: end -->"
    path.write_text(re.sub(f"{marks[0]}.*{marks[1]}", f"{marks[0]}\n{text}\n{marks[1]}", path.read_text(), flags=re.S))


if __name__ == "__main__":
    if sys.argv[1].endswith(".md"):
        write_table(sys.argv[1])
    else:
        ranks.main(worker)
