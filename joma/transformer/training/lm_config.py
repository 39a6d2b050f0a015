"""Every hyperparameter of a language-model run, once.

A preset is a function that returns a config; flags are laid over it. Those
named after figures are the runs behind Figures 7 and 10 of Scan & Snap
(https://arxiv.org/abs/2305.16380) and Figures 6 and 8 of JoMA
(https://arxiv.org/abs/2310.00535), completed by the papers' code: PyTorch's
tutorial encoder, clipping at .5, text in order, a new Adam every epoch and a
schedule that is never stepped, which is a constant one.

Letters: B batch, T positions, V vocabulary.
"""

import dataclasses
from typing import Literal

from joma.systems.probes import names
from joma.transformer import config as model_config
from joma.transformer.config import TransformerConfig
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError
from scansnap_jax.experiment.processes import mesh_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmConfig:
  """A run: model, text, optimizer, and what is recorded of it.

  Attributes:
    model: The Transformer; its vocabulary must hold that of the corpus, whose
      it is where `train_lm` is not given one.
    corpus: Name of a corpus, or a text file or folder; see `corpus`.
    tokenizer: What a token is: `bytes`, `words` or `bpe`, or what the
      tokenizer.json of a folder says.
    bpe_vocab_size: Most tokens that `bpe` learns.
    batch_layout: `random` draws windows of the text anew at every step;
      `sequential` cuts it into batch_size columns read side by side in order,
      epoch after epoch, the last batch of an epoch being shorter.
    batch_size: Sequences B of a batch, over all devices.
    seq_len: Tokens T that are predicted of each sequence.
    optimizer: Update rule; `adam` adds weight_decay to the gradient, `adamw`
      decays by it, `sgd` has no momentum.
    lr: Learning rate at its highest.
    lr_mlp: Learning rate of the MLPs at its highest; None is lr.
    beta_1: Decay of Adam's mean.
    beta_2: Decay of Adam's mean square.
    weight_decay: Coefficient of the weight decay.
    group_penalty: Factor of the norms of blocks of neurons, which are added to
      the loss of a token; see `group_penalty`.
    group_size: Neurons of such a block; divides model.hidden_dim.
    clip_norm: Largest norm of a gradient, all parameters together; None is any.
    warmup_steps: Steps over which the rate rises linearly to lr.
    schedule: Learning rate after the warmup: constant, or a half cosine that
      reaches lr_end at the last step.
    lr_end: Rate at the end of the cosine, over lr.
    update_layers: Layers, from 0, whose parameters are trained, while all
      others keep their first values, embedding and output too; empty is all.
    reset_optimizer_every_epoch: Whether moments are lost at each epoch's start.
    init: Initial values: those of `model`, or PyTorch's for the same layers
      with embedding and output layer uniform in +-.1.
    identical_layers: Whether all layers start as copies of the first.
    num_steps: Optimizer steps; None is num_epochs passes over the text.
    num_epochs: Passes over the text; None where num_steps is given.
    log_every: Steps between rows of metrics and probes.
    eval_every: Steps between losses on the validation text; a multiple of
      log_every.
    checkpoint_every: Steps between checkpoints, each taken at the row that
      reaches it; the last step is always saved.
    eval_batch_size: Columns of the validation text.
    probe_batches: Batches of batch_size rows of the validation text that probes
      are averaged over; 0 is all of it.
    probes: More probes by name, each a curve a layer: sinks, sink_of_means,
      secondary_sinks, concentration, diversity, local, update_rank.
    entropy_chunk: Chunk of seq_len tokens of the validation text's first column
      whose entropy is also recorded by itself; None is none. JoMA's code
      reports that of chunk 100 alone.
    map_steps: Steps whose attention maps are kept; multiples of log_every.
    map_batch: Number of the training batch whose first sequence the maps are
      of.
    dtype: Number type of activations and products; parameters are float32.
    remat: What the backward pass computes anew to save memory: none, full
      (whole layers), dots (of layers all but products with weights) or offload
      (as dots, and the products wait in the host's memory; not on a CPU).
    loss_piece: Positions of a text whose logits a step makes at a time, once
      more in the backward pass, so that those of a large vocabulary never
      are held for all; none is all at once.
    grad_accum: Parts that a batch is computed in, one after the other.
    parallelism: `replicate` keeps the whole state on every device and splits
      batches (pmap); `mesh` splits states too (jit over a mesh).
    fsdp: Devices of the mesh that split parameters, and batches with them.
    tensor: Devices of the mesh that split heads, hidden units and vocabulary.
    seq: Devices of the mesh that split the positions of a text, between which
      keys and values go round; divides seq_len.
    on_nan: What a loss that is no number does, or one above spike: `stop` ends
      the run, `skip` leaves that update out, `roll_back` goes back to the last
      checkpoint and on with later batches.
    spike: Times the mean loss of the row before, above which a batch's loss is
      taken for a failure; None is never.
    seed: Random seed for initial values, windows and dropout.
  """

  model: TransformerConfig = TransformerConfig()
  corpus: str = "tinyshakespeare"
  tokenizer: str = "bytes"
  bpe_vocab_size: int = 8192
  batch_layout: Literal["random", "sequential"] = "random"
  batch_size: int = 16
  seq_len: int = 128
  optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
  lr: float = 2e-3
  lr_mlp: float | None = None
  beta_1: float = 0.9
  beta_2: float = 0.99
  weight_decay: float = 0.1
  group_penalty: float = 0.0
  group_size: int = 16
  clip_norm: float | None = 1.0
  warmup_steps: int = 20
  schedule: Literal["constant", "cosine"] = "cosine"
  lr_end: float = 0.1
  update_layers: tuple[int, ...] = ()
  reset_optimizer_every_epoch: bool = False
  init: Literal["model", "pytorch"] = "model"
  identical_layers: bool = False
  num_steps: int | None = 500
  num_epochs: int | None = None
  log_every: int = 25
  eval_every: int = 100
  checkpoint_every: int = 100
  eval_batch_size: int = 16
  probe_batches: int = 1
  probes: tuple[str, ...] = ()
  entropy_chunk: int | None = None
  map_steps: tuple[int, ...] = (0, 100, 500)
  map_batch: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: model_config.Remat = "none"
  loss_piece: int | None = None
  grad_accum: int = 1
  parallelism: Literal["replicate", "mesh"] = "replicate"
  fsdp: int = 1
  tensor: int = 1
  seq: int = 1
  on_nan: Literal["stop", "skip", "roll_back"] = "stop"
  spike: float | None = None
  seed: int = 1

  def __post_init__(self):
    for name in ("batch_size", "seq_len", "log_every", "eval_every"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("checkpoint_every", "eval_batch_size"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("fsdp", "tensor", "seq"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("warmup_steps", "map_batch", "probe_batches"):
      require.at_least(name, getattr(self, name), 0)
    if self.entropy_chunk is not None:
      require.at_least("entropy_chunk", self.entropy_chunk, 0)
    names.check(self.probes)
    require.seeds("seed", self.seed)
    require.at_least("num_steps", self.num_steps or 0, 0)
    require.memory(f"num_steps={self.num_steps}", 4 * (self.num_steps or 0))
    require.memory(
        f"batch_size={self.batch_size} of seq_len={self.seq_len}",
        8 * self.batch_size * self.seq_len,
    )
    require.positive("lr", self.lr)
    if self.spike is not None and self.spike <= 1:
      raise UserError(f"spike={self.spike} must be above 1, or none.")
    for name in ("lr_mlp", "clip_norm"):
      if getattr(self, name) is not None:
        require.positive(name, getattr(self, name))
    for name in ("beta_1", "beta_2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(
            f"{name} must lie in [0, 1), got {getattr(self, name)}."
        )
    for name in ("weight_decay", "lr_end"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
            f"{name} must lie in [0, 1], got {getattr(self, name)}."
        )
    require.at_least("grad_accum", self.grad_accum, 1)
    if self.loss_piece is not None:
      require.at_least("loss_piece", self.loss_piece, self.seq)
    self._check_length()
    self._check_parts()

  def _check_length(self) -> None:
    if (self.num_steps is None) == (self.num_epochs is None):
      raise UserError(
          "one of num_steps and num_epochs must be given and the other none,"
          f" got {self.num_steps} and {self.num_epochs}."
      )
    length = "num_epochs" if self.num_steps is None else "num_steps"
    require.at_least(length, getattr(self, length), 1)
    for name, steps in (
        ("eval_every", (self.eval_every,)),
        ("map_steps", self.map_steps),
    ):
      for step in steps:
        if step < 0 or (step % self.log_every and step != self.num_steps):
          raise UserError(
              f"{name} must name multiples of log_every={self.log_every}, got"
              f" {step}."
          )
    if self.model.positions == "learned" and self.seq_len > self.model.max_len:
      raise UserError(
          f"seq_len={self.seq_len} is more than the"
          f" model.max_len={self.model.max_len} learned positions."
      )

  def _check_parts(self) -> None:
    for layer in self.update_layers:
      require.between("update_layers", layer, 0, self.model.num_layers - 1)
      if self.update_layers.count(layer) > 1:
        raise UserError(
            f"update_layers={self.update_layers} has {layer} twice."
        )
    if self.group_penalty < 0:
      raise UserError(
          f"group_penalty={self.group_penalty} must not be below 0."
      )
    if self.group_penalty:
      model_config.require_dense(self.model, "group_penalty")
    require.at_least("group_size", self.group_size, 1)
    if self.group_penalty and self.model.hidden_dim % self.group_size:
      raise UserError(
          f"group_size={self.group_size} must divide the"
          f" model.hidden_dim={self.model.hidden_dim} neurons."
      )
    if self.batch_size % self.grad_accum:
      raise UserError(
          f"batch_size={self.batch_size} must be a multiple of"
          f" grad_accum={self.grad_accum}."
      )
    on_mesh = self.fsdp * self.tensor * self.seq
    if self.parallelism == "replicate" and on_mesh > 1:
      raise UserError(
          f"fsdp={self.fsdp}, tensor={self.tensor} and seq={self.seq} want"
          " parallelism=mesh."
      )
    if self.seq_len % self.seq:
      fitting = mesh_config.divisors(self.seq_len)
      raise UserError(
          f"seq={self.seq} devices do not divide the seq_len={self.seq_len}"
          f" positions; {mesh_config.listed(fitting)} would do."
      )


# Fields that say where a run is computed, and what is done about a failure: one
# that goes on may have others.
MAY_DIFFER = ("parallelism", "fsdp", "tensor", "seq", "on_nan", "spike")


def on_mesh(config: LmConfig, sizes: tuple[int, ...]) -> LmConfig:
  """The same run on a mesh of data, fsdp, tensor and seq devices."""
  _, fsdp, tensor, seq = sizes
  return dataclasses.replace(
      config, parallelism="mesh", fsdp=fsdp, tensor=tensor, seq=seq
  )


def default() -> LmConfig:
  """A small Llama on the embedded text, by bytes: minutes on a CPU."""
  return LmConfig()


def smoke() -> LmConfig:
  """A run of seconds, at a size at which numbers mean nothing."""
  return LmConfig(
      model=TransformerConfig(
          num_layers=1,
          embed_dim=8,
          num_heads=1,
          num_kv_heads=1,
          head_dim=8,
          hidden_dim=8,
      ),
      batch_size=2,
      seq_len=8,
      eval_batch_size=2,
      num_steps=4,
      log_every=2,
      eval_every=2,
      checkpoint_every=2,
      map_steps=(0, 2),
  )


def joma_figure6() -> LmConfig:
  """Attention entropy by layer over 20 epochs: one curve of rate 1e-4.

  The figure has --model.num_layers of 1, 2, 5 and 10, with seeds 1 to 3.
  """
  return LmConfig(
      model=model_config.authors_encoder(dropout=0.2),
      corpus="wikitext2",
      tokenizer="words",
      batch_layout="sequential",
      batch_size=20,
      seq_len=35,
      optimizer="adam",
      lr=1e-4,
      beta_2=0.999,
      weight_decay=0.0,
      clip_norm=0.5,
      warmup_steps=0,
      schedule="constant",
      reset_optimizer_every_epoch=True,
      init="pytorch",
      identical_layers=True,
      num_steps=None,
      num_epochs=20,
      log_every=100,
      eval_every=1000,
      checkpoint_every=1000,
      eval_batch_size=10,
      probe_batches=0,
      entropy_chunk=100,
      map_steps=(0, 2000, 20_000),
      map_batch=100,
  )


def joma_figure8() -> LmConfig:
  """The same with five layers: one curve of --lr from 1e-6 to 1e-2."""
  return dataclasses.replace(
      joma_figure6(), model=model_config.authors_encoder(num_layers=5)
  )


def scansnap_figure7() -> LmConfig:
  """Attention maps of the lowest layer while one layer learns by SGD.

  The paper's code has rate 10 for the MLP and 5 for all others, where the
  caption says 5. Its lower row has --model.num_layers=3.
  """
  return dataclasses.replace(
      joma_figure6(),
      model=model_config.authors_encoder(dropout=0.3),
      optimizer="sgd",
      lr=5.0,
      lr_mlp=10.0,
      num_steps=1500,
      num_epochs=None,
      eval_every=100,
      checkpoint_every=100,
      map_steps=(0, 500, 1000, 1500),
  )


def scansnap_figure10() -> LmConfig:
  """Attention entropy after training by SGD: one point, --lr from 1 to 5.

  Neither the optimizer nor the length are published; these are Figure 7's,
  with the rate of the caption for all parameters, over one epoch.
  """
  return dataclasses.replace(
      scansnap_figure7(),
      lr_mlp=None,
      num_steps=None,
      num_epochs=1,
      eval_every=500,
      checkpoint_every=500,
  )


PRESETS = {
    preset.__name__: preset
    for preset in (
        default,
        smoke,
        scansnap_figure7,
        scansnap_figure10,
        joma_figure6,
        joma_figure8,
    )
}
