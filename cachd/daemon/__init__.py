"""The composition root: builds all objects from the options, starts them and stops them."""
