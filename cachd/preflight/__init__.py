"""Examines whether an inference engine would load a model without a network.

Only small JSON files and the headers of weights are read, each bounded before it is parsed. No pickle is ever
loaded.
"""
