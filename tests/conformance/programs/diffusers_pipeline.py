"""Loads a pipeline of five components with diffusers, and takes one step with it."""

import os

from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(os.environ["MODEL"])
drawn = pipeline("a", num_inference_steps=1, height=16, width=16, output_type="np")
assert drawn.images.shape[0] == 1
