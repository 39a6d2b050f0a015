"""What recurrences cost beside attention."""
