"""Checks of written artifacts."""
