"""One absl script per experiment: `python -m launch.scansnap --help`.

Scripts: scansnap; of benchmarks, those of bench. Their parts: report_scansnap,
plot_scansnap, plot_theory. Ground of every script: app, flag_config.
"""
