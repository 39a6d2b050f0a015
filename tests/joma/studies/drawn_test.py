import json
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.studies.figures import figure4
from joma.studies.theorems import convergence
from joma.studies.theorems import entropy_bounce
from joma.studies.theorems import erf
from joma.studies.theorems import hblt
from joma.studies.theorems import invariants as invariants_study
from joma.studies.theorems import stable_rank
from joma.theory import context_runs
from joma.theory import dynamics
from joma.theory import invariants
from scansnap_jax.experiment import figures

_CONFIGS = {
    "figure2": figure2.Figure2Config(num_seeds=2, num_steps=40),
    "figure3": figure3.Figure3Config(num_seeds=2, num_steps=40),
    "figure4": figure4.Figure4Config(num_steps=900),
    "erf": erf.ErfConfig(num_times=5),
    "convergence": convergence.ConvergenceConfig(num_times=5),
    "entropy_bounce": entropy_bounce.EntropyBounceConfig(num_times=5),
    "hblt": hblt.HbltConfig(num_depths=2, batch_size=100),
    "stable_rank": stable_rank.StableRankConfig(num_times=5, num_seeds=2),
}


_STUDIES = {
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "erf": erf,
    "convergence": convergence,
    "entropy_bounce": entropy_bounce,
    "hblt": hblt,
    "stable_rank": stable_rank,
}


def _made_up_runs(config):
  """Runs of Figure 2 with the right shapes, and positive numbers."""
  random = np.random.default_rng(0)
  times = config.num_steps // config.record_every + 1
  curve = lambda: random.uniform(0.1, 1, (config.num_seeds, times))
  check = lambda: invariants.InvariantCheck(curve(), curve(), curve())
  return {
      mode: context_runs.ContextRun(
          *(curve(), curve(), curve(), check(), check(), curve()),
          random.normal(size=(config.num_seeds, times, 20, 20)),
          curve(),
      )
      for mode in context_runs.MODES
  }


def _summary(name):
  """Measures a small study, and reads it back from JSON."""
  with mock.patch.object(figure2, "run_all", _made_up_runs):
    summary = _STUDIES[name].measure(_CONFIGS[name])
  to_list = lambda x: x.tolist()
  return json.loads(json.dumps(summary, default=to_list, allow_nan=False))


def _invariants():
  laws = [
      {
          "attention": attention,
          "activation": activation,
          "num_queries": number,
          "relative_error": [2e-2, 1e-3],
      }
      for attention in ("linear", "exp", "softmax")
      for activation in dynamics.ACTIVATIONS
      for number in (1, 3)
  ]
  printed = [
      {"activation": a, "num_queries": n, "printed_relative_error": 0.2}
      for a in dynamics.ACTIVATIONS
      for n in (1, 3)
  ]
  return {"step_sizes": [2e-2, 1e-3], "laws": laws, "printed": printed}


def _texts(figure):
  """Draws a figure; returns its titles, labels and legends."""
  with figures.style():
    figure.draw_without_rendering()
  texts = []
  for axes in figure.axes:
    texts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    texts += axes.get_legend_handles_labels()[1]
  return texts


class FiguresTest(parameterized.TestCase):

  @parameterized.parameters(
      ("figure2", "relative error, exact law", 4),
      # Each of four colour bars is an axis.
      ("figure3", "tokens per node", 8 + 4),
      ("figure4", "attention entropy (nats)", 2),
      ("erf", r"$\Delta_l=0.8$", 3),
      ("convergence", r"$\mu_j,\mu_k=3,2$", 3),
      ("entropy_bounce", "without attention", 3),
      ("hblt", r"$\rho=0.95$", 1),
      ("stable_rank", "with attention", 2),
  )
  @pytest.mark.by_default(1)
  def test_draws_a_summary_read_back_from_json(self, name, text, num_axes):
    figure = _STUDIES[name].draw(_summary(name))
    self.assertIn(text, _texts(figure))
    self.assertLen(figure.axes, num_axes)

  def test_invariants(self):
    figure = invariants_study.draw(_invariants())
    self.assertIn("softmax attention", _texts(figure))
    # Five activations twice and the guide; five crosses.
    self.assertLen(figure.axes[0].lines, 11)
    self.assertLen(figure.axes[2].lines, 16)

  def test_points_are_the_summarys(self):
    summary = _summary("figure4")
    left, right = figure4.draw(summary).axes
    self.assertEqual(right.lines[1].get_xdata(), [summary["min_step"]])
    self.assertEqual(right.lines[1].get_ydata(), [summary["min_entropy"]])
    np.testing.assert_array_equal(
        left.lines[3].get_ydata(), np.array(summary["curve"]["v"])[:, 3]
    )

  def test_no_line_leads_to_the_root_of_which_the_theorem_does_not_speak(self):
    summary = _summary("hblt")
    row, line = summary["rows"][0], hblt.draw(summary).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), row["depths"][1:])
    np.testing.assert_array_equal(line.get_ydata(), row["theorem"][1:])


if __name__ == "__main__":
  absltest.main()
