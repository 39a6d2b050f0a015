"""What the ops share of a chip, TPU or GPU: layouts, registers, tiles, math."""
