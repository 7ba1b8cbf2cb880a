"""The HTTP API. A route validates its request, makes one call into the layers below, and answers."""
