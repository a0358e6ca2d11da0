"""Plan an output completely, from headers and small files alone.

A plan fixes every tensor, byte offset and document before any weight is read. Planning never
encodes or writes: it must not import `execution`, `sinks` or `writing`.
"""
