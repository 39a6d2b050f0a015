import math

from absl.testing import absltest
import numpy as np

from joma.studies import study_report
from scansnap_jax.experiment import report


class ToJsonTest(absltest.TestCase):

  def test_arrays_become_lists_and_infinities_null(self):
    found = report.to_json(
        {1: np.array([1.0, np.inf]), "b": (np.float32(0.5), math.nan, True)}
    )
    self.assertEqual(found, {"1": [1.0, None], "b": [0.5, None, True]})


class TablesTest(absltest.TestCase):

  def test_numbers_and_rows_are_laid_out_with_their_spread(self):
    summary = {
        "finding": "It holds.",
        "least": {"value_at": 0.25, "curve": [0.1] * 50},
        "score": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "cells": [
            {"size": 3, "levels": [{"trained": {"mean": 1.0, "std": 0.5}}]},
            {"size": 4, "levels": [{"trained": {"mean": 2.0, "std": None}}]},
            {"size": 5, "loss": None},
        ],
    }
    single, rows = study_report.tables(summary)
    self.assertEqual(
        list(single.rows),
        [("least, value at", "0.25"), ("score", "0.5 [0.25, 0.75]")],
    )
    self.assertEqual(rows.header, ["size", "levels 0, trained", "loss"])
    self.assertEqual(
        rows.rows, [["3", "1 ± 0.5", "–"], ["4", "2", "–"], ["5", "–", "–"]]
    )


if __name__ == "__main__":
  absltest.main()
