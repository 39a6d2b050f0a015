"""The gated delta rule and its gradients in float64 NumPy, step by step.

Written apart from the library's reference: no code is shared with it. And what
every implementation must satisfy against that.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gated_delta_rule import output
from kernels_pallas.gated_delta_rule import shapes
from tests.kernels_pallas import modes

# Scaled by the largest value: a hundred roundings of float32; of bfloat16 two
# roundings of its 8 bits. Of bfloat16 gradients, each of two results that were
# rounded, twice that.
_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}
_GRADIENT_ATOL = {"float32": 2e-5, "bfloat16": 2.0**-6}

Call = Callable[..., output.GatedDeltaRuleOutput]


@dataclasses.dataclass(frozen=True)
class Case:
  """Arguments, and cotangents of out and state."""

  query: Any
  key: Any
  value: Any
  log_decay: Any
  beta: Any
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


def draw(shape: shapes.Shape, dtype: str, seed: int = 0) -> Case:
  """Keys of unit length that repeat; decays from 1 to 1e-6; beta 0 to 1."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: rng.standard_normal(dims).astype(np.float32)
  query, key, value, log_decay, beta = (x.shape for x in shape.arrays())
  keys = normal(*key)
  keys[:, 1::3] = keys[:, :1]
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  decays = rng.choice([1, 0.999, 0.9, 0.3, 1e-6], size=log_decay)
  betas = rng.choice([0, 0.1, 0.5, 1], size=beta)
  arrays = [jnp.asarray(x, dtype) for x in (normal(*query), keys)]
  return Case(
      *arrays,
      jnp.asarray(normal(*value), dtype),
      jnp.asarray(np.log(decays), jnp.float32),
      jnp.asarray(betas, jnp.float32),
      jnp.asarray(normal(*shape.state().shape)),
      jnp.asarray(normal(*value), dtype),
      jnp.asarray(normal(*shape.state().shape)),
  )


def recur(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """The states [T + 1, B, N, H, J] from the initial one on, and out."""
  states, outs = [case.initial_state], []
  for t in range(case.query.shape[1]):
    query, key, decay, beta = _at(case, t)
    kept = decay * states[-1]
    missing = case.value[:, t] - np.einsum("bnhj,bnh->bnj", kept, key)
    states.append(kept + key[..., None] * (beta * missing)[..., None, :])
    outs.append(np.einsum("bnh,bnhj->bnj", query, states[-1]))
  scale = case.query.shape[-1] ** -0.5
  return np.stack(states), scale * np.stack(outs, axis=1)


def gradients(case: Case) -> dict[str, np.ndarray]:
  """Cotangents of all arguments, from the last position to the first."""
  states, _ = recur(case)
  scale, d_state = case.query.shape[-1] ** -0.5, case.d_state
  num_heads, key_size = d_state.shape[1:3]
  heads = (*case.query.shape[:2], num_heads, key_size)
  d_query, d_key, d_decay = (np.zeros(heads) for _ in range(3))
  d_value, d_beta = np.zeros_like(case.value), np.zeros_like(case.beta)
  for t in reversed(range(case.query.shape[1])):
    query, key, decay, beta = _at(case, t)
    d_out = scale * case.d_out[:, t]
    d_query[:, t] = np.einsum("bnhj,bnj->bnh", states[t + 1], d_out)
    d_state = d_state + query[..., None] * d_out[..., None, :]
    # state = kept + beta key (value - kept^T key)^T.
    kept = decay * states[t]
    missing = case.value[:, t] - np.einsum("bnhj,bnh->bnj", kept, key)
    d_key[:, t] = np.einsum("bnhj,bnj->bnh", d_state, beta * missing)
    read = np.einsum("bnhj,bnh->bnj", d_state, key)
    d_beta[:, t] = (read * missing).sum(-1)
    d_missing = beta * read
    d_value[:, t] = d_missing
    d_key[:, t] -= np.einsum("bnhj,bnj->bnh", kept, d_missing)
    d_kept = d_state - key[..., None] * d_missing[..., None, :]
    d_decay[:, t] = (d_kept * kept).sum(-1)
    d_state = decay * d_kept
  if case.log_decay.ndim == 3:
    d_decay = d_decay.sum(-1)
  grouped = (*case.key.shape[:3], -1, key_size)
  return {
      "query": d_query.reshape(grouped).sum(axis=3),
      "key": d_key.reshape(grouped).sum(axis=3),
      "value": d_value,
      "log_decay": d_decay,
      "beta": d_beta,
      "initial_state": d_state,
  }


def run(call: Call, case: Case, implementation: str) -> Any:
  """Outputs and gradients of `call(**arguments)`, twice the same bits."""

  @jax.jit
  def both(arguments, d_out, d_state):
    result, pullback = jax.vjp(lambda x: call(**x), arguments)
    cotangents = output.GatedDeltaRuleOutput(d_out, d_state)
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
  for name, x, want in (("out", out, expected), ("state", state, states[-1])):
    _check_close(x, want, atol, name)
  for name, gradient in gradients(wide).items():
    assert found[name].dtype == case.arguments()[name].dtype
    _check_close(found[name], gradient, _GRADIENT_ATOL[dtype.name], name)


def _check_close(found: Any, expected: Any, atol: float, name: str) -> None:
  largest = max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(
      np.asarray(found, np.float64),
      expected,
      atol=atol * largest,
      rtol=0,
      err_msg=name,
  )


def _at(case: Case, t: int) -> tuple[np.ndarray, ...]:
  """Query, key, decay and beta of a position, of every value head."""
  num_groups = case.value.shape[2] // case.key.shape[2]
  query, key = (
      np.repeat(x[:, t], num_groups, axis=1) for x in (case.query, case.key)
  )
  decay = np.exp(case.log_decay[:, t])
  decay = decay.reshape(*decay.shape[:2], -1, 1)
  return query, key, decay, case.beta[:, t, :, None]
