"""What is left of the source's abilities in every model that was asked the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.abilities.shares import Share, mean_share, shares
from shearling.report.numbers import THIN, named, plural
from shearling.report.records.results import Results

NAMED = 3  # abilities in a sentence; more are counted


def by_asking(results: Results) -> list[dict[str, Abilities]]:
    """Files that may be compared, by fingerprint: same items. Those of most models come first."""
    known = {model.fingerprint for model in results.models}
    groups: dict[Hashable, dict[str, Abilities]] = {}
    for one in results.abilities:
        if one.model.fingerprint in known:
            asked = (one.asked_sha256, one.limit)
            groups.setdefault(asked, {})[one.model.fingerprint] = one
    return sorted(groups.values(), key=lambda group: -len(group))


def left_in_models(results: Results) -> dict[str, list[Share]]:
    """Fingerprint -> shares of the source's abilities, the worst first; without the source."""
    source = results.source
    for group in by_asking(results):
        if source is not None and source.fingerprint in group and len(group) > 1:
            before = group[source.fingerprint]
            left = {key: shares(before, one) for key, one in group.items() if one is not before}
            return {key: of for key, of in left.items() if of}
    return {}


def percent(share: float) -> str:
    """0.934 -> "93.4 %"."""
    return f"{100 * share:.1f}{THIN}%"


def in_a_sentence(left: Sequence[Share]) -> str:
    """ "94 % of the source's abilities are left; below 95 % are sums (81 %) and copying (93 %)"."""
    low = [share for share in left if share.low]
    head = f"{percent(mean_share(left).left)} of the source’s abilities are left on average"
    if not low:
        return f"{head}, and none is below 95{THIN}%"
    shown = [f"{share.ability} ({percent(share.left)})" for share in low[:NAMED]]
    if len(low) > NAMED:
        more = len(low) - NAMED
        shown.append(plural(more, "other") if more > 1 else "one other")
    return f"{head}; below 95{THIN}% {'is' if len(low) == 1 else 'are'} {named(shown)}"
