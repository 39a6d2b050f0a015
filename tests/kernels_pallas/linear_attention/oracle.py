"""Linear attention and its gradients in float64 NumPy, step by step.

Written apart from the library's reference: no code is shared with it. And what
every implementation must satisfy against that.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import shapes
from tests.kernels_pallas import modes

# Scaled by the largest value: a hundred roundings of float32; of bfloat16 two
# roundings of its 8 bits. Gradients, of which each is of two results, twice.
_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}

DECAYS = {
    "none": lambda n: np.ones(n),
    "slow": lambda n: np.full(n, 0.99),
    "mixed": lambda n: np.array([1.0, 0.9, 0.999, 0.01])[:n],
}

Call = Callable[..., output.LinearAttentionOutput]


@dataclasses.dataclass(frozen=True)
class Case:
  """Arguments, and cotangents of out and state."""

  query: Any
  key: Any
  value: Any
  decay: Any
  initial_state: Any
  d_out: Any
  d_state: Any

  def wide(self) -> "Case":
    """The same, rounded as they are, in float64."""
    fields = vars(self).items()
    return Case(**{name: np.asarray(x, np.float64) for name, x in fields})

  def arguments(self) -> dict[str, Any]:
    """Of a call, by name."""
    fields = dict(vars(self))
    del fields["d_out"], fields["d_state"]
    return fields


def draw(shape: shapes.Shape, dtype: str, decay: str, seed: int = 0) -> Case:
  """Standard normal arguments."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = [normal(*x.shape).astype(dtype) for x in shape.arrays()]
  state = (shape.batch, shape.num_heads, shape.head_dim, shape.head_dim)
  rates = jnp.asarray(DECAYS[decay](shape.num_heads), jnp.float32)
  d_out = normal(*arrays[0].shape).astype(dtype)
  return Case(*arrays, rates, normal(*state), d_out, normal(*state))


def recur(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """The states [T + 1, B, N, H, H] from the initial one on, and out."""
  key, value = (_repeat(x, case) for x in (case.key, case.value))
  scale = case.query.shape[-1] ** -0.5
  states, outs = [case.initial_state], []
  for t in range(case.query.shape[1]):
    kept = case.decay[:, None, None] * states[-1]
    states.append(kept + key[:, t, :, :, None] * value[:, t, :, None])
    outs.append(
        scale * np.einsum("bnh,bnhj->bnj", case.query[:, t], states[-1])
    )
  return np.stack(states), np.stack(outs, axis=1)


def gradients(case: Case) -> dict[str, np.ndarray]:
  """Cotangents of all arguments, from the last position to the first."""
  states, _ = recur(case)
  key, value = (_repeat(x, case) for x in (case.key, case.value))
  scale, d_state = case.query.shape[-1] ** -0.5, case.d_state
  d_query, d_key, d_value = (np.zeros_like(x) for x in (case.query, key, value))
  d_decay = np.zeros_like(case.decay)
  for t in reversed(range(case.query.shape[1])):
    query, d_out = case.query[:, t], case.d_out[:, t]
    d_query[:, t] = scale * np.einsum("bnhj,bnj->bnh", states[t + 1], d_out)
    d_state = d_state + scale * query[..., :, None] * d_out[..., None, :]
    d_key[:, t] = np.einsum("bnhj,bnj->bnh", d_state, value[:, t])
    d_value[:, t] = np.einsum("bnhj,bnh->bnj", d_state, key[:, t])
    d_decay += np.einsum("bnhj,bnhj->n", d_state, states[t])
    d_state = case.decay[:, None, None] * d_state
  grouped = (*case.key.shape[:3], -1, case.key.shape[3])
  return {
      "query": d_query,
      "key": d_key.reshape(grouped).sum(axis=3),
      "value": d_value.reshape(grouped).sum(axis=3),
      "decay": d_decay,
      "initial_state": d_state,
  }


def run(call: Call, case: Case, implementation: str) -> Any:
  """Outputs and gradients of `call(**arguments)`, twice the same bits."""

  @jax.jit
  def both(arguments, d_out, d_state):
    result, pullback = jax.vjp(
        lambda x: call(**x, return_state=True), arguments
    )
    cotangents = output.LinearAttentionOutput(d_out, d_state)
    return result, pullback(cotangents)[0]

  arguments = (case.arguments(), case.d_out, case.d_state)
  with modes.mode_of(implementation):
    found, again = (both(*arguments) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, found, again)
  return found


def check(call: Call, case: Case, implementation: str) -> None:
  """Values, gradients, types and determinism."""
  (out, state), found = run(call, case, implementation)
  dtype, wide = case.query.dtype, case.wide()
  states, expected = recur(wide)
  assert out.dtype == dtype and state.dtype == jnp.float32
  atol = _ATOL[dtype.name]
  largest = np.abs(wide.value).max()
  if dtype == jnp.bfloat16:  # Out is a sum, not a mean: so is its rounding.
    largest = max(largest, np.abs(expected).max())
  _check_close(out, expected, atol * largest, "out")
  largest = max(largest, np.abs(states[-1]).max())
  _check_close(state, states[-1], atol * largest, "state")
  for name, gradient in gradients(wide).items():
    assert found[name].dtype == case.arguments()[name].dtype
    largest = max(1.0, np.abs(gradient).max())
    _check_close(found[name], gradient, 2 * atol * largest, name)


def _check_close(found: Any, expected: Any, atol: float, name: str) -> None:
  np.testing.assert_allclose(
      np.asarray(found, np.float64), expected, atol=atol, rtol=0, err_msg=name
  )


def _repeat(x: np.ndarray, case: Case) -> np.ndarray:
  return np.repeat(x, case.query.shape[2] // x.shape[2], axis=2)
