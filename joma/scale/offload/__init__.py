"""One chip and its host: a plan of where things lie.

Public modules: offload_config, plan, report, drawing.
"""
