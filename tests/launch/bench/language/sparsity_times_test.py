"""Times of gathered MLPs beside perplexities that a run has measured."""

import csv
import json
import pathlib

from absl.testing import absltest
import pytest

from kernels_pallas.aot import topology
from launch.bench.language import sparsity_times
from scansnap_jax.experiment import errors


def _run(folder, names, shares=(0.25, 0.75)):
  """A finished run, whose change is a tenth of what is left out."""
  rows = [{"rule": "dense", "share": 1.0}]
  for name in names:
    for share in shares:
      change = (1 - share) / 10
      found = {"change": change, "change_low": 0.0, "change_high": 2 * change}
      rows.append({"rule": name, "share": share, **found})
  path = pathlib.Path(folder) / "summary.json"
  path.write_text(json.dumps({"methods": rows}))
  return path.parent


class ReadTest(absltest.TestCase):

  def test_oracles_of_blocks_are_taken_and_nothing_else(self):
    names = ("teal", "oracle", "oracle:layers", "oracle:even:32")
    folder = _run(self.create_tempdir().full_path, names)
    rows = sparsity_times.read(folder)
    found = [(row["block"], row["share"]) for row in rows]
    self.assertEqual(found, [(1, 0.25), (1, 0.75), (32, 0.25), (32, 0.75)])
    self.assertAlmostEqual(rows[2]["change_high"], 0.15)

  def test_what_cannot_be_is_named(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for names, message in (
        (None, "has no summary.json: give the workdir of a finished"),
        (("teal",), "measured no oracle: give --methods=oracle:even:32"),
        (("oracle:even:24",), "has blocks of 24 neurons; there are times of"),
    ):
      if names is not None:
        _run(folder, names)
      with self.assertRaisesRegex(errors.UserError, message):
        sparsity_times.read(folder)
    with self.assertRaisesRegex(errors.UserError, "chips=v9 must be of v4"):
      sparsity_times.BenchConfig(chips=("v9",))


class MeasureTest(absltest.TestCase):

  def _measure(self, *chips):
    folder = _run(
        self.create_tempdir().full_path, ("oracle:even:32", "oracle:even:64")
    )
    config = sparsity_times.BenchConfig(chips=chips, num_times=2)
    found = sparsity_times.measure(str(folder), str(folder / "figures"), config)
    with open(folder / "figures" / "times.csv") as file:
      return found["rows"], list(csv.reader(file))

  def test_each_size_of_block_has_its_times(self):
    rows, table = self._measure()
    self.assertLen(rows, 4)
    for row in rows:
      self.assertGreater(row["times_dense"], 0)
    said = str(table)
    for name in ("32 neurons", "64 neurons", "dense"):
      self.assertIn(name, said)

  @absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
  @pytest.mark.slow
  def test_more_neurons_take_longer_on_a_chip(self):
    rows, _ = self._measure("v5e")
    self.assertLen(rows, 8)
    for few, many in zip(rows[4::2], rows[5::2], strict=True):
      self.assertEqual((few["where"], few["block"]), ("v5e", many["block"]))
      self.assertLess(few["times_dense"], many["times_dense"])


if __name__ == "__main__":
  absltest.main()
