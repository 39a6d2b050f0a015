"""A head with a planted column that gets much attention, for the study `act`.

All queries are alike: a column of the answer has a logit of 2, the planted one
of 4, the rest about 0. What the planted column says is nothing (useless), or
the answer (useful); the answer's column then says nothing.

Letters: B draws, S keys, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma.systems.score_rules.calibrated import act
from joma.transformer import hooks

_ANSWER, _PLANTED, _NUM_CLASSES = 5, 3, 16
KINDS = ("useless", "useful")


def margins(
    kind: str, seeds: range, num_keys: int, theta: float, beta: float
) -> Float[np.ndarray, "B"]:
  """The answer's lead over the best other class at the last query.

  Args:
    kind: Of `KINDS`.
    seeds: A draw each.
    num_keys: S, more than the answer's place.
    theta: As in `Act`.
    beta: Likewise; 1 is plain attention.
  """
  key, value = (
      jnp.stack(each)[:, :, None]
      for each in zip(
          *(_draw(kind, seed, num_keys) for seed in seeds), strict=True
      )
  )
  query = jnp.zeros_like(key).at[..., 0].set(1.0)
  places = jnp.broadcast_to(jnp.arange(num_keys)[None], key.shape[:2])
  options = hooks.AttentionOptions(scale=1.0, implementation="reference")
  system = act.Act(theta=theta, beta=beta)
  out, _ = system.calibrated(query, key, value, places, options)
  last = np.asarray(out)[:, -1, 0]
  return last[:, 0] - last[:, 1:].max(axis=1)


def _draw(
    kind: str, seed: int, num_keys: int
) -> tuple[Float[Array, "S H"], Float[Array, "S H"]]:
  """Keys, whose first channel is the logit, and values, a class each."""
  keys = jax.random.split(jax.random.key(seed))
  logit = 0.3 * jax.random.normal(keys[0], (num_keys,))
  logit = logit.at[_ANSWER].set(2.0).at[_PLANTED].set(4.0)
  other = jax.random.randint(keys[1], (num_keys,), 1, _NUM_CLASSES)
  value = jax.nn.one_hot(other, _NUM_CLASSES)
  says, silent = _ANSWER, _PLANTED
  if kind == "useful":
    says, silent = silent, says
  value = (
      value.at[says].set(jax.nn.one_hot(0, _NUM_CLASSES)).at[silent].set(0.0)
  )
  return jnp.zeros_like(value).at[:, 0].set(logit), value
