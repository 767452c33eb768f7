"""Whole ways to a smaller model: a recipe names what is wanted, a run makes it stage by stage."""
