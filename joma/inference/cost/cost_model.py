"""What a prefill and a decode step must move, compute and hold.

  bytes of a step = weights + sum over layers and KV heads of
                    B [C (2 H b + a) + 2 H b]
  time            >= max(bytes / bandwidth, FLOPs / peak)

with C slots read, b bytes a number, a bytes of scores and positions a slot, and
the second 2 H b for the new token. Bytes count every array once, which kernels
that fuse well come close to; no figure here is measured. Attention systems add
what `system_costs` counts of their own code. Imports no jax for models without
systems.

Letters: B batch, T tokens so far, C slots, L layers, N query heads, K key and
value heads, H head size, D width, F hidden width.
"""

from collections.abc import Collection
import dataclasses
import math
from typing import Literal

from joma.inference.cost import cache_plan
from joma.inference.cost import chips
from joma.inference.cost import model_size
from joma.inference.cost import system_costs
from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Config = configs.TransformerConfig
Dtype = Literal["float32", "bfloat16", "int8"]
ITEMSIZE: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
# A stored vector of int8 numbers has one float32 scale.
_SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What the model is asked for.

  Attributes:
    batch_size: B, sequences that are continued together.
    length: T, tokens of each so far: of the prompt in a prefill.
    weight_dtype: How parameters are stored. Scales of int8 ones, one a channel,
      are not counted.
    cache_dtype: How keys and values are stored.
  """

  batch_size: int
  length: int
  weight_dtype: Dtype = "bfloat16"
  cache_dtype: Dtype = "bfloat16"

  def __post_init__(self):
    require.at_least("batch_size", self.batch_size, 1)
    require.at_least("length", self.length, 1)
    for name in ("weight_dtype", "cache_dtype"):
      if getattr(self, name) not in ITEMSIZE:
        raise errors.UserError(
            f"{name}={getattr(self, name)} is none of {', '.join(ITEMSIZE)}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextualSparsity:
  """Heads and neurons that are computed of each token (arXiv 2310.17157).

  Attributes:
    heads_kept: Fraction of query heads, in (0, 1].
    neurons_kept: Fraction of the MLP's neurons, in (0, 1].
    predictor_rank: Of the two predictors of each layer, D to rank to N and to
      F; 0 is none, as where norms of the weights or the prompt choose.
    is_shared: Whether all sequences of a batch keep the same ones. If not, a
      step reads their union, 1 - (1 - kept)^B of all when they are independent.
    skips_key_value: Whether a skipped head's key and value are not computed
      either. They then have to be filled in later; with grouped queries they
      are a small part, and serve heads that are kept.
  """

  heads_kept: chips.Number = 1.0
  neurons_kept: chips.Number = 1.0
  predictor_rank: int = 0
  is_shared: bool = True
  skips_key_value: bool = False

  def __post_init__(self):
    for name in ("heads_kept", "neurons_kept"):
      if not 0 < getattr(self, name) <= 1:
        raise errors.UserError(
            f"{name} must lie in (0, 1], got {getattr(self, name)}."
        )
    require.at_least("predictor_rank", self.predictor_rank, 0)

  def read(self, kept: chips.Number, batch_size: int) -> chips.Number:
    """Fraction that a step of a whole batch reads."""
    return kept if self.is_shared else 1 - (1 - kept) ** batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Of one prefill or one decode step.

  Attributes:
    weight_bytes: Parameters that are read.
    cache_bytes: Keys, values, scores, positions: read and written.
    flops: Of the matrix products, a multiplication and an addition being two.
    memory_bytes: Parameters and caches, for as long as the sequences live.
      Activations come on top: megabytes in a step.
    unknown: What of the attention systems the figures leave out, in words.
  """

  weight_bytes: chips.Number
  cache_bytes: chips.Number
  flops: chips.Number
  memory_bytes: chips.Number
  unknown: tuple[str, ...] = ()

  @property
  def num_bytes(self) -> chips.Number:
    """All that is read and written."""
    return self.weight_bytes + self.cache_bytes

  def seconds(self, chip: chips.Chip) -> float:
    """Least time on a chip."""
    return chip.seconds(self.num_bytes, self.flops)

  def bound(self, chip: chips.Chip) -> Literal["memory", "arithmetic"]:
    """What that time is made of."""
    moving = self.num_bytes / chip.bytes_per_sec
    computing = self.flops / chip.flops_per_sec
    return "memory" if moving >= computing else "arithmetic"


