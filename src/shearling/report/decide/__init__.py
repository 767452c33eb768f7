"""What the figures of several models lead to."""
