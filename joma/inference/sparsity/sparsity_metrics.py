"""How good a choice of units was, all measures together.

  recall        share of the units that count which were chosen
  precision     share of the chosen units that count
  mass recall   sum of |h| over chosen neurons / sum of |h|
  output error  ||y - y_dense|| / ||y_dense|| of the MLP's output
  kept          share of the units that were chosen
  union         share of the units that at least one sequence of a batch chose,
                which is what a batched step reads
  overlap       share of a token's units that the token before chose too

They are kept as sums over tokens, to be added up and divided at the end. A
recall of 1 is easily had by choosing everything: look at `kept` beside it.

Letters: B batch, T tokens, U units, F neurons, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np


class Sums(NamedTuple):
  """Sums over the tokens that count; leaves [] or [L].

  Attributes:
    chosen: Units that were chosen.
    positive: Units that count.
    both: Units that were chosen and count.
    chosen_mass: |h| of chosen neurons.
    mass: |h| of all.
    error: ||y - y_dense||^2.
    output: ||y_dense||^2.
    union: Units that some sequence chose, by position.
    shared: Units that were chosen at two tokens in a row.
    repeated: Units that were chosen and have a token before.
    tokens: Tokens, times units.
    steps: Positions, times units.
  """

  chosen: Float[Array, "*l"]
  positive: Float[Array, "*l"]
  both: Float[Array, "*l"]
  chosen_mass: Float[Array, "*l"]
  mass: Float[Array, "*l"]
  error: Float[Array, "*l"]
  output: Float[Array, "*l"]
  union: Float[Array, "*l"]
  shared: Float[Array, "*l"]
  repeated: Float[Array, "*l"]
  tokens: Float[Array, "*l"]
  steps: Float[Array, "*l"]


def count(
    chosen: Bool[Array, "B T U"],
    positive: Bool[Array, "B T U"],
    mass: Float[Array, "B T U"],
    update: Float[Array, "B T D"],
    dense_update: Float[Array, "B T D"],
    is_counted: Bool[Array, "B T"],
) -> Sums:
  """Sums up one layer's choice on a batch.

  Args:
    chosen: Units that were chosen.
    positive: Units that count.
    mass: |h| of each unit.
    update: The MLP's or attention's output with the chosen units alone.
    dense_update: With all, of the same input.
    is_counted: Tokens that are measured.
  """
  num_units = chosen.shape[-1]
  counted = is_counted[..., None]
  chosen, positive = chosen & counted, positive & counted
  mass = jnp.where(counted, mass.astype(jnp.float32), 0)
  # A prompt's last token is not counted, and is no predecessor either.
  has_both = counted[:, 1:] & counted[:, :-1]
  square = lambda x: jnp.square(jnp.where(counted, x, 0).astype(jnp.float32))
  total = lambda x: x.sum(dtype=jnp.float32)
  return Sums(
      chosen=total(chosen),
      positive=total(positive),
      both=total(chosen & positive),
      chosen_mass=total(jnp.where(chosen, mass, 0)),
      mass=total(mass),
      error=total(square(update - dense_update)),
      output=total(square(dense_update)),
      union=total(chosen.any(axis=0)),
      shared=total(chosen[:, 1:] & chosen[:, :-1] & has_both),
      repeated=total(chosen[:, 1:] & has_both),
      tokens=total(is_counted) * num_units,
      steps=total(is_counted.any(axis=0)) * num_units,
  )


def summarize(sums: Sums) -> dict[str, Any]:
  """Divides; a measure without anything to divide by is NaN."""
  double: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
  with np.errstate(invalid="ignore", divide="ignore"):
    return {
        "recall": double.both / double.positive,
        "precision": double.both / double.chosen,
        "mass_recall": double.chosen_mass / double.mass,
        "output_error": np.sqrt(double.error / double.output),
        "kept": double.chosen / double.tokens,
        "union": double.union / double.steps,
        "overlap": double.shared / double.repeated,
    }
