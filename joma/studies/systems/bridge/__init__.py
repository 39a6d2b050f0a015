"""The ladder from Scan & Snap's data to text, one change a rung."""
