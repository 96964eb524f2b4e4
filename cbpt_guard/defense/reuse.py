"""The triggers of an earlier run, read for another class list instead of being inverted anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.search import Search
from cbpt_guard.errors import InputError


def adopt(run: PurifyRun, search: Search, observed: Sequence[int]) -> Findings:
    """The findings of an earlier run of the same suspect, read for another class list.

    A stored trigger's target is the class that most images answer under it now; a suspect of the earlier run
    stays one, whatever its class is called here.
    """
    suspected = {candidate.index for candidate in run.record.candidates if candidate.stands_out}
    triggers, candidates = [], {}
    for trigger in run.bank():
        share = search.shares(trigger)
        target = int(share.argmax())
        triggers.append(replace(trigger, target=target))
        if trigger.target in suspected:
            earlier = next(item for item in run.record.candidates if item.index == trigger.target)
            candidates[target] = earlier.model_copy(
                update={
                    "label": search.classes[target],
                    "index": target,
                    "share": float(share[target]),
                    "share_clean": float(search.shares(None)[target]),
                }
            )
    known = Findings(TriggerBank(tuple(triggers)), tuple(candidates.values()))
    missing = [target for target in observed if target not in known.suspects]
    if not missing:
        return known
    raise InputError(
        f"the observed attack images answer {search.classes[missing[0]]!r}, toward which the earlier run found no "
        "trigger; run without `--reuse`"
    )
