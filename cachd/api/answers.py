"""Serializes JSON answers outside the event loop, so that a large document does not delay other requests."""

from __future__ import annotations

from fastapi.responses import JSONResponse, Response


def as_json(document: object) -> bytes:
    """A document as JSON. To be called in the thread that made the document."""
    return bytes(JSONResponse(document).body)


def json_answer(content: bytes) -> Response:
    """A 200 answer with the bytes that `as_json` returned."""
    return Response(content, media_type="application/json")
