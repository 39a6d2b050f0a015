"""Makes figure4_counts.npz: the batches behind the authors' Figure 4 log.

  python tests/scansnap_jax/figure4_counts.py

draws them with torch 2.13 as the logged run (seed 2) did: Python's generator,
seeded with 2, chooses the classes; torch's, seeded with 4, draws first the
weights of two 34 x 34 linear maps without bias and then, for each sample, 127
tokens with replacement.
"""

import pathlib
import random

import numpy as np

PATH = pathlib.Path(__file__).with_suffix(".npz")


def draw(support_probs, num_tokens, *, num_steps=11, batch_size=128, seed=2):
  """Returns class_index [N, B] and counts [N, B, S], as uint8."""
  import torch  # Only to make or to check the file.

  random.seed(seed)
  torch.manual_seed(seed + 2)
  for _ in ("Y", "Z"):
    torch.nn.Linear(num_tokens, num_tokens, bias=False)
  probs = torch.tensor(np.asarray(support_probs))
  classes, counts = [], []
  for _ in range(num_steps * batch_size):
    n = random.choice(range(len(probs)))
    tokens = torch.multinomial(probs[n], 127, replacement=True)
    classes.append(n)
    counts.append(torch.bincount(tokens, minlength=probs.shape[1]).numpy())
  shape = (num_steps, batch_size)
  return (
      np.array(classes, np.uint8).reshape(shape),
      np.array(counts, np.uint8).reshape(*shape, -1),
  )


def main() -> None:
  from scansnap_jax import config
  from scansnap_jax import data

  classes = data.make_classes(config.figure4().data, 2)
  class_index, counts = draw(classes.support_probs, classes.num_tokens)
  np.savez_compressed(PATH, class_index=class_index, counts=counts)
  print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
  main()
