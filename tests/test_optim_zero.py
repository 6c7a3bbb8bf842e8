"""Every optimizer on two ranks under every ZeRO stage."""

import pytest
import ranks
import torch
from optim_cases import SETTINGS, Net, batches, train

from fastssl import optim
from fastssl.kernels.multi_tensor import LarsOptions


def poison(zero, stage: int) -> int:
    """Set DeepSpeed's padding to NaN: nothing may read it.  Returns the number of elements on this rank."""
    count = 0
    if stage in (1, 2):
        for flat, padding in zip(zero.single_partition_of_fp32_groups, zero.groups_padding):
            flat.data[flat.numel() - padding :] = torch.nan
            count += padding
    if stage == 3:
        for params, flat, paddings in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.groups_padding):
            end = 0
            for p, padding in zip(params, paddings):
                end += p.partition_numel()
                flat.data[end - padding : end] = torch.nan
                count += padding
    return count


def worker(out: str) -> None:
    """One of two ranks: every optimizer under every ZeRO stage, half of each batch per rank."""
    import deepspeed

    from fastssl import dist

    dist.init("cpu")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled first
    deepspeed.init_distributed("gloo")
    results = {}
    for name, settings in SETTINGS.items():
        for stage in range(4):
            net = Net()
            optimizer, schedule = optim.build(net.named_parameters(), settings, steps_per_epoch=5)
            zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
            if stage == 3 and name == "solo":
                zero["sub_group_size"] = 40  # several partitions for one group of the optimizer
            engine, *_ = deepspeed.initialize(
                model=net,
                optimizer=optimizer,
                config={
                    "train_micro_batch_size_per_gpu": 4,
                    "gradient_clipping": 0.0,
                    "zero_optimization": zero,
                    "zero_allow_untested_optimizer": True,
                },
            )
            optim.attach(engine)
            poisoned = poison(engine.optimizer, stage) if settings.name == "lars" else 0
            for step, (x, y) in enumerate(batches()):
                schedule.set_lr(engine.optimizer, step)
                mine = slice(4 * dist.rank(), 4 * dist.rank() + 4)
                engine.backward((engine(x[mine]) - y[mine]).square().mean())
                engine.step()
            with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
                results[f"{name} {stage}"] = {k: p.detach().clone() for k, p in net.named_parameters()}
            results[f"{name} {stage} padding"] = dist.sum_(torch.tensor(poisoned)).item()
    if dist.is_main():
        torch.save(results, out)
    dist.shutdown()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return ranks.launch(__file__, 2, tmp_path_factory.mktemp("optim") / "results.pt")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_under_zero_are_one_process(sharded, name, stage):
    start, plain = dict(Net().named_parameters()), train(SETTINGS[name])
    for key, value in sharded[f"{name} {stage}"].items():
        torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert (value - start[key]).abs().max() > 1e-5, f"{key} has not moved: the comparison would be empty"
    if SETTINGS[name].name == "lars":
        assert (sharded[f"{name} {stage} padding"] > 0) == (stage > 0)


def test_lars_with_an_unknown_partition_raises():
    lars = optim.Lars([torch.ones(3, 3, requires_grad=True)], LarsOptions(lr=1.0, weight_decay=0.0))
    flat = torch.ones(5, requires_grad=True)
    flat.grad = torch.ones(5)
    lars.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"Lars was given an unknown flat partition: call optim.attach\(engine\)"):
        lars.step()


if __name__ == "__main__":
    ranks.main(worker)
