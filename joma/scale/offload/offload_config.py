"""What a plan of one chip and its host is asked; imports no jax."""

import dataclasses

from joma.inference.cost import cache_plan
from joma.inference.cost import chips
from joma.inference.cost import cost_model
from joma.inference.cost import offload
from joma.scale import plan_config
from joma.transformer.config import TransformerConfig
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig:
  """Decoding with one chip and the memory of its host.

  Attributes:
    shape: Name of a model, or a folder with its config.json.
    chip: Name of the chip, such as v5e.
    host_gb: Memory of the host that may be used, in 10^9 bytes.
    link_gbs: Bandwidth from the host to the chip, and as much back, in 10^9
      bytes per second.
    seq_len: Tokens of each sequence in its cache.
    max_batch: Most sequences.
    capacity: Slots of a cache that scores what it keeps; none keeps all.
    page_size: Slots of a cache that come from the host at a time.
    weight_dtype: How parameters are stored.
    cache_dtype: How keys and values are stored.
  """

  shape: str = "opt_30b"
  chip: str = "v5e"
  host_gb: float = 192.0
  link_gbs: float = 32.0
  seq_len: int = 1024
  max_batch: int = 1024
  capacity: int | None = None
  page_size: int = 64
  weight_dtype: cost_model.Dtype = "bfloat16"
  cache_dtype: cost_model.Dtype = "bfloat16"

  def __post_init__(self):
    for name in ("seq_len", "max_batch", "page_size"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("host_gb", "link_gbs"):
      require.positive(name, getattr(self, name))
    if self.capacity is not None:
      require.between("capacity", self.capacity, 1, self.seq_len)
    self.machine()
    self.load()

  def model(self) -> TransformerConfig:
    """The shape; raises UserError as `plan_config.model_of`."""
    return plan_config.model_of(self.shape)

  def load(self) -> cost_model.Load:
    """What the model is asked for, a sequence."""
    return cost_model.Load(
        batch_size=1,
        length=self.seq_len,
        weight_dtype=self.weight_dtype,
        cache_dtype=self.cache_dtype,
    )

  def machine(self) -> offload.Machine:
    """The chip and its host."""
    return offload.Machine(
        chip=chips.get(self.chip),
        host_bytes=int(self.host_gb * 1e9),
        link_bytes_per_sec=self.link_gbs * 1e9,
    )

  def work(self) -> offload.Work:
    """The model's numbers."""
    plan = cache_plan.full()
    if self.capacity is not None:
      plan = cache_plan.scored(self.capacity)
    return offload.work_of(self.model(), self.load(), plan, self.page_size)
