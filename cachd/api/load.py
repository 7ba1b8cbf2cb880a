"""Loads structlog and FastAPI without parts that cachd does not use."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast


def load_libraries() -> None:
    """Load structlog and FastAPI without parts that cachd does not use. They take a quarter of the start.

    structlog would load rich for tracebacks with variables, which may be secrets. FastAPI would load pydantic
    1 to recognise its models. Both do without what cannot be imported. The models of FastAPI, which describe
    an OpenAPI document, are built when somebody first asks for one.
    """
    rich = {name: module for name, module in sys.modules.items() if name == "rich"}
    sys.modules["rich"] = sys.modules["pydantic.v1"] = cast("ModuleType", None)  # cannot be imported
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
        sys.modules.update(rich)
    from pydantic import BaseModel

    BaseModel.model_config["defer_build"] = True
    try:
        import fastapi  # noqa: F401
    finally:
        del BaseModel.model_config["defer_build"]
