"""What a step should cost on a mesh, by formulas: for ranking, not for records.

Of N parameters on a mesh of d x f x t x s devices (data, fsdp, tensor, seq), in
bfloat16 with float32 parameters and two moments,

  state        12 N / (f t) bytes in training; 2 N / (f t) and the cache in
               decoding
  fsdp         weights gathered for the forward and for the backward pass (and
               once more where layers are computed anew), gradients scattered:
               2 N / t bytes each
  data         gradients summed: 2 N / (f t) bytes
  tensor       two sums of the residual stream a layer and pass
  seq          gradients summed as over data; in training, keys and values of a
               device sent s - 1 times a pass, and their gradients with them,
               in float32, in the backward pass

after "How to Scale Your Model" (https://jax-ml.github.io/scaling-book/). What
a device sends, of these, is that of `collectives`. Imports no jax.
"""

import dataclasses
import math

import numpy as np

from joma.inference.cost import cache_plan
from joma.inference.cost import chips
from joma.inference.cost import cost_model
from joma.inference.cost import model_size
from joma.scale import interconnect
from joma.scale import plan_config
from joma.transformer.config import TransformerConfig
from kernels_pallas.hardware import peaks

Number = chips.Number
_BF16, _F32 = 2, 4
_ADAM = 3 * _F32  # Parameter and two moments.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Of one device and step.

  Attributes:
    mesh: Sizes of the axes.
    flops: That it computes.
    hbm_bytes: That it reads and writes.
    ici_bytes: That it sends, by axis.
    held_bytes: That it holds at most.
    activation_bytes: Of these, what the backward pass waits for.
    compute_seconds: Least time of the FLOPs.
    hbm_seconds: Of HBM.
    ici_seconds: Of all exchanges within slices, one after the other.
    dcn_seconds: Of all between slices.
    fits: Whether it holds less than its HBM.
  """

  mesh: dict[str, int]
  flops: Number
  hbm_bytes: Number
  ici_bytes: dict[str, Number]
  held_bytes: Number
  activation_bytes: Number
  compute_seconds: Number
  hbm_seconds: Number
  ici_seconds: Number
  dcn_seconds: Number
  fits: bool

  @property
  def seconds(self) -> Number:
    """The slowest of the four, as if the others hid behind it."""
    return max(
        *(self.compute_seconds, self.hbm_seconds),
        *(self.ici_seconds, self.dcn_seconds),
    )

  @property
  def serial_seconds(self) -> Number:
    """All four, one after the other."""
    exchanges = self.ici_seconds + self.dcn_seconds
    return self.compute_seconds + self.hbm_seconds + exchanges


def model_flops(
    config: plan_config.PlanConfig, model: TransformerConfig
) -> Number:
  """FLOPs that a step needs, over all devices, nothing computed twice.

  Attention counts the pairs that a causal mask lets through. Training is three
  times its forward pass.
  """
  load = cost_model.Load(batch_size=config.batch, length=config.seq_len)
  if config.task == "decode":
    return cost_model.decode(model, load, cache(config)).flops
  forward = cost_model.prefill(model, load, cache_plan.full()).flops
  output = model_size.count(model).output
  # The cost model has the logits of last tokens alone.
  forward += 2 * config.batch * (config.seq_len - 1) * output
  return 3 * forward


def cache(config: plan_config.PlanConfig) -> cache_plan.CachePlan:
  """What the cache keeps, as if its policy scored every slot."""
  if config.capacity is None or config.capacity >= config.seq_len:
    return cache_plan.full()
  return cache_plan.scored(config.capacity)


def of_mesh(
    config: plan_config.PlanConfig,
    model: TransformerConfig,
    sizes: tuple[int, ...],
) -> Estimate:
  """Estimates a step on a mesh of these sizes."""
  mesh = dict(zip(plan_config.AXES, sizes, strict=True))
  parts = _Parts(config, model, mesh)
  peak = peaks.PEAKS[config.chip]
  flops, moved, held, activations = (
      parts.training() if config.task == "train" else parts.decoding()
  )
  sent = parts.sent()
  torus = interconnect.Torus(config.chip, config.sides, config.num_slices)
  ids = np.arange(config.num_devices).reshape(sizes)
  seconds = np.zeros(2)
  for axis, name in enumerate(plan_config.AXES):
    group = np.moveaxis(ids, axis, -1).reshape(-1, sizes[axis])[0].tolist()
    if len(group) > 1:
      seconds += torus.seconds(sent[name], group)
  ici_seconds, dcn_seconds = map(float, seconds)
  return Estimate(
      mesh=mesh,
      flops=flops,
      hbm_bytes=moved,
      ici_bytes=sent,
      held_bytes=held,
      activation_bytes=activations,
      compute_seconds=flops * peak.num_devices / peak.flops_per_sec,
      hbm_seconds=moved * peak.num_devices / peak.bytes_per_sec,
      ici_seconds=ici_seconds,
      dcn_seconds=dcn_seconds,
      fits=held <= peak.hbm_bytes / peak.num_devices,
  )


class _Parts:
  """Sizes of what a device has of a step."""

  def __init__(
      self,
      config: plan_config.PlanConfig,
      model: TransformerConfig,
      mesh: dict[str, int],
  ):
    self.config, self.model = config, model
    self.data, self.fsdp, self.tensor, self.seq = mesh.values()
    self.params = model_size.count(model).total
    self.split = self.fsdp * self.tensor
    self.is_anew = config.remat == "full"
    # Of a batch that they do not divide, all have every sequence.
    batch_parts = self.data * self.fsdp
    self.batch_split = 1 if config.batch % batch_parts else batch_parts
    self.sequences = config.batch / self.batch_split
    self.positions = config.seq_len / self.seq

  def training(self) -> tuple[Number, Number, Number, Number]:
    """Returns FLOPs, bytes moved, bytes held and bytes of activations."""
    again = 4 / 3 if self.is_anew else 1
    flops = again * model_flops(self.config, self.model)
    state = _ADAM * self.params / self.split
    gradients = _F32 * self.params / self.split
    activations, widest = self.activations()
    passes = 3 if self.is_anew else 2
    gathered = passes * 2 * _BF16 * self.params / self.tensor
    moved = 2 * state + 2 * gradients + gathered + 3 * activations + 3 * widest
    held = state + gradients + activations + widest
    return flops / self.config.num_devices, moved, held, activations

  def activations(self) -> tuple[Number, Number]:
    """Bytes that wait for the backward pass, and of the logits beside them."""
    model, tokens = self.model, self.sequences * self.positions
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    hidden = (3 if model.use_gated_mlp else 2) * model.hidden_dim
    layer = 4 * model.embed_dim + (heads + hidden) / self.tensor
    kept = model.num_layers * layer
    if self.config.remat == "dots":  # What products with weights gave.
      heads -= 2 * model.num_heads * model.head_dim // 2
      hidden -= model.hidden_dim
      kept = 3 * model.embed_dim + (heads + hidden) / self.tensor
      kept = model.num_layers * kept + layer
    if self.is_anew or self.config.remat == "offload":
      kept = model.num_layers * model.embed_dim + layer
    at_once = min(1.0, (self.config.loss_piece or math.inf) / self.positions)
    logits = at_once * tokens * model.vocab_size / self.tensor
    logits *= _F32 + _BF16
    return _BF16 * tokens * kept, logits

  def decoding(self) -> tuple[Number, Number, Number, Number]:
    """As `training`, of a step that makes one token."""
    load = cost_model.Load(
        batch_size=self.config.batch, length=self.config.seq_len
    )
    step = cost_model.decode(self.model, load, cache(self.config))
    cache_split = self.batch_split * self.tensor
    weights = _BF16 * self.params
    held = weights / self.split + (step.memory_bytes - weights) / cache_split
    moved = step.weight_bytes / self.tensor + step.cache_bytes / cache_split
    if self._products() < weights / self.tensor:  # Weights stay in parts.
      moved -= step.weight_bytes / self.tensor * (1 - 1 / self.fsdp)
    return step.flops / cache_split, moved, held, 0.0

  def _products(self) -> Number:
    """Bytes of a token's products that fsdp would have to add up, twice."""
    model = self.model
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    hidden = (1 + model.use_gated_mlp) * model.hidden_dim
    width = 2 * model.embed_dim + (heads + hidden) / self.tensor
    tokens = self.config.batch / (self.data if self.batch_split > 1 else 1)
    return 2 * _BF16 * tokens * model.num_layers * width

  def sent(self) -> dict[str, Number]:
    """Bytes that a device sends in a step, by axis."""
    is_training = self.config.task == "train"
    share = lambda size: (size - 1) / size
    weights = _BF16 * self.params / self.tensor
    remat = self.is_anew
    fsdp = (2 + remat + 1) * weights * share(self.fsdp)
    if not is_training:  # Of few tokens the products are less than weights.
      fsdp = min(weights, self._products()) * share(self.fsdp)
    gradients = 2 * weights / self.fsdp if is_training else 0.0
    tokens = self.sequences * (self.positions if is_training else 1)
    stream = _BF16 * tokens * self.model.embed_dim
    sums = 2 * self.model.num_layers * (2 + remat if is_training else 1)
    tensor = 2 * sums * stream * share(self.tensor)
    return {
        "data": gradients * share(self.data),
        "fsdp": fsdp,
        "tensor": tensor,
        "seq": gradients * share(self.seq) + self._round_the_ring(tokens),
    }

  def _round_the_ring(self, tokens: Number) -> Number:
    """Bytes of keys and values, and of their gradients, that a device sends."""
    model = self.model
    heads = 2 * model.num_kv_heads * model.head_dim / self.tensor
    passes = _BF16 * (2 + self.is_anew) + _F32
    return model.num_layers * tokens * heads * passes * (self.seq - 1)
