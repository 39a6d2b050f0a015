"""A program of eight devices: the ring beside one device.

Run as `python -m tests.kernels_pallas.attention.ring.on_eight NAME...`; prints
a line of JSON for each case: how far values and gradients are off, in units of
the tolerance 2e-5 (1 + |expected|).
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import api
from kernels_pallas.attention.ring import api as ring_api
from kernels_pallas.attention.ring import order

_TOLERANCE = 2e-5
_DRAW = np.random.default_rng(0)


def _documents(length, batch=2):
  """Ids of packed texts of all lengths, the last of them padding."""
  ids = np.cumsum(_DRAW.random((batch, length)) < 0.08, axis=1)
  ids[:, -3:] = -1
  return jnp.asarray(ids, jnp.int32)


def _ids(length):
  ids = _DRAW.integers(0, 3, length, np.int32)
  return jnp.asarray(ids)


# Name -> length, heads, key heads, mask, options. Lengths that 16 does not
# divide are padded as `joma.transformer.weighing.in_parts` pads them.
CASES = {
    "causal": lambda: (64, 4, 4, masks.causal(64), {}),
    "ragged": lambda: (53, 4, 2, masks.causal(53), {}),
    "gqa_cap_sink": lambda: (
        48,
        4,
        1,
        masks.causal(48),
        {"logits_soft_cap": 2.0, "sink_logits": jnp.array([0.5, 1, -1, 0])},
    ),
    "window": lambda: (61, 2, 1, masks.sliding_window(61, window=9), {}),
    "streaming": lambda: (
        64,
        2,
        2,
        masks.streaming(64, window=20, num_sinks=3),
        {},
    ),
    "documents": lambda: (60, 4, 2, masks.document(_documents(60)), {}),
    "ids": lambda: (50, 2, 2, masks.hash_sparse(_ids(50), _ids(50)), {}),
    "prefix": lambda: (
        40,
        2,
        2,
        masks.prefix_lm(40, prefix_len=jnp.array([3, 17])),
        {},
    ),
    "full": lambda: (32, 2, 1, masks.full(32, 32), {}),
    # Numbers of heads and positions that share no factor with the devices.
    "odd": lambda: (41, 9, 3, masks.causal(41), {}),
    "shorter_than_the_ring": lambda: (5, 3, 1, masks.causal(5), {}),
    "a_window_of_all": lambda: (
        45,
        3,
        3,
        masks.sliding_window(45, window=45),
        {},
    ),
}


def _alone(where, options, query, key, value, sink, weights):
  return api.attention(
      query,
      key,
      value,
      where=where,
      sink_logits=sink,
      row_weights=weights,
      return_lse=True,
      return_col_mass=True,
      **options,
  )


def _on_ring(mesh, where, options, query, key, value, sink, weights):
  """The same by eight devices, each with an eighth of the padded text."""
  length = query.shape[1]
  ring = order.plan(where, length, length, "seq", 8)
  more = -length % ring.multiple
  pad = lambda x, axis: jnp.pad(
      jnp.asarray(x), [(0, more if i == axis else 0) for i in range(x.ndim)]
  )
  where = jax.tree.map(lambda x: pad(x, x.ndim - 1), where)
  op = functools.partial(ring_api.attention, ring=ring, **options)

  def own(query, key, value, where, sink, weights):
    return op(
        query,
        key,
        value,
        where=where,
        sink_logits=sink,
        row_weights=weights,
        return_lse=True,
        return_col_mass=True,
    )

  texts, last = jax.P(None, "seq"), jax.P(None, None, "seq")
  places = jax.tree.map(lambda x: jax.P(*[None] * (x.ndim - 1), "seq"), where)
  out, lse, mass = jax.shard_map(
      own,
      mesh=mesh,
      in_specs=(texts, texts, texts, places, jax.P(), last),
      out_specs=output.AttentionOutput(texts, last, last),
      check_vma=False,
  )(*(pad(x, 1) for x in (query, key, value)), where, sink, pad(weights, 2))
  return out[:, :length], lse[..., :length], mass[..., :length]


def check(name, mesh):
  """The largest error of a case, over outputs and cotangents."""
  length, num_heads, num_kv_heads, where, options = CASES[name]()
  normal = lambda *shape: jnp.asarray(_DRAW.normal(size=shape), jnp.float32)
  options = dict(options)
  sink = options.pop("sink_logits", None)
  arrays = [normal(2, length, n, 8) for n in (num_heads,) + (num_kv_heads,) * 2]
  weights = jnp.abs(normal(2, num_heads, length))

  def both(op, query, key, value, sink):
    out, lse, mass = op(query, key, value, sink, weights)
    seen = jnp.where(jnp.isfinite(lse), lse, 0)
    # Cotangents of both results, and no symmetry.
    loss = (out * jnp.cos(jnp.arange(8.0))).sum() + jnp.sin(seen).sum()
    return loss, (out, seen, mass)

  found = []
  for op in (_alone, functools.partial(_on_ring, mesh)):
    run = functools.partial(both, functools.partial(op, where, options))
    argnums = (0, 1, 2, 3) if sink is not None else (0, 1, 2)
    grad = jax.value_and_grad(run, argnums=argnums, has_aux=True)
    found.append(jax.jit(grad)(*arrays, sink))
  off = jax.tree.map(
      lambda a, b: float((jnp.abs(a - b) / (1 + jnp.abs(a))).max()), *found
  )
  return max(jax.tree.leaves(off)) / _TOLERANCE


def main(names):
  """Prints the lines."""
  mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
  for name in names or CASES:
    print(json.dumps({"case": name, "error": check(name, mesh)}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
