"""Every hyperparameter of Table 1, once (https://arxiv.org/abs/2310.00535)."""

import dataclasses
import math

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table1Config:
  """Table 1: a Transformer on a hierarchy of latents, per cell and seed.

  A cell is one of num_classes x num_combinations x (num_latents_0,
  num_latents_1), of which the last two are taken in pairs.

  Attributes:
    num_classes: Sweep axis: numbers of classes K.
    num_combinations: Sweep axis: how many latents of the level below, or
      tokens, each latent and each class combines, N_ch.
    num_latents_0: Sweep axis: latents of level 0, which combine tokens.
    num_latents_1: Latents of level 1 that go with each of num_latents_0.
    num_seeds: Seeds of each cell.
    first_seed: The seeds are first_seed, first_seed + 1, ... Each has its own
      hierarchy, initial values and batches.
    num_tokens: Number of tokens M, of which the last is padding.
    seq_len: Sequence length T.
    num_layers: Blocks, at least 3: block s is compared with the latents of
      level s, and block 2 with the classes.
    embed_dim: Width d.
    hidden_multiple: Hidden nodes of a block over M.
    lr: Learning rate of Adam.
    weight_decay: Coefficient of L2, inside Adam.
    batch_size: Sequences per step.
    num_steps: Optimizer steps.
    log_every: Steps between evaluations.
    checkpoint_every: Steps between checkpoints, each taken at the evaluation
      that reaches it; the last step is always saved.
    num_unseen: Combinations of latents that no class has, to score on.
    num_shuffles: Permutations behind the shuffled baseline.
  """

  num_classes: tuple[int, ...] = (20, 30, 50)
  num_combinations: tuple[int, ...] = (2, 3)
  num_latents_0: tuple[int, ...] = (10, 20)
  num_latents_1: tuple[int, ...] = (20, 30)
  num_seeds: int = 5
  first_seed: int = 1
  num_tokens: int = 100
  seq_len: int = 30
  num_layers: int = 3
  embed_dim: int = 1024
  hidden_multiple: int = 4
  lr: float = 1e-4
  weight_decay: float = 1e-4
  batch_size: int = 128
  num_steps: int = 10_000
  log_every: int = 100
  checkpoint_every: int = 1000
  num_unseen: int = 100
  num_shuffles: int = 20

  @property
  def num_cells(self) -> int:
    """Cells of the table."""
    axes = (self.num_classes, self.num_combinations, self.num_latents_0)
    return math.prod(len(axis) for axis in axes)

  @property
  def num_runs(self) -> int:
    """Runs of all cells."""
    return self.num_seeds * self.num_cells

  def __post_init__(self):
    if len(self.num_latents_0) != len(self.num_latents_1):
      raise errors.UserError(
          f"num_latents_0={self.num_latents_0} and"
          f" num_latents_1={self.num_latents_1} are taken in pairs: give as"
          " many of one as of the other."
      )
    pairs = (*zip(self.num_latents_0, self.num_latents_1, strict=True),)
    for name, values in (
        ("num_classes", self.num_classes),
        ("num_combinations", self.num_combinations),
        ("num_latents_0 with num_latents_1", pairs),
    ):
      if not values or len(set(values)) < len(values):
        raise errors.UserError(
            f"{name} needs one or more values that differ, got {values}."
        )
    for name, least in _LEAST.items():
      require.at_least(name, getattr(self, name), least)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    require.memory(
        f"num_steps={self.num_steps} of {self.num_seeds} seeds",
        4 * self.num_seeds * self.num_steps,
    )
    require.positive("lr", self.lr)
    if not (0 <= self.weight_decay < math.inf):
      raise errors.UserError(
          "weight_decay must be finite and not negative, got"
          f" {self.weight_decay}."
      )
    self._check_cells(pairs)

  def _check_cells(self, pairs: tuple[tuple[int, int], ...]) -> None:
    for size in self.num_combinations:
      for below, above in (
          *((self.num_tokens - 1, first) for first, _ in pairs),
          *pairs,
          *((second, k) for _, second in pairs for k in self.num_classes),
      ):
        if not (size >= 1 and 2 <= above <= math.comb(below, size)):
          raise errors.UserError(
              f"num_combinations={size} out of {below} gives"
              f" {math.comb(below, max(size, 0))} sets, of which {above} cannot"
              " be drawn; a level needs at least 2."
          )
      if min(size**3, self.num_tokens - 1) > self.seq_len:
        raise errors.UserError(
            f"A class of num_combinations={size} may have"
            f" {min(size**3, self.num_tokens - 1)} tokens, but seq_len is"
            f" {self.seq_len}."
        )


_LEAST = {
    "num_seeds": 1,
    "first_seed": 0,
    "num_tokens": 3,
    "seq_len": 1,
    "num_layers": 3,
    "embed_dim": 1,
    "hidden_multiple": 1,
    "batch_size": 1,
    "num_steps": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "num_unseen": 2,
    "num_shuffles": 1,
}


def table1() -> Table1Config:
  """Table 1 at the size of the paper's code."""
  return Table1Config()


def table1_reduced() -> Table1Config:
  """All cells and seeds at d = 128, for minutes on two cores."""
  return Table1Config(
      embed_dim=128,
      lr=1e-3,
      num_steps=300,
      checkpoint_every=100,
  )


def smoke() -> Table1Config:
  """A single cell in seconds, at a size at which numbers mean nothing."""
  return Table1Config(
      num_classes=(5,),
      num_combinations=(2,),
      num_latents_0=(6,),
      num_latents_1=(7,),
      num_tokens=20,
      seq_len=9,
      embed_dim=8,
      num_seeds=2,
      num_unseen=5,
      num_shuffles=2,
      num_steps=2,
      log_every=2,
  )
