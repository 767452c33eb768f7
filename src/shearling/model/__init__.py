"""One model on disk: opened, checked, loaded as stock transformers loads it, described."""
