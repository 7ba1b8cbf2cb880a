"""Says which files a pull would make ready, and what engines would find in them, without pulling."""

from __future__ import annotations

from cachd.errors import Cancelled, NotFound, Unavailable
from cachd.model import Manifest, ModelSpec, Ref
from cachd.preflight.examine import Preflight, examine
from cachd.preflight.remote import SourceContents
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
        manifest, chosen = self._chosen(spec, cancel_token or CancelToken(), seconds)
        check_numbers(chosen, manifest, spec)
        return self._context.store.manifests.as_kept(chosen)

    def check_caller(self, ref: Ref, token: str | None, *, seconds: float = _ANSWER_SECONDS) -> None:
        """Ask the source whether the owner of a token may read a ref, for at most `seconds`.

        Raises NotFound, Forbidden or Invalid if not, and any error that prevents the answer. None of them
        counts as a failure of the source, because a caller can cause it with a wrong token.
        """
        source, cancel_token = self._sources.of(ref), CancelToken()
        if not isinstance(source, ForCallers):
            raise NotFound(f"the source of {ref} knows no tokens of callers", code="repo_not_found")
        with self._stopping.reaches(cancel_token):
            try:
                with self._context.resolves.ending(cancel_token, seconds=seconds) as ending:
                    source.for_caller(token).resolve(ref, ending)
            except Cancelled as error:
                cancel_token.check()
                raise Unavailable(f"{ref}: its source took too long for a token") from error

    def preflight(
        self, spec: ModelSpec, cancel_token: CancelToken | None = None, *, seconds: float = _ANSWER_SECONDS
    ) -> tuple[Manifest, Preflight]:
        """Ask the source for the spec's manifest, and for headers of its files: what an engine would find.

        After `seconds` no more headers are asked for: the findings say which files were not examined. Raises
        as `resolve`, but a missing shard is a finding.
        """
        token, began = cancel_token or CancelToken(), self._context.clock()
        _, chosen = self._chosen(spec, token, seconds)
        left, source = seconds - (self._context.clock() - began), self._sources.of(spec.ref)
        with self._stopping.reaches(token), self._context.resolves.ending(token, seconds=left) as ending:
            found = examine(SourceContents(chosen, source, ending))
        token.check()
        return chosen, found

    def _chosen(
        self, spec: ModelSpec, cancel_token: CancelToken, seconds: float
    ) -> tuple[Manifest, Manifest]:
        """All files of the source, and those that a pull would make ready."""
        source = self._sources.of(spec.ref)
        with self._stopping.reaches(cancel_token):
            manifest = self._context.resolves.resolve(source, spec.ref, cancel_token, seconds=seconds)
        return manifest, selected(manifest, spec, self._context.table())

    def interrupt(self) -> None:
        """End every running resolve. Later ones raise Cancelled."""
        self._stopping.cancel()
