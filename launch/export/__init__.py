"""The script of folders for others: `python -m launch.export`."""
