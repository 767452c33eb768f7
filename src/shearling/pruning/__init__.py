"""From a wish to a proven smaller checkpoint: plan, choose, cut, prove."""
