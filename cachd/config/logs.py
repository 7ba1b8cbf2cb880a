"""Options of the log."""

from typing import Annotated, Literal

from pydantic import Field

from cachd.config.group import Group
from cachd.settings.types import Word


class LogsOptions(Group):
    """What is logged, and in which form."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Word({"warn": "warning"})] = Field(
        "info", description="lowest severity to log"
    )
    log_format: Annotated[Literal["auto", "json", "text"], Word()] = Field(
        "auto", description="auto: text on a terminal, JSON elsewhere"
    )
