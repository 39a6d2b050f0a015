"""One absl script per experiment: `python -m launch.scansnap --help`.

Scripts: scansnap, bench_scansnap. Ground: flag_config.
"""
