"""What prefill and decode must move, compute and hold, by chip and cache."""
