"""What is measured, a script each: `python -m launch.bench.NAME --help`."""
