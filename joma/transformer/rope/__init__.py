"""Positions: rotary (`rotary`), and added to embeddings (`absolute`)."""
