"""Where weights, cache and activations lie: an accelerator and its host.

FlexGen's question (https://arxiv.org/abs/2303.06865) for a decode step of B
sequences. Of L layers the weights of k and the caches of j lie in the host's
memory, and the residual stream between layers, where that is wanted. A step
takes the slowest of

  transfer    what comes from the host over the link, or what goes there
  memory      all that the device reads and writes over its bandwidth, what has
              come from the host once more
  arithmetic  FLOPs over the peak

as if the others hid behind it: what a layer needs comes while the one before it
is computed. Embedding, output layer and norms stay on the device. FlexGen's
disc, its attention on the host and its batches one after the other under one
layer's weights are left out, and so are prompts.

A step's bytes and FLOPs are a + b B with numbers of the placement alone, so
that tokens per second never fall as B grows: of each placement the largest
batch is the best, and `search` looks at placements, not at batches. Imports no
jax for models without systems.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
from typing import Literal

from joma.inference.cost import cache_plan
from joma.inference.cost import chips
from joma.inference.cost import cost_model
from joma.inference.cost import model_size
from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

Bound = Literal["transfer", "memory", "arithmetic"]
# Of what comes by and by: one part is computed with while the next comes.
_BUFFERS = 2
# Of each layer's cache the page that is being filled, and one that comes by:
# a compiler shares no buffers between the loops of layers.
_PAGES = 2
_ACTIVATION = 2  # bfloat16.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """A chip and its host.

  Attributes:
    chip: With a known memory.
    host_bytes: Of the host's memory that may be used.
    link_bytes_per_sec: From the host to the chip, and as much back.
  """

  chip: chips.Chip
  host_bytes: int
  link_bytes_per_sec: chips.Number

  def __post_init__(self):
    if self.chip.hbm_bytes is None:
      raise errors.UserError(
          f"chip={self.chip.name}: its memory must be known to share it out."
      )
    if self.host_bytes < 0:
      raise errors.UserError(
          f"host_bytes={self.host_bytes} must not be below 0."
      )
    require.positive("link_bytes_per_sec", self.link_bytes_per_sec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
  """What lies in the host's memory, and how many sequences there are.

  Attributes:
    host_weights: k, layers whose weights do.
    host_cache: j, layers whose caches do.
    host_stream: Whether the residual stream does between layers.
    batch_size: B.
  """

  host_weights: int
  host_cache: int
  host_stream: bool
  batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A model and its text, as numbers of a layer and of a sequence.

  Attributes:
    num_layers: L.
    fixed_bytes: Parameters that stay on the device.
    layer_bytes: Parameters of a layer.
    cache_bytes: Cache of a layer and sequence.
    page_bytes: Of these, what comes from the host at a time.
    read_bytes: Of the cache of a layer and sequence, read in a step.
    written_bytes: Likewise, written.
    stream_bytes: Residual stream of a sequence.
    working_bytes: Other activations of a sequence: heads, hidden units, logits.
    step_bytes: Parameters that a step reads.
    flops: Of a step and sequence.
  """

  num_layers: int
  fixed_bytes: int
  layer_bytes: int
  cache_bytes: int
  page_bytes: int
  read_bytes: int
  written_bytes: int
  stream_bytes: int
  working_bytes: int
  step_bytes: int
  flops: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """A placement and its step.

  Attributes:
    placement: Where things lie.
    device_bytes: Held by the chip.
    host_bytes: Held by the host.
    seconds: Least time by what it goes over.
  """

  placement: Placement
  device_bytes: int
  host_bytes: int
  seconds: dict[Bound, float]

  @property
  def bound(self) -> Bound:
    """What the step waits for."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def step_seconds(self) -> float:
    """Least time of a step."""
    return self.seconds[self.bound]

  @property
  def tokens_per_sec(self) -> float:
    """New tokens of all sequences."""
    return self.placement.batch_size / self.step_seconds


def work_of(
    config: configs.TransformerConfig,
    load: cost_model.Load,
    plan: cache_plan.CachePlan,
    page_size: int,
) -> Work:
  """Returns the numbers of a model; layers count as all alike.

  Args:
    config: The model's.
    load: T and the types of numbers; its batch does not count.
    plan: What caches keep.
    page_size: Slots of a cache that come from the host at a time.
  """
  require.at_least("page_size", page_size, 1)
  one = dataclasses.replace(load, batch_size=1)
  step = cost_model.decode(config, one, plan)
  size, layers = model_size.count(config), config.num_layers
  itemsize = cost_model.ITEMSIZE[load.weight_dtype]
  in_layers = size.query_out + size.key_value + size.mlp + size.systems
  layer_bytes = in_layers // layers * itemsize
  cache = cost_model.cache_bytes(config, one, plan) // layers
  written = cost_model.token_bytes(config, one) // layers
  slots = max(map(max, plan.slots(config, load.length)))
  heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  hidden = (1 + config.use_gated_mlp) * config.hidden_dim
  return Work(
      num_layers=layers,
      fixed_bytes=size.total * itemsize - layers * layer_bytes,
      layer_bytes=layer_bytes,
      cache_bytes=cache,
      page_bytes=math.ceil(cache * min(1, page_size / slots)),
      read_bytes=int(step.cache_bytes) // layers,
      written_bytes=int(written) * min(page_size, slots),
      stream_bytes=_ACTIVATION * config.embed_dim,
      working_bytes=_ACTIVATION * (heads + hidden) + 4 * config.vocab_size,
      step_bytes=int(step.weight_bytes),
      flops=int(step.flops),
  )


def of_placement(work: Work, machine: Machine, where: Placement) -> Found:
  """Says what a placement holds and how long its step takes."""
  batch = where.batch_size
  whole = lambda pair: pair[0] + pair[1] * batch
  parts = _parts(work, where)
  chip, link = machine.chip, machine.link_bytes_per_sec
  return Found(
      placement=where,
      device_bytes=whole(parts["device"]),
      host_bytes=whole(parts["host"]),
      seconds={
          "transfer": max(whole(parts["up"]), whole(parts["down"])) / link,
          "memory": whole(parts["memory"]) / chip.bytes_per_sec,
          "arithmetic": whole(parts["flops"]) / chip.flops_per_sec,
      },
  )


def _parts(work: Work, where: Placement) -> dict[str, tuple[int, int]]:
  """Pairs (a, b) of a + b B, the batch of `where` aside."""
  k, j, stays = where.host_weights, where.host_cache, not where.host_stream
  layers, weights = work.num_layers, work.layer_bytes
  buffered = min(_BUFFERS, k) * weights
  pages = _PAGES * j * work.page_bytes
  stream = 0 if stays else layers * work.stream_bytes
  from_host = k * weights, j * work.read_bytes + stream
  return {
      "device": (
          work.fixed_bytes + (layers - k) * weights + buffered,
          (layers - j) * work.cache_bytes + pages
          # One layer's is always there.
          + work.stream_bytes + work.working_bytes + stays * work.stream_bytes,
      ),
      "host": (
          k * weights,
          j * work.cache_bytes + (0 if stays else work.stream_bytes),
      ),
      "up": from_host,
      "down": (0, j * work.written_bytes + stream),
      "memory": (
          work.step_bytes + from_host[0],
          layers * work.read_bytes + from_host[1],
      ),
      "flops": (0, work.flops),
  }


def fits(found: Found, machine: Machine) -> bool:
  """Whether chip and host hold it."""
  return (
      machine.chip.fits(found.device_bytes)
      and found.host_bytes <= machine.host_bytes
  )


def largest_batch(
    work: Work, machine: Machine, where: Placement, most: int
) -> int:
  """Most sequences that chip and host hold, up to `most`; 0 is none."""
  assert machine.chip.hbm_bytes is not None  # A machine has seen to it.
  parts, batch = _parts(work, where), most
  rooms = (
      ("device", int(machine.chip.hbm_bytes)),
      ("host", machine.host_bytes),
  )
  for name, room in rooms:
    fixed, each = parts[name]
    if fixed > room:
      return 0
    if each:
      batch = min(batch, (room - fixed) // each)
  return batch


def search(
    work: Work,
    machine: Machine,
    most: int,
    *,
    host_weights: bool = True,
    host_cache: bool = True,
    host_stream: bool = True,
) -> Found | None:
  """Returns the placement of most tokens per second; None where none fits.

  Of equal ones that with least in the host.

  Args:
    work: Of the model.
    machine: The chip and its host.
    most: Largest batch.
    host_weights: Whether weights may lie in the host.
    host_cache: Whether caches may.
    host_stream: Whether the residual stream may.
  """
  require.at_least("batch", most, 1)
  best: Found | None = None
  for where in _placements(work, host_weights, host_cache, host_stream):
    batch = largest_batch(work, machine, where, most)
    if not batch:
      continue
    where = dataclasses.replace(where, batch_size=batch)
    found = of_placement(work, machine, where)
    if best is None or _rank(found) > _rank(best):
      best = found
  return best


def _rank(found: Found) -> tuple[float, int]:
  return found.tokens_per_sec, -found.host_bytes


def _placements(work: Work, *may: bool) -> Iterator[Placement]:
  weights, cache, stream = may
  counts = lambda allowed: range(work.num_layers + 1 if allowed else 1)
  for k, j, is_host in itertools.product(
      counts(weights), counts(cache), (False, True)[: 1 + stream]
  ):
    yield Placement(
        host_weights=k, host_cache=j, host_stream=is_host, batch_size=1
    )
