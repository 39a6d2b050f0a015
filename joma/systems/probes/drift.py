"""Attention drift: which heads look elsewhere once instructions conflict.

A text has spans of several roles, as of a system and a user. The drift of a
head is the Jensen-Shannon divergence between what it gives each role without
and with an instruction in one span that contradicts another's, the head's
weights of one token summed over each span: 0 where nothing moves, log 2 where
everything does. After the localizing step of "Diagnose, Localize, Align" (SAIL,
2025), whose agents and judges are not here.

Letters: B texts, L layers, N heads, T tokens, S keys, R roles.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


def role_mass(
    attn_weights: Float[Array, "B N T S"],
    roles: Int[Array, "B S"],
    at: Int[Array, "B"],
    num_roles: int,
) -> Float[Array, "B N R"]:
  """What each head gives each role from one token of each text.

  Args:
    attn_weights: Rows that sum to 1.
    roles: Of the keys, each in [0, R); others are left out.
    at: The token.
    num_roles: R.
  """
  place = at[:, None, None, None]
  rows = jnp.take_along_axis(attn_weights, place, axis=2)[:, :, 0]
  of_role = jax.nn.one_hot(roles, num_roles, dtype=rows.dtype)
  return jnp.einsum("BNS,BSR->BNR", rows, of_role)


def divergence(
    one: Float[Array, "*b R"], two: Float[Array, "*b R"]
) -> Float[Array, "*b"]:
  """Jensen-Shannon divergence of distributions over the last axis, in nats."""
  entropy = lambda x: jax.scipy.special.entr(x).sum(axis=-1)
  return entropy((one + two) / 2) - (entropy(one) + entropy(two)) / 2


def scores(
    without: Sequence[Float[Array, "B N T T"]],
    conflict: Sequence[Float[Array, "B N T T"]],
    roles: Int[Array, "B T"],
    at: Int[Array, "B"],
    num_roles: int,
) -> Float[Array, "L N"]:
  """The drift of every head, mean over texts.

  Args:
    without: Attention weights of each layer on texts without a conflict.
    conflict: On the same texts with one, of the same lengths.
    roles: Of the tokens of both.
    at: The token that looks, of both.
    num_roles: R.
  """
  mass = lambda maps: role_mass(maps, roles, at, num_roles)
  found = [
      divergence(mass(one), mass(two)).mean(axis=0)
      for one, two in zip(without, conflict, strict=True)
  ]
  return jnp.stack(found)


def ranked(scores: Float[np.ndarray, "L N"]) -> list[tuple[int, int]]:
  """Layer and head of each, largest drift first."""
  order = np.argsort(-np.asarray(scores), axis=None, kind="stable")
  return [divmod(int(i), scores.shape[1]) for i in order]
