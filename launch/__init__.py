"""Command lines: every experiment from absl flags to a report.

One script is one experiment; `--help` of each tells its command and what it
writes. Ground of all of them: `app` (parses, shows errors in one line),
`flag_config` (a frozen dataclass becomes flags) and `run` (claims a folder,
measures, reports). What an experiment measures and draws lies in the room of
its subject, in joma and scansnap_jax; benchmarks are in `bench`.
"""

import sys

from scansnap_jax.version import attribute as __getattr__  # __version__.

if sys.argv[0] == "-m":  # A script starts: Ctrl-C during its imports counts.
  from scansnap_jax.experiment import progress
  from scansnap_jax.experiment.processes import interrupts
  from scansnap_jax.experiment.processes import limits
  from scansnap_jax.experiment.processes import variables

  interrupts.install()
  limits.settle()
  variables.settle()
  progress.begin()
