"""The Helm chart: what it renders, what it refuses, and that the manifests for kustomize come from it."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachd import __version__
from cachd.config import RELOADED_KEYS, Config
from cachd.kubelet import thresholds
from docs import chart
from tests.ground.helm import helm_binary
from tests.ground.hub import Hub
from tests.ground.node import Node
from tests.test_daemonset import NEWEST, OLDEST, PROBES, documents, validate

pytestmark = pytest.mark.needs("helm")

Object = dict[str, Any]
CI = chart.CHART / "ci"
VALUES = sorted(path.name for path in CI.glob("*.yaml"))
# Where an object came, or changed.
VERSIONS = [OLDEST, "1.27", "1.29", "1.30", NEWEST]
TOKEN = secrets.token_hex(32)
OWN_KINDS = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}  # of the Prometheus Operator


def helm(*arguments: str | Path, given: str = "{}") -> subprocess.CompletedProcess[str]:
    """Run helm; `--values -` reads what is given."""
    return subprocess.run([helm_binary() or "helm", *arguments], input=given, capture_output=True, text=True)


@functools.cache
def _rendered(values: str, version: str, settings: str) -> str:
    file: list[str | Path] = ["--values", CI / values] if values else []
    known = ["--kube-version", version] if version != NEWEST else []
    common = ("template", "cachd", chart.CHART, "--namespace", "cachd")
    ended = helm(*common, *file, *known, "--values", "-", given=settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def objects(values: str = "", version: str = NEWEST, **settings: Any) -> list[Object]:
    """What the chart renders with the values of a file of ci, and with these."""
    return documents(_rendered(values, version, json.dumps(settings)))


def only(kind: str, found: list[Object]) -> Object:
    (one,) = [each for each in found if each["kind"] == kind]
    return one


def options(config_map: Object) -> Object:
    read: Object = yaml.safe_load(config_map["data"]["config.yaml"])
    return read


def pod(owner: Object) -> Object:
    found: Object = owner["spec"]["template"]["spec"]
    return found


# --- the chart as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_helm_lint_finds_nothing(values: str) -> None:
    linted = helm("lint", "--strict", chart.CHART, "--values", CI / values)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", VALUES)
def test_every_object_passes_the_strict_schema(values: str, version: str) -> None:
    found = objects(values, version)
    assert {each["kind"] for each in found} >= {"ConfigMap", "DaemonSet", "Service"}
    for each in found:
        if each["kind"] not in OWN_KINDS:
            validate(each, version)


def test_the_manifests_for_kustomize_are_what_the_chart_renders() -> None:
    for file, text in chart.manifests().items():
        assert file.read_text() == text, f"{file.name}: run: make manifests"


def test_the_chart_has_the_version_of_the_daemon() -> None:
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (__version__, __version__)
    assert about["kubeVersion"] == f">={OLDEST}.0-0"


def test_the_chart_carries_the_alerts_and_the_dashboard_that_there_are() -> None:
    for name, source in chart.COPIED.items():
        copy = chart.CHART / "files" / name
        assert copy.exists() == source.exists(), "run: make manifests"
        assert not source.exists() or copy.read_text() == source.read_text(), "run: make manifests"


def test_a_config_map_has_the_dashboard_as_it_is() -> None:
    found = objects(monitoring={"dashboard": {"enabled": True}})
    (document,) = (each for each in found if each["metadata"]["name"] == "cachd-dashboard")
    assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert document["data"] == {"cachd.json": chart.COPIED["dashboard.json"].read_text()}


def test_the_same_values_render_the_same() -> None:
    """The order of a map is chance in a template: whoever takes one of several pools must sort them."""
    pools = {name: {"nodeSelector": {"pool": name}} for name in "abcdefgh"}
    common = ("template", "cachd", chart.CHART, "--values", "-")
    assert len({helm(*common, given=json.dumps({"pools": pools})).stdout for _ in range(4)}) == 1


def test_the_notes_name_three_commands_of_this_release() -> None:
    ended = helm("install", "mine", chart.CHART, "--dry-run=client", "--namespace", "models")
    notes = ended.stdout.partition("NOTES:")[2]
    commands = re.findall(r"^  (kubectl -n models (?:rollout|exec) .*)", notes, re.MULTILINE)
    assert len(commands) == 3
    assert all("daemonset/mine-cachd" in command for command in commands)
    assert "create secret generic mine-cachd" in notes


def test_nothing_that_helm_runs_touches_the_cache_at_an_uninstall() -> None:
    rendered = _rendered("all-values.yaml", NEWEST, "{}")
    assert re.findall(r"helm\.sh/hook: (\S+)", rendered) == ["test"]
    assert {
        volume["persistentVolumeReclaimPolicy"]
        for each in documents(rendered)
        if each["kind"] == "PersistentVolume"
        for volume in [each["spec"]]
    } == {"Retain"}


@pytest.mark.parametrize("values", VALUES)
def test_every_object_has_the_recommended_labels_and_only_daemons_are_selected(values: str) -> None:
    found = objects(values)
    for each in found:
        labels = each["metadata"]["labels"]
        keys = ("name", "instance", "part-of", *(() if each["kind"] == "Pod" else ("version", "managed-by")))
        assert labels.keys() >= {f"app.kubernetes.io/{key}" for key in keys}, each["kind"]
    selector = only("DaemonSet", found)["spec"]["selector"]["matchLabels"] if "pools" not in values else {}
    others = [pod["metadata"]["labels"] for pod in found if pod["kind"] == "Pod"]
    others += [each["spec"]["template"]["metadata"]["labels"] for each in found if each["kind"] == "Job"]
    assert others
    for labels in others:
        assert labels["app.kubernetes.io/name"] != "cachd"
        assert not selector or not selector.items() <= labels.items()


def test_without_options_nothing_is_open_on_the_node_and_no_pod_has_rights() -> None:
    found = objects()
    assert [
        each["kind"] for each in found if each["kind"] in ("PersistentVolume", "Role", "ClusterRole")
    ] == []
    daemon = pod(only("DaemonSet", found))
    assert daemon["automountServiceAccountToken"] is False
    assert "serviceAccountToken" not in json.dumps(daemon["volumes"])
    assert all("hostPort" not in port for each in daemon["containers"] for port in each["ports"])
    assert [v["hostPath"] for v in daemon["volumes"] if "hostPath" in v] == [
        {"path": "/var/lib/cachd", "type": "DirectoryOrCreate"}
    ]
    for each in [*daemon["containers"], *pod_containers(only("Pod", found))]:
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def pod_containers(found: Object) -> list[Object]:
    containers: list[Object] = found["spec"]["containers"]
    return containers


# --- the values ------------------------------------------------------------------------------------------


def test_every_value_is_documented_and_in_the_schema() -> None:
    assert chart.schema() == chart.SCHEMA.read_text(), "run: make manifests"
    documented = {value.name for value in chart.values()}

    def names(schema: Object, path: str = "") -> set[str]:
        if path in documented or "properties" not in schema:
            return {path}
        return {n for key, of in schema["properties"].items() for n in names(of, f"{path}.{key}".lstrip("."))}

    assert names(json.loads(chart.SCHEMA.read_text())) - {"global"} == documented


def test_a_value_without_help_is_found() -> None:
    with pytest.raises(ValueError, match="unknown has no help"):
        list(chart.documented("# -- why\nknown: 1\nunknown: 2\n"))


REFUSED: dict[str, tuple[Object, str]] = {
    "an unknown value": ({"imagee": {}}, "'imagee' not allowed"),
    "an unknown field of a model": ({"models": [{"ref": "a/b", "nme": "x"}]}, "/models/0.*'nme' not allowed"),
    "a model without ref": ({"models": [{"name": "x"}]}, "/models/0.*missing property 'ref'"),
    "a model that is a text": ({"models": ["a/b"]}, "/models/0.*got string, want object"),
    "an unknown option": ({"config": {"limit_byte": "1GB"}}, "/config.*'limit_byte' not allowed"),
    "an option of the chart's": ({"config": {"root": "/x"}}, "/config.*'root' not allowed"),
    "a number as text": ({"config": {"streams": "many"}}, "/config/streams.*want integer"),
    "too many streams": ({"config": {"streams": 1000}}, "/config/streams.*256"),
    "an unknown field of a source": (
        {"config": {"sources": [{"prefix": "hf://", "x": 1}]}},
        "'x' not allowed",
    ),
    "a pool for all nodes": ({"pools": {"a": {"models": []}}}, "/pools/a.*'nodeSelector'"),
    "a pool that no object may be called": ({"pools": {"A_1": {"nodeSelector": {}}}}, "'A_1' not allowed"),
    "a digest that is none": ({"image": {"digest": "sha256:12"}}, "/image/digest"),
    "a moving tag": ({"image": {"tag": "latest"}}, "/image/tag"),
    "a relative directory": ({"cache": {"hostPath": "cachd"}}, "/cache/hostPath"),
    "root as the daemon's user": ({"uid": 0}, "/uid.*minimum"),
    "prewarm by required": (
        {"prewarm": {"models": [{"ref": "a/b", "required": True}]}},
        "'required' not allowed",
    ),
    "a taint with its effect": (
        {"nodeSignals": {"startupTaint": "a/b:NoSchedule"}},
        "/nodeSignals/startupTaint",
    ),
    "rights for every pod of the namespace": (
        {"nodeSignals": {"labels": True}, "serviceAccount": {"create": False}},
        "a service account of the daemon's own",
    ),
    "prewarm over TLS": (
        {"prewarm": {"models": [{"ref": "a/b"}]}, "tls": {"secretName": "x"}},
        "a certificate of tls.secretName has no name",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_value_is_refused_and_the_message_says_where(settings: Object, message: str) -> None:
    ended = helm("template", "cachd", chart.CHART, "--values", "-", given=json.dumps(settings))
    assert ended.returncode != 0
    assert re.search(message, ended.stderr), ended.stderr


# --- the daemon's configuration --------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_the_daemon_takes_the_configuration_of_every_pool(values: str) -> None:
    config_maps = [each for each in objects(values) if "config.yaml" in each.get("data", {})]
    assert config_maps
    for config_map in config_maps:
        Config.model_validate({**options(config_map), "node_name": "gpu-7"})


def test_options_of_the_values_arrive_as_they_were_written() -> None:
    found = options(only_config("all-values.yaml"))
    assert found["limit_bytes"] == 500_000_000_000
    assert found["token_file"] == "/etc/cachd-tokens"
    assert found["allowed_hosts"][-1] == "models.example.com"
    assert found["allowed_hosts"][0] == "models"
    assert found["listen"] == ["0.0.0.0:8470", "unix:/run/cachd/cachd.sock group=65532"]


def only_config(values: str, **settings: Any) -> Object:
    (one,) = [each for each in objects(values, **settings) if "config.yaml" in each.get("data", {})]
    return one


def test_the_kubelets_thresholds_reach_the_daemon(tmp_path: Path) -> None:
    config_map = only_config("all-values.yaml")
    daemon = pod(only("DaemonSet", objects("all-values.yaml")))
    (config,) = [volume["projected"] for volume in daemon["volumes"] if volume["name"] == "config"]
    items = [item for each in config["sources"] if "configMap" in each for item in each["configMap"]["items"]]
    assert {"key": "kubelet.yaml", "path": "kubelet.yaml"} in items
    assert options(config_map)["kubelet_config"] == "/etc/cachd/kubelet.yaml"
    (tmp_path / "kubelet.yaml").write_text(config_map["data"]["kubelet.yaml"])
    found = thresholds(Config(kubelet_config=tmp_path / "kubelet.yaml"), 1 << 40)
    assert (found.available.percent, found.inodes.percent) == (20, 0)
    assert "kubelet_config" not in options(only_config(""))


def checksum(**config: Any) -> str:
    template = only("DaemonSet", objects(config=config))["spec"]["template"]
    found: str = template["metadata"]["annotations"]["checksum/config"]
    return found


def test_only_an_option_that_is_read_at_the_start_restarts_the_daemons() -> None:
    helpers = (chart.CHART / "templates/_helpers.tpl").read_text()
    (left_out,) = re.findall(r"omit \$config (.*) \|", helpers)
    assert set(re.findall(r'"(\w+)"', left_out)) == RELOADED_KEYS
    models = [{"ref": "hf://a/b"}]
    before = only("DaemonSet", objects())["spec"]["template"]
    assert only("DaemonSet", objects(models=models))["spec"]["template"] == before
    assert checksum(limit_bytes="1TB", allow=["10.0.0.0/8"]) == checksum() != checksum(streams=8)


def test_every_pool_has_its_own_nodes_and_models() -> None:
    found = objects("pools-values.yaml")
    sets = {each["metadata"]["name"]: each for each in found if each["kind"] == "DaemonSet"}
    maps = {each["metadata"]["name"]: options(each) for each in found if each["kind"] == "ConfigMap"}
    assert sets.keys() == maps.keys() == {"cachd-a100", "cachd-l4"}
    assert [model["name"] for model in maps["cachd-a100"]["models"]] == ["embedder", "qwen-72b"]
    assert [model["name"] for model in maps["cachd-l4"]["models"]] == ["embedder", "qwen"]
    assert [maps[name].get("limit_bytes") for name in sorted(maps)] == ["1500GB", None]
    service = only("Service", found)["spec"]["selector"]
    for name, each in sets.items():
        selector = each["spec"]["selector"]["matchLabels"]
        assert selector["cachd.dev/pool"] == name.removeprefix("cachd-")
        assert service.items() <= selector.items()
        assert "nvidia.com/gpu.product" in pod(each)["nodeSelector"]
        (config,) = [volume["projected"] for volume in pod(each)["volumes"] if volume["name"] == "config"]
        assert config["sources"][0]["configMap"]["name"] == name


# --- what may be switched on -----------------------------------------------------------------------------


def test_a_tag_or_a_digest_names_the_image() -> None:
    def image(**settings: Any) -> set[str]:
        found = pod(only("DaemonSet", objects(image=settings)))
        return {each["image"] for each in [*found["initContainers"], *found["containers"]]}

    digest = f"sha256:{'ab' * 32}"
    assert image() == {f"cachd:{__version__}"}
    assert image(repository="r.example.com/cachd", tag="1.2") == {"r.example.com/cachd:1.2"}
    assert image(tag="1.2", digest=digest) == {f"cachd@{digest}"}


def test_an_admission_policy_is_left_out_where_the_cluster_has_none() -> None:
    kinds = {v: {each["kind"] for each in objects("all-values.yaml", v)} for v in ("1.29", "1.30")}
    assert kinds["1.30"] - kinds["1.29"] == {
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }


def test_the_admission_policy_is_about_this_release(tmp_path: Path) -> None:
    settings: Object = {
        "admissionPolicy": {"enabled": True},
        "uid": 1234,
        "cache": {"hostPath": "/mnt/models"},
    }
    policy = only("ValidatingAdmissionPolicy", objects(**settings))
    told = {each["name"]: each["expression"] for each in policy["spec"]["variables"]}
    assert (told["daemonUid"], told["root"], told["ownNamespace"]) == ("1234", "'/mnt/models/'", "'cachd'")


def test_each_namespace_gets_a_read_only_volume_of_its_own() -> None:
    found = objects("all-values.yaml")
    volumes = [each for each in found if each["kind"] == "PersistentVolume"]
    claims = [each for each in found if each["kind"] == "PersistentVolumeClaim"]
    assert [each["metadata"]["namespace"] for each in claims] == ["team-a", "team-b"]
    for volume, claim in zip(volumes, claims, strict=True):
        spec = volume["spec"]
        assert spec["mountOptions"] == ["ro"]
        assert spec["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]
        assert spec["local"] == {"path": "/var/lib/cachd"}
        assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
        assert spec["claimRef"]["namespace"] == claim["metadata"]["namespace"]
        assert spec["claimRef"]["name"] == claim["metadata"]["name"]
        (term,) = spec["nodeAffinity"]["required"]["nodeSelectorTerms"]
        assert {each["operator"] for each in term["matchExpressions"]} == {"In", "Exists"}


def test_monitors_scrape_the_port_that_the_daemon_has() -> None:
    for values, port in (("all-values.yaml", "http"), ("tls-values.yaml", "probes")):
        on: Object = {"monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}}
        found = objects(values, **on)
        daemon_set = only("DaemonSet", found)
        (container,) = pod(daemon_set)["containers"]
        monitors = only("PodMonitor", found), only("ServiceMonitor", found)
        endpoints = [*monitors[0]["spec"]["podMetricsEndpoints"], *monitors[1]["spec"]["endpoints"]]
        assert {each["port"] for each in endpoints} == {port}
        assert port in {each["name"] for each in container["ports"]}
        assert port in {each["name"] for each in only_api_service(found)["spec"]["ports"]}
        labels = daemon_set["spec"]["template"]["metadata"]["labels"]
        assert monitors[0]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert {container[probe]["httpGet"]["port"] for probe in PROBES} == {port}


def only_api_service(found: list[Object]) -> Object:
    (one,) = [e for e in found if e["kind"] == "Service" and e["spec"].get("clusterIP") != "None"]
    return one


def test_the_socket_of_the_node_is_the_daemon_users() -> None:
    daemon = pod(only("DaemonSet", objects(unixSocket={"enabled": True, "group": 3000})))
    chown = daemon["initContainers"][0]
    (container,) = daemon["containers"]
    assert "/run/cachd" in chown["command"]
    assert {"name": "api", "mountPath": "/run/cachd"} in chown["volumeMounts"]
    assert {"name": "api", "mountPath": "/run/cachd"} in container["volumeMounts"]
    assert daemon["securityContext"]["supplementalGroups"] == [3000]


SIGNALS: dict[str, tuple[Object, Object]] = {
    "labels": ({"labels": True}, {"nodes": ["get", "patch"]}),
    "condition": ({"condition": True}, {"nodes": ["get"], "nodes/status": ["patch"]}),
    "events": ({"events": True}, {"nodes": ["get"], "events": ["create", "patch"]}),
    "taint": ({"startupTaint": "a/b"}, {"nodes": ["get", "patch"]}),
}


@pytest.mark.parametrize(("signals", "rights"), SIGNALS.values(), ids=SIGNALS)
def test_a_signal_brings_the_rights_that_it_needs_and_no_more(signals: Object, rights: Object) -> None:
    found = objects(nodeSignals=signals)
    roles = [each for each in found if each["kind"] in ("Role", "ClusterRole")]
    assert all(rule["apiGroups"] == [""] for role in roles for rule in role["rules"])
    granted = {name: rule["verbs"] for role in roles for rule in role["rules"] for name in rule["resources"]}
    assert granted == rights
    for binding in (each for each in found if each["kind"].endswith("RoleBinding") or "roleRef" in each):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "cachd", "namespace": "cachd"}]
        assert binding["roleRef"]["name"] in {role["metadata"]["name"] for role in roles}


def test_the_token_is_where_the_daemon_reads_it_and_in_its_container_alone() -> None:
    daemon = pod(only("DaemonSet", objects(nodeSignals={"condition": True})))
    assert daemon["automountServiceAccountToken"] is False
    (volume,) = [each for each in daemon["volumes"] if each["name"] == "kubernetes"]
    files = {
        Path("/var/run/secrets/kubernetes.io/serviceaccount", path)
        for each in volume["projected"]["sources"]
        for path in ([each["serviceAccountToken"]["path"]] if "serviceAccountToken" in each else ["ca.crt"])
    }
    config = Config.model_validate({})
    assert files == {config.kubernetes_token_file, config.kubernetes_ca_file}
    mounts = {
        each["name"]: "kubernetes" in {mount["name"] for mount in each["volumeMounts"]}
        for each in (*daemon["containers"], *daemon["initContainers"])
    }
    assert mounts == {"cachd": True, "check-config": False, "own-the-root": False}
    for each in (daemon["containers"][0], daemon["initContainers"][1]):
        (name,) = [variable for variable in each["env"] if variable["name"] == "NODE_NAME"]
        assert name["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


def test_the_daemon_runs_on_nodes_with_the_startup_taint() -> None:
    key = "cachd.dev/models-not-ready"
    found = objects(nodeSignals={"startupTaint": key})
    assert {"key": key, "operator": "Exists"} in pod(only("DaemonSet", found))["tolerations"]
    assert options(only_config("", nodeSignals={"startupTaint": key}))["startup_taint"] == key


def test_critical_pods_come_with_the_quota_that_admits_them() -> None:
    found = objects("all-values.yaml")
    (expression,) = only("ResourceQuota", found)["spec"]["scopeSelector"]["matchExpressions"]
    assert pod(only("DaemonSet", found))["priorityClassName"] in expression["values"]
    assert "priorityClassName" not in pod(only("DaemonSet", objects()))


def test_the_network_policy_admits_the_named_peers_and_the_release_alone() -> None:
    policy = only("NetworkPolicy", objects("all-values.yaml"))["spec"]
    (rule,) = policy["ingress"]
    own, named = rule["from"]
    assert own["podSelector"]["matchLabels"] == {"app.kubernetes.io/instance": "cachd"}
    assert named["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert policy["policyTypes"] == ["Ingress"]


def test_the_hub_endpoint_is_a_port_of_the_node_for_the_named_networks() -> None:
    found = objects("all-values.yaml")
    (port,) = (
        each for each in pod(only("DaemonSet", found))["containers"][0]["ports"] if each["name"] == "hub"
    )
    configured = options(
        next(each for each in found if each["kind"] == "ConfigMap" and "config.yaml" in each["data"])
    )
    assert configured["hub_listen"].endswith(f":{port['containerPort']}")
    assert port["hostPort"] == 8471
    assert configured["hub_allow"] == ["10.244.0.0/16"]
    assert {"port": "hub"} in only("NetworkPolicy", found)["spec"]["ingress"][0]["ports"]
    assert not [key for key in options(only("ConfigMap", objects())) if key.startswith("hub_")]


def test_a_prewarm_job_has_another_name_after_each_change() -> None:
    def name(ref: str) -> str:
        found = objects(prewarm={"job": True, "models": [{"ref": ref}]})
        return str(only("Job", found)["metadata"]["name"])

    assert name("a/b") == name("a/b") != name("a/c")


# --- what runs in the pods -------------------------------------------------------------------------------


def check_config(config: str, place: Path) -> int:
    """The exit code of the init container that checks the configuration, over this one."""
    inits = pod(only("DaemonSet", objects()))["initContainers"]
    (command,) = [each["command"] for each in inits if each["name"] == "check-config"]
    (place / "config.yaml").write_text(config)
    script = command[-1].replace("/tmp", str(place)).replace("/etc/cachd", str(place))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([*command[:-1], script], env=env, capture_output=True).returncode


def test_a_new_pod_with_a_wrong_configuration_does_not_start_and_an_old_one_does(tmp_path: Path) -> None:
    assert check_config("streams: many", tmp_path) != 0
    assert check_config("streams: 8", tmp_path) == 0
    assert check_config("streams: many", tmp_path) == 0, "the daemon then has its last good configuration"


def test_the_check_sees_the_variables_of_the_daemon() -> None:
    variables = [{"name": "CACHD_STREAMS", "value": "8"}]
    daemon = pod(only("DaemonSet", objects(env=variables)))
    assert daemon["initContainers"][1]["env"] == variables
    assert daemon["containers"][0]["env"][-1:] == variables


def prewarm(node: Node, models: list[Object], place: Path) -> subprocess.CompletedProcess[str]:
    """Run what the Job runs, for one daemon."""
    (place / "models.json").write_text(json.dumps(models))
    (place / "token").write_text(TOKEN)
    address, _, port = node.url.removeprefix("http://").partition(":")
    script, file = str(chart.CHART / "files/prewarm.py"), str(place / "models.json")
    command = [sys.executable, script, address, port, file]
    env = {**os.environ, "CACHD_TOKEN_FILE": str(place / "token"), "TIMEOUT_SECONDS": "100"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_prewarm_job_ends_when_a_node_has_the_models_and_fails_when_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(TOKEN)
    with Hub() as hub:
        hub.add("org/model", {"config.json": b"{}"})
        with Node(tmp_path / "node", {"hf_endpoint": hub.url, "token_file": str(tmp_path / "admin")}) as node:
            wanted = [{"ref": "hf://org/model", "name": "next"}]
            ended = prewarm(node, wanted, tmp_path)
            assert (ended.returncode, ended.stderr) == (0, "")
            assert ended.stdout.splitlines() == ["127.0.0.1: next: ready", "1 of 1 nodes are ready"]
            assert (tmp_path / "node/ready/next.json").exists()
            ended = prewarm(node, [*wanted, {"ref": "hf://org/absent"}], tmp_path)
            assert ended.returncode == 1
            assert "hf://org/absent: " in ended.stdout


def test_the_prewarm_pod_gives_the_script_what_it_reads() -> None:
    found = objects("all-values.yaml")
    job = pod(only("Job", found))
    (container,) = job["containers"]
    host, port, models = container["args"]
    assert host == "models-nodes.cachd"
    headless = next(each for each in found if each["metadata"]["name"] == "models-nodes")
    assert headless["spec"]["clusterIP"] == "None"
    assert [str(each["port"]) for each in headless["spec"]["ports"]] == [port]
    (config_map,) = [each for each in found if each["metadata"]["name"] == "models-prewarm"][:1]
    assert json.loads(config_map["data"]["models.json"])[0]["name"] == "qwen-next"
    script = (chart.CHART / "files/prewarm.py").read_text()
    assert config_map["data"]["prewarm.py"].rstrip() == script.rstrip()
    assert {Path(container["command"][1]).name, Path(models).name} == config_map["data"].keys()
    assert pod(only("CronJob", found)["spec"]["jobTemplate"]) == job
