"""Native sparse attention: three branches of keys, mixed by learned gates.

  out = g_1 compressed + g_2 selected + g_3 window,   g = sigmoid(x W + b)

Compressed reads one key and value for each complete block of B, their means or
what an MLP makes of them; selected reads the query's own block and the k - 1
before it to which the compressed keys gave most weight, summed over the heads
of a group; window the newest keys (https://arxiv.org/abs/2502.11089). With a
gate at 1 and the others at 0 a branch is given exactly. Ours differs: blocks do
not overlap, all branches share their keys and values, which are rotated when
blocks are compressed, and the first block is not always read.

Compressed and window run on every implementation of the op; selected is XLA
only, as every query selects for itself.

Paper's settings: compressed blocks of 32 every 16 keys, 16 selected blocks of
64 (first and 2 newest among them), a window of 512.

Letters: B batch, T queries, S keys, D width, N query heads, K key and value
heads, G = N / K, H head size, C blocks, U keys of a block, R hidden units.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma.systems.selectors.branches import choice
from joma.systems.selectors.branches import compression
from joma.systems.selectors.branches import nsa_cache
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import layer_hooks
from kernels_pallas import masks
from kernels_pallas.attention import api
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Nsa:
  """A mixer.

  Attributes:
    k: Blocks that a query reads, its own included.
    block: U, keys of a block.
    window: Newest keys that a query reads, its own included.
    compress: How a block becomes one key and one value: mean, or mlp.
    hidden: R, of mlp.
  """

  name: ClassVar[str] = "nsa"
  paper: ClassVar[str] = "https://arxiv.org/abs/2502.11089"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "gate": ("fsdp", "tensor", None),
      "bias": ("tensor", None),
      **{f"{of}_place": () for of in ("key", "value")},
      **{f"{of}_in": (None, None) for of in ("key", "value")},
      **{f"{of}_out": (None, None) for of in ("key", "value")},
  }

  k: int = 4
  block: int = 64
  window: int = 512
  compress: str = "mean"
  hidden: int = 64

  def __post_init__(self):
    for name in ("k", "block", "window", "hidden"):
      require.at_least(f"nsa: {name}", getattr(self, name), 1)
    require.one_of("nsa: compress", self.compress, ("mean", "mlp"))

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns W [D, N, 3], b [N, 3] and, of mlp, its weights."""
    heads, size = config.num_heads, config.head_dim
    keys = iter(jax.random.split(key, 3))
    normal = lambda *shape: (
        shape[0] ** -0.5 * jax.random.normal(next(keys), shape)
    )
    found = {
        "gate": normal(config.embed_dim, heads, 3),
        "bias": jnp.zeros((heads, 3)),
    }
    if self.compress == "mlp":
      for of in ("key", "value"):
        own = compression.draw(next(keys), self.block, size, self.hidden)
        found |= {f"{of}_{part}": x for part, x in own.items()}
    return found

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts; refuses other masks."""
    layer_hooks.check_causal(self.name, call, mask)
    query = call.rotate(query, call.positions)
    key = call.rotate(key, call.positions)
    return self.of_text(params, call, query, key, value)

  def of_text(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
  ) -> Float[Array, "B T N H"]:
    """Attends causally to whole texts; arrays are rotated."""
    length, options = query.shape[1], call.options
    keys, values = (
        self.compressed(params, of, compression.in_blocks(x, self.block))
        for of, x in (("key", key), ("value", value))
    )
    complete = (np.arange(length, dtype=np.int32)[None] + 1) // self.block
    before = masks.Mask(np.zeros_like(complete), complete)
    near = masks.sliding_window(length, window=self.window)
    where = choice.of_text(query, keys, self.block, self.k, options.scale)
    shared: Any = dict(
        scale=options.scale, logits_soft_cap=options.logits_soft_cap
    )
    attend = lambda key, value, where, implementation: api.attention(
        query, key, value, where=where, implementation=implementation, **shared
    ).out
    named = options.implementation
    outs = (
        attend(keys, values, before, named),
        attend(key, value, where, named if named == "reference" else "xla"),
        attend(key, value, near, named),
    )
    return self.mixed(params, call, outs)

  def compressed(
      self, params: hooks.Params, of: str, blocks: Float[Array, "B C U K H"]
  ) -> Float[Array, "B C K H"]:
    """One key or value for each block.

    Args:
      params: Of the layer.
      of: key or value.
      blocks: Rotated keys, or values.
    """
    if self.compress == "mean":
      return blocks.mean(axis=2)
    own = {part: params[f"{of}_{part}"] for part in compression.PARTS}
    return compression.by_mlp(own, blocks)

  def mixed(
      self,
      params: hooks.Params,
      call: hooks.Call,
      outs: tuple[Array, Array, Array],
  ) -> Float[Array, "B T N H"]:
    """Sums what the branches gave, by their gates."""
    wide = call.x.astype(jnp.float32)
    opening = jnp.einsum("BTD,DNI->BTNI", wide, params["gate"])
    gates = jax.nn.sigmoid(opening + params["bias"][None, None])
    return jnp.einsum(
        "BTNI,IBTNH->BTNH", gates.astype(outs[0].dtype), jnp.stack(outs)
    )

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns an empty cache of keys, values and what blocks became."""
    capacity = -(-capacity // self.block) * self.block
    return nsa_cache.init(self, config, layer, batch_size, capacity, dtype)
