"""Settings of the bridge from co-occurrence to heavy hitters."""

import dataclasses
from typing import Literal

from joma.systems.cache_policies import names as policy_names
from joma.transformer.config import TransformerConfig
from joma.transformer.training import lm_config
from scansnap_jax import config as scansnap_config
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

# Predictors of the bridge that see attention: running scores of the policy that
# goes by it, as a sum, and as a mean over the queries since.
RUNNING_SUM = policy_names.COMPARED[0]
RUNNING_MEAN = f"{RUNNING_SUM}_mean"
Positions = Literal["none", "rotary"]

_MOST_TYPES = 8192


def one_layer() -> scansnap_config.ScanSnapConfig:
  """The setting of Scan & Snap's theorems: plain SGD, a fast decoder.

  Two next tokens share each of three queries, so that context must decide; the
  start is random, so that there is something to be found from the first step.
  """
  return scansnap_config.ScanSnapConfig(
      data=scansnap_config.DataConfig(num_next_per_last=2),
      model=scansnap_config.ModelConfig(zero_init=False),
      optimizer=scansnap_config.OptimizerConfig(name="sgd"),
      num_last=(3,),
      lr_z=(0.5,),
      lr_ratio=(10.0,),
      num_seeds=10,
      num_steps=400,
      log_every=20,
      checkpoint_every=400,
      record_attention=True,
  )


def language_model() -> lm_config.LmConfig:
  """One layer of a small Llama on word pieces of the embedded text."""
  return lm_config.LmConfig(
      model=TransformerConfig(
          vocab_size=1024,
          num_layers=1,
          embed_dim=64,
          num_heads=2,
          num_kv_heads=2,
          head_dim=32,
          hidden_dim=172,
          max_len=128,
      ),
      tokenizer="bpe",
      bpe_vocab_size=1024,
      batch_size=16,
      seq_len=128,
      num_steps=480,
      log_every=20,
      eval_every=480,
      checkpoint_every=240,
      map_steps=(0, 20, 40, 80, 160, 320, 480),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BridgeConfig:
  """What is trained, and how its heavy hitters are read off.

  Attributes:
    scansnap: Runs of the one-layer model; all of one data setting and one pair
      of learning rates. Measured at every log_every steps.
    lm: Run of the Transformer, measured at its map_steps. Its seed is the first
      seed, and the flag `positions` stands for its own.
    positions: What the Transformers know of the order of tokens, one panel
      each: none, as the theory has it, or rotary.
    num_lm_seeds: Runs of the Transformer for each of positions.
    budget: Share of the candidates that is kept.
    num_sequences: Sequences that each run is measured on.
    num_windows: Windows of the training text that co-occurrence is counted in.
  """

  scansnap: scansnap_config.ScanSnapConfig = dataclasses.field(
      default_factory=one_layer
  )
  lm: lm_config.LmConfig = dataclasses.field(default_factory=language_model)
  positions: tuple[Positions, ...] = ("none", "rotary")
  num_lm_seeds: int = 4
  budget: float = 0.25
  num_sequences: int = 96
  num_windows: int = 3000

  def __post_init__(self):
    scansnap = self.scansnap
    axes = (scansnap.num_last, scansnap.lr_z, scansnap.lr_ratio)
    if any(len(axis) > 1 for axis in axes) or scansnap.num_seeds < 2:
      raise UserError(
          "scansnap must be one setting with two seeds or more, got"
          f" num_last={axes[0]}, lr_z={axes[1]}, lr_ratio={axes[2]},"
          f" num_seeds={scansnap.num_seeds}."
      )
    if self.seq_len < 9:
      raise UserError(
          "scansnap.data.seq_len must be at least 9, for sequences with two"
          f" halves, got {scansnap.data.seq_len}."
      )
    if not scansnap.record_attention:
      raise UserError("scansnap.record_attention must be on.")
    self._check_text()
    if not self.positions or len(set(self.positions)) < len(self.positions):
      raise UserError(
          f"positions must name none, rotary or both, got {self.positions}."
      )
    require.at_least("num_lm_seeds", self.num_lm_seeds, 2)
    if not 0 < self.budget < 1:
      raise UserError(f"budget must lie in (0, 1), got {self.budget}.")
    require.at_least("num_sequences", self.num_sequences, 1)
    require.at_least("num_windows", self.num_windows, 2)

  def _check_text(self) -> None:
    require.at_least("lm.seq_len", self.lm.seq_len, 8)
    if self.lm.num_steps is None or self.lm.num_steps not in self.lm.map_steps:
      raise UserError(
          "lm.map_steps are where models are measured, and must name the last"
          f" step: got {self.lm.map_steps} for"
          f" lm.num_steps={self.lm.num_steps}."
      )
    vocab_size = self.lm.model.vocab_size
    if vocab_size > _MOST_TYPES:
      raise UserError(
          f"lm.model.vocab_size={vocab_size}: co-occurrence is counted in"
          f" arrays of its square, so up to {_MOST_TYPES} types are allowed."
      )

  @property
  def seq_len(self) -> int:
    """T of the one-layer model's sequences, the query among them."""
    return self.scansnap.data.seq_len or 0

  def training(self, positions: Positions, run: int) -> lm_config.LmConfig:
    """The run of a Transformer, by its number from 0."""
    model = dataclasses.replace(self.lm.model, positions=positions)
    seed = self.lm.seed + run
    return dataclasses.replace(self.lm, model=model, seed=seed)


def smoke() -> BridgeConfig:
  """Both halves in seconds, at a size at which numbers mean nothing."""
  scansnap = dataclasses.replace(
      one_layer(),
      data=scansnap_config.DataConfig(num_next_per_last=2, seq_len=17),
      num_seeds=2,
      batch_size=4,
      num_steps=2,
      log_every=2,
  )
  lm = lm_config.LmConfig(
      model=TransformerConfig(
          num_layers=1,
          embed_dim=16,
          num_heads=2,
          num_kv_heads=2,
          head_dim=8,
          hidden_dim=16,
      ),
      seq_len=16,
      eval_batch_size=2,
      num_steps=2,
      log_every=2,
      eval_every=2,
      checkpoint_every=2,
      map_steps=(0, 2),
  )
  return BridgeConfig(
      scansnap=scansnap,
      lm=lm,
      positions=("none",),
      num_lm_seeds=2,
      num_sequences=4,
      num_windows=8,
  )


PRESETS = {"default": BridgeConfig, "smoke": smoke}
