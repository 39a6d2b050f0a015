"""Numbers that the authors of Scan & Snap published, to hold ours against.

Scan & Snap (https://arxiv.org/abs/2305.16380). All were read out of the files
that accompany the paper's code, github.com/facebookresearch/luckmatters at
commit 625b5f7, in the folder ssl/real-dataset/scan_snap:

  FIGURE4_LOSSES        figure_4.log: Syn-Small, SGD with momentum .9, seed 2,
                        eta_Y = eta_Z = 1, 34 tokens with queries and next ones
  FIGURE6_CELLS         figure_6_data.pkl: Syn-Medium, seeds 1 to 10, the
                        settings M/K = 1/2 and 3/6
  FIGURE6_JOB0_LOSSES   figure_6.log: its first run, seed 1, M/K = 1/2,
                        eta_Y = eta_Z = .5

A loss is the cross-entropy of the batch before the update of that step, in
nats. It is printed to about seven digits; below 1e-3 it is mostly float32
cancellation.
"""

import types
from typing import NamedTuple


class EntropyCell(NamedTuple):
  """One point of Figure 6.

  Attributes:
    num_last: Query tokens, M in the paper's "M/K".
    num_next: Next tokens, K.
    lr_z: eta_Z.
    lr_ratio: eta_Y / eta_Z.
    mean: Distinct-token entropy after training in nats, mean over seeds.
    std: Its sample standard deviation over seeds (ddof 1). The paper's caption
      calls it the standard deviation of the mean.
  """

  num_last: int
  num_next: int
  lr_z: float
  lr_ratio: float
  mean: float
  std: float


FIGURE6_NUM_SEEDS = 10

FIGURE6_CELLS = (
    EntropyCell(1, 2, 0.5, 1.0, 1.971, 0.028),
    EntropyCell(1, 2, 0.5, 2.0, 2.007, 0.032),
    EntropyCell(1, 2, 0.5, 5.0, 2.066, 0.017),
    EntropyCell(1, 2, 0.5, 10.0, 2.092, 0.016),
    EntropyCell(1, 2, 1.0, 1.0, 1.871, 0.052),
    EntropyCell(1, 2, 1.0, 2.0, 1.937, 0.052),
    EntropyCell(1, 2, 1.0, 5.0, 2.022, 0.036),
    EntropyCell(1, 2, 1.0, 10.0, 2.053, 0.030),
    EntropyCell(1, 2, 2.0, 1.0, 1.699, 0.101),
    EntropyCell(1, 2, 2.0, 2.0, 1.810, 0.099),
    EntropyCell(1, 2, 2.0, 5.0, 1.934, 0.068),
    EntropyCell(1, 2, 2.0, 10.0, 1.900, 0.200),
    EntropyCell(1, 2, 3.0, 1.0, 1.551, 0.155),
    EntropyCell(1, 2, 3.0, 2.0, 1.708, 0.152),
    EntropyCell(1, 2, 3.0, 5.0, 1.786, 0.170),
    EntropyCell(1, 2, 3.0, 10.0, 1.825, 0.331),
    EntropyCell(3, 6, 0.5, 1.0, 2.019, 0.010),
    EntropyCell(3, 6, 0.5, 2.0, 1.988, 0.012),
    EntropyCell(3, 6, 0.5, 5.0, 2.031, 0.007),
    EntropyCell(3, 6, 0.5, 10.0, 2.063, 0.005),
    EntropyCell(3, 6, 1.0, 1.0, 1.963, 0.015),
    EntropyCell(3, 6, 1.0, 2.0, 1.920, 0.018),
    EntropyCell(3, 6, 1.0, 5.0, 1.982, 0.009),
    EntropyCell(3, 6, 1.0, 10.0, 2.024, 0.008),
    EntropyCell(3, 6, 2.0, 1.0, 1.842, 0.024),
    EntropyCell(3, 6, 2.0, 2.0, 1.809, 0.027),
    EntropyCell(3, 6, 2.0, 5.0, 1.899, 0.018),
    EntropyCell(3, 6, 2.0, 10.0, 1.955, 0.020),
    EntropyCell(3, 6, 3.0, 1.0, 1.737, 0.032),
    EntropyCell(3, 6, 3.0, 2.0, 1.715, 0.038),
    EntropyCell(3, 6, 3.0, 5.0, 1.821, 0.030),
    EntropyCell(3, 6, 3.0, 10.0, 1.839, 0.100),
)

FIGURE4_NUM_TOKENS = 34

FIGURE4_LOSSES = types.MappingProxyType({
    0: 3.526360,
    2: 2.367910,
    4: 0.7334754,
    6: 0.1608049,
    8: 0.04442878,
    10: 0.01295247,
    20: 2.054338e-4,
    30: 5.301202e-5,
    50: 2.578305e-5,
    70: 1.994946e-5,
    98: 2.222372e-5,
})

FIGURE6_JOB0_LOSSES = types.MappingProxyType({
    0: 3.454857,
    2: 2.876298,
    4: 1.758272,
    6: 0.7731755,
    8: 0.3355617,
    10: 0.1616624,
    20: 4.889907e-3,
    30: 1.328099e-3,
    50: 7.773914e-4,
    70: 6.626487e-4,
    98: 5.514767e-4,
})


def figure6_cell(
    num_last: int, num_next: int, lr_z: float, lr_ratio: float
) -> EntropyCell | None:
  """Finds a point of Figure 6, or None where none is known."""
  wanted = (num_last, num_next, lr_z, lr_ratio)
  return next((cell for cell in FIGURE6_CELLS if cell[:4] == wanted), None)
