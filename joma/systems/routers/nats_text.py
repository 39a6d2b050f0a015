"""Whole texts through both ways of NAtS-L.

Letters: B batch, T tokens, D width, N query heads, K key and value heads, H
head size, C chunks, U tokens of a chunk.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.systems import newest_inputs
from joma.systems.mixers import delta_rule
from joma.systems.mixers import gdn
from joma.systems.routers import nats_ways
from joma.systems.score_rules import convolved
from joma.transformer import hooks


@runtime_checkable
class Routing(Protocol):
  """A system of this kind; see `nats.Nats`."""

  name: ClassVar[str]

  @property
  def chunk(self) -> int:
    """U."""
    ...

  @property
  def slots(self) -> int:
    """Chunks of keys that a cache has room for; 0 is all of a text."""
    ...

  @property
  def width(self) -> int:
    """Tokens that the convolutions read, w."""
    ...

  @property
  def epsilon(self) -> float:
    """Of the norms."""
    ...

  @property
  def rule(self) -> gdn.Gdn:
    """Of the linear way."""
    ...

  def routes(
      self, params: hooks.Params, mean: Float[Array, "B C D"]
  ) -> tuple[Bool[Array, "B C K"], Float[Array, "B C K"]]:
    """Returns which chunks are kept, and probabilities of what was chosen."""
    ...

  def finish(
      self,
      params: hooks.Params,
      x: Float[Array, "B T D"],
      query: Float[Array, "B T N H"],
      soft: Float[Array, "B T N H"],
      linear: Float[Array, "B T N H"],
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs."""
    ...


class Text(NamedTuple):
  """What texts were read as, and what they leave.

  Attributes:
    out: Of the heads [B, T, N, H].
    soft: What attention read.
    linear: What the rule read.
    vectors: Of the tokens.
    is_kept: Which chunks stay as keys, complete or not [B, C, K].
    state: Before each text's last, incomplete chunk [B, N, H, H].
    inner: After its last token.
  """

  out: Float[Array, "B T N H"]
  soft: Float[Array, "B T N H"]
  linear: Float[Array, "B T N H"]
  vectors: nats_ways.Vectors
  is_kept: Bool[Array, "B C K"]
  state: Float[Array, "B N H H"]
  inner: Float[Array, "B N H H"]


def vectors(
    system: Routing,
    params: hooks.Params,
    x: Float[Array, "B T D"],
    both: Mapping[str, Float[Array, "B L _ H"]],
) -> nats_ways.Vectors:
  """Convolves and norms.

  Args:
    system: The router.
    params: Of the layer.
    x: What it reads.
    both: Queries, keys and values by name, the w - 1 inputs before them first.
  """
  length = x.shape[1]
  made = [
      convolved.convolve(both[part], params[part], length)
      for part in newest_inputs.PARTS
  ]
  query, key, value = (jax.nn.silu(each) for each in made)
  norm = lambda x, name: normed(x, params[name], system.epsilon).astype(x.dtype)
  unit = delta_rule.unit(made, query.shape[2])
  return nats_ways.Vectors(
      query,
      norm(query, "soft_query"),
      norm(key, "soft_key"),
      value,
      (*unit, *system.rule.rates(params, x)),
  )


def normed(
    x: Float[Array, "B T N H"], scale: Float[Array, "H"], epsilon: float
) -> Float[Array, "B T N H"]:
  """RMS norm of each head, float32."""
  wide = x.astype(jnp.float32)
  size = jnp.square(wide).mean(axis=-1, keepdims=True)
  return wide * jax.lax.rsqrt(size + epsilon) * scale[None, None, None]


def read(
    system: Routing,
    params: hooks.Params,
    call: hooks.Call,
    arrays: tuple[Array, Array, Array],
    lengths: Int[Array, "B"],
) -> Text:
  """Reads texts from their first tokens.

  Args:
    system: The router.
    params: Of the layer.
    call: Of the layer.
    arrays: Queries, keys and values as they were projected.
    lengths: Tokens of each; what follows them leaves nothing.
  """
  both = {}
  for part, x in zip(newest_inputs.PARTS, arrays, strict=True):
    before = jnp.zeros((len(x), system.width - 1, *x.shape[2:]), x.dtype)
    both[part] = jnp.concatenate([before, x], axis=1)
  found = vectors(system, params, call.x, both)
  is_kept, prob = system.routes(params, means(call.x, system.chunk))
  # 0, with the gradient of the probability of what was chosen.
  slope = prob - jax.lax.stop_gradient(prob)
  options, size = call.options, system.chunk
  soft = nats_ways.attend(
      found, is_kept, None if call.has_cache else slope, size, options
  )
  linear, state, inner = nats_ways.fold(
      found, is_kept, slope, lengths, size, options
  )
  out = system.finish(params, call.x, found.query, soft, linear)
  return Text(out, soft, linear, found, is_kept, state, inner)


def means(x: Float[Array, "B T D"], size: int) -> Float[Array, "B C D"]:
  """Means over chunks, float32; of the last one if it is complete."""
  return nats_ways.in_chunks(x.astype(jnp.float32), size).mean(axis=2)
