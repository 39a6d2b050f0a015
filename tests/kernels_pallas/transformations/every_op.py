"""Every op as a function of an implementation and two arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import api as attention_lib
from kernels_pallas.decode import api as decode_lib
from kernels_pallas.decode import slots
from kernels_pallas.decode.paged import api as paged_lib
from kernels_pallas.gated_delta_rule import api as delta_lib
from kernels_pallas.gather_mlp import api as mlp_lib
from kernels_pallas.gather_mlp import heads as heads_lib
from kernels_pallas.linear_attention import api as linear_lib

_DRAW = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(_DRAW.standard_normal(shape), jnp.float32)
_IDS = np.array([1, 0], np.int32)


def _attend(implementation, query, key):
  result = attention_lib.attention(
      query,
      key,
      key,
      where=masks.causal(8),
      return_col_mass=True,
      implementation=implementation,
  )
  return result.out


def _attend_by_data(implementation, query, key):
  lengths = jnp.full(query.shape[0], 5) + query.astype(jnp.int32)[:, 0, 0, 0]
  return attention_lib.attention(
      query,
      key,
      key,
      where=masks.key_lengths(8, jnp.clip(lengths, 1, 8)),
      sink_logits=jnp.ones(2),
      implementation=implementation,
  ).out


def _linear(implementation, query, key):
  return linear_lib.linear_attention(
      query, key, key, decay=jnp.full(2, 0.9), implementation=implementation
  ).out


def _delta(implementation, value, key):
  gates = jnp.full(value.shape[:3], 0.5)
  return delta_lib.gated_delta_rule(
      key, 0.3 * key, value, -gates, gates, implementation=implementation
  ).out


def _mlp(implementation, x, up):
  return mlp_lib.gather_mlp(
      x, up, up, _IDS, block_size=128, implementation=implementation
  )


def _project(implementation, x, kernel):
  into = heads_lib.project_in(x, kernel, _IDS, implementation=implementation)
  return heads_lib.project_out(
      into, kernel, _IDS, implementation=implementation
  )


def _decode(implementation, query, key):
  cache = slots.empty(query.shape[0], 1, 16, 16)
  positions = jnp.zeros(query.shape[0], jnp.int32)
  out, *_ = decode_lib.decode_step(
      query, key, key, cache, positions, implementation=implementation
  )
  return out


def _decode_pages(implementation, query, key):
  pool = jax.tree.map(lambda x: x[:, 0], slots.empty(2, 1, 16, 16))
  batch = query.shape[0]
  table, ones = jnp.arange(batch, dtype=jnp.int32), jnp.ones(batch, jnp.int32)
  out, *_ = paged_lib.decode_step(
      query,
      key,
      key,
      pool,
      table[:, None],
      ones,
      0 * ones,
      implementation=implementation,
  )
  return out


# Op -> what it computes of an implementation and two arrays, and those: one is
# split over the mesh, the other is shared.
OPS = {
    "attention": (_attend, normal(2, 8, 2, 16), normal(2, 8, 1, 16)),
    "attention_by_data": (
        _attend_by_data,
        normal(2, 8, 2, 16),
        normal(2, 8, 1, 16),
    ),
    "linear": (_linear, normal(2, 8, 2, 16), normal(2, 8, 1, 16)),
    "mlp": (_mlp, normal(2, 128), normal(256, 128)),
    "project": (_project, normal(2, 128), normal(2, 16, 128)),
    "decode": (_decode, normal(2, 2, 16), normal(2, 1, 16)),
    "pages": (_decode_pages, normal(2, 2, 16), normal(2, 1, 16)),
    "delta": (_delta, normal(2, 8, 2, 16), normal(2, 8, 1, 16)),
}


def loss(op, implementation):
  """The op's sum of squares, of its two arrays."""
  function = OPS[op][0]
  return lambda x, w: (function(implementation, x, w) ** 2).sum()
