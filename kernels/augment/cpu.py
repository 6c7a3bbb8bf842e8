"""The views on a CPU, by loops compiled by numba: one view of one sample at a time, which stays in the CPU's cache.

The same operations as in reference.py, with the same parameters (params.draw).  As many threads as torch has divide the
samples.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .cpu_loops import Spec, make_part
from .params import OPS, View


def make_views(
    pixels: Tensor, sizes: Tensor, views: Sequence[View], tables: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """See reference.make_views."""
    outs = [torch.empty((len(sizes), view.size, view.size, 3), dtype=torch.float32) for view in views]
    images, widths, threads = pixels.contiguous().numpy(), sizes[:, 1].tolist(), torch.get_num_threads()
    step = max(1, len(sizes) // (4 * threads))  # several parts for each thread: some samples take longer
    parts = [
        (images[i : i + step], np.array(widths[i : i + step]), table[i : i + step], _spec(view), out[i : i + step])
        for view, table, out in zip(views, tables.numpy(), [out.numpy() for out in outs])
        for i in range(0, len(sizes), step)
    ]
    if threads == 1:
        for part in parts:
            make_part(*part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: make_part(*part), parts))
    outs = [out.rot90(v.quarter_turns, (1, 2)).contiguous() if v.quarter_turns else out for v, out in zip(views, outs)]
    return [out.to(dtype).permute(0, 3, 1, 2) for out in outs]


def _spec(view: View) -> Spec:
    return Spec(
        view.interpolation == "bicubic",
        view.pad_mode == "reflect",
        view.rotate > 0,
        np.array([OPS.index(op) for op in view.order]),
        np.array([strength > 0 for strength in view.jitter]),
        view.blur_radius,
        np.float32(view.solarize_threshold),
        np.array(view.mean, np.float32),
        np.array(view.std, np.float32),
    )
