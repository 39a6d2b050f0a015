"""The op of `merged` on a mesh: each device its sequences, heads and positions.

Positions that lie on several devices, those of the mesh axis `seq`, meet on a
ring; see `kernels_pallas.attention.ring`. A selection of blocks is computed by
every device of that axis, for all positions.

Letters as in `merged`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from joma.transformer import hooks
from joma.transformer import sharding
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import api
from kernels_pallas.attention.ring import api as ring_api
from kernels_pallas.attention.ring import order


class _Arrays(NamedTuple):
  """What is split, or how.

  Attributes:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    where: None where it is known, and the same for all devices.
    of_heads: The rule's arrays.
    row_weights: None where they are 1.
  """

  query: PyTree[Float[Array, "B T N H"]]
  key: PyTree[Float[Array, "B S K H"]]
  value: PyTree[Float[Array, "B S K H"]]
  where: PyTree
  of_heads: dict[str, Any]
  row_weights: PyTree[Float[Array, "B N T"]]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
    *,
    row_weights: Float[Array, "#B #N #T"] | None = None,
    **returns: Any,
) -> output.AttentionOutput:
  """As `merged.attend`; under `jax.set_mesh` of a mesh, in parts.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    where: Of all positions.
    options: As there.
    row_weights: Of all queries.
    **returns: What else the op is to return.
  """
  if row_weights is not None:
    shape = query.shape[0], query.shape[2], query.shape[1]
    row_weights = jnp.broadcast_to(row_weights, shape)
  rule, mesh = options.weights, sharding.current_mesh()
  of_heads = {} if rule is None else rule.of_heads
  arrays = _Arrays(query, key, value, where, of_heads, row_weights)
  if mesh is None:
    return _own(api.attention, options, returns, None, arrays)
  ring, known = None, None
  if mesh.shape["seq"] > 1 and isinstance(where, masks.Mask):
    lengths = query.shape[1], key.shape[1]
    ring = order.plan(where, *lengths, "seq", mesh.shape["seq"])
    arrays = _padded(arrays, ring)
  elif sharding.is_known(where):
    known, arrays = where, arrays._replace(where=None)
  op = api.attention
  if ring is not None:
    op = functools.partial(ring_api.attention, ring=ring)
  places, results = _specs(mesh, arrays, ring, returns)
  found = jax.shard_map(
      functools.partial(_own, op, options, returns, known),
      in_specs=(places,),
      out_specs=results,
      # Kernels do not say over which axes of the mesh their outputs vary.
      check_vma=False,
  )(arrays)
  return _cut(found, query.shape[1], key.shape[1])


def _own(
    op: Callable[..., output.AttentionOutput],
    options: hooks.AttentionOptions,
    returns: dict[str, Any],
    known: hooks.Where | None,
    arrays: _Arrays,
) -> output.AttentionOutput:
  """What one device computes."""
  query, key, value, where, of_heads, row_weights = arrays
  where: Any = known if where is None else where
  assert where is not None  # One of the two is given.
  rule = options.weights
  if rule is not None:
    rule = dataclasses.replace(rule, **of_heads)
    options = dataclasses.replace(options, weights=rule)
  if row_weights is not None:
    returns = {**returns, "row_weights": row_weights}
  found = merged.attend(query, key, value, where, options, op, **returns)
  # Learned keys are merged by lse, which then is there without being asked for.
  return output.AttentionOutput(
      found.out,
      found.lse if returns.get("return_lse") else None,
      found.col_mass if returns.get("return_col_mass") else None,
  )


def _specs(
    mesh: sharding.AnyMesh,
    arrays: _Arrays,
    ring: order.Ring | None,
    returns: dict[str, Any],
) -> tuple[_Arrays, output.AttentionOutput]:
  """How arrays and results lie on the mesh."""
  place = sharding.places(
      mesh, len(arrays.query), arrays.key.shape[2], ring is not None
  )
  where = arrays.where
  places = _Arrays(
      place("btn."),
      place("btn."),
      place("btn."),
      None if where is None else sharding.where_specs(where, place),
      {name: place("n") for name in arrays.of_heads},
      None if arrays.row_weights is None else place("bnt"),
  )
  asked = lambda name: place("bnt") if returns.get(name) else None
  named: Any = output.AttentionOutput
  results = named(place("btn."), asked("return_lse"), asked("return_col_mass"))
  return places, results


def _padded(arrays: _Arrays, ring: order.Ring) -> _Arrays:
  """Adds queries that see nothing and keys that nothing sees."""
  query, key, value, where, of_heads, row_weights = arrays
  assert isinstance(where, masks.Mask)
  num_keys = key.shape[1]
  rows, columns = (-len_ % ring.multiple for len_ in (query.shape[1], num_keys))
  pad = lambda x, axis, more: (
      None
      if x is None
      else jnp.pad(
          jnp.asarray(x), [(0, more if i == axis else 0) for i in range(x.ndim)]
      )
  )
  last = lambda x, more: pad(x, None if x is None else x.ndim - 1, more)
  mask = masks.Mask(
      last(where.starts, rows),
      last(where.stops.clip(max=num_keys), rows),
      last(where.query_ids, rows),
      last(where.key_ids, columns),
  )
  return _Arrays(
      pad(query, 1, rows),
      pad(key, 1, columns),
      pad(value, 1, columns),
      mask,
      of_heads,
      pad(row_weights, 2, rows),
  )


def _cut(
    found: output.AttentionOutput, num_queries: int, num_keys: int
) -> output.AttentionOutput:
  """Leaves out what was added."""
  lse, col_mass = found.lse, found.col_mass
  return output.AttentionOutput(
      found.out[:, :num_queries],
      None if lse is None else lse[..., :num_queries],
      None if col_mass is None else col_mass[..., :num_keys],
  )
