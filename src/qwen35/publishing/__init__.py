"""Sync a folder with a repository on the Hub: list both, show the difference, apply it.

It must not know how artifacts are made: it reads their manifests and files, and asks
`qwen35.verification` whether they are sound.
"""
