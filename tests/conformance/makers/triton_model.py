"""Makes one Triton model with its configuration, without a directory for its version."""

import sys

import triton_repository  # the program beside this one
import triton_version

triton_version.make(sys.argv[1])
triton_repository.configure(sys.argv[1])
