"""Makes a Stable Diffusion pipeline of tiny components with random weights, with diffusers."""

import json
import os
import sys
import tempfile

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

with tempfile.TemporaryDirectory() as place:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    with open(os.path.join(place, "vocab.json"), "w") as vocabulary:
        json.dump({word: number for number, word in enumerate(words)}, vocabulary)
    with open(os.path.join(place, "merges.txt"), "w") as merges:
        merges.write("#version: 0.2\n")
    files = (os.path.join(place, "vocab.json"), os.path.join(place, "merges.txt"))
    tokenizer = CLIPTokenizer(*files, model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=(32, 32),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(sys.argv[1])
