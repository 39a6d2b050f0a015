"""Numbers of docs/theory.md, made again by the presets that it names."""

import pathlib

from absl.testing import absltest
import numpy as np
import pytest

from joma.studies.figures import figure4
from joma.studies.theorems import convergence
from joma.studies.theorems import entropy_bounce
from joma.studies.theorems import hblt
from joma.studies.theorems import stable_rank

_PAGE = pathlib.Path(__file__).parents[3] / "docs" / "theory.md"


def _number(value, digits=4):
  """As the page prints it: .5661 and −.329, 1 where it is that."""
  if value == 1:
    return "1"
  sign = "−" if value < 0 else ""
  return sign + f"{abs(value):.{digits}f}".removeprefix("0")


@pytest.mark.slow
class NumbersTest(absltest.TestCase):

  def _assert_printed(self, *texts):
    page = " ".join(_PAGE.read_text().split())
    for text in texts:
      with self.subTest(text):
        self.assertIn(text, page)

  def test_entropy_bounce(self):
    found = entropy_bounce.measure(entropy_bounce.STUDY.config)
    followed, frozen = found["with"], found["without"]
    first, least, last = (
        _number(followed[name]) for name in ("first", "least", "last")
    )
    time = _number(followed["time_of_least"], 2)
    ends = " → ".join(_number(frozen[name]) for name in ("first", "last"))
    self._assert_printed(
        f"{first} → {least} ($t={time}$) → {last}", f"without {ends}, falling"
    )

  def test_stable_rank(self):
    found = stable_rank.measure(stable_rank.STUDY.config)["with"]
    ranks = np.asarray(found["stable_rank"])
    start, least, end = ranks[:, 0], ranks.min(axis=1), ranks[:, -1]
    spread = _number(least.std(ddof=1), 2)
    self._assert_printed(
        f"{start.mean():.2f} → {least.mean():.2f} ± {spread} → {end.mean():.2f}"
    )

  def test_hblt(self):
    rows = hblt.measure(hblt.STUDY.config)["rows"]
    (row,) = (row for row in rows if row["polarity"] == 0.8)
    theorem = " | ".join(_number(value) for value in row["theorem"][1:])
    samples = " | ".join(_number(value) for value in row["sampled"])
    self._assert_printed(
        f"| theorem | – | {theorem} |",
        f"| samples | {samples} |",
        f"at the root it gives {_number(row['exact'][0])} above",
    )

  def test_convergence(self):
    found = convergence.measure(convergence.STUDY.config)
    ratios, limits = found["ratio"][-1], found["ratio_limit"]
    last, bounded = (
        ", ".join(_number(value, 6) for value in values)
        for values in (found["lambda"][-1], found["lambda_limit"])
    )
    self._assert_printed(
        f"| {ratios[0]:.4f} | $e^{{2.5}}={limits[0]:.4f}$ |",
        f"| {ratios[1]:.4f} | $e^{{1.5}}={limits[1]:.4f}$ |",
        f"| {last} | {bounded} |",
    )

  def test_figure_4(self):
    found = figure4.measure(figure4.STUDY.config)
    self._assert_printed(
        f"**{_number(found['min_entropy'], 5)} at step {found['min_step']}**",
        *(
            f"{_number(entropy, 5)} ({step})"
            for step, entropy in found["entropy_at"].items()
        ),
    )


if __name__ == "__main__":
  absltest.main()
