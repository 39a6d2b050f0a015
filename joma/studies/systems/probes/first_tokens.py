"""What makes the first token of a checkpoint's text a sink.

Its position: then a text whose positions begin later has none. Or that it sees
itself alone: then a token inside the text becomes one that is kept from seeing
what is before it, while all others see what they saw.

Letters: B texts, L layers, T tokens.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
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
  """Reads texts that no begin token leads to.

  Args:
    folder: A checkpoint.
    corpus: Name of what it reads.
    num_texts: B.
    num_tokens: T.

  Returns:
    Mean attention of the second half of the queries [B, L]: "shifts", on the
    first token, by where positions begin; and on the token a quarter into the
    text, "alone" where it sees itself alone and "plain" where it sees all
    before it.
  """
  shape, params = pretrained.load(folder)
  text = corpus_lib.load(corpus, tokenizer=folder)
  tokens = jnp.asarray(
      text.valid[: num_texts * num_tokens].reshape(-1, num_tokens)
  )
  model = models.Transformer(shape, implementation="xla")

  @jax.jit
  def read(
      positions: Int[Array, "B T"], starts: Int[Array, "1 T"]
  ) -> Float[Array, "B L T"]:
    causal = masks.causal(num_tokens)
    _, seen = model.apply(
        {"params": params},
        tokens,
        positions=positions,
        mask=dataclasses.replace(causal, starts=starts),
        mutable="intermediates",
    )
    layers: Any = seen["intermediates"]
    return jnp.stack(
        [
            layers[f"layers_{i}"]["attn"]["attn_weights"][0][
                :, :, num_tokens // 2 :
            ].mean(axis=(1, 2))
            for i in range(shape.num_layers)
        ],
        axis=1,
    )

  places, plain = np.arange(num_tokens), np.zeros((1, num_tokens), np.int32)
  chosen = num_tokens // 4
  alone = plain.copy()
  alone[0, chosen] = chosen  # Others see what they saw, this one too.
  run = lambda shift, starts: np.asarray(
      read(np.broadcast_to(places + shift, tokens.shape), starts)
  )
  return {
      "shifts": {
          str(shift): run(shift, plain)[..., 0].tolist() for shift in _SHIFTS
      },
      "alone": run(0, alone)[..., chosen].tolist(),
      "plain": run(0, plain)[..., chosen].tolist(),
  }


def rate(real: Mapping[str, Any]) -> list[claims.Row]:
  """What the first tokens of a checkpoint were expected to be."""
  first = np.array(real["shifts"]["0"])
  moved = [np.abs(np.array(x) - first).max() for x in real["shifts"].values()]
  alone, plain = np.array(real["alone"]), np.array(real["plain"])
  told = intervals.interval(alone.mean(axis=1))
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
          "checkpoint: a token inside that sees itself alone becomes one",
          "at least ten times the attention that it gets where it sees all"
          f" before it, {plain.mean():.4f}",
          intervals.text(told),
          told["low"] > 10 * plain.mean(),
      ),
  ]


def draw(axes: mpl_axes.Axes, real: Mapping[str, Any]) -> None:
  """Draws attention on first tokens, layer by layer."""
  curves = {
      "first token": real["shifts"]["0"],
      f"positions from {_SHIFTS[-1]}": real["shifts"][str(_SHIFTS[-1])],
      "inside, sees itself": real["alone"],
      "inside, sees all": real["plain"],
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
