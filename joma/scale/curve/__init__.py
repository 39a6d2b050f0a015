"""A step on more and more chips.

Public modules: curve_config, scaling, report.
"""
