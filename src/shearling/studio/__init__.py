"""A local page on which dense and pruned models answer one prompt side by side."""
