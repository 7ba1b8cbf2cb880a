"""The checks of `cachd doctor`: what is wrong on this node, whether its daemon runs or not.

Each check is a function that takes what it examines and yields findings. None changes anything, apart from
probe files that it removes again. `examine.py` runs them all, at once and with a deadline for each.
"""
