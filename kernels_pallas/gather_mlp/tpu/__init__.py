"""Gathered MLPs on TPUs: entry (the three ops), config, heads and stream."""
