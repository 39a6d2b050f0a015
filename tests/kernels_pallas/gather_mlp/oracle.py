"""A gathered MLP and its gradients in float64 NumPy, sequence by sequence.

Written apart from the library's reference: no code is shared with it. And what
every implementation must satisfy against that.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gather_mlp import shapes
from tests.kernels_pallas import modes

# Scaled by the largest value: a hundred roundings of float32; of bfloat16 two
# roundings of its 8 bits. Gradients, each through two products, twice.
_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}

_SQRT_2_BY_PI = math.sqrt(2 / math.pi)


def _sigmoid(z):
  return 1 / (1 + np.exp(-z))


def _normal_cdf(z):
  return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def _normal_pdf(z):
  return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _tanh_part(z):
  return np.tanh(_SQRT_2_BY_PI * (z + 0.044715 * z**3))


def _tanh_slope(z):
  inner = _SQRT_2_BY_PI * (1 + 3 * 0.044715 * z**2)
  return 0.5 * (1 + _tanh_part(z)) + 0.5 * z * (1 - _tanh_part(z) ** 2) * inner


# Value and derivative.
ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "silu": (
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    ),
    "gelu": (
        lambda z: z * _normal_cdf(z),
        lambda z: _normal_cdf(z) + z * _normal_pdf(z),
    ),
    "gelu_tanh": (lambda z: 0.5 * z * (1 + _tanh_part(z)), _tanh_slope),
    "identity": (lambda z: z, np.ones_like),
    "quadratic": (lambda z: z**2, lambda z: 2 * z),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Arguments, by name; chosen blocks; and the cotangent of y."""

  arrays: dict[str, Any]
  block_ids: np.ndarray
  num_valid: Any
  activation: str
  block_size: int
  d_out: Any

  def lists(self) -> list[np.ndarray]:
    """The blocks that count, of each sequence."""
    batch, width = self.arrays["x"].shape[0], self.block_ids.shape[-1]
    ids = np.broadcast_to(self.block_ids, (batch, width))
    num = width if self.num_valid is None else self.num_valid
    num = np.broadcast_to(num, (batch,))
    return [row[:n] for row, n in zip(ids, num, strict=True)]


def draw(
    shape: shapes.Shape,
    dtype: str,
    activation: str = "relu",
    *,
    num_chosen: int = 2,
    per_sequence: bool = False,
    is_ragged: bool = False,
    seed: int = 0,
) -> Case:
  """Normal arguments and random blocks; of ragged lists some do not count."""
  rng = np.random.default_rng(seed)
  normal = lambda array, scale: jnp.asarray(
      scale * rng.standard_normal(array.shape), array.dtype
  )
  x, weights = shape.arrays(dtype)
  scales = {"up": x.shape[1], "gate": x.shape[1], "down": shape.block_size}
  arrays = {"x": normal(x, 1)} | {
      name: normal(array, scales.get(name, 4) ** -0.5)
      for name, array in weights._asdict().items()
      if array is not None
  }
  if shape.has_bias:
    arrays["down_bias"] = normal(x, 0.5)[0]
  lists = shape.batch if per_sequence else 1
  order = [rng.permutation(shape.num_blocks) for _ in range(lists)]
  ids = np.stack(order)[:, :num_chosen].astype(np.int32)
  num_valid = None
  if is_ragged:  # What does not count is nonsense.
    num_valid = rng.integers(0, num_chosen, lists).astype(np.int32)
    ids[np.arange(num_chosen)[None] >= num_valid[:, None]] = 1 << 20
  if not per_sequence:
    ids, num_valid = ids[0], None if num_valid is None else num_valid[0]
  return Case(
      arrays, ids, num_valid, activation, shape.block_size, normal(x, 1)
  )


def expected(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """y, and the cotangents of the arrays."""
  act, slope = ACTIVATIONS[case.activation]
  wide = {k: np.asarray(v, np.float64) for k, v in case.arrays.items()}
  d_out = np.asarray(case.d_out, np.float64)
  zero = np.zeros(len(wide["up"]))
  up_bias, gate_bias = (wide.get(n, zero) for n in ("up_bias", "gate_bias"))
  y = np.zeros_like(wide["x"])
  grads = {name: np.zeros_like(array) for name, array in wide.items()}
  for b, blocks in enumerate(case.lists()):
    x, size = wide["x"][b], case.block_size
    for f in (int(i) * size + j for i in blocks for j in range(size)):
      up, down = wide["up"][f], wide["down"][f]
      pre = x @ up + up_bias[f]
      d_hidden = d_out[b] @ down
      if "gate" in wide:
        gate = x @ wide["gate"][f] + gate_bias[f]
        hidden, d_pre = act(gate) * pre, act(gate) * d_hidden
        d_gate = slope(gate) * pre * d_hidden
        grads["gate"][f] += d_gate * x
        grads["x"][b] += d_gate * wide["gate"][f]
        if "gate_bias" in wide:
          grads["gate_bias"][f] += d_gate
      else:
        hidden, d_pre = act(pre), slope(pre) * d_hidden
      y[b] += hidden * down
      grads["down"][f] += hidden * d_out[b]
      grads["up"][f] += d_pre * x
      grads["x"][b] += d_pre * up
      if "up_bias" in wide:
        grads["up_bias"][f] += d_pre
  if "down_bias" in wide:
    y += wide["down_bias"]
    grads["down_bias"] = d_out.sum(axis=0)
  return y, grads


def both_passes(call: Callable[..., Any]) -> Callable[..., Any]:
  """y and cotangents of `call(arrays, block_ids, num_valid)`, compiled."""

  @jax.jit
  def both(arrays, block_ids, num_valid, d_out):
    y, pullback = jax.vjp(lambda a: call(a, block_ids, num_valid), arrays)
    return y, pullback(d_out)[0]

  return both


def check(both: Callable[..., Any], case: Case, implementation: str) -> None:
  """Values, gradients, types, the same bits twice; zeros where none chose."""
  arguments = (case.arrays, case.block_ids, case.num_valid, case.d_out)
  with modes.mode_of(implementation):
    found = both(*arguments)
  jax.tree.map(np.testing.assert_array_equal, found, both(*arguments))
  (y, grads), (want, want_grads) = found, expected(case)
  dtype = case.arrays["x"].dtype
  assert y.dtype == dtype
  _check_close(y, want, _ATOL[dtype.name], "y")
  for name, gradient in want_grads.items():
    assert grads[name].dtype == dtype
    _check_close(grads[name], gradient, 2 * _ATOL[dtype.name], name)
  is_chosen = np.zeros(len(want_grads["up"]), bool)
  for block in (i for blocks in case.lists() for i in blocks):
    is_chosen[block * case.block_size : (block + 1) * case.block_size] = True
  for name in set(grads) - {"x", "down_bias"}:
    assert not np.asarray(grads[name])[~is_chosen].any(), name


def _check_close(found: Any, want: Any, tolerance: float, name: str) -> None:
  scale = max(1.0, np.abs(want).max())
  np.testing.assert_allclose(
      np.asarray(found, np.float64),
      want,
      atol=tolerance * scale,
      rtol=0,
      err_msg=name,
  )
