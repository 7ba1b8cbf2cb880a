"""Real servers for the tests, which misbehave when asked to."""
