"""What tests of Hugging Face folders share."""

import os
import pathlib

from absl.testing import parameterized
from flax import traverse_util
import numpy as np

from joma.transformer.hf import pretrained
from tests.joma.transformer import tiny_models


class FolderTestCase(parameterized.TestCase):

  def folder(self):
    return pathlib.Path(self.create_tempdir().full_path)

  def saved(self, name, **options):
    """Writes random weights; returns folder, config, parameters."""
    config = tiny_models.config_of(name)
    params = traverse_util.unflatten_dict(
        tiny_models.flat_params(name), sep="/"
    )
    folder = self.folder()
    family = tiny_models.fields_of(name)["model_type"]
    pretrained.save(folder, config, params, family=family, **options)
    return folder, config, params

  def assert_same_files(self, first, second):
    names = sorted(os.listdir(first))
    self.assertEqual(names, sorted(os.listdir(second)))
    for name in names:
      self.assertEqual(
          (first / name).read_bytes(), (second / name).read_bytes(), name
      )

  def assert_same_trees(self, actual, expected):
    actual = traverse_util.flatten_dict(actual, sep="/")
    expected = traverse_util.flatten_dict(expected, sep="/")
    self.assertEqual(actual.keys(), expected.keys())
    for path, leaf in expected.items():
      np.testing.assert_array_equal(actual[path], leaf, path)
