"""Weight formats: layout from a description alone, encoding, decoding, comparison with a source.

One folder per format, one row in `qwen35.codecs.registry`. A codec sees single weights; it must not
know about checkpoint files, recipes, plans or how an output is written.
"""
