"""What every error says."""

from __future__ import annotations

from cachd.errors import CachdError, TooBig


def test_an_error_has_its_code_detail_hint_class_and_numbers() -> None:
    error = TooBig("it is wrong", code="wrong", hint="do it right", need=5)
    assert str(error) == "it is wrong (do it right)"
    assert error.as_document() == {
        "code": "wrong",
        "detail": "it is wrong",
        "hint": "do it right",
        "error_class": "TooBig",
        "need": 5,
    }


def test_every_class_of_error_has_a_code_of_its_own() -> None:
    def below(kind: type[CachdError]) -> list[type[CachdError]]:
        return [kind, *(each for direct in kind.__subclasses__() for each in below(direct))]

    kinds = [kind for kind in below(CachdError) if kind.__module__ == "cachd.errors"]
    assert len({kind.code for kind in kinds}) == len(kinds) >= 13
