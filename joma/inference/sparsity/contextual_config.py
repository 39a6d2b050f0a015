"""Settings of contextual sparsity: capture, predictors, the study of both."""

import dataclasses
from typing import Literal

from joma.inference.sparsity.gated import spec as specs
from joma.transformer.config import TransformerConfig
from joma.transformer.training import lm_config
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

Label = Literal["sign", "magnitude", "contribution"]
Nonlinearity = Literal["none", "gelu"]


def require_share(name: str, value: float) -> None:
  """Raises UserError unless 0 < value <= 1."""
  if not 0 < value <= 1:
    raise UserError(f"{name} must lie in (0, 1], got {value}.")


def count(share: float, num: int) -> int:
  """A share of `num` things as a number of them, at least 1."""
  return max(1, round(share * num))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureConfig:
  """What is kept of each token.

  Attributes:
    label: Which neurons count, see `sparsity_labels`.
    label_fraction: Share of the blocks that count; unused for `sign`.
    block_size: Neurons of a block.
    batch_size: Texts of a shard.
    dtype: Number type of what is stored on disk.
  """

  label: Label = "contribution"
  label_fraction: float = 0.2
  block_size: int = 1
  batch_size: int = 8
  dtype: Literal["float16", "float32"] = "float16"

  def __post_init__(self):
    require.at_least("block_size", self.block_size, 1)
    require.at_least("batch_size", self.batch_size, 1)
    require_share("label_fraction", self.label_fraction)

  def num_units(self, hidden_dim: int) -> int:
    """U; raises UserError if blocks do not divide the neurons."""
    if hidden_dim % self.block_size:
      raise UserError(
          f"block_size={self.block_size} must divide the {hidden_dim} neurons"
          " of a layer."
      )
    return hidden_dim // self.block_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
  """What a predictor is and how it learns.

  Attributes:
    rank: Rank r of the neurons' predictor, at most D.
    head_rank: Rank r of the heads' predictor; where it is more than D, D.
    nonlinearity: Nonlinearity between a predictor's two matrices.
    lookahead: Layers that the heads are predicted ahead: 0 reads what their own
      layer reads, 1 what the layer before read. Neurons are predicted from what
      their MLP reads, or with 1 from what their layer reads, before attention.
    head_fraction: Share of the heads that count.
    num_steps: Steps of AdamW on the predictors.
    batch_size: Rows, which are tokens, of a training step.
    lr: Highest learning rate; it falls to a tenth along a cosine.
    weight_decay: Weight decay of a predictor's two matrices.
    class_balance: Whether the units that count weigh as much, all together, as
      those that do not. Without it a predictor of rare units finds few.
    checkpoint_every: Steps between checkpoints.
    seed: Random seed for the initial values and batches of predictors.
  """

  rank: int = 32
  head_rank: int = 16
  nonlinearity: Nonlinearity = "none"
  lookahead: int = 0
  head_fraction: float = 0.5
  num_steps: int = 600
  batch_size: int = 256
  lr: float = 3e-3
  weight_decay: float = 0.01
  class_balance: bool = True
  checkpoint_every: int = 200
  seed: int = 1

  def __post_init__(self):
    for name in ("rank", "head_rank", "batch_size", "checkpoint_every"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_steps", self.num_steps, 0)
    require.seeds("seed", self.seed)
    require.between("lookahead", self.lookahead, 0, 1)
    require.positive("lr", self.lr)
    require_share("head_fraction", self.head_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextualConfig:
  """A study: a model, predictors of it, and what they save at what loss.

  Attributes:
    model: Folder of a model as Hugging Face's transformers writes it, or its
      name there, as org/name@revision; none trains a small one.
    corpus: Name of a corpus, or a text file or folder.
    data_dir: Where WikiText is looked for.
    tokenizer: What a token is, for a model that is trained here; see `corpus`.
    bpe_vocab_size: Most tokens that `bpe` learns.
    num_layers: Layers of the model that is trained where none is given.
    embed_dim: Width D of the model that is trained; heads have 32 numbers each.
    hidden_dim: Hidden width F of the model that is trained.
    activation: Activation of the MLP of the model that is trained; `silu` makes
      it a gated one.
    num_steps: Steps of training the model.
    batch_size: Texts of a training step.
    lr: Highest learning rate of training the model.
    seq_len: Tokens of a text, in training and in all that follows.
    num_texts: Texts of the training split that predictors learn from.
    held_out_fraction: Share of the texts of num_texts that thresholds are
      calibrated on.
    num_eval_texts: Texts of the validation split that are measured.
    eval_batch_size: Texts that are measured at once, over which the union of a
      batch is taken.
    prompt_fraction: Share of a text that is read densely, as a prompt.
    label: Which neurons count; `auto` is sign for ReLU, else contribution.
    capture: Settings of the captured numbers; the label is that of `label`.
    predictor: Settings of the predictors.
    shares: Shares of the neurons that each rule keeps.
    head_shares: Shares of the heads that each rule keeps.
    recalls: Recalls that thresholds are calibrated to.
    with_rules: Whether rules that choose units, and predictors of them, are
      measured; without them methods alone are.
    methods: Methods that read a part of MLPs' weights, as NAME:SPREAD:B; names
      are teal, teal_attention, rsparse, cats, oracle, sketch, int4_scores,
      int4_filled, output_error, int8, int6 and int4; spreads of a budget even,
      split (within a layer) and layers; B is the neurons of a block, 1 by
      itself. None measures none.
    budgets: Shares of the MLPs' weights that each method may read.
    seed: Random seed for the model and the texts.
  """

  model: str | None = None
  corpus: str = "tinyshakespeare"
  data_dir: str | None = None
  tokenizer: str = "bytes"
  bpe_vocab_size: int = 4096
  num_layers: int = 4
  embed_dim: int = 128
  hidden_dim: int = 512
  activation: Literal["relu", "silu"] = "relu"
  num_steps: int = 500
  batch_size: int = 16
  lr: float = 3e-3
  seq_len: int = 128
  num_texts: int = 128
  held_out_fraction: float = 0.25
  num_eval_texts: int = 64
  eval_batch_size: int = 8
  prompt_fraction: float = 0.5
  label: Literal["auto", "sign", "magnitude", "contribution"] = "auto"
  capture: CaptureConfig = CaptureConfig()
  predictor: PredictorConfig = PredictorConfig()
  shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
  head_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
  recalls: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
  with_rules: bool = True
  methods: tuple[str, ...] = ()
  budgets: tuple[float, ...] = (0.5, 0.75)
  seed: int = 1

  def __post_init__(self):
    for name in ("num_layers", "hidden_dim", "num_steps", "batch_size"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("num_texts", "num_eval_texts", "seq_len"):
      require.at_least(name, getattr(self, name), 2)
    require.at_least("eval_batch_size", self.eval_batch_size, 1)
    require.seeds("seed", self.seed)
    require.positive("lr", self.lr)
    for name in ("held_out_fraction", "prompt_fraction"):
      require_share(name, getattr(self, name))
    for name in self.methods:
      specs.parse(name)
    if not (self.with_rules or self.methods):
      raise UserError("with_rules=false without methods measures nothing.")
    for name in ("shares", "head_shares", "recalls", "budgets"):
      if not getattr(self, name):
        raise UserError(f"{name} must name at least one share.")
      for value in getattr(self, name):
        require_share(name, value)
    if not 1 <= self.prompt_len < self.seq_len - 1:
      raise UserError(
          f"prompt_fraction={self.prompt_fraction} of seq_len={self.seq_len} is"
          f" {self.prompt_len} tokens: a prompt has at least 1, and leaves at"
          " least 1."
      )
    if self.embed_dim < 32 or self.embed_dim % 32:
      raise UserError(
          "embed_dim must be a multiple of the 32 numbers of a head, got"
          f" {self.embed_dim}."
      )

  @property
  def prompt_len(self) -> int:
    """Tokens of a prompt."""
    return int(self.prompt_fraction * self.seq_len)

  @property
  def training(self) -> lm_config.LmConfig:
    """The run that trains a model of its own; its vocabulary is set later."""
    num_heads = self.embed_dim // 32
    model = TransformerConfig(
        num_layers=self.num_layers,
        embed_dim=self.embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=32,
        hidden_dim=self.hidden_dim,
        max_len=self.seq_len,
        activation=self.activation,
        use_gated_mlp=self.activation == "silu",
    )
    return lm_config.LmConfig(
        model=model,
        corpus=self.corpus,
        tokenizer=self.tokenizer,
        bpe_vocab_size=self.bpe_vocab_size,
        batch_size=self.batch_size,
        seq_len=self.seq_len,
        lr=self.lr,
        num_steps=self.num_steps,
        log_every=min(100, self.num_steps),
        eval_every=self.num_steps,
        checkpoint_every=min(500, self.num_steps),
        map_steps=(),
        seed=self.seed,
    )


def smoke() -> ContextualConfig:
  """The whole study in seconds, at a size at which numbers mean nothing."""
  default = ContextualConfig()
  return dataclasses.replace(
      default,
      num_layers=1,
      embed_dim=32,
      hidden_dim=16,
      num_steps=3,
      batch_size=2,
      seq_len=8,
      num_texts=8,
      num_eval_texts=4,
      eval_batch_size=2,
      shares=(0.5, 1.0),
      head_shares=(1.0,),
      recalls=(0.9,),
      methods=("teal:layers", "int8"),
      budgets=(0.5,),
      capture=dataclasses.replace(default.capture, block_size=2, batch_size=4),
      predictor=dataclasses.replace(default.predictor, rank=4, num_steps=4),
  )


PRESETS = {"default": ContextualConfig, "smoke": smoke}
