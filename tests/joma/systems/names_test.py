"""Entries of `TransformerConfig.attention`: what is read, what is refused."""

import dataclasses
import subprocess
import sys
from typing import ClassVar
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from joma.systems import names
from joma.transformer import config as configs
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Loud:
  name: ClassVar[str] = "loud"
  k: int = 8
  share: float = 0.5
  is_on: bool = True
  how: str = "max"


_TABLE = {"loud": f"{__name__}:Loud", "calm": f"{__name__}:Loud"}


class NamesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    table = mock.patch.dict(names.SYSTEMS, _TABLE)
    self.enterContext(table)

  def test_options_have_the_types_of_their_defaults(self):
    (part,) = names.parts("loud:k=3:share=1:is_on=false:how=sum")
    self.assertEqual(names.make(part), Loud(3, 1.0, False, "sum"))

  def test_an_entry_has_parts(self):
    found = names.parts("loud:k=3+calm")
    self.assertEqual([part.name for part in found], ["loud", "calm"])
    self.assertEqual(names.parts("softmax"), ())

  def test_a_pattern_repeats(self):
    pattern = ("loud", "loud", "softmax")
    entries = [names.entry_of(pattern, layer) for layer in range(6)]
    self.assertEqual(entries, [*pattern, *pattern])
    self.assertEqual(names.entry_of((), 3), "softmax")

  @parameterized.parameters(
      ("lout", "no system 'lout'; the nearest is 'loud'"),
      ("loud+softmax", "'softmax' stands alone.*so leave it out"),
      ("softmax:k=1", "'softmax:k=1': 'softmax' stands alone"),
      ("loud+loud", "'loud' twice"),
      ("loud:k", "written :name=value, got 'k'"),
      ("", "no system ''"),
  )
  def test_what_cannot_be_read_is_refused(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.TransformerConfig(attention=(entry,))

  @parameterized.parameters(
      ("loud:key=1", "loud has no option 'key'; its options: how, is_on, k"),
      ("loud:k=few", "k must be like 8, got 'few'"),
      ("loud:is_on=1", "is_on must be like True"),
  )
  def test_options_are_checked(self, entry, message):
    (part,) = names.parts(entry)
    with self.assertRaisesRegex(errors.UserError, message):
      names.make(part)

  def test_more_entries_than_layers_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, "2 entries.* 1 layers"):
      configs.TransformerConfig(num_layers=1, attention=("loud", "calm"))

  def test_a_pattern_is_not_cut_short(self):
    pattern = ("loud", "calm", "softmax")
    configs.TransformerConfig(num_layers=6, attention=pattern)
    for num_layers in (4, 5):
      message = f"3 entries.*not fit {num_layers} layers.*divides {num_layers}"
      with self.assertRaisesRegex(errors.UserError, message):
        configs.TransformerConfig(num_layers=num_layers, attention=pattern)

  def test_configs_import_no_jax(self):
    code = (
        "import sys; from joma.transformer.training import lm_config;"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
  absltest.main()
