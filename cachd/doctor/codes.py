"""Names every check of the doctor by a stable code, and says what its findings mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Code(StrEnum):
    """The codes of findings, in the order in which they are shown."""

    configuration = "configuration"
    configuration_in_force = "configuration_in_force"
    restart_needed = "restart_needed"
    daemon = "daemon"
    user = "user"
    root = "root"
    file_system = "file_system"
    hard_links = "hard_links"
    foreign_files = "foreign_files"
    leases = "leases"
    inotify = "inotify"
    space = "space"
    inodes = "inodes"
    kubelet = "kubelet"
    open_files = "open_files"
    threads = "threads"
    ca_file = "ca_file"
    certificate = "certificate"
    proxy = "proxy"
    dns = "dns"
    endpoint = "endpoint"
    clock = "clock"
    secret_file = "secret_file"  # noqa: S105 the name of a check
    api_tokens = "api_tokens"
    hub_token = "hub_token"  # noqa: S105 the name of a check
    s3_credentials = "s3_credentials"
    kubernetes = "kubernetes"
    required_models = "required_models"
    model = "model"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a check examines, and when its finding is a warning or wrong; empty: never."""

    checks: str
    warning: str = ""
    wrong: str = ""


MEANINGS: Mapping[Code, Meaning] = MappingProxyType(
    {
        Code.configuration: Meaning(
            "the options of flags, environment and file, as `cachd check-config` does",
            "a variable `CACHD_…` is not an option",
            "an option is wrong",
        ),
        Code.configuration_in_force: Meaning(
            "whether the options in force are those of the file on the disk",
            "the token has no role `admin`, which this check needs",
            "the file is wrong, so the daemon still uses the previous options",
        ),
        Code.restart_needed: Meaning(
            "options of the file that the daemon uses only after a restart", "there are some"
        ),
        Code.daemon: Meaning(
            "whether the daemon answers, and can write to its disk",
            "no daemon answers at the default address or that of the file, and none holds the root",
            "it does not answer at the address that was given, or refuses the token, or cannot write",
        ),
        Code.user: Meaning(
            "whether this command runs as the daemon's user; root switches to it",
            "it runs as another user, so the checks of root and secrets are skipped",
        ),
        Code.root: Meaning(
            "owner and mode of the root, of the directories above it, and of cachd's own files in it",
            "pods of other users cannot read it",
            "it is missing, is not writable, or somebody else could change it",
        ),
        Code.file_system: Meaning(
            "the file system of the root",
            "it is a network file system, or a container's own layer",
            "it is mounted read-only, or smaller than `disk_at_least`",
        ),
        Code.hard_links: Meaning(
            "whether files can be linked and moved between the directories of the root",
            wrong="they cannot, or a directory of the root is another mount",
        ),
        Code.foreign_files: Meaning(
            "whether `models`, `ready` and `status` of the root have only what cachd made",
            "somebody else put something there, which takes space that cachd never frees",
        ),
        Code.leases: Meaning(
            "whether the kernel reports which files are open",
            "it does not: only pins and leases protect models",
        ),
        Code.inotify: Meaning(
            "whether the kernel can watch all directories of the views",
            "a limit is too low, so deleted and opened files are seen only after minutes",
        ),
        Code.space: Meaning(
            "free disk space, `limit_bytes` and `reserve_free`",
            "less than 5 % of the disk is free, or less than `reserve_free` while no daemon runs",
            "models take more than `limit_bytes`, or less than `reserve_free` is free, while the daemon runs",
        ),
        Code.inodes: Meaning(
            "free inodes and `reserve_inodes`",
            "fewer than `reserve_inodes` are free",
            "none is free",
        ),
        Code.kubelet: Meaning(
            "the kubelet's eviction thresholds",
            "`reserve_free` is below its threshold, or its file cannot be used",
        ),
        Code.open_files: Meaning(
            "the limit of open files, of the daemon if it runs",
            "it is below 4,096",
            "it is too low for the option `streams`",
        ),
        Code.threads: Meaning(
            "whether all threads of a daemon can be started", wrong="the kernel refuses a thread"
        ),
        Code.ca_file: Meaning(
            "certificate authorities for sources: readable, PEM, not expired",
            "one has expired, or expires within 30 days; or the system has no authorities",
            "the file cannot be used, or all its certificates have expired",
        ),
        Code.certificate: Meaning(
            "the API's own certificate", "it expires within 14 days", "it cannot be used, or has expired"
        ),
        Code.proxy: Meaning(
            "whether each proxy accepts connections",
            "a variable names a proxy, but the option `proxy` is not set",
            "it cannot be reached",
        ),
        Code.dns: Meaning(
            "names of endpoints and proxies",
            "the name of an endpoint that is only a default has no address",
            "a name has no address",
        ),
        Code.endpoint: Meaning(
            "whether each endpoint answers: those of options, of `sources` and of `models`",
            "an endpoint that is only a default does not answer, or one answers 5xx",
            "it does not answer in time, or is refused by certificate or policy",
        ),
        Code.clock: Meaning(
            "this node's clock against the endpoints' dates",
            "it differs by more than a minute, or no endpoint states a date",
            "it differs by more than five minutes; S3 refuses requests at fifteen",
        ),
        Code.secret_file: Meaning(
            "each secret file of the options: proxy, ModelScope, headers", wrong="it cannot be read or used"
        ),
        Code.api_tokens: Meaning("the API's `token_file`", wrong="it cannot be read, or an entry is wrong"),
        Code.hub_token: Meaning(
            "whether the Hub accepts each token (`whoami`); it is never shown",
            "the endpoint has no `whoami`, or does not answer",
            "the token is refused, or cannot be read",
        ),
        Code.s3_credentials: Meaning(
            "where credentials for S3 come from, and whether S3 accepts them",
            "there are none, or S3 does not answer",
            "S3 refuses them, or they cannot be read",
        ),
        Code.kubernetes: Meaning(
            "whether the Kubernetes API has this node, and allows what `node_labels`, `node_condition`,"
            " `node_events` and `startup_taint` need",
            wrong="it does not answer, or has no such node, or refuses one of the writes",
        ),
        Code.required_models: Meaning("whether every model marked `required` is ready", wrong="one is not"),
        Code.model: Meaning(
            "the newest pull of each model, also where no daemon runs",
            "the pull failed, but an earlier snapshot is ready; or cachd will try it again",
            "it failed and nothing is ready, or the model is damaged or refused",
        ),
    }
)


def table() -> list[tuple[str, str, str, str]]:
    """Code, what is checked, when it is a warning, and when it is wrong, for the documentation."""
    return [(code.value, m.checks, m.warning, m.wrong) for code, m in MEANINGS.items()]
