"""What the tests of `learn` and `judge` begin with."""

from judge_fixtures import answers, prompts, stub
from tiny_flock import model, store

__all__ = ["answers", "model", "prompts", "store", "stub"]
