"""Makes the OpenAPI document state the schema of every answer, and the role that each call needs.

FastAPI would build a serializer for each declared answer when the daemon starts, and validate each answer
that is sent. The reports need neither: a route names their classes with `answers`, and their schemas are made
when somebody first asks for the document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import TypeAdapter

from cachd.api.access import RULES
from cachd.api.problems import Problem
from cachd.report.values import adapter

EVENT_STREAM = "text/event-stream"
Responses = dict[int | str, dict[str, Any]]
_REF = "#/components/schemas/{model}"
_PROBLEM = {
    "description": "a problem document (RFC 9457)",
    "content": {"application/problem+json": {"schema": {"$ref": _REF.format(model=Problem.__name__)}}},
}
PROBLEMS: Responses = {"4XX": _PROBLEM, "5XX": _PROBLEM}
_kinds: dict[str, type[Any]] = {Problem.__name__: Problem}


def answers(
    kinds: Mapping[int, type[Any] | tuple[type[Any], ...]], *, stream: tuple[type[Any], ...] = ()
) -> Responses:
    """The argument `responses` of a route that answers with these reports; one of several for a tuple.

    `stream`: the reports in the `data` of the server-sent events that the route can answer with, too.
    """
    responses: Responses = {}
    for status, one_or_more in kinds.items():
        several = one_or_more if isinstance(one_or_more, tuple) else (one_or_more,)
        _kinds.update((kind.__name__, kind) for kind in several)
        refs = [{"$ref": _REF.format(model=kind.__name__)} for kind in several]
        schema = {"oneOf": refs} if len(refs) > 1 else refs[0]
        description = " Or: ".join((kind.__doc__ or "").partition("\n")[0] for kind in several)
        responses[status] = {"description": description, "content": {"application/json": {"schema": schema}}}
    if stream:
        responses[200]["content"] |= {EVENT_STREAM: {"itemSchema": _sent(stream)}}
    return responses


def _sent(kinds: tuple[type[Any], ...]) -> dict[str, Any]:
    """The schema of a server-sent event, as FastAPI writes it (OpenAPI 3.2, section 4.14.4)."""
    _kinds.update((kind.__name__, kind) for kind in kinds)
    content = {"oneOf": [{"$ref": _REF.format(model=kind.__name__)} for kind in kinds]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    texts: dict[str, Any] = {"event": {"type": "string"}, "id": {"type": "string"}}
    return {"type": "object", "properties": {"data": data, **texts, "retry": {"type": "integer"}}}


def install(app: FastAPI) -> None:
    """Make `app.openapi` return the complete document."""
    of_fastapi = app.openapi

    def complete() -> dict[str, Any]:
        document = of_fastapi()
        components = document["components"]
        components["schemas"] |= _schemas()
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for calls in document["paths"].values():
            for call in calls.values():
                if role := RULES[call["operationId"]].role:
                    call |= {"x-role": role.name, "security": [{"token": []}]}
        return document

    app.openapi = complete  # type: ignore[method-assign]  # as in FastAPI's manual, "Extending OpenAPI"


def _schemas() -> dict[str, Any]:
    """The schemas of all answers, by the name of the class."""
    mode: Literal["serialization"] = "serialization"
    _, found = TypeAdapter.json_schemas(
        [(name, mode, adapter(kind)) for name, kind in _kinds.items()], ref_template=_REF
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas
