"""The bundle's sbom.cdx.json: CycloneDX, of the model, what made it and what serving it requires."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import requires, version
from typing import Final

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

from cbpt_guard.errors import InputError
from cbpt_guard.manifest import Manifest
from cbpt_guard.session import builds_here

_SERVING: Final = "cpu"
"""The extra whose requirements are listed: `gpu` differs in the build of onnxruntime only."""


def sbom(manifest: Manifest, hashes: Mapping[str, str]) -> str:
    """The text of sbom.cdx.json; the same for the same run, to the byte.

    Args:
        manifest: the bundle's; its list of files is not read.
        hashes: sha256 of each variant's file, by the file's name.

    Raises:
        InputError: `created`, which is the run's, is no date.
    """
    bundle = _bundle(manifest)
    source = _model(manifest.model.source, manifest.model.source_sha256)
    graphs = [_model(name, hashes[name], source) for name in sorted({v.file for v in manifest.variants.values()})]
    libraries = list(_requirements())
    bom = Bom(
        serial_number=uuid.UUID(int=0),
        components=[*graphs, *libraries],
        metadata=BomMetaData(
            timestamp=_when(manifest.created),
            component=bundle,
            tools=ToolRepository(components=_tools(manifest)),
        ),
    )
    bom.register_dependency(bundle, [*graphs, *libraries])
    # a random serial number would make two exports of one run differ
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_OID, _text(bom))
    return _text(bom)


def _when(created: str) -> datetime:
    try:
        return datetime.fromisoformat(created)
    except ValueError as error:
        raise InputError(f"run.json was created at {created[:40]!r}, which is no ISO date") from error


def _text(bom: Bom) -> str:
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _bundle(manifest: Manifest) -> Component:
    said = {"verdict": manifest.verdict, "rule": manifest.rule.name, "architecture": manifest.model.architecture}
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name="guarded zero-shot classifier",
        bom_ref="bundle",
        properties=[Property(name=f"cbpt-guard:{name}", value=value) for name, value in said.items()],
    )


def _model(name: str, sha256: str, source: Component | None = None) -> Component:
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        bom_ref=f"file:{name}" if source else None,  # every variant names its source: no identifier to repeat
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        pedigree=Pedigree(ancestors=[source]) if source else None,
    )


def _tools(manifest: Manifest) -> Iterator[Component]:
    yield _library("cbpt-guard", manifest.cbpt_guard, "tool")
    for name, release in manifest.tools.items():
        if name == "python":
            yield Component(type=ComponentType.PLATFORM, name=name, version=release, bom_ref=f"tool:{name}")
        else:
            yield _library(name, release, "tool")


def _requirements() -> Iterator[Component]:
    """What `pip install cbpt-guard[cpu]` asks for: the range as a property, the version that was tested."""
    for text in requires("cbpt-guard") or ():
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": _SERVING}):
            asked = Property(name="cbpt-guard:requires", value=str(wanted.specifier))
            # whichever build of onnxruntime is installed: it is what the bundle was tested with
            found = builds_here() if wanted.name == "onnxruntime" else {wanted.name: version(wanted.name)}
            yield from (_library(name, release, "runtime", asked) for name, release in found.items())


def _library(name: str, release: str, role: str, *properties: Property) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=release,
        bom_ref=f"{role}:{name}",
        purl=PackageURL("pypi", None, name.lower().replace("_", "-"), release),
        properties=properties,
    )
