"""The latent hierarchy behind JoMA's Table 1: combinations of combinations.

Every latent of level 0 is a random set of p tokens, every latent of a higher
level a random set of p latents of the level below, all sets of a level
distinct; the last level are the classes (https://arxiv.org/abs/2310.00535,
Table 1; its code). A class expands to all tokens below it, written
right-aligned in ascending order after padding. So there is **one sequence per
class**, some classes may share theirs, and nothing is random per sample.

"Held-out" therefore means `unseen_classes`: combinations of the known latents
that are none of the classes. They have no label, but the activity of each
latent is known, which is what Table 1 correlates with: it asks whether hidden
nodes have found the latents or only the classes. (Samples of a noisy hierarchy
come from `data.Hblt`.)

The last token is padding. Letters as in `joma.hierarchy`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int
import numpy as np

from joma.theory import data
from scansnap_jax.experiment import errors

# Sets drawn for each unseen class that is asked for.
_DRAWS_PER_UNSEEN = 50
_pack = jax.jit(data.pack_tokens, static_argnums=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Hierarchy:
  """The sets of each level; `make_hierarchy` draws them.

  Attributes:
    num_tokens: M, padding included.
    members: For each level: which p of the level below each latent holds.
  """

  num_tokens: int
  members: tuple[Int[np.ndarray, "_ _"], ...]

  @property
  def num_classes(self) -> int:
    """K, the latents of the last level."""
    return len(self.members[-1])

  @property
  def max_tokens(self) -> int:
    """The most tokens that any class can have, old or new."""
    sizes = [members.shape[1] for members in self.members]
    return min(math.prod(sizes), self.num_tokens - 1)

  @functools.cached_property
  def activity(self) -> tuple[Bool[np.ndarray, "K _"], ...]:
    """For each level from 0, the classes last: which latents a class holds."""
    identity = np.eye(self.num_classes, dtype=bool)
    return (*self.expand(self.members[-1]), identity)

  def is_used(self, level: int) -> Bool[np.ndarray, "N"]:
    """Latents that some class holds and some does not: others teach nothing."""
    held = self.activity[level]
    return np.asarray(held.any(axis=0) & ~held.all(axis=0))

  @functools.cached_property
  def is_present(self) -> Bool[np.ndarray, "K M"]:
    """Which of the tokens 0 .. M-2 a class holds."""
    return self.tokens_of(self.members[-1])

  @property
  def num_distinct_sequences(self) -> int:
    """Classes that differ in their tokens."""
    return len(np.unique(self.is_present, axis=0))

  def expand(
      self, classes: Int[np.ndarray, "K P"]
  ) -> tuple[Bool[np.ndarray, "K _"], ...]:
    """Activity of the latents below some classes, for each level from 0.

    Args:
      classes: Latents of the highest level below the classes that each of
        these classes, old or new, holds.
    """
    return self._descend(classes)[1:]

  def tokens_of(
      self, classes: Int[np.ndarray, "K P"]
  ) -> Bool[np.ndarray, "K M"]:
    """Tokens 0 .. M-2 that each class holds; `classes` as in `expand`."""
    return self._descend(classes)[0]

  def _descend(self, classes: np.ndarray) -> tuple[np.ndarray, ...]:
    """What classes hold of the tokens and of each level below the classes."""
    sizes = [self.num_tokens - 1, *map(len, self.members[:-1])]
    held = [_to_bool(classes, sizes[-1])]
    # From the classes down: what a class holds of a level is the union of what
    # its latents hold. Products of booleans are "or of ands".
    for members, size in zip(self.members[-2::-1], sizes[-2::-1], strict=True):
      held.append(held[-1] @ _to_bool(members, size))
    return tuple(reversed(held))


def _to_bool(
    members: Int[np.ndarray, "N P"], num_below: int
) -> Bool[np.ndarray, "N _"]:
  is_member = np.zeros((len(members), num_below), bool)
  np.put_along_axis(is_member, members, True, axis=1)
  return is_member


def make_hierarchy(
    seed: int,
    *,
    num_tokens: int = 100,
    num_latents: tuple[int, ...] = (10, 20, 20),
    set_sizes: tuple[int, ...] = (2, 2, 2),
) -> Hierarchy:
  """Draws the sets of each level.

  Args:
    seed: Seed.
    num_tokens: M, of which the last is padding.
    num_latents: Latents of each level; the last are the K classes.
    set_sizes: p of each level.

  Raises:
    UserError: If a level has fewer sets than latents are asked for.
  """
  if len(num_latents) != len(set_sizes) or not num_latents:
    raise errors.UserError(
        f"num_latents={num_latents} and set_sizes={set_sizes} need one value"
        " for each level."
    )
  rng, num_below, members = np.random.default_rng(seed), num_tokens - 1, []
  for num, size in zip(num_latents, set_sizes, strict=True):
    if size < 1 or not 0 < num <= math.comb(num_below, size):
      raise errors.UserError(
          f"{num} distinct sets of {size} out of {num_below} do not exist."
      )
    members.append(_distinct_sets(rng, num, num_below, size))
    num_below = num
  return Hierarchy(num_tokens, tuple(members))


def _draw_sets(
    rng: np.random.Generator, num: int, num_below: int, size: int
) -> np.ndarray:
  """Draws sets of equal chance, written in ascending order."""
  # The places of the smallest of uniform numbers: every set is as likely,
  # without a loop over rows.
  drawn = np.argsort(rng.random((num, num_below)), axis=1)[:, :size]
  return np.sort(drawn, axis=1).astype(np.int32)


def _first_of_each(rows: np.ndarray) -> np.ndarray:
  """Indices of the rows that equal none before them, ascending."""
  return np.sort(np.unique(rows, axis=0, return_index=True)[1])


def _distinct_sets(
    rng: np.random.Generator, num: int, num_below: int, size: int
) -> np.ndarray:
  """Draws sets until `num` of them differ: each new one is uniform."""
  found = np.zeros((0, size), np.int32)
  while len(found) < num:
    drawn = _draw_sets(rng, num, num_below, size)
    found = np.concatenate([found, drawn])
    found = found[_first_of_each(found)]
  return found[:num]


def unseen_classes(
    seed: int, hierarchy: Hierarchy, num_classes: int
) -> Int[np.ndarray, "K P"]:
  """Draws sets of latents whose tokens are those of no class, nor of another.

  Returns:
    Sets for `Hierarchy.expand` and `Hierarchy.tokens_of`; fewer than asked for
    where 50 draws for each find no more.
  """
  rng, members = np.random.default_rng(seed), hierarchy.members
  num_below = len(members[-2]) if len(members) > 1 else hierarchy.num_tokens - 1
  num_draws = _DRAWS_PER_UNSEEN * num_classes
  drawn = _draw_sets(rng, num_draws, num_below, members[-1].shape[1])
  seen = hierarchy.is_present
  # By their tokens, not by their sets: different latents may hold the same
  # tokens, and such a class would not be new.
  rows = np.concatenate([seen, hierarchy.tokens_of(drawn)])
  first = _first_of_each(rows) - len(seen)
  return drawn[first[first >= 0][:num_classes]]


def to_tokens(
    is_present: Bool[np.ndarray, "K M"], seq_len: int
) -> Int[np.ndarray, "K T"]:
  """Writes the sequence of each class, padding in front.

  Raises:
    UserError: If a class has more than `seq_len` tokens.
  """
  most = int(is_present.sum(axis=1).max(initial=0))
  if most > seq_len:
    raise errors.UserError(f"A class has {most} tokens; seq_len is {seq_len}.")
  return np.asarray(_pack(jnp.asarray(is_present), seq_len), np.int32)


def merge_padding(
    tokens: Int[np.ndarray, "*b T"], max_tokens: int
) -> tuple[Int[np.ndarray, "*b _"], int]:
  """Cuts the padding that all sequences begin with down to one token.

  Args:
    tokens: Sequences of `to_tokens`.
    max_tokens: The most tokens that a class has; see `Hierarchy.max_tokens`.

  Returns:
    The shorter sequences, and how many tokens the first of each stands for: the
    `num_padding` of `hierarchy_model.HierarchyTransformer`.
  """
  # From the sizes of the sets, not from the tokens: one length, and one
  # program, for all seeds of a cell.
  num_padding = max(1, tokens.shape[-1] - max_tokens)
  return tokens[..., num_padding - 1 :], num_padding
