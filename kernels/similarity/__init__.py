"""Two passes over the tiles of a similarity matrix that is not stored: row sums, then gradients.  Shared by NT-Xent and
the symmetric InfoNCE; docs/kernels.md has the derivation.

Row i of u (this rank's rows) against all columns j of v (the rows of all ranks), s_ij = <u_i, v_j>:
  row_sums.py   r_i = sum_j e_ij, with e_ij = exp(s_ij / temperature) = 2^(scale s_ij) and scale = log2(e) / temperature
  gradients.py  acc_i = sum_j (e_ij (w_i + w_j) - 2 [j is the positive of i]) v_j, with w = 1 / r: one exponential
                serves both directions; at a positive the two terms are subtracted in float32 before the cast to the
                tiles' dtype, so that their small difference keeps its digits
Unit rows need no maximum: 2^scale and 2^-scale are far from float32's limits.  For temperatures below
`LOWEST_TEMPERATURE` and rows of any length, ONLINE keeps a running maximum, and w is log2 of the row sum instead.

In the kernels: M rows of this rank, N rows of all ranks, D features; matrices of rows are contiguous.
"""

from .gradients import row_gradients
from .labels import classes_of
from .row_sums import loss_parts, row_losses
from .spec import LossSpec, RankRows, Side
