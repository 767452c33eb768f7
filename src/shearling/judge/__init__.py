"""Which of two models follows instructions better, as another model judges it."""
