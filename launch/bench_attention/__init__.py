"""The former name of `python -m launch.bench.attention`; it runs still."""
