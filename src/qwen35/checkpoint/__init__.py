"""Reading checkpoints, from folders and the Hub: headers first, then byte ranges.

Everything in a file is untrusted until validated. This package must not know about recipes, plans
or outputs.
"""
