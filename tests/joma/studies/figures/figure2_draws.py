"""Makes figure2_draws.npz: what the reference runs of Figures 2 and 3 start at.

  python tests/joma/studies/figures/figure2_draws.py

draws, with torch 2.13 seeded with 0, 1 and 2, first the uniform weights of 20
tokens (rows) in 20 classes, then W and z, in the order in which the authors'
script does. Gaussian mode replaces weights and draws nothing.
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_suffix(".npz")


def draw(seed):
  """Returns weights [20, 20], W [30, 20] and z [20]."""
  import torch  # Only to make or to check the file.

  torch.manual_seed(seed)
  weights = torch.rand(20, 20) / 2
  lower, attn_logits = torch.randn(30, 20) / 100, torch.randn(20) / 100
  return weights.numpy(), lower.numpy(), attn_logits.numpy()


def main() -> None:
  names = ("weights", "lower", "attn_logits")
  draws = map(np.stack, zip(*map(draw, range(3)), strict=True))
  np.savez_compressed(PATH, **dict(zip(names, draws, strict=True)))
  print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
  main()
