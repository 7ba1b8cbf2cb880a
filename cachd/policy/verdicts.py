"""Decides whether models may be pulled from a source, by the longest prefix that allows or refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult

from cachd.errors import Forbidden
from cachd.model import SCHEMES
from cachd.policy.prefixes import Prefix, Prefixes


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether refs below a prefix may be pulled, and the entry of `sources` (`by`) that says so.

    `opens`: whether it also allows private addresses, plain http and file:// there.
    """

    is_allowed: bool
    by: Prefix
    opens: bool = False


class Verdicts:
    """The rules in force. A source that no rule covers is allowed."""

    def __init__(self, rules: Mapping[Prefix, Rule]) -> None:
        self._rules = Prefixes(rules)
        self._are_none = not rules
        self.opened = tuple(
            prefix.text
            for prefix, rule in rules.items()
            if rule.opens and prefix.steps and SCHEMES[prefix.scheme].grammar.is_address
        )

    def refusal(self, base: str) -> Prefix | None:
        """The entry that refuses `base`, a ref's base or a file's origin; None when it may be pulled.

        Of the longest prefixes, such as those of a kind and of an owner, one that refuses is enough.
        Raises Forbidden when servers read its path in different ways.
        """
        covering = self._rules.covering(base)
        longest = [rule for prefix, rule in covering if len(prefix.steps) == len(covering[0][0].steps)]
        return next((rule.by for rule in longest if not rule.is_allowed), None)

    def allows_host(self, base: str) -> bool:
        """Whether a rule allows `base` by more than its scheme."""
        return any(rule.is_allowed for prefix, rule in self._rules.covering(base) if prefix.steps)

    def check_request(self, url: SplitResult) -> None:
        """Raises Forbidden for a URL, of a request or a redirect, that an entry refuses.

        Entries of a scheme alone (`https://`) do not count here. They are about refs: an allowed source may
        keep its files on any host.
        """
        if self._are_none:
            return
        covering = self._rules.covering(url.geturl().partition("?")[0])
        rule = next((rule for prefix, rule in covering if prefix.steps), None)
        if rule and not rule.is_allowed:
            raise Forbidden(
                f"{url.scheme}://{url.netloc} is refused by the entry {rule.by} of sources",
                code="source_refused",
                hint="the source keeps its files there; allow that prefix if it should be used",
            )


NO_VERDICTS = Verdicts({})
