"""The shipped Kubernetes objects and the image keep the promises their comments make."""

import contextlib
import http.client
import importlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cachd import __version__
from cachd.config import Config
from cachd.model.listener import Address, Serves
from cachd.policy.roles import Grant, Namespaces, Role
from cachd.settings.tokens import TokenFile
from cachd.store.disk_store import DiskStore
from tests.ground.program import CACHD, Program
from tests.ground.stored import publish

ROOT = Path(__file__).parents[1]
BASE = ROOT / "daemonset"
EXAMPLE = BASE / "examples/vllm/vllm.yaml"
CONFIG_MAP = BASE / "configmap.yaml"
CACHE = "/var/lib/cachd"
Object = dict[str, Any]

OLDEST = "1.26"
NATIVE_SIDECARS = "1.29"  # in their strict schema
ADMISSION_POLICIES = "1.30"
NEWEST = "newest"  # that kubernetes_validate knows


def kubernetes() -> ModuleType:
    """The schemas of Kubernetes. Its import takes seconds: only a test that uses it pays for it."""
    return importlib.import_module("kubernetes_validate")


def validate(document: Object, version: str) -> None:
    """Raises ValidationError unless the object is as its schema says, with no other field."""
    schemas = kubernetes()
    schemas.validate(document, schemas.latest_version() if version == NEWEST else version, strict=True)


def documents(text: str) -> list[Object]:
    return [document for document in yaml.safe_load_all(text) if document]


def base() -> list[Object]:
    """The objects of the base: composed by kubectl where there is one, else the resources as they stand."""
    if kubectl := shutil.which("kubectl"):
        composed = subprocess.run([kubectl, "kustomize", BASE], check=True, capture_output=True, text=True)
        return documents(composed.stdout)
    resources = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    return [document for name in resources for document in documents((BASE / name).read_text())]


OBJECTS = {document["kind"]: document for document in base()}
DEPLOYMENT = documents(EXAMPLE.read_text())[0]
DAEMON_POD = OBJECTS["DaemonSet"]["spec"]["template"]["spec"]
CONSUMER_POD = DEPLOYMENT["spec"]["template"]["spec"]
DAEMON = DAEMON_POD["containers"][0]
OPTIONS = yaml.safe_load(OBJECTS["ConfigMap"]["data"]["config.yaml"])
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def containers(pod: Object) -> Iterator[Object]:
    yield from pod["initContainers"]
    yield from pod["containers"]


def host_paths(pod: Object) -> dict[str, Object]:
    return {volume["name"]: volume["hostPath"] for volume in pod["volumes"] if "hostPath" in volume}


def mounts(container: Object) -> dict[str, Object]:
    return {mount["name"]: mount for mount in container["volumeMounts"]}


