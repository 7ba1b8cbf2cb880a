"""Makes an embedding model with random weights, with sentence-transformers."""

import os
import sys
import tempfile

from sentence_transformers import SentenceTransformer, models
from transformers import BertConfig, BertModel, BertTokenizerFast

special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
words = [*special, "a", "cache", "holds", "what", "every", "pod", "reads", "once"]
with tempfile.TemporaryDirectory() as bert:
    with open(os.path.join(bert, "vocab.txt"), "w") as vocabulary:
        vocabulary.write("\n".join(words))
    BertTokenizerFast(os.path.join(bert, "vocab.txt")).save_pretrained(bert)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(bert)
    transformer = models.Transformer(bert, max_seq_length=32)
    pooling = models.Pooling(32, pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(sys.argv[1])
