"""The probes by the names that `--probes` gives them: the only list.

Imports no jax, so that wrong flags are answered at once.
"""

from collections.abc import Sequence
import difflib

from scansnap_jax.experiment import errors

# What each one says of a layer, for reports.
PROBES: dict[str, str] = {
    "sinks": (
        "share of texts and heads whose first key is a sink: has a mean"
        " weight above .3"
    ),
    "sink_of_means": (
        "share of heads whose first key is one on the mean of texts"
    ),
    "secondary_sinks": "tokens of a text that become like the first one there",
    "concentration": "Frobenius norm of a map, 1 of one key a query",
    "diversity": "1 - cosine of two heads' maps",
    "local": "weight on a query's own key and the 0 to 3 keys before it",
    "update_rank": "singular values that hold 90 % of what has changed",
}
# Of parameters and their first values; all others are of what is sown.
OF_UPDATES = "update_rank"


def check(names: tuple[str, ...]) -> None:
  """Raises UserError if a name is unknown or stands twice."""
  for name in names:
    if name not in PROBES:
      near = difflib.get_close_matches(name, PROBES, n=1, cutoff=0.0)
      raise errors.UserError(
          f"probes={','.join(names)}: there is no probe {name!r}; the nearest"
          f" is {near[0]!r}, of {', '.join(PROBES)}."
      )
    if names.count(name) > 1:
      raise errors.UserError(f"probes={','.join(names)} has {name!r} twice.")


def captions(names: Sequence[str]) -> str:
  """What the columns of a table of probes are, in one sentence."""
  return "; ".join(f"{name}: {PROBES[name]}" for name in names) + "."
