"""What a model can do, asked in items that are made from a seed: no download, exact answers."""
