"""Answers whose bytes are made where the document is: in a thread, so that no large one holds up the loop."""

from __future__ import annotations

from fastapi.responses import JSONResponse, Response


def as_json(document: object) -> bytes:
    """The bytes of a document."""
    return bytes(JSONResponse(document).body)


def json_answer(content: bytes) -> Response:
    """200 with bytes that `as_json` made."""
    return Response(content, media_type="application/json")
