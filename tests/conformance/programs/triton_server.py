"""Serves a model repository with tritonserver, or makes one of links to a model or to its files."""

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytriton

LONGEST_SECONDS = 300
CONFIGURATION = """
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""


def backends(server, scratch):
    """A directory of backends: the one for Python, with the stub for this version of Python."""
    place = os.path.join(scratch, "backends")
    shutil.copytree(os.path.join(server, "backends"), place)
    version = "{}.{}".format(*sys.version_info)
    stub = os.path.join(place, "python", "triton_python_backend_stub")
    shutil.copy(os.path.join(server, "python_backend_stubs", version, "triton_python_backend_stub"), stub)
    os.chmod(stub, 0o755)
    return place


def repository(model, scratch):
    """The model, if it is a model repository; else a new one with a link to the model or to its version 1."""
    if glob.glob(os.path.join(model, "*", "config.pbtxt")):
        return model
    if os.path.exists(os.path.join(model, "config.pbtxt")):
        os.mkdir(os.path.join(scratch, "repository"))
        os.symlink(model, os.path.join(scratch, "repository", "twice"))
        return os.path.join(scratch, "repository")
    os.makedirs(os.path.join(scratch, "repository", "twice"))
    os.symlink(model, os.path.join(scratch, "repository", "twice", "1"))
    with open(os.path.join(scratch, "repository", "twice", "config.pbtxt"), "w") as file:
        file.write(CONFIGURATION)
    return os.path.join(scratch, "repository")


def asked(port):
    """What the model answers, as soon as it does."""
    inputs = [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/twice/infer", json.dumps({"inputs": inputs}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["outputs"][0]["data"]


with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
place, scratch = os.path.dirname(pytriton.__file__), os.environ["TMPDIR"]
server = os.path.join(place, "tritonserver")
program = os.path.join(scratch, "tritonserver")
shutil.copy(os.path.join(server, "bin", "tritonserver"), program)
os.chmod(program, 0o755)
words = [
    program,
    f"--model-repository={repository(os.environ['MODEL'], scratch)}",
    f"--backend-directory={backends(server, scratch)}",
    f"--http-port={port}",
    "--allow-grpc=false",
    "--allow-metrics=false",
]
packages = os.path.dirname(place)
env = {
    **os.environ,
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # whose packages the backend finds
    "LD_LIBRARY_PATH": os.path.join(packages, "nvidia_pytriton.libs"),
}
with open(os.path.join(scratch, "log"), "w+") as log:
    started = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while True:
            try:
                assert asked(port) == [2, 4]
                break
            except OSError as error:
                answer = error.read() if isinstance(error, urllib.error.HTTPError) else ""
                if answer or started.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{error} {answer}; {' '.join(log.read().splitlines()[-3:])}")
                time.sleep(0.2)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
