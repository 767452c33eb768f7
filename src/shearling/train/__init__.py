"""Training: one loop for healing and, later, learned gates; from one CPU to many nodes."""
