"""Models that exist only as they are read: cut, masked, in another basis."""
