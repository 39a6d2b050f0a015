"""What makes the first token of a checkpoint's text a sink.

Its position: then a text whose positions begin later has none. Or that it sees
itself alone: then the first token of a second text, which does not see the text
before it, is one too.

Letters: B texts, L layers, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import axes as mpl_axes
import numpy as np

from joma.studies import claims
from joma.studies import drawing
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import corpus as corpus_lib
from kernels_pallas import masks
from scansnap_jax.experiment import intervals

# Positions at which texts begin.
_SHIFTS = (0, 1, 64, 1000)


def measure(
    folder: str, corpus: str, num_texts: int, num_tokens: int
) -> dict[str, Any]:
  """Reads texts whose first token no other one leads to.

  Args:
    folder: A checkpoint.
    corpus: Name of what it reads.
    num_texts: B.
    num_tokens: T.

  Returns:
    Mean attention of the second half of the queries [B, L]: "shifts", on the
    first token, by where positions begin; "second", on the first token of a
    second text that begins a quarter into the tokens; and "same place, one
    text", on the token that stands there where there is no second text.
  """
  shape, params = pretrained.load(folder)
  text = corpus_lib.load(corpus, tokenizer=folder)
  size = num_tokens
  tokens = text.valid[: num_texts * size].reshape(-1, size)
  model = models.Transformer(shape, implementation="xla")

  @jax.jit
  def read(tokens: jax.Array, positions: jax.Array, ids: jax.Array) -> Any:
    _, seen = model.apply(
        {"params": params},
        tokens,
        positions=positions,
        mask=masks.document(ids),
        mutable="intermediates",
    )
    layers: Any = seen["intermediates"]
    return jnp.stack([
        layers[f"layers_{i}"]["attn"]["attn_weights"][0].mean(axis=1)
        for i in range(shape.num_layers)
    ])

  places, half = np.arange(size)[None], size // 2
  whole = np.zeros_like(places)
  each = lambda x: jnp.asarray(np.repeat(x, len(tokens), axis=0), jnp.int32)
  on = lambda weights, key, first: (
      np.asarray(weights)[:, :, first:, key].mean(axis=2).T.tolist()
  )
  found = {
      str(shift): on(
          read(jnp.asarray(tokens), each(places + shift), each(whole)), 0, half
      )
      for shift in _SHIFTS
  }
  cut = read(
      jnp.asarray(tokens), each(places), each((places >= half // 2).astype(int))
  )
  # From the same queries: the second text begins a quarter into the tokens.
  return {
      "shifts": found,
      "second": on(cut, half // 2, half),
      "same place, one text": on(
          read(jnp.asarray(tokens), each(places), each(whole)), half // 2, half
      ),
  }


def rate(real: Mapping[str, Any]) -> list[claims.Row]:
  """What the first tokens of a checkpoint were expected to be."""
  first = np.array(real["shifts"]["0"])
  moved = [np.abs(np.array(x) - first).max() for x in real["shifts"].values()]
  second, inside = np.array(real["second"]), real["same place, one text"]
  share = intervals.interval((second / first).mean(axis=1))
  return [
      claims.row(
          "checkpoint: the first token is a sink without a begin token",
          "more than a third of the attention, mean over layers",
          intervals.text(intervals.interval(first.mean(axis=1))),
          first.mean() > 1 / 3,
      ),
      claims.row(
          "checkpoint: it stays one wherever positions begin",
          "attention on it changes by less than .01 in every layer and text",
          f"{max(moved):.5f} at most",
          max(moved) < 0.01,
      ),
      claims.row(
          "checkpoint: the first token of a second text becomes one",
          "at least half of the first's attention, where inside one text it"
          f" gets {np.mean(inside):.3f}",
          f"{second.mean():.3f}, a share of {intervals.text(share)}",
          second.mean() > 0.5 * first.mean(),
      ),
  ]


def draw(axes: mpl_axes.Axes, real: Mapping[str, Any]) -> None:
  """Draws attention on first tokens, layer by layer."""
  curves = {
      "first token": real["shifts"]["0"],
      f"positions from {_SHIFTS[-1]}": real["shifts"][str(_SHIFTS[-1])],
      "first of a second text": real["second"],
      "there, in one text": real["same place, one text"],
  }
  for (name, values), look in zip(
      curves.items(), drawing.looks(len(curves)), strict=True
  ):
    curve = np.array(values).mean(axis=0)
    drawing.draw_curve(axes, np.arange(len(curve)), curve, look, name)
  # Room for the legend above what there can be.
  axes.set(xlabel="layer", ylabel="attention on it", ylim=(0, 1.6))
  axes.set_yticks(np.arange(6) / 5)
  axes.legend(loc="upper left")
