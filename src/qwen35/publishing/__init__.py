"""Sync with the Hub: two listings, their difference, and the operations that carry it out."""
