"""Carrying out plans: one loop for any number of outputs of one source."""
