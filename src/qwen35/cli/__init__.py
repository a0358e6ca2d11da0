"""The command line: parse arguments, call one function of `qwen35.api`, print the result.

Only `console` prints. Nothing here decides or computes what the API does not offer too.
"""
