"""Settings of the study of longer contexts than those of training."""

import dataclasses

from joma.transformer.config import TransformerConfig
from joma.transformer.training import lm_config
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeExtensionConfig:
  """A small Llama on bytes, trained on short windows, read on longer ones.

  Attributes:
    corpus: Name of a corpus, or a text file or folder.
    window: Tokens that the model is trained on, L.
    factor: How many times longer than `window` the texts are that the trained
      model reads, s.
    num_layers: Layers of the model.
    embed_dim: Width D of the model; heads have 32 numbers each.
    num_steps: Steps of training.
    batch_size: Texts of a training step.
    lr: Highest learning rate.
    tuning_steps: Steps of fine-tuning on texts of s L tokens.
    tuning_lr: Highest learning rate of fine-tuning.
    num_texts: Texts of s L tokens of the validation text that are read.
    bin_size: Neighbouring positions whose losses are averaged.
    seed: Random seed for the initial values and the batches.
  """

  corpus: str = "tinyshakespeare"
  window: int = 64
  factor: int = 4
  num_layers: int = 3
  embed_dim: int = 96
  num_steps: int = 1500
  batch_size: int = 32
  lr: float = 3e-3
  tuning_steps: int = 200
  tuning_lr: float = 5e-4
  num_texts: int = 200
  bin_size: int = 8
  seed: int = 1

  def __post_init__(self):
    for name in ("num_layers", "num_steps", "tuning_steps", "num_texts"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("window", "factor"):
      require.at_least(name, getattr(self, name), 2)
    require.seeds("seed", self.seed)
    require.between("bin_size", self.bin_size, 1, self.window)
    require.at_least("batch_size", self.batch_size, self.factor)
    require.positive("lr", self.lr)
    require.positive("tuning_lr", self.tuning_lr)
    if self.embed_dim < 32 or self.embed_dim % 32:
      raise UserError(
          "embed_dim must be a multiple of the 32 numbers of a head, got"
          f" {self.embed_dim}."
      )
    if self.window % self.bin_size:
      raise UserError(
          f"window={self.window} must be a multiple of"
          f" bin_size={self.bin_size}."
      )

  @property
  def training(self) -> lm_config.LmConfig:
    """The run that the model is trained by."""
    num_heads = self.embed_dim // 32
    model = TransformerConfig(
        num_layers=self.num_layers,
        embed_dim=self.embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=32,
        hidden_dim=8 * self.embed_dim // 3,
        max_len=self.window,
    )
    return lm_config.LmConfig(
        model=model,
        corpus=self.corpus,
        batch_size=self.batch_size,
        seq_len=self.window,
        lr=self.lr,
        num_steps=self.num_steps,
        log_every=self.num_steps,
        eval_every=self.num_steps,
        checkpoint_every=self.num_steps,
        map_steps=(),
        seed=self.seed,
    )

  @property
  def tuning(self) -> lm_config.LmConfig:
    """The run that it is fine-tuned by, on as many tokens a step."""
    return dataclasses.replace(
        self.training,
        seq_len=self.factor * self.window,
        batch_size=self.batch_size // self.factor,
        lr=self.tuning_lr,
        num_steps=self.tuning_steps,
        log_every=self.tuning_steps,
        eval_every=self.tuning_steps,
        checkpoint_every=self.tuning_steps,
    )


def smoke() -> RopeExtensionConfig:
  """All readings in seconds, at a size at which numbers mean nothing."""
  return RopeExtensionConfig(
      window=4,
      factor=2,
      num_layers=1,
      embed_dim=32,
      num_steps=2,
      batch_size=2,
      tuning_steps=2,
      num_texts=2,
      bin_size=2,
  )


PRESETS = {"default": RopeExtensionConfig, "smoke": smoke}
