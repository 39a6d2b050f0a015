"""What every experiment needs.

Modules: checkpoint, metric_stream, devices, figures, report, workdir.
"""
