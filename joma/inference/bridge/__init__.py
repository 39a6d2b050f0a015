"""From the theory to heavy hitters: does co-occurrence predict them?"""