def environment(container: Object) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def serving(config: Path, port: int) -> Iterator[None]:
    """The image's command over `config`, from its first accepted connection until SIGTERM ends it in time."""
    command = [sys.executable, "-c", "from cachd.cli import main; main()", *DAEMON["args"]]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "CACHD_CONFIG": str(config)}) as daemon:
        try:
            while not listens(port):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(0.05)
                assert daemon.returncode is None, f"the daemon ended with {daemon.returncode}"
            yield
            daemon.terminate()
            daemon.wait(DAEMON_POD["terminationGracePeriodSeconds"])
        finally:
            daemon.kill()


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool installed beside this Python."""
    path = Path(sys.executable).with_name(name)
    return subprocess.run([path, *arguments], check=False, capture_output=True, text=True)


# --- the schemas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("document", OBJECTS.values(), ids=lambda document: document["kind"])
def test_every_object_passes_the_strict_schema(document: Object, version: str) -> None:
    validate(document, version)


def test_the_page_about_kubernetes_names_the_versions_that_the_schemas_prove() -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    stated = re.findall(r"^\| (1\.\d+) \| ", page, re.MULTILINE)
    assert stated[:3] == [OLDEST, NATIVE_SIDECARS, ADMISSION_POLICIES]
    with pytest.raises(kubernetes().ValidationError):
        validate(DEPLOYMENT, "1.27")  # it has no native sidecar yet


def test_the_schema_refuses_a_field_that_does_not_exist() -> None:
    planted = yaml.safe_load(yaml.safe_dump(OBJECTS["DaemonSet"]))
    planted["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes().ValidationError, match="readOnlyRootFileSystem"):
        validate(planted, NEWEST)


def test_the_kustomization_takes_in_every_file_of_the_base() -> None:
    resources = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert sorted([*resources, "kustomization.yaml"]) == sorted(path.name for path in BASE.glob("*.yaml"))
    assert sorted(OBJECTS) == ["ConfigMap", "DaemonSet", "Namespace", "Service", "ServiceAccount"]


def test_yamllint_finds_nothing_but_long_lines_of_comments() -> None:
    rules = "{extends: relaxed, ignore: [templates/], rules: {line-length: {max: 130}}}"
    linted = tool("yamllint", "--strict", "-d", rules, BASE)
    assert linted.returncode == 0, linted.stdout


# --- the daemon's pod ------------------------------------------------------------------------------------


def test_the_daemon_mounts_its_whole_root_through_one_host_path() -> None:
    assert host_paths(DAEMON_POD) == {"root": {"path": CACHE, "type": "DirectoryOrCreate"}}
    assert mounts(DAEMON)["root"] == {"name": "root", "mountPath": CACHE}
    assert [mount for mount in DAEMON["volumeMounts"] if mount["mountPath"].startswith(CACHE)] == [
        mounts(DAEMON)["root"]
    ]
    assert OPTIONS["root"] == CACHE


def test_the_daemon_runs_without_root_and_without_rights() -> None:
    assert DAEMON_POD["securityContext"]["runAsNonRoot"] is True
    assert DAEMON_POD["securityContext"]["runAsUser"] == 65532
    assert DAEMON_POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert DAEMON["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not DAEMON_POD.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all("hostPort" not in port for port in DAEMON["ports"])


def test_the_one_container_that_is_root_may_chown_the_root_directory_and_nothing_else() -> None:
    chown, *others = DAEMON_POD["initContainers"]
    assert not any("securityContext" in each and "runAsUser" in each["securityContext"] for each in others)
    assert chown["command"] == ["chown", "65532:65532", CACHE]
    assert chown["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert chown["securityContext"]["readOnlyRootFilesystem"] is True
    assert chown["securityContext"]["allowPrivilegeEscalation"] is False
    assert list(mounts(chown)) == ["root"]
    assert chown["image"] == DAEMON["image"]


def test_no_pod_holds_a_token_for_the_kubernetes_api() -> None:
    assert OBJECTS["ServiceAccount"]["automountServiceAccountToken"] is False
    assert DAEMON_POD["automountServiceAccountToken"] is False
    assert CONSUMER_POD["automountServiceAccountToken"] is False


def test_no_service_turns_into_environment_options() -> None:
    assert DAEMON_POD["enableServiceLinks"] is False
    assert CONSUMER_POD["enableServiceLinks"] is False


def test_what_is_writable_is_the_root_and_a_bounded_tmp() -> None:
    assert [mount["name"] for mount in DAEMON["volumeMounts"] if not mount.get("readOnly")] == ["root", "tmp"]
    (tmp,) = [volume for volume in DAEMON_POD["volumes"] if volume["name"] == "tmp"]
    assert tmp["emptyDir"]["sizeLimit"]


def test_the_configuration_is_mounted_as_a_directory_so_that_changes_arrive() -> None:
    assert mounts(DAEMON)["config"] == {"name": "config", "mountPath": "/etc/cachd", "readOnly": True}
    assert environment(DAEMON)["CACHD_CONFIG"] == "/etc/cachd/config.yaml"


def test_the_token_is_required_and_the_origins_secrets_are_not() -> None:
    (config,) = [volume["projected"] for volume in DAEMON_POD["volumes"] if volume["name"] == "config"]
    optional = {
        "/etc/cachd/" + item["path"]: source["secret"].get("optional", False)
        for source in config["sources"]
        if "secret" in source
        for item in source["secret"]["items"]
    }
    assert optional == {
        "/etc/cachd/secrets/token": False,
        "/etc/cachd/secrets/hf-token": True,
        "/etc/cachd/secrets/aws-credentials": True,
        "/etc/cachd/secrets/proxy-credentials": True,
    }
    assert OPTIONS["token_file"] in optional
    assert config["defaultMode"] == 0o440
    assert DAEMON_POD["securityContext"]["fsGroup"] == 65532


def test_the_example_of_tokens_is_what_the_daemon_reads(tmp_path: Path) -> None:
    (secret,) = documents((BASE / "examples" / "tokens.yaml").read_text())
    (volume,) = [volume["secret"] for volume in DAEMON_POD["volumes"] if volume["name"] == "tokens"]
    assert volume == {"secretName": secret["metadata"]["name"], "optional": True, "defaultMode": 0o440}
    assert f"# token_file: {mounts(DAEMON)['tokens']['mountPath']}" in CONFIG_MAP.read_text()
    for name, content in secret["stringData"].items():
        (tmp_path / name).write_text(content)
    tokens = TokenFile(tmp_path)
    assert tokens.are_in_force()
    grants = {name: tokens.grant_of(f"REPLACE-{name}".encode()) for name in secret["stringData"]}
    assert grants["operator"] == Grant("operator", Role.admin)
    assert grants["team-a"] == Grant("team-a", Role.pull, Namespaces(("team-a-*", "hf://Qwen/")))
    assert grants["prometheus"] == Grant("prometheus", Role.read)
    assert grants["pods"] is None, "its hash is given"


def test_two_daemons_never_run_on_one_node() -> None:
    strategy = OBJECTS["DaemonSet"]["spec"]["updateStrategy"]
    assert strategy["type"] == "RollingUpdate"
    assert strategy["rollingUpdate"]["maxSurge"] == 0
    assert DAEMON_POD["terminationGracePeriodSeconds"] == 30


def test_the_taints_of_gpu_nodes_are_tolerated() -> None:
    tolerated = {toleration["key"]: toleration["operator"] for toleration in DAEMON_POD["tolerations"]}
    assert tolerated == {"nvidia.com/gpu": "Exists", "amd.com/gpu": "Exists"}


def test_memory_is_limited_and_cpu_is_not() -> None:
    for container in containers(DAEMON_POD):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert "cpu" not in container["resources"]["limits"]


def test_a_daemon_with_this_configuration_passes_the_probes_and_answers_to_its_names(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    (tmp_path / "root").mkdir()
    port = free_port()
    here = {
        "root": str(tmp_path / "root"),
        "listen": f"127.0.0.1:{port}",
        "token_file": str(tmp_path / "token"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(OPTIONS | here | {"models": []}))

    def status(path: str, host: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Host": f"{host}:8470"})
            return connection.getresponse().status

    with serving(tmp_path / "config.yaml", port):
        for probe in PROBES:
            assert status(DAEMON[probe]["httpGet"]["path"], host="10.1.2.3") == 200
        for host in OPTIONS["allowed_hosts"]:
            assert status("/v1/models", host) == 200
        assert status("/v1/models", host="cachd.example.com") in range(400, 500)


def test_prometheus_is_told_where_to_scrape() -> None:
    annotations = OBJECTS["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(DAEMON["ports"][0]["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"


# --- the other objects -----------------------------------------------------------------------------------


def test_the_service_leads_to_the_daemon_of_the_callers_node() -> None:
    spec = OBJECTS["Service"]["spec"]
    labels = OBJECTS["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert spec["internalTrafficPolicy"] == "Local"
    assert spec.get("clusterIP") != "None"  # a headless Service ignores the policy
    assert spec["selector"].items() <= labels.items()
    assert spec["ports"][0]["targetPort"] == DAEMON["ports"][0]["name"]
    assert OPTIONS["listen"] == f"0.0.0.0:{DAEMON['ports'][0]['containerPort']}"


def test_every_name_of_the_service_is_an_allowed_host() -> None:
    name, namespace = (OBJECTS["Service"]["metadata"][key] for key in ("name", "namespace"))
    short = f"{name}.{namespace}"
    assert OPTIONS["allowed_hosts"] == [name, short, f"{short}.svc", f"{short}.svc.cluster.local"]


def test_the_namespace_admits_host_paths_and_holds_every_object() -> None:
    namespace = OBJECTS["Namespace"]["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    others = [document for kind, document in OBJECTS.items() if kind != "Namespace"]
    assert {document["metadata"]["namespace"] for document in others} == {namespace["name"]}


def test_every_object_carries_the_recommended_labels() -> None:
    recommended = {f"app.kubernetes.io/{key}" for key in ("name", "instance", "part-of")}
    for document in OBJECTS.values():
        assert document["metadata"]["labels"].keys() >= recommended


def test_a_new_version_leaves_the_selector_alone() -> None:
    selectors = (
        OBJECTS["DaemonSet"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
    )
    for selector in selectors:
        assert selector == {"app.kubernetes.io/name": "cachd", "app.kubernetes.io/instance": "cachd"}


def test_every_place_that_names_the_version_names_this_one() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert [image["newTag"] for image in kustomization["images"]] == [__version__]
    assert [labels["pairs"]["app.kubernetes.io/version"] for labels in kustomization["labels"]] == [
        __version__
    ]
    assert {container["image"] for container in containers(DAEMON_POD)} == {f"cachd:{__version__}"}
    assert f"\nARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()


def test_the_config_map_holds_only_options_the_daemon_knows() -> None:
    from cachd.config import Config

    assert OPTIONS.keys() <= Config.model_fields.keys()
    config = Config.model_validate(OPTIONS)
    assert [model.name for model in config.models] == ["qwen-instruct"]


def test_the_options_shown_as_comments_are_known_too() -> None:
    from cachd.config import Config

    shown = re.findall(r"^  # ([a-z0-9_]+):", CONFIG_MAP.read_text(), re.MULTILINE)
    assert {"disk_at_least", "sources"} <= set(shown) <= Config.model_fields.keys()


# --- a pod that uses the cache ---------------------------------------------------------------------------


def test_a_consumer_mounts_the_root_read_only_and_never_creates_it() -> None:
    assert host_paths(CONSUMER_POD) == {"cache": {"path": CACHE, "type": "Directory"}}
    for container in containers(CONSUMER_POD):
        assert mounts(container)["cache"] == {"name": "cache", "mountPath": "/cache", "readOnly": True}


def consumer(name: str) -> Object:
    return next(container for container in containers(CONSUMER_POD) if container["name"] == name)


def test_a_consumer_waits_for_holds_and_serves_one_model_of_the_config_map() -> None:
    wait, hold, engine = containers(CONSUMER_POD)
    name = wait["args"][1]
    assert name in [model["name"] for model in OPTIONS["models"]]
    assert wait["args"][:1] + hold["args"][:2] == ["wait", "hold", name]
    link = f"{hold['args'][hold['args'].index('--link') + 1]}/{name}"
    assert link in engine["command"]
    assert hold["startupProbe"]["exec"]["command"] == ["test", "-d", f"{link}/"]
    assert {c["image"] for c in (wait, hold)} == {f"cachd:{__version__}"}


def test_a_consumer_holds_its_model_in_a_sidecar_whose_link_the_engine_only_reads() -> None:
    hold, engine = consumer("hold-model"), consumer("vllm")
    assert hold["restartPolicy"] == "Always"
    assert [volume for volume in CONSUMER_POD["volumes"] if volume["name"] == "model"] == [
        {"name": "model", "emptyDir": {}}
    ]
    assert mounts(hold)["model"] == {"name": "model", "mountPath": "/model"}
    assert mounts(engine)["model"] == {**mounts(hold)["model"], "readOnly": True}


def test_the_containers_of_a_consumer_that_wait_and_hold_have_no_rights() -> None:
    for container in CONSUMER_POD["initContainers"]:
        assert container["securityContext"] == DAEMON["securityContext"]
        assert "memory" in container["resources"]["limits"]
        assert "env" not in container


def test_a_consumer_is_offline_and_writes_outside_the_cache() -> None:
    variables = environment(consumer("vllm"))
    assert variables["HF_HUB_CACHE"] == "/cache/hub"
    assert variables["HF_HUB_OFFLINE"] == "1"
    writable = [mount["mountPath"] for mount in consumer("vllm")["volumeMounts"] if not mount.get("readOnly")]
    for name in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT"):
        assert any(Path(variables[name]).is_relative_to(path) for path in writable)


def started(container: Object, cache: Path, link: Path) -> subprocess.Popen[str]:
    """Run a container of the example as its image would, over `cache`, its link below `link`."""
    here = {"/cache": str(cache), "/model": str(link)}
    arguments = [here.get(word, word) for word in container["args"]]
    return Program([*CACHD, *arguments], cwd=ROOT, stderr=subprocess.PIPE)


def test_the_example_waits_until_the_model_is_ready_and_holds_it_until_it_is_told_to_end(
    tmp_path: Path,
) -> None:
    with DiskStore(tmp_path) as store, started(consumer("wait-for-model"), tmp_path, tmp_path) as waiting:
        assert waiting.stderr is not None
        assert "waiting for qwen-instruct" in waiting.stderr.readline()
        snapshot = publish(store, {"config.json": b"{}"}, name="qwen-instruct")
        assert waiting.wait(30) == 0
        link = tmp_path / "link"
        link.mkdir()
        with started(consumer("hold-model"), tmp_path, link) as holding:
            assert holding.stderr is not None
            assert "is held" in holding.stderr.readline()
            (*probe, place) = consumer("hold-model")["startupProbe"]["exec"]["command"]
            assert subprocess.run([*probe, place.replace("/model", str(link))], check=False).returncode == 0
            assert store.protection.is_in_use(store.manifests.of(snapshot))
            holding.terminate()
            assert holding.wait(30) == 0
        assert not store.protection.is_in_use(store.manifests.of(snapshot))


# --- the image -------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    linted = tool("hadolint", ROOT / "Dockerfile")
    assert linted.returncode == 0, linted.stdout


def test_the_image_runs_as_the_user_of_the_daemon_set() -> None:
    instructions = (ROOT / "Dockerfile").read_text().splitlines()
    user = DAEMON_POD["securityContext"]["runAsUser"]
    group = DAEMON_POD["securityContext"]["runAsGroup"]
    assert f"USER {user}:{group}" in instructions
    assert 'ENTRYPOINT ["cachd"]' in instructions
    assert DAEMON["args"] == ["serve"]
    assert f"EXPOSE {DAEMON['ports'][0]['containerPort']}" in instructions


def test_the_image_is_built_alike_for_every_architecture() -> None:
    """`make base` takes the digest of all platforms; tests/test_lock.py compares the packages of both."""
    text = (ROOT / "Dockerfile").read_text()
    named = r"(?i)amd64|x86|arm64|aarch64|--platform|(?:TARGET|BUILD)(?:ARCH|PLATFORM|VARIANT)|uname|dpkg"
    assert not re.search(named, text)


def test_the_build_sees_only_what_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert allowed == set(" ".join(copied).split())


# --- the example with TLS ---------------------------------------------------------------------------------

TLS = BASE / "examples" / "tls"


def merged(base: Any, patch: Any) -> Any:
    """As a strategic merge does it: mappings by key, lists of named things by name, other lists replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and all(isinstance(each, dict) and "name" in each for each in [*base, *patch]):
        found = {each["name"]: each for each in base}
        for each in patch:
            found[each["name"]] = merged(found.get(each["name"]), each)
        return list(found.values())
    return patch


