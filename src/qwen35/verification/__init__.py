"""Verify written artifacts at three depths: structure, numbers, behaviour.

One walk checks every container; what differs is in its `Subject` and in the codecs. It must not
know how artifacts are written or published, and writes nothing but a cache of its own progress.
"""
