"""Predicts heavy hitters from co-occurrence, and follows them in training.

  python -m launch.bridge --workdir=runs/bridge
  python -m launch.bridge --lm.corpus=wikitext2 --data_dir=DATA --workdir=DIR

Which tokens attention will keep, as Scan & Snap
(https://arxiv.org/abs/2305.16380) and JoMA (https://arxiv.org/abs/2310.00535)
predict from token statistics alone, against H2O's running score
(https://arxiv.org/abs/2306.14048), frequency, recency and chance: in the
one-layer model, and in Transformers on text without and with positions. Below
--workdir: report.html, summary.json, figures/bridge.pdf, the runs' metrics and
checkpoints, flags.txt, config.json. The same command continues what was
interrupted.
"""

import pathlib
from typing import Any

from joma.inference.bridge import config as bridge_config
from launch.command import app
from launch.command import flag_config
from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import workdir as workdir_lib

_WORKDIR = run.define_workdir()
_PRESET = run.define_preset()
_DATA_DIR = run.define_data_dir()
trackers.define()
_CONFIG = flag_config.define(bridge_config.BridgeConfig())


def main(_: list[str]) -> None:
  """Trains, measures, and writes the report."""
  config = _CONFIG(bridge_config.PRESETS[_PRESET.value]())
  folder = run.Folder(
      _WORKDIR.value,
      workdir_lib.config_to_json(config),
      flag_config.to_flagfile(config, {"data_dir": _DATA_DIR.value}),
  )
  run.run(
      "bridge",
      lambda: folder,
      measure=lambda this: _measure(config, this.folder),
      report=_report,
  )


def _report(
    this: run.Run, measured: tuple[dict[str, Any], str]
) -> pathlib.Path:
  from joma.inference.bridge import report

  summary, corpus = measured
  facts = {**this.facts, "corpus": corpus}
  path = report.write(this.folder, summary, facts, this.started)
  print(summary["finding"])
  return path


def _measure(
    config: bridge_config.BridgeConfig, workdir: pathlib.Path
) -> tuple[dict[str, Any], str]:
  """Returns the summary, and a line about the corpus."""
  from joma.inference.bridge import one_layer as bridge_one_layer
  from joma.inference.bridge import report as bridge_report
  from joma.inference.bridge import text as bridge_text
  from joma.transformer.text import corpus as corpus_lib
  from joma.transformer.training import run as training_run
  from joma.transformer.training import train
  from scansnap_jax.experiment import progress

  corpus = corpus_lib.load(
      config.lm.corpus,
      tokenizer=config.lm.tokenizer,
      data_dir=_DATA_DIR.value,
      cache_dir=workdir / "corpus",
      bpe_vocab_size=config.lm.bpe_vocab_size,
  )
  train.check_vocabulary(config.lm, corpus)
  described = training_run.describe(corpus.facts())
  print(described, flush=True)
  with progress.bar(
      "one layer",
      total=config.scansnap.num_runs * config.scansnap.num_steps,
      unit="runs",
      per_step=1 / config.scansnap.num_steps,
  ) as on_progress:
    one_layer = bridge_one_layer.measure(
        config, workdir / "one_layer", on_progress
    )
  num_runs = len(config.positions) * config.num_lm_seeds
  with progress.bar(
      "text",
      total=num_runs * (config.lm.num_steps or 1),
      unit="tokens",
      per_step=config.lm.batch_size * config.lm.seq_len,
  ) as on_progress:
    text = bridge_text.measure(config, corpus, workdir / "text", on_progress)
  named = text.pop("named")
  panels = {"one_layer": one_layer, **text}
  return bridge_report.summarize(panels, named), described


if __name__ == "__main__":
  app.run(main)
