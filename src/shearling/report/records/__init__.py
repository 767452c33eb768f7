"""Result files of a run, found and read."""
