"""Grids of policies and budgets, with a model too small to be right."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cost import cache_plan
from joma.inference.cost import cost_model
from joma.inference.evaluation import evaluate_caches
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_data
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation import evaluate_subject
from joma.inference.evaluation import tasks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import intervals
from tests.joma.transformer import applied

_CONFIG = evaluate_config.EvaluateConfig(
    policies=("h2o:num_sinks=3",),
    budgets=(0.5,),
    num_seeds=2,
    batch_size=3,
    length=16,
    num_pairs=2,
    vocab_size=12,
)


def _subject(config, vocab_size=12, reads_text=False):
  shape = dataclasses.replace(
      config.shape,
      vocab_size=vocab_size,
      embed_dim=8,
      num_heads=2,
      head_dim=4,
      hidden_dim=8,
  )
  model = models.Transformer(shape)
  params = applied.params(model)
  return evaluate_grid.Subject(
      model=model,
      params=params,
      tokenizer=tokenizer.Bytes() if reads_text else None,
  )


@functools.cache
def _measured():
  """The subject, its rows by the policy's first word, and what was told.

  What is not asked for is no NaN on a device: nothing is trapped.
  """
  subject, told = _subject(_CONFIG), []
  with jax.debug_nans(True):
    rows = evaluate_grid.measure(_CONFIG, subject, on_progress=told.append)
  rows = {row["policy"].partition(":")[0]: row for row in rows["mqar"]}
  return subject, rows, told


class GridTest(absltest.TestCase):

  def test_means_are_of_numbers_and_a_state_has_none(self):
    """Without a word to the user: numpy's own mean of nothing warns."""
    recall = np.array([[[1.0], [np.nan], [0.0]], [[np.nan]] * 3])
    found = evaluate_grid._mean_of_numbers(recall)
    np.testing.assert_array_equal(found, [[0.5], [np.nan]])

  @pytest.mark.slow
  def test_a_selector_is_read_through_its_own_cache(self):
    """With all keys it is the full cache; nothing evicts from it."""
    subject, rows, _ = _measured()
    shape = layer_hooks.over(subject.model.config, ("hip:k=256",))
    laid = dataclasses.replace(subject, model=models.Transformer(shape))
    config = dataclasses.replace(_CONFIG, policies=("full",))
    (row,) = evaluate_grid.measure(config, laid)["mqar"]
    self.assertEqual(evaluate_grid.num_readings(config, shape), 2)
    self.assertEqual(row["policy"], "full")
    self.assertEqual(row["quality"], rows["full"]["quality"])
    message = "h2o has nothing to evict from in layer 0, where hip keeps"
    with self.assertRaisesRegex(errors.UserError, message):
      evaluate_grid.check(_CONFIG, laid)

  def test_what_is_laid_over_a_model_wants_one(self):
    config = dataclasses.replace(_CONFIG, attention=("hip",))
    with self.assertRaisesRegex(errors.UserError, "hip is laid over a --model"):
      evaluate_subject.check(config, None)

  def test_rows_of_a_task(self):
    subject, rows, told = _measured()
    self.assertEqual([*rows], ["full", "window", "random", "h2o"])
    self.assertEqual(rows["h2o"]["policy"], "h2o:num_sinks=3")
    self.assertLen(told, evaluate_grid.num_readings(_CONFIG))
    for row in rows.values():
      # Random eviction draws anew with each seed, in a program of its own.
      is_drawn = row["policy"] == "random"
      self.assertEqual(row["compilations"], 2 if is_drawn else 1)
      self.assertEqual(row["num_draws"], 2 if is_drawn else None)
      self.assertEqual(row["num_texts"], 6)
      if not is_drawn:
        self.assertGreater(row["ms_per_step"], 0)
      # Of the layer that sees all.
      self.assertLen(row["recall_by_layer"], 1)
    self.assertEqual(rows["full"]["recall"]["mean"], 1)
    self.assertEqual(rows["full"]["slots"], 16)
    # The pairs come first, and slots are for half of the text.
    self.assertLess(rows["window"]["recall"]["mean"], 1)
    self.assertBetween(rows["h2o"]["kept_mass"]["mean"], 0.1, 1)
    self.assertIsNone(rows["window"]["kept_mass"])
    load = cost_model.Load(
        batch_size=3,
        length=16,
        weight_dtype="float32",
        cache_dtype="float32",
    )
    # A slot cache has its slots in layers with windows too.
    shape = dataclasses.replace(subject.model.config, windows=())
    for name, plan in (
        ("h2o", cache_plan.scored(8)),
        ("window", cache_plan.window(8)),
    ):
      modelled = cost_model.cache_bytes(shape, load, plan)
      self.assertEqual(rows[name]["cache_bytes"], modelled)
    self.assertLess(rows["h2o"]["step_bytes"], rows["full"]["step_bytes"])

  def test_gold_in_sinks_counts_the_tokens_before_the_first_that_may_leave(
      self,
  ):
    """Two pairs come first: what is asked for stands at 1 or at 3."""
    draw = evaluate_data.drawer(_CONFIG, "mqar", 12, None)
    drawn = []
    for seed in range(_CONFIG.num_seeds):
      drawn += evaluate_data.examples(_CONFIG, draw, _CONFIG.first_seed + seed)
    gold = tasks.stack(drawn).gold
    gold = gold[gold >= 0]
    self.assertEqual(set(gold), {1, 3})
    _, rows, _ = _measured()
    self.assertEqual(rows["full"]["gold_in_sinks"], 0)
    found = rows["h2o"]["gold_in_sinks"]
    self.assertAlmostEqual(found, (gold == 1).mean())

  @pytest.mark.slow
  def test_a_model_whose_logits_are_no_numbers_has_no_accuracy(self):
    """NaN has a largest logit, by argmax: a wrong answer like any other."""
    subject, _, _ = _measured()
    params = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan), subject.params
    )
    subject = dataclasses.replace(subject, params=params)
    with self.assertRaisesRegex(errors.UserError, "infinite in 6 of 6 texts"):
      evaluate_grid.measure(_CONFIG, subject)

  def test_a_text_that_is_not_there_is_told_before_any_is_read(self):
    config = dataclasses.replace(
        _CONFIG, tasks=("mqar", "perplexity"), texts=("/absent.txt",)
    )
    subject = dataclasses.replace(_measured()[0], tokenizer=tokenizer.Bytes())
    with self.assertRaisesRegex(errors.UserError, "texts=/absent.txt"):
      evaluate_grid.measure(config, subject, on_progress=self.fail)

  @pytest.mark.slow  # Three compilations.
  def test_perplexity_is_compared_text_by_text(self):
    config = dataclasses.replace(
        _CONFIG, tasks=("perplexity",), policies=(), skip=4
    )
    subject = _subject(config, 256, reads_text=True)
    found = evaluate_grid.measure(config, subject)["perplexity"]
    rows = {row["policy"]: row for row in found}
    self.assertEqual(
        rows["full"]["ratio"], {"mean": 1.0, "low": 1.0, "high": 1.0}
    )
    # An untrained model: about one in 256.
    self.assertBetween(rows["full"]["perplexity"]["mean"], 100, 700)
    window = rows["window"]
    self.assertAlmostEqual(
        window["ratio"]["mean"],
        window["perplexity"]["mean"] / rows["full"]["perplexity"]["mean"],
        places=6,
    )
    self.assertLess(window["ratio"]["low"], window["ratio"]["high"])


