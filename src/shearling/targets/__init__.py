"""Targets of a cut in speed, latency and memory, met by measured costs of this machine."""
