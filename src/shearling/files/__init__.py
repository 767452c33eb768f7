"""Files and processes: outputs that appear whole or not at all, progress, the terminal."""
