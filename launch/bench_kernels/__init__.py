"""The former name of `python -m launch.bench.kernels`; it runs still."""
