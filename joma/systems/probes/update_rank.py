"""How many directions training has changed of each matrix.

The numerical rank of W_t - W_0: InRank (https://arxiv.org/abs/2306.11250) finds
that it is small and grows.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
import numpy as np

from joma.transformer.layers import monarch


def update_rank(
    now: Float[np.ndarray, "I O"],
    start: Float[np.ndarray, "I O"],
    share: float = 0.9,
) -> float:
  """Singular values that hold a share of |now - start|^2; 0 if it is 0.

  NaN if the change is not finite, for LAPACK raises: the loop that asked says
  then that training diverged.
  """
  change = np.asarray(now) - np.asarray(start)
  if not np.isfinite(change).all():
    return np.nan
  values = np.linalg.svd(change, compute_uv=False)
  held = np.cumsum(np.square(values, dtype=np.float64))
  if held[-1] == 0:
    return 0.0
  return float(np.searchsorted(held, share * held[-1])) + 1


def matrices(params: Mapping[str, Any], layer: int) -> dict[str, np.ndarray]:
  """The matrices of a layer's attention and MLP, by name, each [I, O]."""
  found = {}
  for part in ("attn", "mlp"):
    for name, module in params[f"layers_{layer}"].get(part, {}).items():
      if not isinstance(module, Mapping) or not {"kernel", "right"} & {*module}:
        continue
      kernel = monarch.kernel_of(module)
      if kernel.ndim > 1:
        # Heads are part of the side that they are on: [D, N, H] or [N, H, D].
        sides = (-1, kernel.shape[-1]) if name == "out" else (len(kernel), -1)
        found[f"{part}_{name}"] = np.asarray(kernel, np.float32).reshape(sides)
  return found


def of_params(
    now: Mapping[str, Any], start: Mapping[str, Any]
) -> dict[str, Float[np.ndarray, "L"]]:
  """The rank of every matrix's change, as `update_rank_attn_query`.

  Args:
    now: Parameters of a Transformer.
    start: Of the same shapes.

  Returns:
    Numbers of each layer; NaN where a layer lacks the matrix.
  """
  num_layers = sum(name.startswith("layers_") for name in now)
  found: dict[str, np.ndarray] = {}
  for layer in range(num_layers):
    before = matrices(start, layer)
    for name, kernel in matrices(now, layer).items():
      values = found.setdefault(
          f"update_rank_{name}", np.full(num_layers, np.nan)
      )
      values[layer] = update_rank(kernel, before[name])
  return found
