"""Closed-form repair after a cut, and the text that it is solved on."""
