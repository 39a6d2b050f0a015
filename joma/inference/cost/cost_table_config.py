"""What `launch.cost_table` prints; imports no jax."""

import dataclasses

from joma.inference.cost import chips as chips_lib
from joma.inference.cost import cost_model
from joma.systems.cache_policies import names as policy_names
from joma.transformer.config import TransformerConfig
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

# Not what a cache keeps, but which heads and neurons are computed.
CONTEXTUAL = "deja_vu"


def llama3_8b() -> TransformerConfig:
  """Llama-3-8B: 8 KV heads for 32 queries', 8.03e9 parameters."""
  return _llama(128_256, 32, 4096, 32, 8, 14_336)


def llama3_70b() -> TransformerConfig:
  """Llama-3-70B, for more than one chip."""
  return _llama(128_256, 80, 8192, 64, 8, 28_672)


def llama2_7b() -> TransformerConfig:
  """Llama-2-7B: as many KV heads as query heads, four times the cache."""
  return _llama(32_000, 32, 4096, 32, 32, 11_008)


def smollm2_135m() -> TransformerConfig:
  """SmolLM2-135M: runs on a laptop."""
  model = _llama(49_152, 30, 576, 9, 3, 1536)
  return dataclasses.replace(model, head_dim=64, tie_embeddings=True)


def llama3_405b() -> TransformerConfig:
  """Llama-3.1-405B, for a slice of many chips."""
  return _llama(128_256, 126, 16_384, 128, 8, 53_248)


def llama32_1b() -> TransformerConfig:
  """Llama-3.2-1B: output and embedding are one."""
  model = _llama(128_256, 16, 2048, 32, 8, 8192)
  return dataclasses.replace(model, tie_embeddings=True)


def smollm2_1b7() -> TransformerConfig:
  """SmolLM2-1.7B: as many KV heads as query heads."""
  model = _llama(49_152, 24, 2048, 32, 32, 8192)
  return dataclasses.replace(model, tie_embeddings=True)


def opt_6b7() -> TransformerConfig:
  """OPT-6.7B, one of H2O's models: multi-head, ReLU."""
  return _opt(32, 4096, 32)


def opt_30b() -> TransformerConfig:
  """OPT-30B, one of H2O's models."""
  return _opt(48, 7168, 56)


def opt_175b() -> TransformerConfig:
  """OPT-175B, Deja Vu's model, for several chips."""
  return _opt(96, 12_288, 96)


def _llama(
    vocab: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
) -> TransformerConfig:
  return TransformerConfig(
      vocab_size=vocab,
      num_layers=layers,
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=width // heads,
      hidden_dim=hidden,
      tie_embeddings=False,
  )


