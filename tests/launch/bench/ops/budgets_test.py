import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import budgets
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from launch.bench.ops import budgets as kernel_budgets
from launch.bench.ops import programs

_UPDATE = "python -m launch.bench.kernels --update_budgets"


def _complaints(reports):
  """What rose, by case and chip; skips where this compiler has no budgets."""
  stored, why_none = budgets.load(budgets.compiler("tpu"))
  if why_none:
    pytest.skip(f"{why_none}; write them with {_UPDATE}")
  return {
      key: budgets.check(
          kernel_budgets.figures(key[0], report), stored[key[0]][key[1]]
      )
      for key, report in reports.items()
  }


def _visits(mask_or_selection, block_q, block_kv, length):
  """Tiles that are wholly allowed, and others that are met."""
  mask = getattr(mask_or_selection, "mask", mask_or_selection)
  states = selection_lib.tile_states(mask, length, length, block_q, block_kv)
  if mask is not mask_or_selection:
    listed = 0 * states
    for row, num in enumerate(mask_or_selection.num_valid[0, 0]):
      listed[row, mask_or_selection.block_table[0, 0, row, :num]] = 1
    states = states * listed
  full = int((states == selection_lib.FULL).sum())
  return full, int((states > selection_lib.EMPTY).sum()) - full


def _runs_of_products(kernel):
  """How often each piece of code with matrix products runs."""
  return [
      round(region.issued / region.bundles)
      for region in kernel.tree.walk()
      if region.units.get("MXU", 0) > 20
  ]


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
@pytest.mark.slow
class CompiledTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.reports = kernel_budgets.compile_cases(["v6e"])

  @parameterized.parameters(*kernel_budgets.CASES)
  @pytest.mark.slow
  def test_figures_are_within_their_budgets(self, case):
    report = {(case, "v6e"): self.reports[case, "v6e"]}
    for sentences in _complaints(report).values():
      self.assertEmpty(sentences, f"if this is meant to be: {_UPDATE}")

  @parameterized.parameters(("column sums alone", 2048), ("backward", 2048))
  def test_products_are_made_for_the_tiles_of_a_mask_alone(self, case, length):
    kernel = self.reports[case, "v6e"].kernels[-1]
    # Keys by queries: tiles of the kernel are squares here.
    rows = kernel.num_steps
    block = length // rows
    full, partial = _visits(masks.causal(length), block, block, length)
    self.assertEqual(_runs_of_products(kernel), [full, partial])

  @pytest.mark.slow
  def test_products_are_made_for_the_blocks_of_a_selection_alone(self):
    sizes = kernel_budgets.CASES["block-sparse"][1]
    length, block_q, block_kv = (
        sizes[name] for name in ("length", "block_q", "block_kv")
    )
    selection = programs.random_selection(
        length, 1, block_q, block_kv, sizes["density"]
    )
    full, partial = _visits(selection, block_q, block_kv, length)
    self.assertGreater(full, 0)
    kernel = self.reports["block-sparse backward", "v6e"].kernels[-1]
    self.assertEqual(_runs_of_products(kernel), [full, partial])
    # The sweeps of the forward pass: logits of either kind, then weights.
    (kernel,) = self.reports["block-sparse", "v6e"].kernels
    self.assertEqual(_runs_of_products(kernel), [full, partial, full + partial])

  @pytest.mark.slow
  def test_nothing_is_undecided(self):
    for key, report in self.reports.items():
      for kernel in report.kernels:
        self.assertEmpty(kernel.undecided, key)

  @pytest.mark.slow
  def test_all_chips_are_within_their_budgets(self):
    reports = kernel_budgets.compile_cases(chips.TPU_NAMES)
    found = {k: v for k, v in _complaints(reports).items() if v}
    self.assertEmpty(found, f"if this is meant to be: {_UPDATE}")


class FileTest(absltest.TestCase):

  def test_has_every_case_for_every_chip(self):
    stored = json.loads(budgets.PATH.read_text())
    self.assertNotEmpty(stored)
    for version, cases in stored.items():
      self.assertEqual(set(cases), set(kernel_budgets.CASES), version)
      for by_chip in cases.values():
        self.assertEqual(set(by_chip), set(chips.TPU_NAMES))
        for figures in by_chip.values():
          self.assertEqual(set(figures), {"bundles", "spills", "temp_bytes"})

  def test_what_is_measured_is_written(self):
    path = pathlib.Path(self.create_tempfile("figures.json", "{}").full_path)
    report = mock.Mock(temp_bytes=7)
    kernel = lambda n: mock.Mock(issued=n, spills=n)
    report.kernels = [kernel(100), kernel(1)]
    reports = {
        (case, chip): report
        for case in kernel_budgets.CASES
        for chip in chips.TPU_NAMES
    }
    with (
        mock.patch.multiple(
            kernel_budgets, compile_cases=lambda *_, **__: reports
        ),
        mock.patch.object(budgets, "compiler", return_value="libtpu 1"),
    ):
      kernel_budgets.update(path)
    (cases,) = json.loads(path.read_text()).values()
    forward = {"bundles": 101, "spills": 101, "temp_bytes": 7}
    self.assertEqual(cases["forward"]["v4"], forward)
    self.assertEqual(
        cases["backward"]["v7x"], dict(forward, bundles=1, spills=1)
    )


if __name__ == "__main__":
  absltest.main()
