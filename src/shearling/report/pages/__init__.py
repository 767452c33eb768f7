"""The sections and pages of a report."""