def _opt(layers: int, width: int, heads: int) -> TransformerConfig:
  return TransformerConfig(
      vocab_size=50_272,
      num_layers=layers,
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=width // heads,
      hidden_dim=4 * width,
      max_len=2048,
      norm="layer_norm",
      positions="learned",
      position_offset=2,
      activation="relu",
      use_gated_mlp=False,
      use_qkv_bias=True,
      use_attn_out_bias=True,
      use_mlp_bias=True,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTableConfig:
  """Model, load, policies and chips; a row for each length, batch and policy.

  Attributes:
    shape: Shape of the model, where no folder is given.
    chips: Chips to show, one column each.
    bandwidth_gbs: Measured bandwidth of one machine more, in 10^9 bytes per
      second; goes with peak_tflops.
    peak_tflops: Measured arithmetic of the machine of bandwidth_gbs, in 10^12
      operations per second.
    memory_gb: Memory of the machine of bandwidth_gbs, in 10^9 bytes; none is
      not known.
    lengths: Tokens T of each sequence so far.
    batch_sizes: Numbers B of sequences that are continued together.
    policies: Cache policies compared with keeping everything, by the names
      that evaluate_cache knows, with settings if need be, as
      snapkv:window=16; duo_attention; and deja_vu, which evicts nothing.
      What a step moves is the same for all policies that score every slot, as
      h2o, and for those that go by place, as window.
    kept: Fractions: of the tokens that policies keep, of those that quest
      reads, of the heads of duo_attention that keep everything.
    weight_dtype: How parameters are stored.
    cache_dtype: How keys and values are stored.
    scored_queries: Last queries of a prompt by whose attention snapkv and
      pyramidkv choose.
    pyramid_beta: The last layer of pyramidkv keeps 1 / beta of the mean.
    streaming_slots: Sinks and window of the heads of duo_attention that do not
      keep everything.
    page_size: Tokens of a page of quest.
    heads_kept: Fraction of heads that deja_vu computes.
    neurons_kept: Fraction of neurons that deja_vu computes.
    predictor_rank: Rank of deja_vu's predictors.
    is_shared: Whether the sequences of a batch keep the same heads and neurons;
      if not, a step reads the union of independent choices.
    counts_lookup: Whether the weights of a step include tables of which it
      reads a row for each sequence.
  """

  shape: TransformerConfig = llama3_8b()
  chips: tuple[str, ...] = ("v5e", "v6e", "v5p", "h100")
  bandwidth_gbs: float | None = None
  peak_tflops: float | None = None
  memory_gb: float | None = None
  lengths: tuple[int, ...] = (8192, 32_768)
  batch_sizes: tuple[int, ...] = (1, 8, 32)
  policies: tuple[str, ...] = policy_names.COMPARED[:1]
  kept: tuple[float, ...] = (0.2, 0.1)
  weight_dtype: cost_model.Dtype = "bfloat16"
  cache_dtype: cost_model.Dtype = "bfloat16"
  scored_queries: int = 64
  pyramid_beta: float = 20.0
  streaming_slots: int = 260
  page_size: int = 16
  heads_kept: float = 0.5
  neurons_kept: float = 0.25
  predictor_rank: int = 1000
  is_shared: bool = False
  counts_lookup: bool = False

  def __post_init__(self):
    for name in ("chips", "lengths", "batch_sizes"):
      empty = name != "chips" and not getattr(self, name)
      if empty or (not self.chips and self.bandwidth_gbs is None):
        raise UserError(f"{name} must name at least one.")
    for name in ("lengths", "batch_sizes"):
      for value in getattr(self, name):
        require.at_least(name, value, 1)
    for fraction in self.kept:
      if not 0 < fraction <= 1:
        raise UserError(f"kept must lie in (0, 1], got {fraction}.")
      if fraction * min(self.lengths) < 1:
        raise UserError(
            f"kept={fraction} of lengths={min(self.lengths)} is no token."
        )
    for name in self.policies:
      if name != CONTEXTUAL:
        policy_names.check(name)
      if name.partition(":")[0] == policy_names.REFERENCE:
        raise UserError(f"policies={name} is there already.")
    if set(self.policies) - {CONTEXTUAL} and not self.kept:
      raise UserError("kept must name at least one fraction.")
    if (self.bandwidth_gbs is None) != (self.peak_tflops is None):
      raise UserError("bandwidth_gbs and peak_tflops must be given together.")
    if self.memory_gb is not None and self.bandwidth_gbs is None:
      raise UserError("memory_gb is that of the machine of bandwidth_gbs.")
    for name in ("scored_queries", "streaming_slots", "page_size"):
      require.at_least(name, getattr(self, name), 1)
    self.machines()
    self.sparsity()

  def machines(self) -> list[chips_lib.Chip]:
    """The chips, the measured machine last."""
    found = [chips_lib.get(name) for name in dict.fromkeys(self.chips)]
    if self.bandwidth_gbs is not None and self.peak_tflops is not None:
      found.append(
          chips_lib.measured(
              self.bandwidth_gbs, self.peak_tflops, self.memory_gb
          )
      )
    return found

  def settings(self) -> dict[str, int | float]:
    """Fields of policies that flags of the table's own stand for."""
    return {
        "window": self.scored_queries,
        "beta": self.pyramid_beta,
        "window_capacity": self.streaming_slots,
        "page_size": self.page_size,
    }

  def sparsity(self) -> cost_model.ContextualSparsity:
    """What deja_vu computes."""
    return cost_model.ContextualSparsity(
        heads_kept=self.heads_kept,
        neurons_kept=self.neurons_kept,
        predictor_rank=self.predictor_rank,
        is_shared=self.is_shared,
    )


PRESETS = {
    preset.__name__: preset
    for preset in (
        llama3_8b,
        llama3_70b,
        llama3_405b,
        llama32_1b,
        llama2_7b,
        smollm2_135m,
        smollm2_1b7,
        opt_6b7,
        opt_30b,
        opt_175b,
    )
}
