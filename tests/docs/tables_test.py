"""The site's tables have a line for every policy, system, kernel and study."""

import pathlib
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from docs.ext import tables
from joma.systems import names as system_names
from joma.systems.cache_policies import names as policy_names
from launch import attention

_ROOT = pathlib.Path(__file__).parents[2]
# What no paper is about.
_PLAIN = {"two_stage", "full", "window", "random"}
# Papers whose settings nobody has looked up yet: no new name may join them.
_UNSTATED = {
    *("scissorhands", "cam"),
    *("distance_bias", "grid_bias", "grid_conv", "hip", "hylra"),
    *("superlinear", "titans"),
    # Kernels, of which papers measure many sizes.
    *("attention", "gather_mlp"),
    # Studies.
    *("adam_order", "composed", "dilution", "dormant", "drift", "grid"),
    *("in_context", "incremental_rank", "induction", "loss_sparsity"),
    *("max_margin", "memory", "monarch", "mqar", "pairs", "pooling"),
    *("random_features", "recall", "reuse", "sink_need", "update_rank"),
}
# Studies of theorems, and questions of this project: no paper has a size.
_OURS = re.compile(
    r"joma/studies/(theorems|questions|systems/bridge)/|/selection.py"
)


def _missing(lines, names):
  """Names without a line, and lines without a name."""
  return sorted(set(names) ^ set(lines))


class TablesTest(parameterized.TestCase):

  def _policies(self):
    return {
        *policy_names.POLICIES,
        *policy_names.WRAPPERS,
        *policy_names.MEASURED,
        *policy_names.FITTED,
    }

  def test_every_name_has_its_line_and_no_line_is_left(self):
    lines = tables.lines_of(_ROOT)
    ops = [path.parent.name for path in _ROOT.glob("kernels_pallas/*/api.py")]
    self.assertEqual(_missing(lines["policies"], self._policies()), [])
    self.assertEqual(_missing(lines["systems"], system_names.SYSTEMS), [])
    self.assertEqual(_missing(lines["kernels"], ops), [])
    for table in lines.values():
      for name, line in table.items():
        self.assertRegex(line, r"^[A-Z].{20,120}\.$", name)

  def test_a_policy_without_its_line_is_seen(self):
    entry = policy_names.POLICIES["h2o"]
    with mock.patch.dict(policy_names.POLICIES, {"newest": entry}):
      lines = tables.lines_of(_ROOT)["policies"]
      self.assertEqual(_missing(lines, self._policies()), ["newest"])
      rows = {row.name: row for row in tables.policies(_ROOT)}
      self.assertEqual(rows["newest"].when, "")

  def test_rows_are_what_docstrings_say(self):
    rows = {row.name: row for row in tables.policies(_ROOT)}
    self.assertEqual(set(rows), self._policies())
    h2o = rows["h2o"]
    self.assertEqual(
        (h2o.what, h2o.paper, h2o.year, h2o.file),
        (
            "Heavy hitters: what attention has given a token so far.",
            "https://arxiv.org/abs/2306.14048",
            "2023",
            "joma/systems/cache_policies/by_attention/h2o.py",
        ),
    )
    undated = {name for name, row in rows.items() if not row.year}
    self.assertEqual(undated, _PLAIN)

  def test_a_systems_paper_is_that_of_its_class(self):
    rows = {row.name: row for row in tables.systems(_ROOT)}
    self.assertEqual(set(rows), set(system_names.SYSTEMS))
    for name, row in rows.items():
      self.assertEqual(row.paper, system_names.load(name).paper)

  def test_papers_settings_are_stated(self):
    makers = (tables.policies, tables.systems, tables.kernels, tables.studies)
    rows = [row for make in makers for row in make(_ROOT)]
    unstated = {
        row.name for row in rows if not (row.settings or _OURS.search(row.file))
    }
    self.assertEqual(unstated, _UNSTATED | _PLAIN)
    by_name = {row.name: row.settings for row in rows}
    # A paragraph of several lines, of a class; and one of a module.
    self.assertEqual(
        by_name["simlayerkv"],
        "4 sinks and 1,024 newest tokens; thresholds .9 for Llama 3, .65 for"
        " Llama 2, .8 for Mistral, .85 for Qwen",
    )
    self.assertEqual(by_name["landmark"], "blocks of 50 tokens and a landmark")

  def test_a_policy_without_its_papers_settings_is_seen(self):
    entry = policy_names.WRAPPERS["cam"]
    with mock.patch.dict(policy_names.POLICIES, {"newest": entry}):
      rows = {row.name: row for row in tables.policies(_ROOT)}
    self.assertEqual(rows["newest"].settings, "")

  def test_studies_are_those_of_the_scripts(self):
    rows = tables.studies(_ROOT)
    # A second script would define the flags of the first anew.
    text = (_ROOT / "launch/joma.py").read_text()
    of_joma = re.findall(r'^    "(\w+)": \w+\.STUDY,$', text, re.MULTILINE)
    self.assertNotEmpty(of_joma)
    self.assertEqual(
        [row.name for row in rows], [*attention._STUDIES, *of_joma]
    )
    by_name = {row.name: row for row in rows}
    self.assertEqual(
        by_name["dilution"].when,
        "`python -m launch.attention --study=dilution`",
    )
    self.assertTrue(by_name["dilution"].what.endswith("focus again?"))

  def test_a_table_keeps_its_columns(self):
    for name, text in tables.tables(_ROOT).items():
      for line in text.splitlines():
        cells = line.replace(r"\|", "").strip("|").split("|")
        self.assertLen(cells, 6, f"{name}: {line}")
        self.assertNotEmpty(cells[4].strip(), line)


if __name__ == "__main__":
  absltest.main()
