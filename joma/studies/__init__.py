"""Studies of joint dynamics: one module a figure, from a config to numbers.

Each module has `measure(config)`, whose result holds every number that its
figure and tables show and a sentence with what was found; `config` has the
settings, `launch/plot_joma.py` draws the figures.
"""
