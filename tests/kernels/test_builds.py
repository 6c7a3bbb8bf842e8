"""Every kernel, compiled for Ampere and Hopper without a GPU: no spills, enough shared memory, use of tensor cores; and
the memory that NT-Xent allocates."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ARCHS = (80, 90)


def ntxent(
    rows=8192,
    dim=128,
    dtype=torch.float16,
    temperature=0.1,
    labels=False,
    decoupled=False,
    precision="high",
    normalize=True,
):
    from fastssl.kernels.ntxent import triton

    torch.set_float32_matmul_precision(precision)
    z = torch.empty(rows, dim, device="meta", dtype=dtype)
    y = torch.empty(rows, device="meta", dtype=torch.int64) if labels else None
    loss, *saved = triton.forward(z, y, temperature, decoupled, normalize, None)
    triton.backward(loss, z, saved, temperature, decoupled, normalize, None)


def infonce(rows=256, dim=128, dtype=torch.float16, keys=65536, queue=None):
    from fastssl.kernels.one_pass import loss_and_gradient

    q = torch.empty(rows, dim, device="meta", dtype=dtype)
    queue = q.new_empty(keys, dim, dtype=queue or dtype) if keys else None
    loss_and_gradient(q, q, queue, 0.2, normalize=True, group=None, normalize_k=True)


def symmetric():
    from fastssl.kernels.infonce import symmetric

    a = torch.empty(4096, 256, device="meta", dtype=torch.float16)
    loss, *saved = symmetric.forward(a, a, 0.1, True, None)
    symmetric.backward(loss, a, a, saved, 0.1, True, None)


def gathered():
    from fastssl.kernels.gathered import triton

    q, bank = (torch.empty(n, 128, device="meta", dtype=torch.float16) for n in (256, 100_000))
    index = torch.empty(256, 65536, device="meta", dtype=torch.int64)
    triton.forward(q, bank, index[:, 0], index, 0.07, True)


def memory():
    from fastssl.kernels.bank import triton as bank
    from fastssl.kernels.queue import triton as queue

    rows, table = (torch.empty(n, 128, device="meta") for n in (256, 65536))
    index = torch.empty(256, device="meta", dtype=torch.int64)
    queue.enqueue(table.half(), index[:1], rows, True)
    bank.update_bank(table, index, rows, 0.5)
    bank.update_centroids(rows, table, torch.empty(65536, device="meta", dtype=torch.int64))


def prototypes(k=65536):
    from fastssl.kernels.sinkhorn import triton as sinkhorn
    from fastssl.kernels.soft_cross_entropy import triton as soft_cross_entropy

    x = torch.empty(512, k, device="meta", dtype=torch.bfloat16)
    center = sinkhorn.center(x, 0.05, 3, None)
    sinkhorn.assignments(x, center, 0.05)
    for teacher, c in ((0.04, center), (0.04, None), (None, None)):
        loss, end = soft_cross_entropy.forward(x, x, 0.1, teacher, c)
        soft_cross_entropy.backward(loss, x, x, c, end, 0.1, teacher)


def lists():
    from fastssl.kernels.multi_tensor import LarsOptions, triton

    x, scalar = [torch.empty(n, device="meta") for n in (3000, 64)], torch.empty((), device="meta")
    triton.lerp_(x, x, scalar, scalar)
    squares = triton.square_sums(x, x, scalar)
    for ratio in (squares, None):
        triton.lars_(x, x, x, ratio, LarsOptions(scalar, scalar, momentum=0.9), scalar)
    every = {"nesterov": True, "norm_of_sum": True, "clip_lr": True, "lr_in_momentum": False}
    triton.lars_(x, x, x, squares, LarsOptions(scalar, scalar, 0.9, 0.1, eps=1e-8, **every), scalar)


SHIPPED = {
    "ntxent": (lambda: ntxent(), {"row_sums_kernel", "row_gradients_kernel"}),
    "infonce": (lambda: infonce(), {"one_pass_kernel"}),
    "gathered": (gathered, set()),
    "memory": (memory, set()),
    "lists": (lists, set()),
    "prototypes": (prototypes, set()),
    "3000 prototypes": (lambda: prototypes(3000), set()),
}
FORMS = {  # the other tile sizes, types and forms
    "ntxent 32": (lambda: ntxent(dim=32), SHIPPED["ntxent"][1]),
    "ntxent 64": (lambda: ntxent(dim=64), SHIPPED["ntxent"][1]),
    "ntxent 256": (lambda: ntxent(dim=256), SHIPPED["ntxent"][1]),
    "ntxent 768": (lambda: ntxent(dim=768), {"row_sums_kernel", "logit_gradients_kernel"}),
    "ntxent 768 labels": (lambda: ntxent(dim=768, labels=True), {"row_sums_kernel", "logit_gradients_kernel"}),
    "ntxent lengths": (lambda: ntxent(dtype=torch.bfloat16, normalize=False), SHIPPED["ntxent"][1]),
    "ntxent 256 labels": (lambda: ntxent(dim=256, labels=True), SHIPPED["ntxent"][1]),
    "ntxent labels": (lambda: ntxent(labels=True), SHIPPED["ntxent"][1]),
    "ntxent decoupled": (lambda: ntxent(decoupled=True), SHIPPED["ntxent"][1]),
    "ntxent labels decoupled": (lambda: ntxent(labels=True, decoupled=True), SHIPPED["ntxent"][1]),
    "ntxent cold": (lambda: ntxent(temperature=0.01), SHIPPED["ntxent"][1]),
    "ntxent float32": (lambda: ntxent(dtype=torch.float32, precision="highest"), set()),
    "infonce 64": (lambda: infonce(dim=64), SHIPPED["infonce"][1]),
    "infonce 256": (lambda: infonce(dim=256), SHIPPED["infonce"][1]),
    "infonce bfloat16": (lambda: infonce(dtype=torch.bfloat16), SHIPPED["infonce"][1]),
    "infonce float32 queue": (lambda: infonce(queue=torch.float32), SHIPPED["infonce"][1]),
    "infonce 256 float32 queue": (lambda: infonce(dim=256, queue=torch.float32), SHIPPED["infonce"][1]),
    "infonce 100": (lambda: infonce(dim=100), SHIPPED["infonce"][1]),
    "infonce batch": (lambda: infonce(keys=None), SHIPPED["infonce"][1]),
    "symmetric": (symmetric, SHIPPED["ntxent"][1]),
}


PER_PASS = {  # limits of instructions of a warp in one pass of the main loop on Hopper: docs/kernels.md plus 10 %
    "row_sums_kernel": 326,
    "row_gradients_kernel": 338,
    "one_pass_kernel": 705,
    "column_kernel": 695,
    "row_kernel": 200,
    "stats_kernel": 377,
}


def builds(name):
    from fastssl.kernels.testing import compile_launch, record_launches
    from fastssl.kernels.tiling import FAKE_CAPABILITY

    built = []
    for arch in ARCHS:
        FAKE_CAPABILITY["capability"] = arch
        with record_launches() as launches:
            {**SHIPPED, **FORMS}[name][0]()
        built += [vars(compile_launch(launch, arch)) for launch in launches]
    return built


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate: `now` (those not freed yet) and their `peak`.

    Meta tensors count as if they were real, so a workload of many GB can be measured on a small machine.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self._seen:
                storage = x.untyped_storage()
                self._seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, nbytes):
        self.now -= nbytes


def peaks():
    """Peak of the bytes that one forward and backward of ntxent allocates for 2N = 65,536, by dtype."""
    from fastssl.kernels.testing import record_launches

    result = {}
    for name, arguments in {
        "float16": {"dtype": torch.float16},
        "bfloat16": {"dtype": torch.bfloat16},
        "float32": {"dtype": torch.float32},
        "exact float32": {"dtype": torch.float32, "precision": "highest"},
    }.items():
        with record_launches(), Allocations() as allocations:
            ntxent(65536, 128, **arguments)
        result[name] = allocations.peak - 65536 * 128 * arguments["dtype"].itemsize  # z is the caller's
    return result


def in_compiler(*arguments):
    """Run in another process without the interpreter, in which kernels would not be compiled."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__, *arguments], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def hold(name, on_tensor_cores):
    built = in_compiler(name)
    assert {b["kernel"] for b in built} >= on_tensor_cores and {b["arch"] for b in built} == set(ARCHS)
    for b in built:
        assert b["spills"] == 0, b
        assert b["fits"], b
        if (
            b["arch"] == 80
        ):  # GPUs of compute capability 8.6, 8.9 and 12.0 use the same tiles and have less shared memory
            assert b["shared"] <= 99 * 1024, b
        if b["kernel"] in on_tensor_cores:
            assert b["tensor_core"] == {80: "HMMA", 90: "HGMMA"}[b["arch"]], b
    return built


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_kernels_compile_without_spills(name):
    for b in hold(name, SHIPPED[name][1]):
        if "prototypes" in name:  # limited by memory bandwidth
            assert b["narrow_loads"] == 0, b
        if b["arch"] == 90 and b["kernel"] in PER_PASS:
            assert 0 < b["loop"] <= PER_PASS[b["kernel"]], b
        if b["arch"] == 90 and b["kernel"] in ("row_sums_kernel", "row_gradients_kernel", "one_pass_kernel"):
            assert b["programs_per_sm"] == 2, b  # one program's products run during the other's exponentials


