"""Makes a model repository of Triton with one model."""

import os
import sys

import triton_version  # the program beside this one

CONFIGURATION = """
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""


def configure(place):
    """Write config.pbtxt into a directory."""
    with open(os.path.join(place, "config.pbtxt"), "w") as file:
        file.write(CONFIGURATION)


if __name__ == "__main__":
    triton_version.make(os.path.join(sys.argv[1], "twice", "1"))
    configure(os.path.join(sys.argv[1], "twice"))
