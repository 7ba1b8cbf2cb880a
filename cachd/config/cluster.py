"""Options of the signals about this node that cachd writes to Kubernetes."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from cachd.config.group import Group
from cachd.fields import AbsolutePath
from cachd.settings.given import Also
from cachd.settings.types import KubeletUrl, NodeName, TaintKey

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SIGNALS = ("node_labels", "node_condition", "node_events", "startup_taint")


class ClusterOptions(Group):
    """Signals for the Kubernetes scheduler and autoscalers. cachd uses that API only if one of them is on."""

    node_labels: bool = Field(
        default=False,
        description="label this node with models.cachd.dev/NAME=ready, updating or failed for each model",
    )
    max_node_labels: int = Field(
        50, ge=1, le=200, description="most labels: required models first, then ready ones, then by name"
    )
    node_condition: bool = Field(
        default=False,
        description="keep the condition CachdRequiredModelsReady of this node up to date",
    )
    node_events: bool = Field(
        default=False,
        description="report pulls, failures, evictions and damage of models as Events of this node",
    )
    startup_taint: TaintKey | None = Field(
        None,
        description="key of a taint, such as cachd.dev/models-not-ready, with which this node is created;"
        " cachd removes it when all required models are ready, and never adds it",
    )
    node_name: Annotated[NodeName | None, Also(("NODE_NAME",))] = Field(
        None,
        validate_default=True,
        description="name of this node in Kubernetes, for node_labels, node_condition, node_events and"
        " startup_taint",
    )
    kubernetes_url: KubeletUrl | None = Field(
        None,
        description="where the Kubernetes API answers, such as https://10.0.0.1:443; default: as"
        " KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT say, else https://kubernetes.default.svc:443",
    )
    kubernetes_token_file: AbsolutePath = Field(
        _SERVICE_ACCOUNT / "token", description="the token of a service account to show the Kubernetes API"
    )
    kubernetes_ca_file: AbsolutePath = Field(
        _SERVICE_ACCOUNT / "ca.crt",
        description="PEM file of the authority that signed the certificate of the Kubernetes API",
    )

    @field_validator("node_name")
    @classmethod
    def _needed(cls, name: str | None, info: ValidationInfo) -> str | None:
        on = [key for key in _SIGNALS if info.data.get(key)]
        if on and name is None:
            raise ValueError(f"{on[0]} needs the name of this node: set it, or the variable NODE_NAME")
        return name

    @property
    def informs_kubernetes(self) -> bool:
        """Whether any signal of the node is on."""
        return any(getattr(self, key) for key in _SIGNALS)
