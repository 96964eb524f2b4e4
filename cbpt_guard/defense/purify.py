"""purify: the recipe, short enough to be read as the paper's algorithm; each step is a module of its own."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard.defense import journal as journals
from cbpt_guard.defense import run as files
from cbpt_guard.defense.data import split
from cbpt_guard.defense.flag import fit_test
from cbpt_guard.defense.found import TriggerBank, encode
from cbpt_guard.defense.head import GuardedHead, Head
from cbpt_guard.defense.inversion import CleanSet
from cbpt_guard.defense.job import TEMPLATE, Job, Prepared, prepare, tool_versions
from cbpt_guard.defense.journal import Journal
from cbpt_guard.defense.observed import Observed, observe
from cbpt_guard.defense.pictures import draw
from cbpt_guard.defense.progress import Progress, Step, silent
from cbpt_guard.defense.prompts import ClassPrompts, save_contexts
from cbpt_guard.defense.record import DataRecord, RunMetrics, RunRecord, Verdict
from cbpt_guard.defense.run import PurifyRun
from cbpt_guard.defense.search import Findings, Search, adopt
from cbpt_guard.defense.settings import Settings
from cbpt_guard.defense.suspect import ModelFlags
from cbpt_guard.defense.tuning import Epoch, FeatureSet, choose, tune
from cbpt_guard.defense.verdict import Attacked, check_accuracy, clean_accuracy, judge, look_at, measure
from cbpt_guard.errors import SetupError
from cbpt_guard.files import staged, write_text
from cbpt_guard.manifest import Suspect

_SAMPLES = 1000


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
        seed: of every draw; the same seed gives the same tensors on the same machine.
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
        InputError: an input is missing, malformed or does not fit the others.
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
    with staged(out, force=force, resume=resume) as folder:
        prepared = prepare(job, progress)
        try:
            Purification(prepared, folder, progress).run()
        except SafetensorError as error:  # how safetensors reports a full disk
            raise SetupError(f"writing {out} failed: {error}") from error
    return PurifyRun.open(out)


class Purification:
    """One run of the recipe into its unfinished folder."""

    def __init__(self, prepared: Prepared, folder: Path, progress: Progress) -> None:
        self.job, self.data, self.original = prepared.job, prepared.data, prepared.original
        self.suspect, self.reused = prepared.suspect, prepared.reused
        self.clip, self.settings = prepared.suspect.clip, prepared.job.settings
        self.observed_images = prepared.observed
        self.folder, self.progress = folder, progress
        self.journal = Journal(folder, prepared.key())
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def run(self) -> None:
        """Features, stage 1, the test, stage 2, the verdict; then every file of the run directory."""
        features = self.journal.tensor("features", lambda: self._encode("features"))
        self.warnings = check_accuracy(self.original, features, self.data)
        kept, held = split(self.data.labels, self.settings.tuning.held_out, self.job.seed)
        observed = self._observe()
        self._lap("features")

        clean = CleanSet(self.data.images[kept], features[kept], self.data.labels[kept])
        search = Search(
            self.clip, clean, self.original, self.data.classes, self.settings.inversion, self.job.seed,
            self.journal, self.progress,
        )  # fmt: skip
        findings = (
            search.run(observed.targets)
            if self.reused is None
            else adopt(self.reused, search, observed.targets)
        )
        self._lap("stage 1: inversion")

        everything = FeatureSet(features, self._triggered(findings.bank), self.data.labels)
        tuning_set = everything.part(kept)
        unseen = everything.part(held if len(held) else kept)
        test = fit_test(
            tuning_set, findings.bank, findings.suspects, self.original, observed.fitting, self.settings.rule
        )
        self._lap("features under found triggers")

        untuned = GuardedHead(self.original, self.original, test, self.data.classes, self.settings.rule.name)
        epoch, keeps_accuracy = self._tune(untuned, tuning_set, unseen, findings.bank, choice=bool(len(held)))
        head = replace(untuned, guarded=Head(epoch.rows, self.original.scale, self.original.bias))
        self._lap("stage 2: prompts")

        attacks = self._attacks(
            findings, unseen, observed, search, head, self.data.images[held if len(held) else kept]
        )
        metrics = measure(head, unseen.clean, unseen.labels, attacks, held_out=bool(len(held)))
        suspects = [self.data.classes[index] for index in findings.suspects]
        verdict = judge(metrics, suspects, self.settings.verdict, keeps_accuracy=keeps_accuracy)
        self._lap("verdict")
        self._write(head, epoch, findings, metrics, verdict, kept, held)

    def _encode(self, stage: str) -> Tensor:
        return encode(self.clip, self.data.images, stage=stage, progress=self.progress)

    def _observe(self) -> Observed:
        images = self.observed_images
        return observe(None if images is None else encode(self.clip, images), self.original)

    def _triggered(self, bank: TriggerBank) -> Tensor:
        """Features of all images under each trigger, (K, N, E)."""
        return torch.stack(
            [
                self.journal.tensor(
                    f"triggered-{number}",
                    lambda trigger=trigger: encode(  # type: ignore[misc]
                        self.clip,
                        self.data.images,
                        trigger,
                        stage="features under triggers",
                        progress=self.progress,
                    ),
                )
                for number, trigger in enumerate(bank)
            ]
        )

    def _tune(
        self,
        untuned: GuardedHead,
        tuning_set: FeatureSet,
        unseen: FeatureSet,
        bank: TriggerBank,
        *,
        choice: bool,
    ) -> tuple[Epoch, bool]:
        """Tune, look at every epoch through the rule on unseen images, and take the one of `choose`."""
        settings, epochs = self.settings.tuning, []
        with_images = tuning_set.labels.unique()
        prompts = ClassPrompts(
            self.clip, list(self.data.classes), self.job.template, with_images, settings.chunk
        )

        def look(number: int, loss: float, rows: Tensor) -> None:
            head = replace(untuned, guarded=Head(rows, self.original.scale, self.original.bias))
            epoch = look_at(head, number, rows, prompts.state(), unseen, bank)
            epochs.append(epoch)
            self.progress(Step("prompts", number, settings.epochs, loss, epoch.found_asr))

        tune(prompts, self.original, tuning_set, settings, journals.generator(self.job.seed, "tuning"), look)
        if not choice:
            return epochs[-1], True
        before = clean_accuracy(self.original.logits(unseen.clean), unseen.labels)
        return choose(epochs, before - settings.accuracy_slack)

    def _attacks(
        self,
        findings: Findings,
        unseen: FeatureSet,
        observed: Observed,
        search: Search,
        head: GuardedHead,
        images: Tensor,
    ) -> list[Attacked]:
        """All that the guard is judged under: the bank, fresh inversions, and observed images.

        A fresh trigger may cover as much of the image as the found one: with more, any image can be painted
        over with the target, backdoor or not.
        """
        attacks = [
            Attacked("found", trigger.family, trigger.target, features, unseen.labels)
            for trigger, features in zip(findings.bank, unseen.triggered, strict=True)
        ]
        for target in findings.suspects:
            budget = min(trigger.area for trigger in findings.bank if trigger.target == target)
            for against, attacked in (("guarded", head.guarded), ("original", head.original)):
                trigger = search.fresh(target, attacked, against, budget)
                features = encode(self.clip, images, trigger)
                attacks.append(Attacked("fresh", trigger.family, target, features, unseen.labels))
        attacks += [
            Attacked("observed", "unknown", target, part, None) for target, part in observed.judging.items()
        ]
        return attacks

    def _lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._started = round(now - self._started, 2), now

    def _write(
        self,
        head: GuardedHead,
        epoch: Epoch,
        findings: Findings,
        metrics: RunMetrics,
        verdict: Verdict,
        kept: Tensor,
        held: Tensor,
    ) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.suspect.tensors.items()},
            self.folder / files.MODEL,
        )
        unseen = held if len(held) else kept
        samples = unseen[:: -(-len(unseen) // _SAMPLES)]
        np.savez(
            self.folder / files.SAMPLES,
            images=self.data.images[samples].numpy(),
            labels=self.data.labels[samples].numpy(),
        )
        save_contexts(self.folder / files.PROMPTS, epoch.contexts, self.job.template)
        head.save(self.folder / files.HEADS)
        findings.bank.save(self.folder / files.TRIGGERS)
        draw(findings.bank, self.folder / files.PICTURES)
        write_text(self.folder / files.METRICS, metrics.model_dump_json(indent=1))
        write_text(
            self.folder / files.RECORD,
            self._record(head, epoch, findings, verdict, kept, held).model_dump_json(indent=1),
        )
        shutil.rmtree(self.folder / journals.FOLDER)  # last: a full disk must not cost what was found

    def _record(
        self,
        head: GuardedHead,
        epoch: Epoch,
        findings: Findings,
        verdict: Verdict,
        kept: Tensor,
        held: Tensor,
    ) -> RunRecord:
        shots = self.data.labels[kept].bincount(minlength=len(self.data.classes)).tolist()
        by_class = dict(zip(self.data.classes, shots, strict=True))
        return RunRecord(
            cbpt_guard=version("cbpt-guard"),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=self.job.seed,
            template=self.job.template,
            rule=head.rule,
            settings=self.settings.model_dump(mode="json"),
            model=self.suspect.record,
            data=DataRecord(
                shots=by_class,
                held_out=len(held),
                without_images=tuple(name for name, count in by_class.items() if not count),
                skipped=self.data.skipped,
                triggered_images=0 if self.observed_images is None else len(self.observed_images),
            ),
            candidates=findings.candidates,
            suspects=tuple(
                Suspect(
                    label=self.data.classes[index], index=index, threshold=float(head.test.thresholds[index])
                )
                for index in head.suspects
            ),
            verdict=verdict,
            warnings=self.warnings,
            epoch=epoch.number,
            seconds=self.seconds,
            versions=tool_versions(),
        )
