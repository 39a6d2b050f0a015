"""Texts as vectors: a model of a folder read out by pooling.

Letters: B texts, T tokens, D width.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.systems.readouts import pooling
from joma.transformer import model as models
from joma.transformer import probes
from joma.transformer.hf import pretrained
from joma.transformer.rope import absolute
from joma.transformer.text import sizes
from joma.transformer.text import tokenizer as tokenizers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import progress


def embed_lines(
    folder: pathlib.Path, lines: Sequence[str], design: str, batch_size: int
) -> Float[np.ndarray, "B D"]:
  """Reads each line as a text of its own.

  Args:
    folder: Of a model with its tokenizer.
    lines: B texts.
    design: Of `pooling.FIXED`.
    batch_size: Texts that are read at once.

  Returns:
    Vectors of length 1, float32, in the order of the lines.

  Raises:
    UserError: The folder cannot be read, a line has no token, is longer than
      the model's learned positions, or has states without a direction.
  """
  config = pretrained.read_config(folder)
  tokenizer = tokenizers.from_folder(folder)
  ids = [np.asarray(tokenizer.encode(line), np.int32) for line in lines]
  for number, one in enumerate(ids, 1):
    if not len(one):
      raise errors.UserError(
          f"line {number} of the text has no token: leave it out."
      )
  absolute.check_learned_positions(config, max(map(len, ids)))
  config, params = pretrained.load(folder)
  with progress.bar(
      folder.name, total=len(ids), unit="texts", per_step=1
  ) as on_progress:
    found = embed(
        models.Transformer(config), params, ids, design, batch_size, on_progress
    )
  wrong = np.flatnonzero(~np.isfinite(found).all(axis=-1))
  if wrong.size:
    raise errors.UserError(
        f"Line {wrong[0] + 1} of the text has no vector: the model's states of"
        " it are 0, or beyond float32."
    )
  return found


def embed(
    model: models.Transformer,
    params: PyTree,
    ids: Sequence[Int[np.ndarray, "_"]],
    design: str,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda num_texts: None,
) -> Float[np.ndarray, "B D"]:
  """Reads texts of any lengths, those of like lengths together.

  Args:
    model: Of the folder.
    params: Its parameters.
    ids: Of each text, at least one token.
    design: Of `pooling.FIXED`.
    batch_size: Texts that are read at once.
    on_progress: Told how many texts have been read since.

  Returns:
    Vectors of length 1, float32, in the order of the texts; NaN of a text that
    has a state without a direction.
  """
  found = np.zeros((len(ids), model.config.embed_dim), np.float32)
  order = np.argsort([len(one) for one in ids], kind="stable")
  for first in range(0, len(order), batch_size):
    rows = order[first : first + batch_size]
    longest = len(ids[rows[-1]])
    # Padded to few shapes; a row that no text fills is of one token.
    tokens = np.zeros((batch_size, sizes.window(longest, model.config)), int)
    lengths = np.ones(batch_size, np.int32)
    for place, row in enumerate(rows):
      tokens[place, : len(ids[row])] = ids[row]
      lengths[place] = len(ids[row])
    vectors, is_known = _read(
        model, params, jnp.int32(tokens), jnp.int32(lengths), design
    )
    # Marked on the host: on a device a NaN is taken for a fault.
    vectors = np.where(np.asarray(is_known)[:, None], vectors, np.nan)
    found[rows] = vectors[: len(rows)]
    on_progress(len(rows))
  return found


@functools.partial(jax.jit, static_argnames=("model", "design"))
def _read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    design: str,
) -> tuple[Float[Array, "B D"], Bool[Array, "B"]]:
  """Vectors, and of which texts all states have a direction."""
  config = model.config
  _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
  resid = probes.stream_of(seen, config)
  # Infinite states come out of a norm as 0, where a mean would not miss them.
  square = jnp.square(resid[:, -1].astype(jnp.float32)).sum(axis=-1)
  has_direction = jnp.isfinite(square) & (square > 0)
  has_direction |= ~pooling.token_mask(tokens.shape[1], lengths)
  if config.use_final_norm:  # What transformers call the last hidden state.
    final = models.make_norm(config, model.dtype, None)
    last = final.apply({"params": params["final_norm"]}, resid[:, -1])
    resid = resid.at[:, -1].set(last)
  vectors = pooling.pool(design, resid, lengths)
  is_known = has_direction.all(axis=1)
  return jnp.where(is_known[:, None], vectors, 0), is_known
