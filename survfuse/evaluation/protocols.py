"""Evaluation protocols by name, and what leaks in each.

A protocol whose note is not empty has the note printed in every report.
"""

from __future__ import annotations

import difflib

LEAKAGE = {
    "honest": "",
    "healnet": (
        "Splits are drawn over slides, so a patient with several slides can be in training and "
        "test; time bins and imputation use all rows, test rows included."
    ),
    "mcat": (
        "The test fold is the validation fold and the last epoch is kept; time bins use all "
        "patients, test patients included."
    ),
    "survpath": (
        "The test fold is the validation fold; time bins use training and validation patients."
    ),
}


def leakage_note(protocol: str) -> str:
    """Return what leaks under `protocol`, "" for nothing.

    Raises:
        ValueError: the protocol is not known; the message holds the nearest name.
    """
    if protocol in LEAKAGE:
        return LEAKAGE[protocol]
    near = difflib.get_close_matches(protocol, LEAKAGE, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"protocol {protocol!r} is not known; {hint}known are {', '.join(LEAKAGE)}; for another "
        "one give leakage=, a sentence saying what leaks, or an empty one if nothing does"
    )
