"""What an attention system may do to a layer: the protocols.

A system is a frozen dataclass of options with a `name` and the methods of one
or more protocols below; a layer calls what its systems have and names none of
them. `TransformerConfig.attention` chooses them. In the order of a call:

  read      what the projections of query, key and value read
  share     whether queries and keys are those of an earlier layer
  prepare   query, key, value before rotation and cache
  select    which keys each query may read; at decode, a cache of its own
  weights   what takes the place of softmax
  mixer     what takes the place of attention, with a cache of its own
  gate      the heads' outputs, and losses beside the cross-entropy
  losses    losses of what was made
  carry     what is handed to later layers
  probe     what is sown to be looked at

Parameters are explicit: `Parametric.init_params` makes a dictionary of arrays,
which lies below `attn/NAME` in the tree and comes back as `params`.

Letters: B batch, T new tokens, S keys, D width, N query heads, K key and value
heads, H head size.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer.weighing import rule as weighing
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib

Rotate = Callable[[Array, Array], Array]
Params = Mapping[str, Array]
Where = masks.Mask | selection_lib.Selection
WeightRule = weighing.WeightRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One call of a layer's attention, as its systems see it.

  Attributes:
    config: The model's.
    layer: Which layer, from 0.
    x: What attention reads [B, T, D], normalized where the model does so first.
    positions: Of the tokens [B, T]; -1 marks padding.
    rotate: Applies rotary positions; does nothing where there are none.
    options: As a cache gets them, without this call.
    params: Of each of the layer's systems, by its name.
    carry: What earlier layers handed on, by name; `resid_embed` is what the
      first layer reads. Leaves of tokens are [B, T, ...].
    is_training: Whether the layer drops.
    has_cache: Whether keys come from a cache.
    made: What the layer has made before its gate, which alone finds it here;
      None for the others.
  """

  config: configs.TransformerConfig
  layer: int
  x: Float[Array, "B T D"]
  positions: Int[Array, "B T"]
  rotate: Rotate
  options: "AttentionOptions"
  params: Mapping[str, Params]
  carry: Mapping[str, Any]
  is_training: bool
  has_cache: bool
  made: "Made | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """What attention needs besides keys, values and queries.

  Attributes:
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(logits / c); None is off.
    window: Keys that a query sees, its own included; None is all.
    implementation: Of the op, see `kernels_pallas.implementations`.
    weights: What takes the place of softmax; None is softmax.
    out_kernel: What heads' outputs are multiplied with, for caches that ask
      what a value would add; None where nobody says.
    call: For the caches of systems and those that ask for it (`ReadsCall`);
      else None where the layer has no system.
  """

  scale: float
  logits_soft_cap: float | None = None
  window: int | None = None
  implementation: implementations.Implementation | None = None
  weights: WeightRule | None = None
  out_kernel: Float[Array, "N H D"] | None = None
  call: Call | None = None

  @property
  def sink_logits(self) -> Float[Array, "N"] | None:
    """Of `weights`, for the ops that take them."""
    return None if self.weights is None else self.weights.sink_logits


@runtime_checkable
class KVCache(Protocol):
  """Keys and values of one layer: what it keeps and what queries see of it.

  A cache that follows more than softmax says so in an attribute `honours`:
  `sinks`, `keys`, `weights`, or the name of a mixer or selector.
  """

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: Rotate,
      options: AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "KVCache"]:
    """Takes in new tokens and attends from them.

    Args:
      query: Not rotated yet.
      key: Not rotated yet: a cache may keep keys before or after rotation.
      value: Of the same tokens.
      positions: In the sequence, from 0; -1 marks padding, which is not kept.
      rotate: Applies rotary positions; does nothing where there are none.
      options: Scale, window, weights; the same at every call of a layer.

    Returns:
      (out, cache). Rows of padding are arbitrary.
    """
    ...


@runtime_checkable
class Bounded(Protocol):
  """A cache that some number of tokens does not fit into."""

  def num_positions(self) -> int | None:
    """Positions from 0 that fit; None where older tokens leave."""
    ...


@runtime_checkable
class Overflows(Protocol):
  """A cache that what a text says, not its length, may fill.

  From then on its outputs are NaN.
  """

  def overflow(self) -> str | None:
    """What did not fit, in a sentence with its number; None if all did."""
    ...


@runtime_checkable
class ReadsCall(Protocol):
  """A cache that may look at `AttentionOptions.call`."""

  def reads_call(self) -> bool:
    """Whether it does; where it does not, the call costs nothing."""
    ...


@runtime_checkable
class TakesPieces(Protocol):
  """A cache that may be given a prompt piece by piece."""

  def takes_pieces(self) -> bool:
    """Whether that gives what the prompt gives at once."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """What a layer's attention has made, for `carry` and `probe`.

  Attributes:
    query: As the product reads it [B, T, N, H]; before rotation with a cache
      or a mixer.
    key: Likewise [B, S, K, H].
    value: Of the keys.
    where: Mask or selection; None with a cache or a mixer.
    head_out: Heads' outputs [B, T, N, H], after the gate.
    options: Of the call, with its weights.
    kv_cache: With what the call has written; None without a cache.
  """

  query: Float[Array, "#B T N H"]
  key: Float[Array, "#B S K H"]
  value: Float[Array, "B S K H"]
  where: Where | None
  head_out: Float[Array, "B T N H"]
  options: AttentionOptions
  kv_cache: PyTree = None


@runtime_checkable
class System(Protocol):
  """What every system has: its name in `names.SYSTEMS`.

  The project's have two more: `paper`, and `neutral`, an entry with which it is
  softmax, empty where there is none.
  """

  name: str


@runtime_checkable
class Parametric(System, Protocol):
  """A system with parameters.

  Attributes:
    axes: Of each parameter, the mesh axes that split its axes, as in the table
      of `sharding`.
  """

  axes: Mapping[str, tuple[str | None, ...]]

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Draws the parameters of one layer."""
    ...


