"""Engines that run what was written, in this process."""
