"""Training: one loop for healing and for learned gates; from one CPU to many nodes."""
