"""Run a plan's steps on threads, worker processes and the nodes of a Ray cluster.

It must not know how an output folder is opened, resumed or completed (`qwen35.writing`), nor what
the formats are: codecs encode, plans say where every byte goes.
"""
