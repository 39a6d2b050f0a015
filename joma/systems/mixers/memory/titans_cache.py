"""The memory of a text so far, as a cache: one size, whatever the text.

Letters: B batch, T new tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems.mixers import delta_state
from joma.systems.mixers.memory import titans_memory
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import one_by_one


@runtime_checkable
class Remembering(Protocol):
  """A mixer of this kind; see `titans.Titans`."""

  name: ClassVar[str]

  @property
  def depth(self) -> int:
    """Layers of the network."""
    ...

  @property
  def chunk(self) -> int:
    """Tokens whose gradients are of the same weights."""
    ...

  @property
  def loss(self) -> str:
    """Of squares, sum or mean."""
    ...

  @property
  def width(self) -> int:
    """Tokens that the convolutions read."""
    ...

  def first(self, params: hooks.Params) -> titans_memory.Weights:
    """Returns weights before the first token."""
    ...

  def tokens(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      both: dict[str, Array],
  ) -> titans_memory.Tokens:
    """Returns what the memory learns and is asked."""
    ...

  def finish(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      out: Float[Array, "B T N H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansCache:
  """A KVCache of one layer.

  Attributes:
    state: `titans_memory.State`; before the first token zeros, which the first
      weights then take the place of: there are none when a cache is made.
    length: Tokens of each text so far [B].
    inputs: The newest of queries, keys and values, by name, [B, w - 1, ., H].
    system: The mixer, static.
  """

  state: PyTree
  length: PyTree
  inputs: PyTree
  system: Remembering = dataclasses.field(metadata={"static": True})

  @property
  def honours(self) -> tuple[str, ...]:
    """Its mixer."""
    return (self.system.name,)

  def takes_pieces(self) -> bool:
    """Always: the state of a text so far is all that there is."""
    return True

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "TitansCache"]:
    """A first prompt as a whole text; what follows one by one."""
    arguments = (query, key, value, positions, rotate, options)
    cls = type(self)
    return one_by_one.but_first(cls.take, cls.attend, self, *arguments)

  def take(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "TitansCache"]:
    """Takes a first prompt, padded at its end, or one token a sequence."""
    call, system = options.call, self.system
    assert call is not None  # A layer gives it to the caches of its systems.
    params, is_token = call.params[system.name], positions >= 0
    lengths, both, after = is_token.sum(axis=1), {}, {}
    vectors = (query, key, value)
    for part, x in zip(delta_state.PARTS, vectors, strict=True):
      both[part] = jnp.concatenate([self.inputs[part].astype(x.dtype), x], 1)
      newest = convolved.last_inputs(both[part], lengths, system.width - 1)
      after[part] = newest.astype(self.inputs[part].dtype)
    tokens = system.tokens(params, call.x, both)
    first = system.first(params)
    state, is_mean = self._begun(first), system.loss == "mean"
    if query.shape[1] == 1:
      is_end = (self.length + 1) % system.chunk == 0
      out, state = titans_memory.step(state, tokens, is_token, is_end, is_mean)
    else:
      out, state = titans_memory.sweep(
          state, tokens, lengths, system.chunk, is_mean
      )
    cache = dataclasses.replace(
        self, state=state, length=self.length + lengths, inputs=after
    )
    out = system.finish(params, call.x, out).astype(query.dtype)
    return out, cache

  def _begun(self, first: titans_memory.Weights) -> titans_memory.State:
    """The state, of texts without a token yet with the first weights."""
    is_new, state = self.length == 0, self.state
    wide = tuple(
        jnp.broadcast_to(new[None], own.shape)
        for own, new in zip(state.memory, first, strict=True)
    )
    put = lambda weights: titans_memory.chosen(is_new, wide, weights)
    begin = lambda: state._replace(
        start=put(state.start), memory=put(state.memory)
    )
    return jax.lax.cond(is_new.any(), begin, lambda: state)


def init(
    system: Remembering, config: configs.TransformerConfig, batch_size: int
) -> TitansCache:
  """Returns the state before the first token."""
  heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  size = config.head_dim
  inputs = {
      part: jnp.zeros((batch_size, system.width - 1, num, size))
      for part, num in zip(delta_state.PARTS, heads, strict=True)
  }
  zeros = tuple(
      jnp.zeros((config.num_heads, size, size)) for _ in range(system.depth)
  )
  state = titans_memory.begin(zeros, batch_size)
  length = jnp.zeros((batch_size,), jnp.int32)
  return TitansCache(state, length, inputs, system)
