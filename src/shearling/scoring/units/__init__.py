"""Criteria for the units of width axes: neurons, query heads, key/value groups, channels."""
