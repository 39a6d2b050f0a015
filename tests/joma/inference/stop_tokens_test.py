import json
import pathlib

from absl.testing import parameterized

from joma.inference import stop_tokens
from scansnap_jax.experiment import errors


class ReadTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _write(self, name, content):
    (self.folder / name).write_text(content)

  def test_generation_config_goes_first(self):
    self.assertEqual(stop_tokens.read(self.folder), ())
    self._write("config.json", json.dumps({"eos_token_id": 2}))
    self.assertEqual(stop_tokens.read(self.folder), (2,))
    self._write("generation_config.json", json.dumps({"eos_token_id": None}))
    self.assertEqual(stop_tokens.read(self.folder), (2,))
    self._write("generation_config.json", json.dumps({"eos_token_id": [5, 7]}))
    self.assertEqual(stop_tokens.read(self.folder), (5, 7))

  @parameterized.parameters(
      (
          '{"eos_token_id": "</s>"}',
          "must be an id from 0 to 2147483647.*got '</s>'",
      ),
      ('{"eos_token_id": [1, -2]}', r"got \[1, -2\]"),
      ("{", "config.json is not JSON"),
  )
  def test_nonsense_is_refused(self, content, message):
    self._write("config.json", content)
    with self.assertRaisesRegex(errors.UserError, message):
      stop_tokens.read(self.folder)
