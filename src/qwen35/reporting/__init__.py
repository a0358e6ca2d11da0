"""Reports of evaluations and tunings: a JSON file, and one HTML page without scripts.

Renders values into files. Must not measure anything, nor know models or formats.
"""