class SumUpTest(absltest.TestCase):

  def test_texts_of_one_draw_of_a_policy_are_one_draw(self):
    # Two draws, two texts each: means of 0.5 and 1.
    seen = {
        "quality": np.array([0.0, 1, 1, 1]),
        "kept_mass": np.array([0.2, 0.4, 0.6, 0.8]),
    }
    row = evaluate_grid._sum_up(seen, 2)
    expected = intervals.interval(np.array([0.5, 1.0]))
    self.assertEqual(row["quality"], expected)
    expected = intervals.interval(np.array([0.3, 0.7]))
    for name, value in expected.items():
      self.assertAlmostEqual(row["kept_mass"][name], value)
    self.assertEqual(row["num_texts"], 4)
    apart = evaluate_grid._sum_up(seen, None)["quality"]
    self.assertEqual(apart, intervals.interval(seen["quality"]))


class CacheTest(parameterized.TestCase):

  def test_windows_of_prompts_shrink_with_the_cache(self):
    config = dataclasses.replace(_CONFIG, policies=("snapkv",))
    caches = evaluate_caches.make(
        config, _subject(config).model.config, "snapkv", 8, 1
    )
    self.assertEqual(caches[0].policy.window, 4)

  def test_quest_reads_so_much_and_adakv_shares_as_much(self):
    shape = _subject(_CONFIG).model.config
    make = lambda name, slots: evaluate_caches.make(
        _CONFIG, shape, name, slots, 1
    )[0]
    read = make("quest:page_size=4", 11)
    self.assertEqual(read.policy.num_keys, 8)
    self.assertEqual(read.kept.key.shape[2], 16)
    self.assertIsNone(read.kept_positions())
    pool = make("adakv:h2o:score=ema", 8)
    self.assertEqual(pool.policy.base.score, "ema")
    # Slots come in pages; what the heads may fill of them is the budget.
    self.assertEqual(int(pool.budgets.sum()), 8)

  def test_what_protects_too_much_is_named(self):
    config = dataclasses.replace(
        _CONFIG, policies=("streaming_llm:num_sinks=8",)
    )
    with self.assertRaisesRegex(
        errors.UserError, "streaming_llm:num_sinks=8, 8 slots"
    ):
      evaluate_grid.check(config, _subject(config))


