"""The script of plans: `python -m launch.plan`."""
