"""What is claimed of recalling pairs, and whether it came out so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from joma.studies import claims
from scansnap_jax.experiment import intervals

_BEST, _CONV, _DELTA = "softmax + conv", "gated_conv", "gdn"
_LINEAR = "lightning + conv"
_HYBRIDS = {
    "3 gdn + 1 softmax": "",
    "3 gdn + 1 softmax + conv": " with convolutions",
}
Row = Mapping[str, Any]


def rows(
    num_pairs: Sequence[int], key_size: int, found: Mapping[str, Row]
) -> list[claims.Row]:
  """Holds what `mqar.measure` gives against the claims.

  Args:
    num_pairs: Pairs of a text: numbers that rise.
    key_size: Channels of a key of the delta rule.
    found: Of each model that was trained, "pairs": of each number of pairs
      "accuracy", "accuracies" by seed, "near" and "far".

  Returns:
    Claims of the models that are there.
  """
  told: list[claims.Row] = []
  has = lambda *names: all(name in found for name in names)
  below = [n for n, num in enumerate(num_pairs) if num < key_size]
  every = range(len(num_pairs))
  if has(_BEST):
    told.append(
        claims.row(
            "softmax with short convolutions recalls every number of pairs",
            "above .95 of the keys of each",
            _text(found[_BEST], every),
            _least(found[_BEST], every) > 0.95,
        )
    )
  if has(_DELTA) and below:
    told.append(
        claims.row(
            "the gated delta rule recalls pairs that are fewer than its keys"
            f" have channels, {key_size}",
            "above .95 of the keys of each number",
            _text(found[_DELTA], below),
            _least(found[_DELTA], below) > 0.95,
        )
    )
  if has(_DELTA, _LINEAR):
    told.append(_below(num_pairs[-1], found[_LINEAR], found[_DELTA]))
  if has(_CONV):
    told += _of_reach(num_pairs, found[_CONV]["pairs"])
  for name, kind in _HYBRIDS.items():
    if has(name, _BEST):
      told.append(_recovers(found[name], found[_BEST], kind))
  return told


def _recovers(hybrid: Row, softmax: Row, kind: str) -> claims.Row:
  """Three layers of the rule to one of softmax, against softmax alone."""
  every = range(len(softmax["pairs"]))
  gap = [
      softmax["pairs"][n]["accuracy"]["mean"]
      - hybrid["pairs"][n]["accuracy"]["mean"]
      for n in every
  ]
  return claims.row(
      f"three layers of the rule to one of softmax{kind} recall as softmax"
      " does",
      "at most .03 below softmax with convolutions, at each number",
      f"hybrid {_text(hybrid, every)}, softmax {_text(softmax, every)}",
      max(gap) < 0.03,
  )


def _below(most: int, linear: Row, delta: Row) -> claims.Row:
  """Linear attention against the rule, at the most pairs."""
  apart = np.array(delta["pairs"][-1]["accuracies"]) - np.array(
      linear["pairs"][-1]["accuracies"]
  )
  return claims.row(
      "linear attention that fades, with the same convolution and a state of"
      f" the same size, recalls less of {most} pairs",
      "less from every seed",
      f"lightning {_text(linear, [-1])}, gdn {_text(delta, [-1])}",
      bool((apart > 0).all()),
  )


def _of_reach(
    num_pairs: Sequence[int], found: Sequence[Row]
) -> list[claims.Row]:
  """What convolutions see of few pairs, and what of many they do not.

  A guess among one pair is right, so that nothing is claimed of it.
  """
  (few, *_), most = num_pairs, num_pairs[-1]
  near, far, told = found[0]["near"], found[-1]["far"], []
  if few > 1:
    told.append(
        claims.row(
            f"two layers of gated convolutions recall {few} pairs told within"
            " 44 tokens",
            f"at least .10 above {1 / few:.2f}, a guess",
            intervals.text(near),
            near["mean"] > 1 / few + 0.1,
        )
    )
  if most > 1 and far is not None:
    told.append(
        claims.row(
            f"and guess of {most} pairs where they were told more than 45"
            " tokens before",
            f"at most .05 above {1 / most:.2f}",
            intervals.text(far),
            far["mean"] < 1 / most + 0.05,
        )
    )
  return told


def _text(row: Row, kinds: Iterable[int]) -> str:
  """Recall of some numbers of pairs."""
  return ", ".join(intervals.text(row["pairs"][n]["accuracy"]) for n in kinds)


def _least(row: Row, kinds: Iterable[int]) -> float:
  return min(row["pairs"][n]["accuracy"]["mean"] for n in kinds)
