import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.studies.questions import bounce
from joma.studies.questions import drift
from joma.studies.questions import joint_invariant
from joma.studies.questions import linear_control
from joma.studies.questions import noisy_hblt
from joma.studies.questions import residual
from joma.studies.questions import two_layer_hblt
from scansnap_jax.experiment import figures

_NUM_RECORDS = 4


def _part(*shape):
  """An interval of positive values."""
  low = np.random.default_rng(0).uniform(0.1, 0.3, shape)
  return dict(low=low, mean=low + 0.1, high=low + 0.3)


def _curve():
  return _part(_NUM_RECORDS)


def _bounce_row():
  return dict(entropy=_curve(), rise=_part(), rises=[0.0, 0.02], num_bounces=1)


def _bounce():
  rows = lambda: {name: _bounce_row() for name in bounce.NONLINEAR}
  return dict(panels={panel: rows() for panel in bounce.PANELS}, min_rise=0.01)


def _linear_control():
  of_noise = lambda: {noise: _bounce_row() for noise in ("0.1", "0.2")}
  rows = {
      "cross-entropy": dict(identity=of_noise(), relu=of_noise()),
      "stationary": dict(identity=of_noise()),
  }
  return dict(rows=rows, noises=[0.1, 0.2], min_rise=0.01)


def _joint_invariant():
  curves = ("correlation", "slope", "relative_error", "exact")
  rows = {}
  for upper in joint_invariant.UPPER:
    for mode in joint_invariant.MODES:
      row = {curve: _curve() for curve in curves}
      extra = dict(embedding=_curve()) if upper == "embeddings" else {}
      rows[f"{upper}/{mode}"] = row | extra
  return dict(rows=rows)


def _drift():
  curves = ("drift", "fixed", "moving", "exact")
  runs = [[0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.3, 0.4]]
  row = lambda: {curve: _curve() for curve in curves} | dict(
      share_mended=_part(), drifts=runs, errors=runs
  )
  names = (
      "identity/random",
      "identity/gaussian",
      "relu/random",
      "relu/gaussian",
  )
  return dict(rows={name: row() for name in names})


def _residual():
  curves = ("loss", "entropy", "distance")
  row = lambda: {curve: _curve() for curve in curves} | dict(
      summed_law=_part(), single_law=_part()
  )
  return dict(
      rows={
          f"{attention}/{task}/{is_on}": row()
          for attention in residual.ATTENTIONS
          for task in residual.TASKS
          for is_on in residual.RESIDUALS
      }
  )


def _two_layer_hblt():
  case = lambda: dict(
      scores=_part(3, 2, 2), chance=_part(3, 2, 2), strong_share=_curve()
  )
  cases = {name: case() for name in two_layer_hblt.CASES}
  return dict(cases=cases, score_steps=[0, 10, 20])


def _noisy_hblt():
  row = lambda: dict(
      trained=_part(2, 2),
      untrained=_part(2, 2),
      shuffled=_part(2, 2),
      accuracy=_part(),
  )
  rows = {key: row() for key in ("0.5", "1")}
  return dict(rows=rows, polarities=[0.5, 1.0], num_classes=4)


# Each study with a summary, and the panels of its figure.
_SUMMARIES = dict(
    bounce=(bounce, _bounce, 6),
    linear_control=(linear_control, _linear_control, 3),
    joint_invariant=(joint_invariant, _joint_invariant, 4),
    drift=(drift, _drift, 6),
    residual=(residual, _residual, 8),
    two_layer_hblt=(two_layer_hblt, _two_layer_hblt, 3),
    noisy_hblt=(noisy_hblt, _noisy_hblt, 5),
)


class FigureTest(parameterized.TestCase):

  @parameterized.parameters(*_SUMMARIES)
  @pytest.mark.slow
  def test_draws_a_summary_read_back(self, name):
    study, make, num_panels = _SUMMARIES[name]
    summary = make() | dict(steps=[0, 10, 20, 30], num_seeds=2)
    to_list = lambda x: x.tolist()
    summary = json.loads(json.dumps(summary, default=to_list))
    figure = study.draw(summary)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    self.assertLen(panels, num_panels)
    for axes in panels:
      self.assertTrue(axes.get_title(), name)
      self.assertNotEmpty(axes.lines)
    paths = figures.save(figure, pathlib.Path(self.create_tempdir()), name)
    for path in paths:
      self.assertGreater(path.stat().st_size, 1000)

  def test_points_are_those_of_the_summary(self):
    summary = _noisy_hblt()
    figure = noisy_hblt.draw(summary)
    line = figure.axes[2].lines[0]  # Layer 2, depth 0, trained.
    np.testing.assert_array_equal(line.get_xdata(), [0.5, 1.0])
    expected = [
        summary["rows"][k]["trained"]["mean"][1, 0] for k in ("0.5", "1")
    ]
    np.testing.assert_array_equal(line.get_ydata(), expected)


if __name__ == "__main__":
  absltest.main()
