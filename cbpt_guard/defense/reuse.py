"""The triggers of an earlier run, read for another class list instead of being inverted anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.found import TriggerBank
from cbpt_guard.defense.record import Candidate
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.search import Search
from cbpt_guard.defense.settings import MANY
from cbpt_guard.errors import InputError


def adopt(run: PurifyRun, search: Search, observed: Sequence[int]) -> Findings:
    """The findings of an earlier run of the same suspect, read for another class list.

    All triggers that the earlier run has toward a class are now toward the one that most images answer under them. A
    suspect of the earlier run stays one, whatever its class is called here; a class that `observed` attack images
    answer is one, too, if there are triggers toward it.

    Raises:
        InputError: there are none.
    """
    bank, beside = run.bank(), run.beside()
    shares = [search.probe.shares(trigger) for trigger in bank]
    earlier = [trigger.target for trigger in bank]
    now = {
        target: int(torch.stack([own for own, c in zip(shares, earlier, strict=True) if c == target]).sum(0).argmax())
        for target in earlier
    }
    candidates = dict[int, Candidate]()
    for item in run.record.candidates:
        target = now.get(item.index)
        if target is None or not (item.stands_out or target in observed):
            continue
        if target in candidates and candidates[target].score >= item.score:
            continue
        best = max(float(own[target]) for own, c in zip(shares, earlier, strict=True) if c == item.index)
        candidates[target] = item.model_copy(
            update={
                "label": search.classes[target],
                "index": target,
                "share": best,
                "share_clean": float(search.probe.shares(None)[target]),
                "stands_out": True,
            }
        )
    missing = [target for target in observed if target not in candidates]
    if missing:
        raise InputError(
            f"the observed attack images answer {search.classes[missing[0]]!r}, toward which the earlier run found no "
            "trigger; run without `--reuse`"
        )
    kept = [edit for edit in beside if edit.target in now and len(search.classes) >= MANY]
    return Findings(
        TriggerBank(tuple(replace(trigger, target=now[trigger.target]) for trigger in bank)),
        tuple(candidates.values()),
        TriggerBank(tuple(replace(edit, target=now[edit.target]) for edit in kept)),
    )
