"""A program of four devices: what jit makes of ops with sharded arguments.

Run as `python -m tests.kernels_pallas.transformations.partitioned
IMPLEMENTATION`; prints a line of JSON for each op: communications by kind, and
how far results are off.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.decode import api as decode_lib
from kernels_pallas.decode import slots
from kernels_pallas.gated_delta_rule import api as delta_lib
from kernels_pallas.linear_attention import api as linear_lib
from tests.kernels_pallas import modes

_LENGTH = 16
_KINDS = ("all-gather", "all-reduce", "collective-permute", "all-to-all")


def _ops(implementation):
  """Op -> what is computed of query, key, value and lengths."""

  def attend(query, key, value, lengths):
    return api.attention(
        query,
        key,
        value,
        where=masks.key_lengths(_LENGTH, lengths),
        return_lse=True,
        return_col_mass=True,
        implementation=implementation,
    )

  def gradients(query, key, value, lengths):
    where = masks.causal(_LENGTH)
    one = lambda *arrays: api.attention(
        *arrays, where=where, implementation=implementation
    ).out
    out, back = jax.vjp(one, query, key, value)
    return back(jnp.cos(out)), lengths

  def linear(query, key, value, lengths):
    decay = np.linspace(0.8, 0.9, query.shape[2], dtype=np.float32)
    one = lambda *arrays: linear_lib.linear_attention(
        *arrays, decay=decay, implementation=implementation
    ).out
    out, back = jax.vjp(one, query, key, value)
    return out, back(jnp.cos(out)), lengths

  def delta(query, key, value, lengths):
    # Here it is the values that have more heads.
    del value
    gates = jnp.full(query.shape[:3], 0.5)
    one = lambda *arrays: delta_lib.gated_delta_rule(
        *arrays, -gates, gates, lengths=lengths, implementation=implementation
    )
    found, back = jax.vjp(one, key, 0.3 * key, query)
    return found, back(jax.tree.map(jnp.cos, found))

  def decode(query, key, value, lengths):
    cache = slots.empty(*key.shape[::2], 16, key.shape[3])
    return decode_lib.decode_step(
        query[:, 0],
        key[:, 0],
        value[:, 0],
        cache,
        lengths,
        implementation=implementation,
    )

  return {
      "attention": attend,
      "gradients": gradients,
      "linear": linear,
      "delta": delta,
      "decode": decode,
  }


def _check(function, num_kv_heads):
  """Communications of the sharded program, and its largest error."""
  rng = np.random.default_rng(0)
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto)
  arrays = [
      jnp.asarray(rng.normal(size=(2, _LENGTH, n, 8)), jnp.float32)
      for n in (4, num_kv_heads, num_kv_heads)
  ]
  arrays.append(jnp.asarray([9, _LENGTH], jnp.int32))
  heads = jax.P("data", None, "tensor")
  places = [heads] + [heads if num_kv_heads > 1 else jax.P("data")] * 2
  places.append(jax.P("data"))
  put = lambda x, place: jax.device_put(x, jax.NamedSharding(mesh, place))
  sharded = [put(*pair) for pair in zip(arrays, places, strict=True)]
  compiled = jax.jit(function).lower(*sharded).compile()
  text = compiled.as_text()
  counts = {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in _KINDS}
  found, expected = compiled(*sharded), jax.jit(function)(*arrays)
  off = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, expected)
  return counts, max(jax.tree.leaves(off))


def main(implementation):
  """Prints the lines."""
  with modes.mode_of(implementation):
    for op, function in _ops(implementation).items():
      for num_kv_heads in (2, 1):
        counts, error = _check(function, num_kv_heads)
        row = {"op": op, "kv_heads": num_kv_heads, "error": error}
        print(json.dumps(row | counts), flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
