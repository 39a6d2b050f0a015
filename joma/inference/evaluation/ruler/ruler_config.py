"""Settings of RULER's tasks; imports no jax."""

import dataclasses
from typing import Literal

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

# Tokens of an answer at most, as RULER allows them.
ANSWER_TOKENS = {
    "niah_single_1": 128,
    "niah_single_2": 128,
    "niah_single_3": 128,
    "niah_multikey_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
NAMES = tuple(ANSWER_TOKENS)
MOST_PIECES = 1_000_000

Protocol = Literal["agnostic", "aware", "decoding"]
# Among which tokens a budget chooses.
Scope = Literal["head", "layer", "model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerConfig:
  """Which of RULER's tasks are read, and how.

  Attributes:
    names: Tasks among niah_single_1 to niah_single_3, niah_multikey_1 to
      niah_multikey_3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1 and
      qa_2; empty is all 13.
    budgets: Slots of a KV head over the tokens that are compressed, in (0, 1).
    scope: Among which tokens a budget chooses: those of each head alone, so
      that all heads keep as many; of all heads of a layer; or of all heads of
      the model, as KVzip's paper does. None is each head alone. Not for
      protocol=decoding, whose heads have slots of their own.
    answer_tokens: Tokens that are generated at most; 0 is RULER's own number,
      30 to 128 by task.
    passes: Score of the full cache from which on a task counts: below, other
      policies are not measured on it, and no mean has it.
    chat: Whether texts stand in a user's message by the chat template of the
      model's folder; auto does so where there is one.
    essay: Text file that hay is cut from in place of the embedded text.
    depths: Depths of the needle for a heat map of the first task among names
      that hides one, from 0 to 1; empty draws none.
    lengths: Tokens of the heat map's texts; empty is `length` alone.
    map_budget: Budget of the heat map.
  """

  names: tuple[str, ...] = ()
  budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
  scope: Scope | None = None
  answer_tokens: int = 0
  passes: float = 0.5
  chat: Literal["auto", "yes", "no"] = "auto"
  essay: str = ""
  depths: tuple[float, ...] = ()
  lengths: tuple[int, ...] = ()
  map_budget: float = 0.5

  def __post_init__(self):
    for name in self.names:
      if name not in NAMES:
        raise errors.UserError(
            f"ruler.names={name} is none of {', '.join(NAMES)}."
        )
    for name in ("budgets", "map_budget"):
      given = getattr(self, name)
      for budget in given if isinstance(given, tuple) else (given,):
        if not 0 < budget < 1:
          raise errors.UserError(f"ruler.{name}={budget} must lie in (0, 1).")
    for depth in self.depths:
      if not 0 <= depth <= 1:
        raise errors.UserError(f"ruler.depths={depth} must lie in [0, 1].")
    if not 0 <= self.passes <= 1:
      raise errors.UserError(f"ruler.passes={self.passes} must lie in [0, 1].")
    require.at_least("ruler.answer_tokens", self.answer_tokens, 0)
    for length in self.lengths:
      require.at_least("ruler.lengths", length, 2)

  def tasks(self) -> tuple[str, ...]:
    """The tasks asked for, each once."""
    return tuple(dict.fromkeys(self.names)) or NAMES

  def mapped(self) -> str | None:
    """The task of the heat map; None where none is asked for.

    Raises:
      UserError: No task hides a needle.
    """
    if not self.depths:
      return None
    for name in self.tasks():
      if name.startswith("niah"):
        return name
    raise errors.UserError(
        "ruler.depths asks for a heat map, and no task of ruler.names hides a"
        " needle: name one of niah_*."
    )

  def num_new(self, name: str) -> int:
    """Tokens that are generated for a task."""
    own = ANSWER_TOKENS[name]
    return min(self.answer_tokens, own) if self.answer_tokens else own
