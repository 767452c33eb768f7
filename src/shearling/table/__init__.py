"""Axes, and what every tensor of an architecture says about them."""
