"""What `launch.bench.lm` measures: a training step on cores and on a GPU."""
