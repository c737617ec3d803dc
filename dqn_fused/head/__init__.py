"""A linear head without its Q matrix.

``q[i, a_i]`` is one dot product, with one row of the weight (``taken``). What needs all actions, a maximum or a sum of
exponentials, is reduced range by range of them (``sweep``), and what the loss makes of it are numbers of a sample.
"""
