"""Criteria for the experts of a mixture."""
