"""Attention calibration: `act`, its columns, its cache."""