@runtime_checkable
class SeesLater(System, Protocol):
  """Lets later tokens change what earlier ones give; `sees_later` says how."""

  sees_later: str


@runtime_checkable
class Read(System, Protocol):
  """Says what the projections read, in the place of the layer's input."""

  def read(self, params: Params, call: Call) -> tuple[Array, Array, Array]:
    """Returns what query, key and value are projections of, [B, T, D] each.

    Where all texts share the first two, these are [1, T, D]: weights are then
    computed once. A layer that takes queries and keys from an earlier one
    (`Share`) asks nothing of it, and has no parameters of it.
    """
    ...


@runtime_checkable
class Share(System, Protocol):
  """Lets layers take queries and keys from the last one that made them.

  What is taken is what the projections gave, before `prepare` and rotation; a
  layer that takes has no projections of queries and keys.
  """

  def is_source(self, config: configs.TransformerConfig, layer: int) -> bool:
    """Whether a layer makes its own; the first one does."""
    ...


@runtime_checkable
class Prepare(System, Protocol):
  """Changes queries, keys and values before rotation and cache.

  Of several in a layer each changes what the one before it made, in the order
  of the entry.
  """

  def init_state(
      self, config: configs.TransformerConfig, layer: int, batch_size: int
  ) -> PyTree:
    """What decoding carries from token to token, leaves [B, ...], or None."""
    ...

  def prepare(
      self,
      params: Params,
      call: Call,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B T K H"],
      value: Float[Array, "B T K H"],
      state: PyTree,
  ) -> tuple[Array, Array, Array, PyTree]:
    """Returns query, key, value and state; state is None without a cache."""
    ...


@runtime_checkable
class Weights(System, Protocol):
  """Takes the place of softmax, or adds to its denominator."""

  def weights(self, params: Params, call: Call) -> WeightRule:
    """Returns how weights follow from logits."""
    ...


@runtime_checkable
class Select(System, Protocol):
  """Chooses which keys each query may read."""

  def select(
      self,
      params: Params,
      call: Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B S K H"],
      mask: masks.Mask,
  ) -> Where:
    """Returns blocks of keys, all allowed by the mask, or the mask itself.

    Arrays are rotated.
    """
    ...

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> KVCache:
    """Returns an empty cache whose steps choose among what it keeps."""
    ...


@runtime_checkable
class Mixer(System, Protocol):
  """Takes the place of attention."""

  def mix(
      self,
      params: Params,
      call: Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns the heads' outputs of whole texts; arrays are not rotated."""
    ...

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> KVCache:
    """Returns the empty state, as a cache."""
    ...


@runtime_checkable
class Gate(System, Protocol):
  """Changes the heads' outputs before the output projection."""

  def gate(
      self, params: Params, call: Call, head_out: Float[Array, "B T N H"]
  ) -> tuple[Float[Array, "B T N H"], Mapping[str, Float[Array, ""]]]:
    """Returns the outputs, and losses by name that training adds.

    What they were made of is in `call.made`.
    """
    ...


@runtime_checkable
class Losses(System, Protocol):
  """Has losses of what was made; called where these count, without a cache."""

  def losses(
      self, params: Params, call: Call, made: Made
  ) -> Mapping[str, Float[Array, ""]]:
    """Returns losses by name that training adds."""
    ...


@runtime_checkable
class Carry(System, Protocol):
  """Hands something to later layers, which find it in `Call.carry`."""

  def carry(self, params: Params, call: Call, made: Made) -> PyTree:
    """Returns what is handed on under the system's name."""
    ...


@runtime_checkable
class Probe(System, Protocol):
  """Looks at what was made; called only where intermediates are wanted."""

  def probe(self, params: Params, call: Call, made: Made) -> dict[str, Array]:
    """Returns what is sown as `NAME_KEY` under "intermediates"."""
    ...
