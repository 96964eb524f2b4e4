"""purify: the recipe, short enough to be read as the paper's algorithm; each step is a module of its own."""

from __future__ import annotations

import hashlib
import time
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cbpt_guard.defense.accuracy import check_accuracy, clean_accuracy
from cbpt_guard.defense.data import split
from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import FoundTrigger, TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, TriggerTest
from cbpt_guard.defense.inversion import Answering
from cbpt_guard.defense.job import Job, Prepared, check_places, prepare
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.observed import Observed, observe
from cbpt_guard.defense.progress import Progress, silent
from cbpt_guard.defense.prompts import ClassPrompts
from cbpt_guard.defense.result import Outcome, write_result
from cbpt_guard.defense.reuse import adopt
from cbpt_guard.defense.run import OURS, PurifyRun
from cbpt_guard.defense.search import Search, searching
from cbpt_guard.defense.settings import TEMPLATE, Settings
from cbpt_guard.defense.stage2 import guard, least_accuracy
from cbpt_guard.defense.suspect import ModelFlags
from cbpt_guard.defense.together import together
from cbpt_guard.defense.tuning import FeatureSet
from cbpt_guard.defense.verdict import Attacked, judge, measure
from cbpt_guard.defense.workshop import Workshop
from cbpt_guard.errors import SetupError
from cbpt_guard.files import partial_path, staged
from cbpt_guard.metrics import exceeds


def purify(
    model: str | Path,
    data: str | Path,
    *,
    out: str | Path = "purified",
    classes: Path | None = None,
    template: str = TEMPLATE,
    shots: int | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    device: str = "cpu",
    triggered: Path | None = None,
    reuse: Path | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    force: bool = False,
    flags: ModelFlags | None = None,
    progress: Progress = silent,
) -> PurifyRun:
    """Purify a suspect's zero-shot classifier and leave a run directory.

    Args:
        model: a checkpoint file or an open_clip local-dir folder; it is read as hostile.
        data: a folder of class folders, or a CSV with the columns path and label.
        out: the run directory to make.
        classes: renames (`folder<TAB>name`) and additional class names, a UTF-8 line each.
        template: the prompt, with one {} for the class name.
        shots: at most so many images a class, drawn by the seed; None takes all.
        settings: the recipe's numbers.
        seed: of every draw; the same seed gives the same tensors on the same machine (on a GPU where torch's own
            algorithms are made deterministic, as the command line does with cuDNN's).
        device: where torch computes.
        triggered: a folder of observed attack images, if a team has some.
        reuse: a run of the same suspect whose found triggers are taken instead of inverting again.
        skip_bad: leave out images that cannot be read instead of stopping.
        resume: go on in an interrupted run's unfinished directory.
        force: replace `out` if it exists.
        flags: what the user knows of the checkpoint.
        progress: called after every step.

    Raises:
        UnsafeError: the checkpoint would run code.
        InputError: an input is missing, malformed or does not fit the others, or `out` is nothing to be replaced.
        SetupError: the output cannot be written, or another command writes it.
    """
    job = Job(
        model=Path(model),
        data=Path(data),
        classes=classes,
        template=template,
        shots=shots,
        settings=settings or Settings(),
        seed=seed,
        device=device,
        triggered=triggered,
        reuse=reuse,
        skip_bad=skip_bad,
        flags=flags or ModelFlags(),
    )
    return purify_job(job, Path(out), resume=resume, force=force, progress=progress)


def purify_job(
    job: Job, out: Path, *, resume: bool = False, force: bool = False, progress: Progress = silent
) -> PurifyRun:
    """`purify` for a job that is already put together; same arguments, same errors."""
    check_places(job, out, force)
    prepared = prepare(job, progress)  # before the folder is touched: a mistyped flag must not cost what it holds
    try:
        with staged(out, force=force, ours=OURS, resumable=True, resume=resume) as folder:
            try:
                Purification(prepared, folder, progress).run()
            except SafetensorError as error:  # how safetensors reports a full disk
                raise SetupError(f"writing {out} failed: {error}") from error
    except BaseException as error:
        if partial_path(out).exists():
            error.add_note("what was found so far is kept: the same command with `--resume` goes on")
        raise
    return PurifyRun.open(out)


