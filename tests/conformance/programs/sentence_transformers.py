"""Embeds a sentence with sentence-transformers."""

import os

from sentence_transformers import SentenceTransformer

assert SentenceTransformer(os.environ["MODEL"], device="cpu").encode("what every pod reads").shape == (32,)
