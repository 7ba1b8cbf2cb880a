"""Says which files a pull would make ready, without pulling."""

from __future__ import annotations

from cachd.errors import NotFound
from cachd.model import Manifest, ModelSpec, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.schemes import Sources
from cachd.sources.source import ForCallers
from cachd.transfer.attempt import PullContext
from cachd.transfer.checks import check_numbers, selected

_ANSWER_SECONDS = 60.0


class Previews:
    """Resolves the refs of callers who wait for the answer. Safe from any thread."""

    def __init__(self, context: PullContext, sources: Sources) -> None:
        self._context, self._sources = context, sources
        self._stopping = CancelToken()

    def resolve(
        self, spec: ModelSpec, cancel_token: CancelToken | None = None, *, seconds: float = _ANSWER_SECONDS
    ) -> Manifest:
        """Ask the source for the spec's current manifest, for at most `seconds`.

        Raises CachdError, also for files that a pull would refuse.
        """
        token = cancel_token or CancelToken()
        source = self._sources.of(spec.ref)
        with self._stopping.reaches(token):
            manifest = self._context.resolves.resolve(source, spec.ref, token, seconds=seconds)
        chosen = selected(manifest, spec, self._context.table())
        check_numbers(chosen, manifest, spec)
        return self._context.store.manifests.as_kept(chosen)

    def check_caller(self, ref: Ref, token: str | None, *, seconds: float = _ANSWER_SECONDS) -> None:
        """Ask the source whether the owner of a token may read a ref, for at most `seconds`.

        Raises NotFound, Forbidden or Invalid if not, and any error that prevents the answer.
        """
        source, cancel_token = self._sources.of(ref), CancelToken()
        if not isinstance(source, ForCallers):
            raise NotFound(f"the source of {ref} knows no tokens of callers", code="repo_not_found")
        with self._stopping.reaches(cancel_token):
            self._context.resolves.resolve(source.for_caller(token), ref, cancel_token, seconds=seconds)

    def interrupt(self) -> None:
        """End every running resolve. Later ones raise Cancelled."""
        self._stopping.cancel()
