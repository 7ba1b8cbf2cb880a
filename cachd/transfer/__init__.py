"""How bytes move from a source into the store. Begin with pull.py."""
