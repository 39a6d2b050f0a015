"""What shows a run while it runs; `tracker` opens them by their names."""
