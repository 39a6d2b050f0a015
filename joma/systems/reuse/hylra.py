"""HyLRA: a few layers read everything, the others what these liked best.

A full layer attends to all keys and hands on, for each query and key head, the
blocks of keys that got most of its attention, the first block and the query's
own among them; the layers behind it read these alone, up to the next full one
(https://arxiv.org/abs/2602.00777). Which layers are full is planned beforehand:
`joma.systems.profiles.layer_plan`. Choosing costs a full layer its logits once
more; what reads fewer keys has no choice of its own to make. XLA only: blocks
of queries are of one query.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, G =
N / K, L layers, W blocks that are read, H head size.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import dotted
from joma.systems.reuse import heaviest
from joma.systems.selectors import block_cache
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Hylra(block_cache.InBlocks):
  """A selector that hands on.

  Attributes:
    full: Layers that read everything, by their numbers with dots between, as
      0.1.5, the first layer among them; all if empty.
    k: Keys that the others read, a multiple of `block`.
    block: Keys that are read together.
    reuse: Whether the others read what a full layer chose; else each chooses by
      its own weights, which saves nothing and is to be compared with.
  """

  name: ClassVar[str] = "hylra"
  paper: ClassVar[str] = "https://arxiv.org/abs/2602.00777"
  neutral: ClassVar[str] = "hylra"

  full: str = ""
  k: int = 512
  block: int = 16
  reuse: bool = True

  def __post_init__(self):
    if self.layers and self.reuse and 0 not in self.layers:
      raise errors.UserError(
          f"hylra: full={self.full} must have the first layer, 0, in it:"
          " nothing comes before it that it could take from."
      )
    if self.block < 1 or self.k < 2 * self.block or self.k % self.block:
      raise errors.UserError(
          f"hylra: k={self.k} must be a multiple of block={self.block}, two of"
          " them at least."
      )

  @property
  def layers(self) -> tuple[int, ...]:
    """Those that read everything; none says that all do."""
    return dotted.numbers("hylra: full", self.full)

  def is_full(self, layer: int) -> bool:
    """Whether a layer reads everything."""
    return not self.full or layer in self.layers

  def select(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> hooks.Where:
    """Returns the mask, or the blocks that the last full layer chose."""
    if self.is_full(call.layer):
      return mask
    if self.reuse:
      blocks, is_valid = call.carry[self.name]
    else:
      blocks, is_valid = self._chosen(query, key, mask, call.options)
    num_groups = query.shape[2] // key.shape[2]
    by_head = lambda x: jnp.repeat(x.swapaxes(1, 2), num_groups, axis=1)
    count = by_head(is_valid).sum(axis=-1).astype(jnp.int32)
    return selection.Selection(by_head(blocks), count, mask, 1, self.block)

  def _chosen(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
      options: hooks.AttentionOptions,
  ) -> tuple[Int[Array, "B T K W"], Bool[Array, "B T K W"]]:
    places = jnp.arange(query.shape[1])[None], jnp.arange(key.shape[1])[None]
    size, num = self.block, self.k // self.block
    return heaviest.choose(query, key, mask, options, places, size, num)

  def carry(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> PyTree:
    """Returns blocks [B, T, K, W] and which count; () where nobody takes."""
    if not self.is_full(call.layer):
      return call.carry.get(self.name, ())
    last = call.layer + 1 == call.config.num_layers
    if last or self.is_full(call.layer + 1) or not self.reuse:
      return ()
    if made.kv_cache is None:
      assert isinstance(made.where, masks.Mask)  # As `select` returned it.
      return self._chosen(made.query, made.key, made.where, made.options)
    return heaviest.choose_of_cache(
        call, made, self.block, self.k // self.block
    )

  def probe(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Array]:
    """Returns the share [B, T, K] of its own choice that a layer was handed."""
    if self.is_full(call.layer) or not isinstance(
        made.where, selection.Selection
    ):
      return {}
    inner = made.where.mask
    assert inner is not None  # As `select` returned it.
    own, counts = self._chosen(made.query, made.key, inner, made.options)
    handed, is_handed = call.carry.get(self.name) or (own, counts)
    shared = heaviest.share_handed(own, counts, handed, is_handed)
    return {"overlap": shared}

  def choose_by(
      self,
      query: Float[Array, "B K G H"],
      kept: PyTree,
      position: Int[Array, "B"],
      call: hooks.Call,
  ) -> tuple[Int[Array, "B K W"], Bool[Array, "B K W"]] | None:
    """Returns what the last full layer chose for the same token."""
    if self.is_full(call.layer):
      return None
    if not self.reuse:
      raise errors.UserError(
          "hylra: reuse=false is for whole texts; decode with reuse=true."
      )
    blocks, is_valid = call.carry[self.name]
    return blocks[:, 0], is_valid[:, 0]
