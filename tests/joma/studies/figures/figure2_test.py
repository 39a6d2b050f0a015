import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.figures import figure2
from joma.studies.figures import figure3
from joma.theory import context_runs
from tests.joma.studies.figures import figure2_draws

# The authors' script, run with torch seeds 0, 1 and 2: normalized correlation
# at steps 100, 500, 1000 and 1500 for each seed, with the full predictor and
# with either term alone.
_STEPS = (100, 500, 1000, 1500)
_REFERENCE = {
    "gaussian": {
        "correlation": [
            [0.99928, 0.99771, 0.99198, 0.95720],
            [0.99848, 0.99837, 0.99754, 0.99559],
            [0.99898, 0.99759, 0.99674, 0.99543],
        ],
        "first_term": [
            [0.41393, 0.89203, 0.95248, 0.94676],
            [-0.39180, 0.86306, 0.95274, 0.98636],
            [0.15970, 0.86466, 0.94956, 0.98541],
        ],
        "second_term": [
            [-0.18094, 0.02046, -0.00612, -0.01109],
            [0.17070, 0.08214, 0.01087, -0.00418],
            [0.07078, 0.08599, 0.02181, -0.00165],
        ],
    },
    "random": {
        "correlation": [
            [0.99918, 0.99389, 0.99791, 0.94459],
            [0.99935, 0.98787, 0.98947, 0.98895],
            [0.99961, 0.99276, 0.99384, 0.99352],
        ],
        "first_term": [
            [0.13937, 0.92828, 0.97909, 0.93447],
            [0.27505, 0.88767, 0.94399, 0.97285],
            [0.34077, 0.92989, 0.96449, 0.98380],
        ],
        "second_term": [
            [0.00727, 0.27139, 0.31602, 0.34959],
            [-0.18558, -0.13044, -0.08230, -0.06994],
            [0.05447, 0.23040, 0.18310, 0.10970],
        ],
    },
}
# v_0 at step 1999 of seed 0, and the losses of all seeds there.
_V0 = {
    "gaussian": [1.531843, 0.548265, 0.231366, 0.082619],
    "random": [0.024529, 0.134926, 0.021122, 0.071724],
}
_LOSS = {
    "gaussian": [2.53471, 2.52078, 2.51871],
    "random": [2.49179, 2.73700, 2.68142],
}
# Ten times the rounding above and the gap between torch's float32 and ours;
# |v| in place of |W| in the predictor makes 7e-5.
_ATOL = 4e-5
_CONFIG = figure2.Figure2Config(num_seeds=3)


def _reference_starts():
  """The draws of the reference, gaussian mode first."""
  with np.load(figure2_draws.PATH) as draws:
    weights = np.stack([draws["weights"]] * 2)
    rest = [
        np.concatenate([draws[name]] * 2) for name in ("lower", "attn_logits")
    ]
  token, label = np.arange(10)[:, None], np.arange(20)[None]
  weights[0, :, :10] = np.exp(-((token - label / 2) ** 2) / 30)
  contexts = (weights / weights.sum(axis=2, keepdims=True)).swapaxes(2, 3)
  contexts = contexts.reshape(6, 20, 20)
  return context_runs.Start(*map(jnp.asarray, (contexts, *rest)))


@functools.cache
def _reference_runs(num_records=100, steps_per_record=20):
  runs = context_runs.train(
      _reference_starts(),
      temperature=0.5,
      step_size=0.1,
      num_records=num_records,
      steps_per_record=steps_per_record,
  )
  return jax.device_get(runs)


@functools.cache
def _seeds():
  """Our own draws: as many runs, so that the program is the same."""
  return figure2.run_all(_CONFIG)


