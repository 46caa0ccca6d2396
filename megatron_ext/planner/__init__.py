"""Predicts memory and step time of a layout without running it."""
