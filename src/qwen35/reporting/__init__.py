"""Reports of evaluations and tunings: a JSON file, and one HTML page that needs no network.

Reads reports back, ranks their candidates, and renders values into files. Must not measure
anything, nor know models or formats.
"""
