"""The memory of a text so far, as a cache: one size, whatever the text.

Letters: B batch, T new tokens, D width, N query heads, K key and value heads, H
head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.systems import newest_inputs
from joma.systems import of_system
from joma.systems.mixers.memory import titans_memory
from joma.transformer import config as configs
from joma.transformer import hooks


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
  def rule(self) -> titans_memory.Rule:
    """How the network answers, and by what it learns."""
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
class TitansCache(
    of_system.InPieces[Remembering], of_system.PromptFirst[Remembering]
):
  """A KVCache of one layer.

  Attributes:
    state: `titans_memory.State`; before the first token zeros, which the first
      weights then take the place of: there are none when a cache is made.
    length: Tokens of each text so far [B].
    inputs: The newest of queries, keys and values, by name, [B, w - 1, ., H].
  """

  state: PyTree
  length: PyTree
  inputs: PyTree

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
    lengths = is_token.sum(axis=1)
    both, inputs = newest_inputs.put_before(
        self.inputs, (query, key, value), lengths
    )
    tokens = system.tokens(params, call.x, both)
    first = system.first(params)
    state, rule = self._begun(first), system.rule
    if query.shape[1] == 1:
      is_end = (self.length + 1) % system.chunk == 0
      out, state = titans_memory.step(state, tokens, is_token, is_end, rule)
    else:
      out, state = titans_memory.sweep(
          state, tokens, lengths, system.chunk, rule
      )
    cache = dataclasses.replace(
        self, state=state, length=self.length + lengths, inputs=inputs
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
  size = config.head_dim
  inputs = newest_inputs.none(config, batch_size, system.width)
  zeros = tuple(
      jnp.zeros((config.num_heads, size, size)) for _ in range(system.depth)
  )
  state = titans_memory.begin(zeros, batch_size)
  length = jnp.zeros((batch_size,), jnp.int32)
  return TitansCache(system, state, length, inputs)