def test_the_example_with_tls_is_the_base_with_files_and_ports_that_fit() -> None:
    objects = {name: documents((TLS / f"{name}.yaml").read_text())[0] for name in ("configmap", "daemonset")}
    daemonset = merged(OBJECTS["DaemonSet"], objects["daemonset"])
    validate(daemonset, NEWEST)
    config = Config.model_validate(yaml.safe_load(objects["configmap"]["data"]["config.yaml"]))
    pod = daemonset["spec"]["template"]["spec"]
    daemon = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in daemon["ports"]}

    api, plain, local = config.listeners
    assert isinstance(api.at, Address)
    assert isinstance(plain.at, Address)
    assert (api.at.port, api.may_speak_tls, api.serves) == (ports["http"], True, Serves.everything)
    assert (plain.at.port, plain.may_speak_tls, plain.serves) == (ports["probes"], False, Serves.reads)
    assert environment(daemon)["CACHD_URL"] == str(local)
    assert {daemon[probe]["httpGet"]["port"] for probe in PROBES} == {"probes"}
    assert daemon["readinessProbe"]["periodSeconds"] == DAEMON["readinessProbe"]["periodSeconds"]
    annotations = daemonset["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["probes"])

    [volume] = [each for each in pod["volumes"] if each["name"] == "config"]
    sources = [next(iter(each.values())) for each in volume["projected"]["sources"]]
    given = {f"/etc/cachd/{item['path']}" for each in sources for item in each["items"]}
    assert {str(config.tls_cert_file), str(config.tls_key_file), str(config.token_file)} < given
    assert "/etc/cachd/tls/ca.crt" in given
    secret = documents((TLS / "certificate.yaml").read_text())[0]["spec"]["secretName"]
    assert secret in [each.get("name") for each in sources]