class Purification:
    """One run of the recipe into its unfinished folder."""

    def __init__(self, prepared: Prepared, folder: Path, progress: Progress) -> None:
        self.prepared, self.folder, self.progress = prepared, folder, progress
        self.data, self.original = prepared.data, prepared.original
        self.clip, self.settings = prepared.suspect.clip, prepared.job.settings
        self.journal = Journal(folder, prepared.key())
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def run(self) -> None:
        """Features, stage 1, the test, stage 2, the verdict; then every file of the run directory."""
        job, settings = self.prepared.job, self.settings
        features = self.journal.tensor("features", lambda: encode(self.clip, self.data.images, progress=self.progress))
        warnings = check_accuracy(self.original, features, self.data)
        kept, held = split(self.data.labels, settings.tuning.held_out, job.seed)
        unseen = held if len(held) else kept
        observed = self._observe(features)
        self._lap("features")

        search = searching(self.prepared, features, kept, self.journal, self.progress)
        findings = self._find(search, observed)
        self._lap("stage 1: inversion")

        everything = FeatureSet(features, torch.stack(self._under_each(findings.bank)), self.data.labels)
        beside = list(zip(findings.beside, self._under_each(findings.beside, "edit"), strict=True))
        tuning_set, unseen_set = everything.part(kept), everything.part(unseen)
        edited = [(trigger.target, under[kept]) for trigger, under in beside]
        test = fit_test(
            tuning_set, findings.bank, findings.suspects, self.original, observed.fitting, settings.rule, edited
        )
        warnings += self._untested(findings, test)
        self._lap("features under found triggers")

        untuned = GuardedHead(self.original, self.original, test, self.data.classes, settings.rule.name)
        tuned = tuning_set.labels.unique()  # the classes that have images
        prompts = ClassPrompts(self.clip, list(self.data.classes), job.template, tuned, settings.tuning.chunk)
        chosen_on = unseen_set if len(held) else None
        head, epoch = guard(
            prompts, untuned, tuning_set, chosen_on, findings.bank, settings, job.seed, self.progress,
            beside=[under for _, under in edited], observed=observed.fitting,
        )  # fmt: skip
        accuracy = clean_accuracy(head.answer(unseen_set.clean).logits, unseen_set.labels)
        keeps_accuracy = not len(held) or not exceeds(least_accuracy(self.original, unseen_set, settings), accuracy)
        self._lap("stage 2: prompts")

        attacks = [
            Attacked("beside", edit.family, edit.target, under[unseen], unseen_set.labels) for edit, under in beside
        ]
        attacks += self._attacks(search.made, findings, observed, head, unseen_set, self.data.images[unseen])
        metrics = measure(head, unseen_set.clean, unseen_set.labels, attacks, held_out=bool(len(held)))
        suspects = [self.data.classes[index] for index in findings.suspects]
        verdict = judge(metrics, suspects, settings.verdict, keeps_accuracy=keeps_accuracy)
        self._lap("verdict")

        outcome = Outcome(findings, head, epoch, metrics, verdict, warnings, kept, held)
        write_result(self.prepared, outcome, self.seconds, self.folder)
        self.journal.remove()  # last: a full disk must not cost what was found

    def _observe(self, clean: Tensor) -> Observed:
        attack = self.prepared.observed
        return observe(None if attack is None else encode(self.clip, attack.images), self.original, clean)

    def _find(self, search: Search, observed: Observed) -> Findings:
        reused = self.prepared.reused
        return search.run(observed.targets) if reused is None else adopt(reused, search, observed.targets)

    def _untested(self, findings: Findings, test: TriggerTest) -> tuple[str, ...]:
        """Of suspected classes that the rule cannot tell images of."""
        untested = [self.data.classes[t] for t in findings.suspects if not test.thresholds[t].isfinite()]
        return tuple(
            f"no test could be fitted for the suspected {name!r}: fewer than two images tuned on answer it under its "
            "found triggers"
            for name in untested
        )

    def _under_each(self, bank: TriggerBank, called: str = "trigger") -> list[Tensor]:
        """Features (N, E) of all images under each trigger."""
        works = [partial(self._under, k, trigger, called) for k, trigger in enumerate(bank)]
        return together(works, self.progress, self.clip.device)

    def _under(self, number: int, trigger: FoundTrigger, called: str, progress: Progress) -> Tensor:
        stage = f"features under {called} {number + 1}"
        # by the pattern: a trigger that is just worth keeping may fail to be on another number of cores
        pattern = hashlib.sha256(trigger.pattern.contiguous().numpy().data).hexdigest()[:8]
        return self.journal.tensor(
            f"triggered-{number}-{pattern}",
            lambda: encode(self.clip, self.data.images, trigger, stage=stage, progress=progress),
        )

    def _attacks(
        self,
        made: Workshop,
        findings: Findings,
        observed: Observed,
        head: GuardedHead,
        unseen: FeatureSet,
        images: Tensor,
    ) -> list[Attacked]:
        """What the guard is judged under beside common edits: the bank, fresh inversions, and observed images."""
        attacks = [
            Attacked("found", trigger.family, trigger.target, features, unseen.labels)
            for trigger, features in zip(findings.bank, unseen.triggered, strict=True)
        ]
        budgets = findings.budgets(self.settings.inversion.stands_out)
        heads: tuple[tuple[str, Answering], ...] = (("guarded", head), ("original", head.original))
        masked = [(t, name, one, area) for t, area in budgets.items() for name, one in heads]
        raised = [(t, name, one) for t in findings.raised for name, one in heads]
        against = [name for _, name, *_ in masked] + [name for _, name, _ in raised]
        fresh = [*made.fresh(masked, findings.bank), *made.fresh_raised(raised, findings.bank)]
        for name, trigger in zip(against, fresh, strict=True):
            features = encode(self.clip, images, trigger)
            attacks.append(Attacked("fresh", trigger.family, trigger.target, features, unseen.labels, against=name))
        for trigger in [*made.fresh_waves(findings.bank), *made.fresh_edits(findings.bank)]:
            features = encode(self.clip, images, trigger)
            attacks.append(Attacked("fresh", trigger.family, trigger.target, features, unseen.labels))
        attacks += [Attacked("observed", "unknown", target, part, None) for target, part in observed.judging.items()]
        return attacks

    def _lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._started = round(now - self._started, 2), now
