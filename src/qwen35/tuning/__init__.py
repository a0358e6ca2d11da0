"""Recipes under a budget: which weights deserve more bits, by measurement."""
