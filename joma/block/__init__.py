"""JoMA's block and a linear read-out: `model`, `data`, `train`, `ensemble`."""
