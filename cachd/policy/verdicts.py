"""Whether models may be pulled from a place, by the longest prefix that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult

from cachd.errors import Forbidden
from cachd.policy.prefixes import Prefix, Prefixes


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether what a prefix covers may be pulled, and the entry of `sources` that says so.

    `opens`: it may be at a private address, plain http or a share, too.
    """

    is_allowed: bool
    by: Prefix
    opens: bool = False


class Verdicts:
    """The rules in force. Where none covers a place, it may be asked."""

    def __init__(self, rules: Mapping[Prefix, Rule]) -> None:
        self._rules = Prefixes(rules)
        self._are_none = not rules
        self.opened = tuple(
            prefix.text
            for prefix, rule in rules.items()
            if rule.opens and prefix.steps and prefix.scheme not in ("hf", "s3")
        )

    def refusal(self, base: str) -> Prefix | None:
        """The entry that refuses what is at a ref's base or a file's origin; None when it may be pulled.

        Raises Forbidden when its path may mean two things.
        """
        rule = next((rule for _, rule in self._rules.covering(base)), None)
        return rule.by if rule and not rule.is_allowed else None

    def allows_host(self, base: str) -> bool:
        """Whether a rule that names more than a scheme allows what is at `base`."""
        return any(rule.is_allowed for prefix, rule in self._rules.covering(base) if prefix.steps)

    def check_request(self, url: SplitResult) -> None:
        """Raises Forbidden for the URL of a request, or of a redirect, on a host that an entry refuses.

        Entries of a scheme alone are about refs: where an allowed source keeps its files is its business.
        """
        if self._are_none:
            return
        covering = self._rules.covering(url.geturl().partition("?")[0])
        rule = next((rule for prefix, rule in covering if prefix.steps), None)
        if rule and not rule.is_allowed:
            raise Forbidden(
                f"{url.scheme}://{url.netloc} is refused by the entry {rule.by} of sources",
                code="source_refused",
                hint="the origin keeps its files there; allow that prefix if it is meant",
            )


NO_VERDICTS = Verdicts({})
