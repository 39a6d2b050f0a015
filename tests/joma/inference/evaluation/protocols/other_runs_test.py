import dataclasses
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation.protocols import other_runs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_CONFIG = evaluate_config.EvaluateConfig(tasks=("count",), batch_size=4)


def _row(policy, slots, mean, cache_bytes, **more):
  quality = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
  return {
      "policy": policy,
      "slots": slots,
      "quality": quality,
      "cache_bytes": cache_bytes,
      "failed": None,
  } | more


_STATE = {"tasks": {"count": [_row("full", 64, 0.9, 400, recall=None)]}}
_SOFTMAX = {
    "tasks": {
        "count": [
            _row("full", 64, 0.99, 4000),
            _row("h2o", 8, 0.5, 600),
            _row("h2o", 16, 0.885, 1200),
            _row("window", 8, 0.2, 500, failed="it is NaN"),
        ]
    }
}


class OtherRunsTest(parameterized.TestCase):

  def _write(self, name, config=_CONFIG, summary=_STATE):
    folder = pathlib.Path(self.create_tempdir().full_path) / name
    folder.mkdir()
    settings = workdir_lib.config_to_json(config)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)

  def test_models_stand_by_the_bytes_of_one_text(self):
    others = other_runs.read([self._write("state")], _CONFIG)
    runs = {"softmax": _SOFTMAX, **others}
    rows = other_runs.entries("count", runs, _CONFIG)
    # Four texts a batch; what failed is left out.
    self.assertEqual(
        [(row.name, row.num_bytes) for row in rows],
        [("state", 100), ("softmax", 150), ("softmax", 300), ("softmax", 1000)],
    )
    self.assertEqual(
        other_runs.lines(rows)[2:4],
        [
            "| state | full | – | 100 | 0.900 [0.890, 0.910] |",
            "| softmax | H2O | 8 | 150 | 0.500 [0.490, 0.510] |",
        ],
    )
    # .885 is within .02 of .9, and nothing of the state is of .99.
    self.assertEqual(
        other_runs.finding(rows),
        "state answers 0.900 with 100 bytes; softmax as much first with 300,"
        " H2O of 16 slots. softmax answers 0.990 with 1000 bytes; state never"
        " as much.",
    )

  def test_runs_of_other_examples_are_refused(self):
    for name, value in dict(
        length=32, batch_size=2, tasks=("copy",), filler="shakespeare"
    ).items():
      other = dataclasses.replace(_CONFIG, **{name: value})
      with self.assertRaisesRegex(errors.UserError, f"was run with {name}="):
        other_runs.read([self._write("other", other)], _CONFIG)
    # What a model is, and how it is trained, may differ.
    other = dataclasses.replace(_CONFIG, train_steps=7, policies=("h2o",))
    self.assertLen(other_runs.read([self._write("one", other)], _CONFIG), 1)

  def test_folders_that_hold_no_run_are_refused(self):
    with self.assertRaisesRegex(errors.UserError, "holds no summary.json"):
      other_runs.read([self.create_tempdir().full_path], _CONFIG)
    two = [self._write("state"), self._write("state")]
    with self.assertRaisesRegex(errors.UserError, "two folders state"):
      other_runs.read(two, _CONFIG)
    with self.assertRaisesRegex(errors.UserError, "two folders state"):
      other_runs.read(two[:1], _CONFIG, "state")


if __name__ == "__main__":
  absltest.main()
