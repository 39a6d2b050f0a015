"""Which guesses stay, so that tokens come as if there had been no draft.

A guess d, drawn from the draft's q, stays with probability min(1, p(d) / q(d));
in the place of the first that does not, a token is drawn from what p has more
than q, max(0, p - q). Both together have the model's distribution p, whatever q
is (Leviathan et al. 2023, arXiv 2211.17192, section 2.3 and appendix A.1). If
all stay, one more token comes from p: the last pass has it anyway.

Letters: B batch, S guesses a round, W = S + 1 tokens of a pass, V vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def greedy(
    best: Int[Array, "B W"], guesses: Int[Array, "B S"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
  """Returns how many guesses stay, and the token behind them.

  Args:
    best: Tokens of the model's largest logits, behind the newest token and
      behind each guess.
    guesses: The draft's.
  """
  count = _leading(guesses == best[:, :-1])
  return count, jnp.take_along_axis(best, count[:, None], axis=1)[:, 0]


def accept(
    target: Float[Array, "B W V"],
    draft: Float[Array, "B S V"],
    guesses: Int[Array, "B S"],
    uniforms: Float[Array, "B S"],
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
  """Returns how many guesses stay, and what the token behind them is drawn by.

  Args:
    target: The model's probabilities behind the newest token and each guess.
    draft: Those by which the guesses were drawn.
    guesses: The draft's, of probability above 0.
    uniforms: One in [0, 1) for each guess.

  Returns:
    The count, and weights of the next token, which need not sum to 1.
  """
  of_guess = lambda probs: jnp.take_along_axis(
      probs, guesses[..., None], axis=-1
  )[..., 0]
  count = _leading(uniforms * of_guess(draft) < of_guess(target[:, :-1]))
  # Behind the last guess nothing was guessed: q is 0.
  draft = jnp.pad(draft, ((0, 0), (0, 1), (0, 0)))
  at = count[:, None, None]
  here = lambda probs: jnp.take_along_axis(probs, at, axis=1)[:, 0]
  rest = jnp.maximum(here(target) - here(draft), 0)
  # By rounding p may equal q but for the guess; a draft's NaN says nothing.
  has_rest = rest.sum(axis=-1, keepdims=True) > 0
  return count, jnp.where(has_rest, rest, here(target))


def _leading(stays: Bool[Array, "B S"]) -> Int[Array, "B"]:
  """Those before the first that does not stay."""
  return jnp.cumprod(stays.astype(jnp.int32), axis=1).sum(axis=1)
