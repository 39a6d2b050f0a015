"""Evaluation of KV caches: tasks, texts, and the grid of policies by budget."""
