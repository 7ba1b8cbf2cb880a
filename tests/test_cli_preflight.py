"""`cachd preflight` and its API call: what they say of a model that is here, and of one that is not."""

from __future__ import annotations

import json

from tests.ground.site import Ground, assert_problem
from tests.ground.weights import safetensors, torch_archive
from tests.test_preflight import TEXT


def test_a_good_model_is_examined_where_it_lies(ground: Ground) -> None:
    ground.hub.add("org/good", dict(TEXT))
    ground.node.pull("hf://org/good")
    ground.node.ready("org--good")
    ended = ground.node.cli("preflight", "org--good")
    assert ended.returncode == 0, ended.stderr
    assert "vllm, sglang, tgi, transformers" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "org--good: 0 refused, 0 warnings, 5 ok"
    document = json.loads(ground.node.cli("preflight", "org--good", "-o", "json").stdout)
    assert document == ground.node.ask("GET", "/v1/models/org--good/preflight").document
    assert (document["level"], document["weights_bytes"], document["tensors"]) == ("ok", 16, 2)
    assert document["tensor_bytes"] == {"BF16": 12, "F32": 4}
    assert ground.show("org--good")["in_use"] is False, "its own reads do not count as use"


def test_a_model_that_an_engine_would_refuse_gives_exit_code_1_and_a_hint(ground: Ground) -> None:
    files = {**TEXT, "model.safetensors": safetensors(100) + b"more"}
    ground.hub.add("org/odd", files)
    ground.node.pull("hf://org/odd")
    ground.node.ready("org--odd")
    ended = ground.node.cli("preflight", "org--odd")
    assert ended.returncode == 1
    assert "refused  safetensors" in ended.stdout
    assert "model.safetensors: its tensors take 100 bytes, and 104 follow the header" in ended.stdout
    assert "hint: copy or upload the file again" in ended.stdout
    (wrong,) = [
        each
        for each in ground.node.ask("GET", "/v1/models/org--odd/preflight").document["findings"]
        if each["level"] == "refused"
    ]
    assert (wrong["file"], wrong["numbers"]) == (
        "model.safetensors",
        {"bytes": len(files["model.safetensors"])},
    )


def test_a_warning_alone_is_no_failure(ground: Ground) -> None:
    ground.hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": torch_archive()})
    ground.node.pull("hf://org/pickled")
    ground.node.ready("org--pickled")
    ended = ground.node.cli("preflight", "org--pickled")
    assert (ended.returncode, "warning  pickle" in ended.stdout) == (0, True)


def test_a_model_that_is_not_ready_has_no_preflight(ground: Ground) -> None:
    assert_problem(ground.node.ask("GET", "/v1/models/nobody/preflight"), 404, "no_such_model")
    assert ground.node.cli("preflight", "nobody").returncode == 3
    with ground.held("held"):
        assert_problem(ground.node.ask("GET", "/v1/models/held/preflight"), 503, "not_ready")
