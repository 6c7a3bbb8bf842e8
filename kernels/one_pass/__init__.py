"""Loss and gradient with respect to the queries in one pass over keys without gradient: an online softmax, as attention
whose values are the keys.  Shared by InfoNCE and the loss over gathered negatives; docs/kernels.md has the derivation.

loss = mean_i (log sum_j exp(x_ij) - x_i,positive), dq_i = (sum_j p_ij k_j - k_positive) / (M temperature), with logits
x = <q, k> / temperature.  The sums are split over programs; combine.py adds the splits and the positive.  Backward
only multiplies the saved gradient by the incoming one.

In the kernels: M queries, N keys, D features; sums and acc are relative to 2^(maximum - P_SCALE_LOG2), so that the
small p of a large queue stay normal numbers in float16.
"""

from .autograd import register_ready_gradient
from .combine import combine
from .keys import loss_and_gradient
