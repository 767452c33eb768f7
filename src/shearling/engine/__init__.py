"""Models run block by block: where, in what order, and what is gathered on the way."""
