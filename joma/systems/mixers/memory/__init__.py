"""Memories that learn as they read: weights are the state."""
