"""Options of the models that the daemon pulls at start."""

import functools
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cachd.config.group import RELOADED, Group
from cachd.errors import CachdError
from cachd.model import ModelSpec
from cachd.settings.types import Several, Strings


class Model(BaseModel):
    """One entry of `models`. The daemon pulls it at start, or when it appears in the file later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str = Field(description="what to pull, in any form that `cachd pull` takes")
    name: str | None = Field(None, description="local name; default: derived from the ref")
    required: bool = Field(default=False, description="/readyz?set=required fails until this model is ready")
    pin: bool = Field(
        default=False, description="pin the model: it is never evicted, and only a forced delete removes it"
    )
    warm: bool = Field(default=False, description="read the model into memory once it is ready")
    include: Strings = Field((), description="patterns of the files to pull; default: all files")
    exclude: Strings = Field((), description="patterns of the files to leave out")
    weights: str | None = Field(
        None, description="the form of the weights to pull, such as safetensors or gguf:Q4_K_M; default: all"
    )
    formats: Literal["all", "safe"] | None = Field(
        None, description="`safe`: refuse the model if its weights are only Python pickles; see sources"
    )
    copy_: Strings | None = Field(
        None,
        alias="copy",
        description="patterns of the files that the views show as copies, not as hard links; default:"
        " external data of ONNX",
    )
    layout: Literal["triton"] | None = Field(
        None,
        description="`triton`: the plain view has the files as version 1 of a Triton model; default: as the"
        " source has them",
    )
    hub_id: str | None = Field(
        None, description="the Hub repository org/model under which a mirror of it appears in the Hub view"
    )
    priority: int = Field(
        0, ge=-100, le=100, description="models with a higher priority are pulled first and evicted last"
    )

    @model_validator(mode="after")
    def _is_spec(self) -> Self:
        try:
            _ = self.spec
        except CachdError as error:
            raise ValueError(str(error)) from error
        return self

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model spec that this entry asks for."""
        return ModelSpec.asked(
            self.ref,
            self.name or None,
            self.include,
            self.exclude,
            hub_id=self.hub_id,
            weights=self.weights,
            copy=self.copy_,
            formats=self.formats,
            layout=self.layout,
        )


class ModelsOptions(Group):
    """The models that this node keeps ready."""

    models: Annotated[tuple[Model, ...], Several, RELOADED] = Field((), description="models to pull at start")
