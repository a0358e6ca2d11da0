"""The streamed pass: text through a model of any format, forward and back, a layer at a time.

Builds transformers' layers one by one, from decoded weights, and keeps hidden states in files. Must
not know what is measured meanwhile: statistics, divergences, prices.
"""
