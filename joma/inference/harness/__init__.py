"""Models for lm-evaluation-harness, with a cache policy as an argument."""
