"""What every implementation of attention must satisfy, against the oracle.

Tolerances, scaled by the largest value (or gradient): float32 2e-5, a hundred
roundings; bfloat16 2^-7, two roundings of its 8 bits. Gradients twice as much.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import output
from kernels_pallas.attention import shapes
from tests.kernels_pallas import modes
from tests.kernels_pallas import oracle

_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}

Call = Callable[..., output.AttentionOutput]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Optional arguments of a call, drawn at random where they are arrays."""

  soft_cap: float | None = None
  scale: float | None = None
  has_sinks: bool = False
  has_row_weights: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arguments for the op, and the same rounded ones in float64."""

  arrays: dict[str, jax.Array]
  keywords: dict[str, Any]
  case: oracle.Case
  d_out: jax.Array
  d_lse: jax.Array


def draw(
    shape: shapes.Shape,
    dtype: str,
    allowed: np.ndarray,
    options: Options,
    seed: int = 0,
) -> Inputs:
  """Draws standard normal arguments; never query = key = value."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = {
      name: normal(*array.shape).astype(dtype)
      for name, array in zip(
          ("query", "key", "value"), shape.arrays(), strict=True
      )
  }
  if options.has_sinks:
    arrays["sink_logits"] = normal(shape.num_heads)
  rows = (shape.batch, shape.num_heads, shape.num_queries)
  keywords = {"scale": options.scale, "logits_soft_cap": options.soft_cap}
  if options.has_row_weights:
    keywords["row_weights"] = normal(*rows)
  wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
  case = oracle.Case(
      **wide,
      allowed=np.broadcast_to(allowed, (*rows, shape.num_keys)),
      scale=options.scale or shape.head_dim**-0.5,
      soft_cap=options.soft_cap,
      row_weights=(
          np.asarray(keywords["row_weights"], np.float64)
          if options.has_row_weights
          else None
      ),
  )
  d_out = normal(*arrays["query"].shape).astype(dtype)
  # Rows without a key have lse = -inf: no cotangent can arrive there.
  return Inputs(arrays, keywords, case, d_out, normal(*rows))


def check(call: Call, inputs: Inputs, implementation: str) -> None:
  """Values, gradients and determinism of `call(**arrays, **keywords)`."""

  @jax.jit
  def run(arrays, d_out, d_lse):
    def outputs(arrays):
      result = call(
          **arrays, **inputs.keywords, return_lse=True, return_col_mass=True
      )
      return (result.out, result.lse), result.col_mass

    (out, lse), pullback, col_mass = jax.vjp(outputs, arrays, has_aux=True)
    return out, lse, col_mass, pullback((d_out, d_lse))[0]

  arguments = (inputs.arrays, inputs.d_out, inputs.d_lse)
  with modes.mode_of(implementation):
    result = run(*arguments)
  check_values(result[:3], inputs)
  check_gradients(result[3], inputs)
  jax.tree.map(np.testing.assert_array_equal, result, run(*arguments))


def check_equal(one: Any, two: Any, atol: float) -> None:
  """Compares results of one computation in another order of its sums.

  Scaled by the largest number of each array. 1e-6, ten roundings, for values;
  gradients twice as much.
  """
  for x, y in zip(*map(jax.tree.leaves, (one, two)), strict=True):
    scale = max(1.0, np.abs(x).max())
    np.testing.assert_allclose(y, x, atol=atol * scale, rtol=0)


def check_values(result: Any, inputs: Inputs) -> None:
  """Compares out, lse and col_mass with the oracle."""
  out, lse, col_mass = result
  expected = oracle.attention(inputs.case)
  dtype = inputs.arrays["query"].dtype
  assert out.dtype == dtype and lse.dtype == col_mass.dtype == jnp.float32
  atol = _ATOL[dtype.name]
  largest = np.abs(inputs.case.value).max()
  np.testing.assert_allclose(
      np.asarray(out, np.float64), expected.out, atol=atol * largest, rtol=0
  )
  # Logits of float32 arithmetic on exact inputs, also where those are bfloat16.
  finite = np.isfinite(expected.lse)
  np.testing.assert_array_equal(np.isneginf(lse), ~finite)
  scale = max(1.0, np.abs(expected.lse[finite]).max(initial=0))
  np.testing.assert_allclose(
      np.asarray(lse)[finite], expected.lse[finite], atol=2e-5 * scale, rtol=0
  )
  scale = max(1.0, np.abs(expected.col_mass).max())
  np.testing.assert_allclose(
      col_mass, expected.col_mass, atol=2e-5 * scale, rtol=0
  )


def check_gradients(found: Any, inputs: Inputs) -> None:
  """Compares the cotangents of all float arguments with the oracle."""
  # Of rows without a key the oracle has no gradient by lse.
  wide = [np.asarray(x, np.float64) for x in (inputs.d_out, inputs.d_lse)]
  expected = oracle.gradients(inputs.case, *wide)
  atol = 2 * _ATOL[inputs.arrays["query"].dtype.name]
  assert set(found) == set(expected)
  for name, gradient in found.items():
    assert gradient.dtype == inputs.arrays[name].dtype
    scale = max(1.0, np.abs(expected[name]).max())
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64),
        expected[name],
        atol=atol * scale,
        rtol=0,
        err_msg=name,
    )
