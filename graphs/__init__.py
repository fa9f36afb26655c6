"""What the graphs compute, in PyTorch: the model at any width over a pot, and one compression.

Letters used in every comment: L layers, Hq query heads, Hkv key/value heads, g = Hq / Hkv, D head
size, M slots of the pot, T tokens of this pass, P catalyst width, K keep_max, V vocabulary.
"""
