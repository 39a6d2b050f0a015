import dataclasses
from unittest import mock

from absl.testing import absltest
import pytest

from launch.bench import attention as bench_attention
from scansnap_jax.experiment import errors

_TINY = bench_attention.BenchConfig(
    entries=("self_gating",),
    train_length=4,
    decode_length=8,
    batch_size=1,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_rounds=1,
)


class AttentionTest(absltest.TestCase):

  @pytest.mark.slow  # Compiles two training steps.
  def test_rows_of_softmax_and_of_each_entry(self):
    """The ratio of softmax to itself is 1; each step goes on from the last."""
    plain, other = bench_attention.measure(_TINY)["rows"]
    self.assertEqual(plain["system"], "softmax")
    self.assertEqual((plain["train_ratio"], plain["decode_ratio"]), (1.0, 1.0))
    self.assertEqual(other["system"], "self_gating")
    self.assertGreater(other["train_ratio"], 0)
    self.assertGreater(other["decode_ms"], 0)

  def test_what_cannot_be_timed_says_why(self):
    def refuse(config, entry):
      if entry != "softmax":
        raise errors.UserError("it cannot")
      return lambda: None

    turns = {"train": refuse, "decode": refuse}
    with mock.patch.object(bench_attention, "_TURNS", turns):
      plain, other = bench_attention.measure(_TINY)["rows"]
    self.assertEqual((plain["train_ratio"], plain["decode_ratio"]), (1.0, 1.0))
    self.assertEqual(other["note"], "train: it cannot decode: it cannot ")

  def test_lengths_are_tables_and_rows_are_kept_as_they_end(self):
    made = []

    def make(config, entry):
      made.append((config.train_length, config.decode_length, entry))
      return lambda: None

    folder = self.create_tempdir().full_path
    config = dataclasses.replace(
        _TINY, entries=("gdn", "moh"), lengths=(4, 6), folder=folder
    )
    turns = {"train": make, "decode": make}
    with mock.patch.object(bench_attention, "_TURNS", turns):
      first = bench_attention.measure(config)["rows"]
      found = [(row["train_length"], row["system"]) for row in first]
      systems = ("softmax", "gdn", "moh")
      self.assertEqual(found, [(n, s) for n in (4, 6) for s in systems])
      self.assertEqual(
          made.count((4, 4, "softmax")), 2
      )  # Compiled once a table and kind of step.
      made.clear()
      again = bench_attention.measure(config)["rows"]
      self.assertEqual(made, [])
      self.assertEqual(again, first)
      larger = dataclasses.replace(config, num_heads=4)
      bench_attention.measure(larger)
      self.assertLen(made, 12)  # Rows of other sizes are not taken.
    with self.assertRaisesRegex(errors.UserError, "lengths must"):
      dataclasses.replace(config, lengths=(512, 0))

  def test_a_system_that_is_none_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "no system 'self_gate'"):
      bench_attention.BenchConfig(entries=("self_gate",))


if __name__ == "__main__":
  absltest.main()
