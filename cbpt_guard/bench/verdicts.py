"""The guard's verdicts against the truth: what it said of its runs, and how those came out."""

from __future__ import annotations

from collections.abc import Sequence

from cbpt_guard.bench.lines import CONTROL, OFF, Line
from cbpt_guard.bench.table import OURS, joined
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.settings import VerdictSettings
from cbpt_guard.metrics import exceeds

SUCCESS_ASR, SUCCESS_LOSS = 0.05, 0.02
"""A run is a true success where no trigger succeeds more often, and no more of the clean accuracy is lost."""
_BOUNDS = VerdictSettings()


def verdicts(lines: Sequence[Line], defense: str = OURS) -> str:
    """Markdown: how often CBPT's verdict was said of runs that succeeded and of runs that did not.

    Below: what guarded runs break that few held-out images do not show, and suspicions where no planted trigger works.
    `defense` is CBPT by either rule.
    """
    runs = [
        line
        for line in lines
        if line.defense == defense and line.took is not False and line.attack not in (OFF, CONTROL)
    ]
    idle = [line for line in lines if line.defense == defense and (line.attack == CONTROL or line.took is False)]
    if not runs:
        return "\n\n".join(part for part in ("No run has been measured yet.", _suspicions(idle)) if part)
    good = {verdict: sum(_succeeded(run) for run in runs if run.verdict == verdict) for verdict in _said(runs)}
    all_of = {verdict: sum(run.verdict == verdict for run in runs) for verdict in good}
    head = ("verdict", "succeeded", "did not")
    rows = [joined((str(verdict), str(good[verdict]), str(all_of[verdict] - good[verdict]))) for verdict in good]
    false = [run for run in runs if run.verdict == "guarded" and run.asr_worst > SUCCESS_ASR]
    named = f" ({', '.join(dict.fromkeys(run.implant for run in false))})" if false else ""
    said = f"*guarded* was said {_times(len(false))} above an ASR of {100 * SUCCESS_ASR:g} %{named}"
    share = f", and of {good.get('guarded', 0)} of {sum(good.values())} runs that succeeded. {_of_today(runs)}"
    told = "\n".join([joined(head), joined(["---"] * len(head)), *rows, "", said + share])
    return "\n\n".join(part for part in (told, _seen_by_few(runs), _suspicions(idle)) if part)


def _of_today(runs: Sequence[Line]) -> str:
    """The same of the runs by today's search alone: what an earlier one did says little of what ships."""
    own = [run for run in runs if run.search == SEARCH]
    good = [run for run in own if _succeeded(run)]
    guarded = [run for run in own if run.verdict == "guarded"]
    false = sum(run.asr_worst > SUCCESS_ASR for run in guarded)
    kept = sum(_succeeded(run) for run in guarded)
    return (
        f"Of these {len(runs)} runs {len(own)} are by version {SEARCH} of the search, today's: there it was said "
        f"{_times(false)} above that, and of {kept} of {len(good)} that succeeded."
    )


def _suspicions(lines: Sequence[Line]) -> str:
    """In how many models in which no planted trigger works a class is suspected.

    Lines of one suspect, draw and search are of one run, however many triggers they count, on or off.
    """
    runs: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        name = f"clean {line.dataset}" if line.attack == CONTROL else line.implant
        runs.setdefault((name, line.seed, line.shots, line.search), []).append(line)
    if not runs:
        return ""
    of = f"{len(runs)} run{'s' if len(runs) > 1 else ''} on clean models and on implants that did not take"
    found = [f"{name}, {of_run[0].verdict}" for (name, *_), of_run in runs.items() if any(map(_suspects, of_run))]
    told = f"{len(found)} of {of} ({'; '.join(found)})" if found else f"none of {of}"
    today = sum(of_run[0].search == SEARCH for of_run in runs.values())
    return f"A class is suspected in {told}. By today's search are {today} of these {len(runs)}."


def _suspects(line: Line) -> bool:
    """Whether the run suspects a class.

    Lines from before they said it tell by the verdict: where nothing is suspected it is *unverified*. So it is, too,
    where too few images are held out, but no line of those is of so few shots.
    """
    return line.verdict != "unverified" if line.suspects is None else bool(line.suspects)


def _seen_by_few(runs: Sequence[Line]) -> str:
    """How many guarded runs break, on the counted images, what the verdict bounds on the few that are held out."""
    guarded = [run for run in runs if run.verdict == "guarded"]
    if not guarded:
        return ""
    flagged = [run for run in guarded if exceeds(run.flag_clean, _BOUNDS.false_alarms)]
    lost = [run for run in guarded if exceeds(_most_lost(run), _BOUNDS.recall_loss)]
    alarms, recall = 100 * _BOUNDS.false_alarms, 100 * _BOUNDS.recall_loss
    return (
        f"On the counted images {_named(flagged)} of these {len(guarded)} guarded runs flag more than {alarms:g} % of "
        f"the clean ones, and {_named(lost)} lose more than {recall:g} points of a suspected class's clean recall: "
        "what the verdict bounds, too, but on the images that are held out."
    )


def _most_lost(run: Line) -> float:
    """Of the clean recall of the targets, together or, where the line says it, of any suspected class."""
    each = [one.undefended - one.recall for one in run.suspects or ()]
    return max([run.undefended.target_recall - run.target_recall, *each])


def _named(runs: Sequence[Line]) -> str:
    names = ", ".join(dict.fromkeys(run.implant for run in runs))
    return f"{len(runs)} ({names})" if runs else "none"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _said(runs: Sequence[Line]) -> list[str | None]:
    return list(dict.fromkeys(run.verdict for run in runs))


def _succeeded(run: Line) -> bool:
    return run.asr_worst <= SUCCESS_ASR and not exceeds(run.undefended.ca - run.ca, SUCCESS_LOSS)
