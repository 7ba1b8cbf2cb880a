"""The Hub endpoint: answers pods that cannot be changed as the Hub would, from what this node has."""
