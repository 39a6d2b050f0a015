"""The state of a layer of the gated delta rule, and what passes through it.

One matrix a head and the w - 1 newest inputs of the convolutions, whatever the
text.

Letters: B batch, T tokens, W = w - 1, D width, N query heads, K key and value
heads, H head size.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems import newest_inputs
from joma.systems import of_system
from joma.systems.mixers import delta_rule
from joma.systems.score_rules import convolved
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import output


@runtime_checkable
class Ruled(Protocol):
  """A mixer of this kind; see `delta_layer.DeltaLayer`."""

  name: ClassVar[str]

  @property
  def width(self) -> int:
    """w, a token's own place included."""
    ...

  @property
  def epsilon(self) -> float:
    """Of the norm, beside the mean square."""
    ...

  def rates(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> tuple[Float[Array, "B T N *d"], Float[Array, "B T N"]]:
    """Returns logarithms of decays, of heads or of channels too, and beta."""
    ...

  def opening(
      self, params: hooks.Params, x: Float[Array, "B T D"]
  ) -> Float[Array, "B T N H"]:
    """Returns what the normed outputs are multiplied by, float32."""
    ...


def finish(
    system: Ruled,
    params: hooks.Params,
    x: Float[Array, "B T D"],
    out: Float[Array, "B T N H"],
) -> Float[Array, "B T N H"]:
  """Norms what was read and opens its gate."""
  wide = out.astype(jnp.float32)
  size = jnp.square(wide).mean(axis=-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(size + system.epsilon)
  wide = wide * params["scale"][None, None, None]
  return (wide * system.opening(params, x)).astype(out.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState(of_system.InPieces[Ruled]):
  """A KVCache of one layer.

  Attributes:
    state: Float32 [B, N, H, H].
    inputs: The newest of queries, keys and values, [B, W, N, H] or [B, W, K,
      H], by name.
  """

  state: PyTree
  inputs: PyTree

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "DeltaState"]:
    """One token: a step. More: texts padded at their ends, in one sweep."""
    call = options.call
    assert call is not None  # A layer gives it to the caches of its systems.
    params, is_token = call.params[self.system.name], positions >= 0
    both, inputs = newest_inputs.put_before(
        self.inputs, (query, key, value), is_token.sum(axis=1)
    )
    made = [
        convolved.convolve(x, params[part], query.shape[1])
        for part, x in both.items()
    ]
    vectors = delta_rule.unit(made, query.shape[2])
    arrays = (*vectors, *self.system.rates(params, call.x))
    sweep = self._step if query.shape[1] == 1 else self._sweep
    result = sweep(arrays, is_token, options)
    out = finish(self.system, params, call.x, result.out)
    return out, dataclasses.replace(self, state=result.state, inputs=inputs)

  def _step(
      self,
      arrays: tuple[Array, ...],
      is_token: Bool[Array, "B 1"],
      options: hooks.AttentionOptions,
  ) -> output.GatedDeltaRuleOutput:
    one = (x[:, 0] for x in arrays)
    result = api.step(self.state, *one, scale=options.scale)
    # Padding neither adds nor fades.
    state = jnp.where(is_token[..., None, None], result.state, self.state)
    return output.GatedDeltaRuleOutput(result.out[:, None], state)

  def _sweep(
      self,
      arrays: tuple[Array, ...],
      is_token: Bool[Array, "B T"],
      options: hooks.AttentionOptions,
  ) -> output.GatedDeltaRuleOutput:
    return delta_rule.rule(
        options,
        arrays,
        initial_state=self.state,
        lengths=is_token.sum(axis=1),
    )


def init(
    system: Ruled, config: configs.TransformerConfig, batch_size: int
) -> DeltaState:
  """Returns the empty state of one layer."""
  size = config.head_dim
  inputs = newest_inputs.none(config, batch_size, system.width)
  state = jnp.zeros((batch_size, config.num_heads, size, size))
  return DeltaState(system, state, inputs)
