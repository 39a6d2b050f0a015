"""The figures of Scan & Snap, and the report of a run."""