def decode(
    config: Config,
    load: Load,
    plan: cache_plan.CachePlan,
    sparsity: ContextualSparsity | None = None,
    *,
    counts_lookup: bool = False,
) -> Cost:
  """Cost of one token more for each sequence.

  Args:
    config: The model's.
    load: T is the number of tokens in the caches, the new one among them.
    plan: What they keep of it.
    sparsity: What is computed of the model; None is all.
    counts_lookup: Whether weights include the tables of which B rows are read:
      an embedding that is not the output layer too, and learned positions.
      They are in what is published as a model's size.

  Raises:
    UserError: If the plan does not fit config or length.
  """
  if sparsity is not None:
    configs.require_dense(config, "Contextual sparsity")
  sparsity = sparsity or ContextualSparsity()
  arguments = (config, load.length, load.cache_dtype)
  systems = system_costs.of_step(*arguments)
  owners = system_costs.of_cache(*arguments).owners
  slots = _kept_slots(config, plan.slots(config, load.length), owners)
  read = _kept_slots(config, plan.read_slots(config, load.length), owners)
  read_bytes = _bytes_of(config, load, plan, read)
  read = sum(map(sum, read))
  num_pages = _num_pages(plan, slots)
  vector = _vector_bytes(config, load)
  # Least and largest key of each page are read as keys are; a new key and value
  # are written by each layer that has no cache of its own.
  num_writing = config.num_layers - len(owners)
  per_sequence = read_bytes + read * plan.slot_traffic
  per_sequence += 2 * vector * (num_pages + num_writing * config.num_kv_heads)
  per_sequence += systems.moved
  group = config.num_heads // config.num_kv_heads
  # Each page's two bounds are multiplied with the query, as a key and a value.
  attention = 4 * group * config.head_dim * (read + num_pages)
  attention += systems.flops
  size = model_size.count(config)
  return Cost(
      weight_bytes=_weight_bytes(config, load, sparsity, counts_lookup),
      cache_bytes=load.batch_size * per_sequence,
      flops=load.batch_size
      * (2 * _multiplied(config, size, sparsity, 1) + attention),
      memory_bytes=memory_bytes(config, load, plan),
      unknown=systems.unknown,
  )


def prefill(
    config: Config,
    load: Load,
    plan: cache_plan.CachePlan,
    *,
    counts_lookup: bool = False,
) -> Cost:
  """Cost of reading prompts of T tokens, up to the logits of the last ones.

  Attention is full: eviction follows. Scores of H2O's kind need the logits a
  second time, half of attention's FLOPs; those of SnapKV's kind, of the last
  queries alone, that fraction of it.

  Raises:
    UserError: As in `decode`.
  """
  length, size = load.length, model_size.count(config)
  per_pair = 2 * config.num_heads * config.head_dim
  systems = system_costs.of_pass(config, length)
  kept = system_costs.of_cache(config, length, load.cache_dtype)
  slots = _kept_slots(config, plan.slots(config, length), kept.owners)
  pairs = [
      _num_pairs(length, length, config.window_of(layer))
      for layer in systems.plain
  ]
  flops = 2 * sum(pairs) * per_pair + systems.flops
  queries = plan.scored_queries
  queries = length if queries is None else min(queries, length)
  flops += per_pair * sum(
      _num_pairs(queries, length, config.window_of(layer))
      for layer in systems.plain
  )
  # Products of the systems' own parameters are among theirs.
  each = size.multiplied - size.output - size.systems
  flops += 2 * (length * each + size.output)
  vector = _vector_bytes(config, load)
  num_slotted = config.num_layers - len(kept.owners)
  # Written, read by attention; what is kept is moved once more.
  moved = 2 * vector * num_slotted * config.num_kv_heads * length * 2
  moved += 2 * kept.held
  if plan.evicts:
    num_kept = sum(slot for layer in slots for slot in layer)
    moved += num_kept * (2 * vector + plan.slot_state)
  layer_of_prompt = 2 * vector * config.num_kv_heads * length
  return Cost(
      weight_bytes=_weight_bytes(
          config, load, ContextualSparsity(), counts_lookup
      ),
      cache_bytes=load.batch_size * moved,
      flops=load.batch_size * flops,
      memory_bytes=memory_bytes(config, load, plan)
      + load.batch_size * layer_of_prompt * plan.evicts,
      unknown=systems.unknown,
  )


def memory_bytes(config: Config, load: Load, plan: cache_plan.CachePlan) -> int:
  """Bytes of parameters and caches."""
  size = model_size.count(config).total
  return size * ITEMSIZE[load.weight_dtype] + cache_bytes(config, load, plan)


def cache_bytes(config: Config, load: Load, plan: cache_plan.CachePlan) -> int:
  """Bytes of the caches of all layers and sequences.

  Layers with windows hold their windows alone.

  Raises:
    UserError: As in `decode`.
  """
  systems = system_costs.of_cache(config, load.length, load.cache_dtype)
  slots = _kept_slots(config, plan.slots(config, load.length), systems.owners)
  vector = _vector_bytes(config, load)
  total = _bytes_of(config, load, plan, slots)
  total += plan.slot_state * sum(slot for heads in slots for slot in heads)
  total += 2 * vector * _num_pages(plan, slots)
  total += systems.held
  return load.batch_size * total