@pytest.mark.full
@pytest.mark.parametrize("name", FORMS)
def test_other_forms_compile_without_spills(name):
    hold(name, FORMS[name][1])


def test_loop_length_counts_the_shortest_path():
    from fastssl.kernels.testing import _loop_length

    code = [
        "MOV R1, R2",
        "FADD R1, R1, R3",
        "@P0 BRA 0x50",
        "FMUL R1, R1, R3",
        "BRA 0x80",
        "FMUL R2, R2, R3",
        "FADD R2, R2, 0x10",
        "MUFU.EX2 R2, R2",
        "@!P1 BRA 0x10",
        "EXIT",
    ]
    sass = "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0000000000000000 */" for i, line in enumerate(code))
    assert _loop_length(sass) == 5  # FADD, the branch not taken, FMUL, BRA, the way back
    assert _loop_length(sass.replace("BRA 0x10", "NOP")) == 0


def test_ntxent_at_65536_rows_needs_under_100_megabytes():
    for name, peak in in_compiler("peaks").items():
        assert 33e6 < peak < 100e6, f"{name}: {peak / 1e6:.1f} MB"  # at least the rows and the gradient


if __name__ == "__main__":  # `python tests/kernels/test_builds.py ntxent`: what docs/kernels.md quotes
    print(json.dumps(peaks() if sys.argv[1] == "peaks" else builds(sys.argv[1])))
