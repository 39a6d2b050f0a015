"""Queries, keys and values that have seen the tokens just before.

  q_t = sum_u w_u q'_{t-u},   u = 0 ... w - 1,   keys and values likewise

causal depthwise convolutions after the projections, before rotation: with one
kernel of H channels for all heads those of RCMHA, with a kernel of each head
the multi-DConv-head attention of Primer
(https://arxiv.org/abs/2109.08668). One layer can then do what plain attention
needs two for: a key that says which token came before its own. Decoding keeps
the last w - 1 inputs.

Paper's settings: width 3, a kernel for every head channel (Primer).

Letters: B batch, T tokens, W = w - 1 inputs that are kept, N query heads, K key
and value heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require

_PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Convolved:
  """A rule that prepares queries, keys and values.

  Attributes:
    width: w, a token's own place included.
    shared: Whether heads share their kernel.
    start: Standard deviation round the kernel that leaves all as it is.
  """

  name: ClassVar[str] = "convolved"
  paper: ClassVar[str] = "https://arxiv.org/abs/2109.08668"
  neutral: ClassVar[str] = "convolved:start=0"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      part: (None, "tensor", None) for part in _PARTS
  }

  width: int = 3
  shared: bool = False
  start: float = 0.1

  def __post_init__(self):
    require.at_least("convolved: width", self.width, 1)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns a kernel each, [w, N, H], or [w, 1, H] where heads share it."""
    found = {}
    for one, part in zip(jax.random.split(key, 3), _PARTS, strict=True):
      heads = config.num_heads if part == "query" else config.num_kv_heads
      shape = (self.width, 1 if self.shared else heads, config.head_dim)
      noise = self.start * jax.random.normal(one, shape)
      found[part] = noise.at[0].add(1)
    return found

  def init_state(
      self, config: configs.TransformerConfig, layer: int, batch_size: int
  ) -> dict[str, Array]:
    """Returns the inputs before the first token, 0: [B, W, N, H] each."""
    shape = lambda heads: (batch_size, self.width - 1, heads, config.head_dim)
    return {
        part: jnp.zeros(
            shape(config.num_heads if part == "query" else config.num_kv_heads)
        )
        for part in _PARTS
    }

  def prepare(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B T K H"],
      value: Float[Array, "B T K H"],
      state: PyTree,
  ) -> tuple[Array, Array, Array, PyTree]:
    """Returns what the convolutions give, and the newest inputs."""
    lengths = (call.positions >= 0).sum(axis=1)
    made, after = [], {}
    for part, x in zip(_PARTS, (query, key, value), strict=True):
      zeros = jnp.zeros((len(x), self.width - 1, *x.shape[2:]), x.dtype)
      before = zeros if state is None else state[part].astype(x.dtype)
      both = jnp.concatenate([before, x], axis=1)
      made.append(convolve(both, params[part], x.shape[1]))
      if state is not None:
        newest = last_inputs(both, lengths, self.width - 1)
        after[part] = newest.astype(state[part].dtype)
    return (*made, None if state is None else after)


def convolve(
    x: Float[Array, "B L N H"],
    kernel: Float[Array, "w #N H"],
    length: int,
    since: Int[Array, "B T"] | None = None,
    step: int = 1,
) -> Float[Array, "B T N H"]:
  """Sums kernel_u x_{t - step u} for the last `length` places t of x.

  Args:
    x: Inputs.
    kernel: Of the newest input first.
    length: T.
    since: Places before each that may be read; None is all.
    step: Places between two that are read.
  """
  first = x.shape[1] - length
  parts = [
      kernel[u].astype(x.dtype)[None, None]
      * x[:, first - step * u : first - step * u + length]
      for u in range(len(kernel))
  ]
  if since is not None:
    seen = lambda u: (since >= step * u)[..., None, None]
    parts = [jnp.where(seen(u), part, 0) for u, part in enumerate(parts)]
  return sum(parts[1:], parts[0])


def last_inputs(
    x: Float[Array, "B L N H"], lengths: Int[Array, "B"], num: int
) -> Float[Array, "B W N H"]:
  """The newest of each sequence's `num` old inputs and `lengths` new ones."""
  places = lengths[:, None] + jnp.arange(num)[None]
  return jnp.take_along_axis(x, places[..., None, None], axis=1)