def break_even_tokens(config: Config, load: Load) -> float:
  """Tokens in all sequences, B T, at which a full cache is all the weights.

  Below it a step is mostly weights, and no eviction can halve its time. It is
  infinite where no layer's cache grows.
  """
  size = model_size.count(config).total * ITEMSIZE[load.weight_dtype]
  each = token_bytes(config, load)
  return size / each if each else math.inf


def token_bytes(config: Config, load: Load) -> chips.Number:
  """Bytes of the keys and values of one token, all layers.

  What systems keep grows in blocks, or not at all: on average over long texts.
  """
  few, many = (
      system_costs.of_cache(config, length, load.cache_dtype)
      for length in (2**14, 2**15)
  )
  # Beyond its window a layer holds no more, however long the text is.
  growing = [
      layer
      for layer in range(config.num_layers)
      if layer not in few.owners and not config.window_of(layer)
  ]
  heads = len(growing) * config.num_kv_heads
  systems = (many.held - few.held) / 2**14 if few.owners else 0
  return 2 * heads * _vector_bytes(config, load) + systems


def largest_batch(
    config: Config, load: Load, plan: cache_plan.CachePlan, chip: chips.Chip
) -> int | None:
  """Most sequences that fit; None where the chip's memory is not known."""
  if chip.hbm_bytes is None:
    return None
  one = dataclasses.replace(load, batch_size=1)
  weights = model_size.count(config).total * ITEMSIZE[load.weight_dtype]
  room = chip.hbm_bytes - weights
  return max(0, int(room // cache_bytes(config, one, plan)))


def _kept_slots(
    config: Config,
    slots: tuple[tuple[int, ...], ...],
    owners: Collection[int],
) -> tuple[tuple[int, ...], ...]:
  """Slots [L, K] of use: none in layers that have a cache of their own.

  A layer with a window needs no more than the window.
  """
  return tuple(
      ()
      if layer in owners
      else tuple(min(slot, config.window_of(layer) or slot) for slot in heads)
      for layer, heads in enumerate(slots)
  )


def _num_pages(
    plan: cache_plan.CachePlan, slots: tuple[tuple[int, ...], ...]
) -> int:
  """Pages of all layers and heads; 0 where the plan has none."""
  if not plan.page_size:
    return 0
  return sum(-(-slot // plan.page_size) for heads in slots for slot in heads)


def _vector_bytes(config: Config, load: Load) -> int:
  """Bytes of one stored key or value."""
  scale = _SCALE_BYTES if load.cache_dtype == "int8" else 0
  return config.head_dim * ITEMSIZE[load.cache_dtype] + scale


def _bytes_of(
    config: Config,
    load: Load,
    plan: cache_plan.CachePlan,
    slots: tuple[tuple[int, ...], ...],
) -> int:
  """Bytes of the keys and values in slots, scores and the like aside."""
  if plan.coding is None:
    return 2 * _vector_bytes(config, load) * sum(map(sum, slots))
  sizes = config.head_dim, ITEMSIZE[load.cache_dtype]
  bytes_of = plan.coding.bytes_of
  return sum(bytes_of(slot, *sizes) for heads in slots for slot in heads)


def _num_pairs(num_queries: int, length: int, window: int | None) -> int:
  """Pairs of the last `num_queries` queries and the keys that they see."""
  first = length - num_queries
  window = window or length
  # Query t sees min(t + 1, window) keys.
  growing = range(min(first, window), min(length, window))
  grown = sum(growing) + len(growing)
  return grown + (num_queries - len(growing)) * window


def _multiplied(
    config: Config,
    size: model_size.ModelSize,
    sparsity: ContextualSparsity,
    batch_size: int,
) -> chips.Number:
  """Parameters that `batch_size` tokens need, the predictors' included."""
  heads = sparsity.read(sparsity.heads_kept, batch_size)
  neurons = sparsity.read(sparsity.neurons_kept, batch_size)
  key_value = size.key_value * (heads if sparsity.skips_key_value else 1)
  outputs = config.num_heads + config.hidden_dim
  predictors = (
      config.num_layers
      * sparsity.predictor_rank
      * (2 * config.embed_dim + outputs)
  )
  return (
      size.query_out * heads
      + key_value
      + size.mlp * neurons
      + size.norms
      + size.output
      + predictors
  )


def _weight_bytes(
    config: Config,
    load: Load,
    sparsity: ContextualSparsity,
    counts_lookup: bool,
) -> chips.Number:
  size = model_size.count(config)
  number = _multiplied(config, size, sparsity, load.batch_size) + size.systems
  if counts_lookup:
    number += size.lookup
  return number * ITEMSIZE[load.weight_dtype]
