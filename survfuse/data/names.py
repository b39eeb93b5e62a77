"""Error text for a name that is not known: what it was and what it probably should have been."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def unknown_name(kind: str, name: str, valid: Iterable[str], *, where: str = "") -> str:
    """The message for `name`, with the nearest valid name where one is near.

    Args:
        kind: what the name should have been, for example "column".
        name: the name that was given.
        valid: the names that exist.
        where: what was searched, for example a file name.

    Example:
        >>> unknown_name("column", "survival_month", ["case_id", "survival_months"])
        "unknown column 'survival_month'; did you mean 'survival_months'?"
    """
    valid = [str(item) for item in valid]
    place = f" in {where}" if where else ""
    # a folded comparison finds "Age" for "age", which difflib rates low on short names
    folded = {item.casefold(): item for item in reversed(valid)}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"unknown {kind} {name!r}{place}; did you mean {folded[near[0]]!r}?"
    return f"unknown {kind} {name!r}{place}; it must be one of {shorten(valid)}"


def shorten(items: Sequence[object], limit: int = 8) -> str:
    """The first `limit` items, comma separated, and how many more there are.

    Example:
        >>> shorten(["a", "b", "c"], limit=2)
        "'a', 'b' and 1 more"
    """
    items = list(items)
    if not items:
        return "(nothing)"
    shown = ", ".join(repr(str(item)) for item in items[:limit])
    more = len(items) - limit
    return f"{shown} and {more} more" if more > 0 else shown
