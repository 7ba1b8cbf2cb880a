"""Tells Kubernetes about the models of this node: labels, a condition, events, and the end of a taint."""