class ReferenceTest(parameterized.TestCase):

  @parameterized.parameters("gaussian", "random")
  @pytest.mark.by_default(0)
  def test_replays_the_authors_run(self, mode):
    seeds = slice(0, 3) if mode == "gaussian" else slice(3, 6)
    for name, expected in _REFERENCE[mode].items():
      actual = getattr(_reference_runs(), name)[seeds]
      places = [step // 20 for step in _STEPS]
      np.testing.assert_allclose(actual[:, places], expected, atol=_ATOL)

  @parameterized.parameters(("gaussian", 0), ("random", 3))
  @pytest.mark.slow  # Another program, for a step that is a prime number.
  def test_weights_and_losses_are_the_authors(self, mode, first):
    runs = _reference_runs(num_records=1999, steps_per_record=1)
    np.testing.assert_allclose(runs.v[first, -1, :4, 0], _V0[mode], atol=_ATOL)
    np.testing.assert_allclose(
        runs.loss[first : first + 3, -1], _LOSS[mode], atol=_ATOL
    )

  @pytest.mark.slow  # Importing torch.
  def test_draws_are_torchs(self):
    try:
      expected = figure2_draws.draw(1)
    except ImportError:
      self.skipTest("torch is not installed")
    with np.load(figure2_draws.PATH) as draws:
      for name, values in zip(
          ("weights", "lower", "attn_logits"), expected, strict=True
      ):
        np.testing.assert_array_equal(draws[name][1], values)


class SeedsTest(parameterized.TestCase):

  @parameterized.parameters(("gaussian", 0.98), ("random", 0.87))
  @pytest.mark.slow
  def test_correlation_stays_high(self, mode, least):
    correlation = _seeds()[mode].correlation
    np.testing.assert_allclose(correlation[:, 0], 1, atol=1e-6)
    self.assertGreater(correlation[:, :25].min(), 0.95)
    self.assertGreater(correlation[:, -1].min(), least)

  @parameterized.parameters("gaussian", "random")
  @pytest.mark.slow
  def test_scale_is_lost_but_by_the_exact_law(self, mode):
    runs = _seeds()[mode]
    self.assertLess(runs.printed.slope[:, -1].max(), 0.35)
    self.assertGreater(runs.printed.relative_error[:, -1].min(), 2)
    self.assertGreater(runs.drift[:, -1].min(), 1)
    # First order in the step, and float32 where z has hardly changed.
    self.assertLess(runs.exact.relative_error[:, 5:].max(), 0.06)
    np.testing.assert_allclose(runs.exact.slope[:, -1], 1, atol=0.02)

  @parameterized.parameters("gaussian", "random")
  @pytest.mark.slow  # Another program.
  def test_exp_attention_obeys_its_own_law(self, mode):
    # Up to step 500: near step 850 attention bursts, and steps are too long.
    start = context_runs.draw_start(jax.random.key(0), mode)
    run = jax.jit(
        functools.partial(context_runs.run, attention="exp", num_records=1)
    )
    errors = [
        run(start, step_size=0.1 / n, steps_per_record=500 * n).printed[2][-1]
        for n in (1, 2)
    ]
    self.assertLess(errors[0], 0.01)
    self.assertBetween(errors[0] / errors[1], 1.8, 2.2)


class MeasureTest(absltest.TestCase):

  def test_summary_is_the_runs(self):
    rows = []
    seeds = _seeds()  # Before what it calls is patched.
    with mock.patch.object(figure2, "run_all", lambda _: seeds):
      summary = figure2.measure(
          _CONFIG, on_metrics=lambda step, row: rows.append((step, row))
      )
    self.assertLen(rows, 101)
    self.assertEqual(rows[-1][0], 2000)
    runs = _seeds()["random"]
    band = summary["random"]["relative_error"]
    np.testing.assert_allclose(
        band["max"], runs.printed.relative_error.max(axis=0)
    )
    self.assertAlmostEqual(
        rows[-1][1]["random_relative_error"], band["mean"][-1]
    )
    self.assertIn("keeps the direction", summary["finding"])
    self.assertIn("loses the scale", summary["finding"])
    self.assertIn("exact law holds", summary["finding"])

  @pytest.mark.slow
  def test_finding_says_so_if_the_exact_law_fails(self):
    runs = {
        mode: of_mode._replace(exact=of_mode.printed)
        for mode, of_mode in _seeds().items()
    }
    with mock.patch.object(figure2, "run_all", lambda _: runs):
      self.assertIn("exact law fails", figure2.measure(_CONFIG)["finding"])


class Figure3Test(absltest.TestCase):

  def test_weights_spread_and_then_draw_together(self):
    config = figure3.Figure3Config(num_seeds=3)
    seeds = _seeds()  # Before what it calls is patched.
    with mock.patch.object(figure2, "run_all", lambda _: seeds):
      summary = figure3.measure(config)
    v = _seeds()["gaussian"].v
    np.testing.assert_array_equal(summary["gaussian"]["last"], v[0, -1])
    np.testing.assert_array_equal(
        summary["gaussian"]["components"], v[0, :, :4, 0]
    )
    for mode in context_runs.MODES:
      effective = summary[mode]["effective"]
      self.assertGreater(effective.max(), effective[0] + 1)
      self.assertLess(effective[-1], effective.max() - 3)
      self.assertBetween(effective.min(), 1, 20)
    self.assertEqual(summary["finding"].count("first spread"), 2)

  def test_effective_number_by_hand(self):
    # (4 + 4 + 1)^2 over 16 + 16 + 1, and a single token.
    v = np.array([[2.0, 3], [-2, 0], [1, 0]])
    np.testing.assert_allclose(
        figure3._effective_number(v), [81 / 33, 1], rtol=1e-12
    )


if __name__ == "__main__":
  absltest.main()
