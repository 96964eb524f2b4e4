"""What a run leaves: every file of the run directory, out of one frozen outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from cbpt_guard import __version__
from cbpt_guard.defense import run as files
from cbpt_guard.defense.calibration import SEARCH
from cbpt_guard.defense.findings import Findings
from cbpt_guard.defense.head import GuardedHead
from cbpt_guard.defense.job import Prepared, tool_versions
from cbpt_guard.defense.pictures import draw
from cbpt_guard.defense.prompts import save_contexts
from cbpt_guard.defense.record import DataRecord, RunMetrics, RunRecord, Verdict
from cbpt_guard.defense.tuning import Epoch
from cbpt_guard.files import write_text
from cbpt_guard.manifest import Suspect

_SAMPLES = 1000


@dataclass(frozen=True)
class Outcome:
    """Everything that a run found; `kept` and `held` index the images tuned on and held out."""

    findings: Findings
    head: GuardedHead
    epoch: Epoch
    metrics: RunMetrics
    verdict: Verdict
    warnings: tuple[str, ...]
    kept: Tensor
    held: Tensor

    @property
    def unseen(self) -> Tensor:
        """The images to measure on: those held out, or where there are none those tuned on."""
        return self.held if len(self.held) else self.kept


def write_result(prepared: Prepared, outcome: Outcome, seconds: Mapping[str, float], folder: Path) -> None:
    """Write the run directory's files; `seconds` is the time of each stage."""
    save_file({name: tensor.contiguous() for name, tensor in prepared.suspect.tensors.items()}, folder / files.MODEL)
    samples = outcome.unseen[:: -(-len(outcome.unseen) // _SAMPLES)]
    images, labels = prepared.data.images[samples].numpy(), prepared.data.labels[samples].numpy()
    np.savez(folder / files.SAMPLES, images=images, labels=labels)
    save_contexts(folder / files.PROMPTS, outcome.epoch.contexts, prepared.job.template)
    outcome.head.save(folder / files.HEADS)
    outcome.findings.bank.save(folder / files.TRIGGERS)
    outcome.findings.beside.save(folder / files.BESIDE)
    draw(outcome.findings.bank, prepared.suspect.clip.image_size, folder / files.PICTURES)
    write_text(folder / files.METRICS, outcome.metrics.model_dump_json(indent=1))
    write_text(folder / files.RECORD, _record(prepared, outcome, seconds).model_dump_json(indent=1))


def _record(prepared: Prepared, outcome: Outcome, seconds: Mapping[str, float]) -> RunRecord:
    job, head = prepared.job, outcome.head
    thresholds = head.test.thresholds.tolist()
    return RunRecord(
        cbpt_guard=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=job.seed,
        template=job.template,
        rule=head.rule,
        settings=job.settings.model_dump(mode="json"),
        model=prepared.suspect.record,
        data=_data(prepared, outcome),
        search=SEARCH if prepared.reused is None else prepared.reused.record.search,
        candidates=outcome.findings.candidates,
        suspects=tuple(Suspect(label=head.classes[i], index=i, threshold=thresholds[i]) for i in head.suspects),
        verdict=outcome.verdict,
        warnings=outcome.warnings,
        epoch=outcome.epoch.number,
        seconds=dict(seconds),
        versions=tool_versions(),
    )


def _data(prepared: Prepared, outcome: Outcome) -> DataRecord:
    data = prepared.data
    shots = data.labels[outcome.kept].bincount(minlength=len(data.classes)).tolist()
    by_class = dict(zip(data.classes, shots, strict=True))
    return DataRecord(
        shots=by_class,
        held_out=len(outcome.held),
        without_images=tuple(name for name, count in by_class.items() if not count),
        skipped=prepared.skipped,
        triggered_images=0 if prepared.observed is None else len(prepared.observed.images),
    )
