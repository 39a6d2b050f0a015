"""The former name of `python -m launch.bench.attention`, which it runs."""

import runpy

if __name__ == "__main__":
  runpy.run_module(
      "launch.bench.attention", run_name="__main__", alter_sys=True
  )