class SubjectTest(parameterized.TestCase):

  @parameterized.parameters(2, 3)
  @pytest.mark.slow  # Compiles a training.
  def test_training_that_diverges_says_where(self, num_steps):
    config = dataclasses.replace(
        _CONFIG, lr=1e30, train_steps=num_steps, train_batch=2
    )
    with self.assertRaisesRegex(errors.UserError, "diverged at step [12]: use"):
      evaluate_subject.train(config)

  @pytest.mark.slow
  def test_trains_on_the_task(self):
    config = dataclasses.replace(
        _CONFIG, train_steps=25, train_batch=8, lr=1e-2
    )
    subject, training = evaluate_subject.train(config)
    self.assertEqual(subject.model.config.vocab_size, 12)
    losses = training["losses"]
    # From one in twelve towards one of the six values.
    self.assertLess(losses[-1], losses[0] - 0.3)

  @parameterized.parameters(
      (dict(tasks=("passkey",)), "without --model"),
      (dict(tasks=("mqar", "copy")), "one task"),
      (dict(num_pairs=5), "length=16"),
      (dict(policies=("best",)), "best"),
  )
  def test_says_before_training_what_cannot_be(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      evaluate_subject.check(dataclasses.replace(_CONFIG, **changes), None)


class ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(budgets=(0.0,)), r"budgets=0.0.*\(0, 1\]"),
      (dict(budgets=(1.5,)), r"budgets=1.5.*\(0, 1\]"),
      (dict(slots=(0,)), "slots.*1 to 16"),
      (dict(slots=(17,)), "slots.*1 to 16"),
      (dict(budgets=()), "budgets"),
      (dict(tasks=("sudoku",)), "sudoku.*mqar"),
      (dict(tasks=()), "tasks"),
      (dict(reading="prompt"), "reading=prompt"),
      (dict(skip=16), "skip"),
      (dict(num_seeds=0), "num_seeds"),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_CONFIG, **changes)

  def test_budgets_become_slots(self):
    config = dataclasses.replace(_CONFIG, budgets=(0.5, 0.25, 0.01))
    self.assertEqual(config.capacities(), {1: 0.01, 4: 0.25, 8: 0.5})
    config = dataclasses.replace(config, slots=(4, 12))
    self.assertEqual(config.capacities(), {4: 0.25, 12: 0.75})


if __name__ == "__main__":
  absltest.main()
