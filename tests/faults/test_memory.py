"""Out of device memory: the error names the setting and the number of images that fits."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import method_cases as cases

from fastssl import build as building
from fastssl import dist, engine


@pytest.mark.parametrize("limit, told", [(9, 8), (5, 4), (1, 1), (0, None)])
def test_the_error_names_the_batch_that_fits(tmp_path, monkeypatch, limit, told):
    """A device that holds `limit` images of a forward pass."""
    prepare = building.prepare

    def limited(method, run, device):
        method = prepare(method, run, device)
        forward = method.forward

        def checked(views, batch):
            if len(batch.index) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(views, batch)

        method.forward = checked
        return method

    monkeypatch.setattr(building, "prepare", limited)
    run = cases.run("simclr", steps=2, norm=False)
    run.name, run.log.root, run.log.collapse_every = "r", str(tmp_path), 0
    dist.init("cpu")
    with pytest.raises(ValueError) as error:
        engine.fit(run, hooks=[], device="cpu", loader=cases.loader(run))
    message = str(error.value)
    assert message.startswith("out of memory after step 0: ") and "Tried to allocate 2.00 GiB" in message
    if told is None:
        assert "a single image does not fit: use smaller views (data.views)" in message
    else:
        assert f"set speed.micro_batch={told} (now 16), which fits: the batch stays as it is" in message
        run.speed.micro_batch = told
        engine.fit(run, hooks=[], device="cpu", loader=cases.loader(run))
    dist.shutdown()
