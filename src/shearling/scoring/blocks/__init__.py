"""Criteria for whole blocks."""
