"""What each unit is worth: one registry of criteria, one type for their scores."""
