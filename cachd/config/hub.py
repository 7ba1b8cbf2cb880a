"""Options of the Hub endpoint."""

from typing import Literal

from pydantic import Field

from cachd.config.group import Group
from cachd.model.listener import Listener
from cachd.settings.types import HubListens, Networks


class HubOptions(Group):
    """Where the Hub endpoint listens, and whom it answers."""

    hub_listen: HubListens = Field(
        (),
        description="addresses of the Hub endpoint, one or several: HOST:PORT, or :PORT for all addresses"
        " of the node; clients of the Hub that cannot be changed set HF_ENDPOINT to it; empty: off",
    )
    hub_allow: Networks = Field(
        (),
        description="networks whose clients the Hub endpoint answers, such as the pod network: 10.244.0.0/16;"
        " the node itself is always allowed",
    )

    hub_share: Literal["node", "token"] = Field(
        "node",
        description="which of these clients may read a model: node, all of them; token, those whose token the"
        " Hub accepts for it; without an answer of the Hub, nobody",
    )

    @property
    def hub_listeners(self) -> list[Listener]:
        """The addresses of `hub_listen`, parsed."""
        return [Listener.parse(each) for each in self.hub_listen]
