"""CBPT, by either rule: one purified run of the suspect, and the same run as the paper's rule answers."""

from __future__ import annotations

import shutil
from functools import partial

from cbpt_guard.bench.settings import CBPT
from cbpt_guard.bench.task import Defended, Task
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.defense.purify import purify
from cbpt_guard.defense.record import RunMetrics, RunRecord
from cbpt_guard.defense.run import HEADS, METRICS, RECORD, PurifyRun
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.stage2 import still_kept
from cbpt_guard.defense.verdict import judge
from cbpt_guard.errors import CheckError
from cbpt_guard.files import staged, write_text
from cbpt_guard.metrics import exceeds


def cbpt(task: Task, settings: Settings = CBPT) -> Defended:
    """CBPT with the switch."""
    return _defended(task, purified_run(task, settings))


def cbpt_prompts(task: Task, settings: Settings = CBPT) -> Defended:
    """CBPT as the paper has it, every image answered from the tuned prompts; of the same run as `cbpt`."""
    return _defended(task, _by_prompts(task, purified_run(task, settings)))


def purified_run(task: Task, settings: Settings) -> PurifyRun:
    """The task's run, made by whichever defence comes first; a run of another search lies elsewhere.

    Raises:
        CheckError: the folder holds a run of other settings, whose numbers would pass for its.
    """
    path = task.folder / f"purified-{SEARCH}"
    make = partial(
        purify,
        task.checkpoint,
        task.listing,
        out=path,
        template=task.template,
        settings=settings,
        seed=task.seed,
        device=str(task.clip.device),
        progress=task.progress,
    )
    task.clock.once(path, make)
    run = PurifyRun.open(path)
    if run.record.settings != settings.model_dump(mode="json"):
        raise CheckError(f"{path} was made with other settings; remove {task.folder}")
    return run


def _by_prompts(task: Task, run: PurifyRun) -> PurifyRun:
    """A copy of the run whose stored rule is `prompts`, with what the run measured of the prompts and its verdict.

    The run's fresh triggers are judged as they are: none was made against the prompts.

    Raises:
        CheckError: the folder holds a copy of another run.
    """
    path = run.path.with_name(f"{run.path.name}.prompts")
    if not path.exists():
        with staged(path) as folder:
            shutil.copytree(run.path, folder, dirs_exist_ok=True)
            run.head().with_rule("prompts").save(folder / HEADS)
            metrics = _after_prompts(run.metrics)
            write_text(folder / METRICS, metrics.model_dump_json(indent=1))
            write_text(folder / RECORD, _record(run.record, metrics).model_dump_json(indent=1))
    copy = PurifyRun.open(path)
    if copy.record.created != run.record.created:
        raise CheckError(f"{path} is of another run than {run.path}; remove {task.folder}")
    return copy


def _after_prompts(metrics: RunMetrics) -> RunMetrics:
    """What the run measured of the prompts, as what comes after."""
    triggers = (
        one.model_copy(update={f"{what}_after": getattr(one, f"{what}_prompts") for what in ("asr", "pa", "max_share")})
        for one in metrics.triggers
    )
    classes = (one.model_copy(update={"after": one.after_prompts}) for one in metrics.classes)
    changed = {"clean_accuracy_after": metrics.clean_accuracy_prompts, "triggers": tuple(triggers)}
    return metrics.model_copy(update=changed | {"classes": tuple(classes)})


def _record(record: RunRecord, metrics: RunMetrics) -> RunRecord:
    settings = Settings.model_validate(record.settings)
    rule = settings.rule.model_copy(update={"name": "prompts"})
    least = still_kept(metrics.clean_accuracy_before, metrics.images, settings)
    keeps = not metrics.held_out or not exceeds(least, metrics.clean_accuracy_after)
    verdict = judge(metrics, _suspected(record), settings.verdict, keeps_accuracy=keeps)
    stored = settings.model_copy(update={"rule": rule}).model_dump(mode="json")
    return record.model_copy(update={"rule": "prompts", "settings": stored, "verdict": verdict})


def _defended(task: Task, run: PurifyRun) -> Defended:
    head: GuardedHead = run.head()
    if head.classes != task.shots.classes:
        raise CheckError(
            f"{run.path} has other classes than the task: {head.classes[:3]}, not {task.shots.classes[:3]}"
        )
    record = run.record
    return Defended(
        clip=task.clip,
        answer=head.answer,
        verdict=record.verdict.name,
        run=run.path,
        warnings=record.warnings,
        suspects=_suspected(record),
        search=record.search,
        chosen={"epoch": record.epoch},
    )


def _suspected(record: RunRecord) -> tuple[str, ...]:
    return tuple(candidate.label for candidate in record.candidates if candidate.stands_out)
