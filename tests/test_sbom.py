"""The bundle says what it is made of: an SBOM that its schema accepts and a card that a reader can act on."""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from figures import Figures
from tiny import tiny_manifest

from cbpt_guard.bundle import open_bundle
from cbpt_guard.errors import InputError
from cbpt_guard.export.sbom import sbom

pytestmark = pytest.mark.trust

REPOSITORY = Path(__file__).parents[1]
HASHES = {"model.onnx": "1" * 64, "model.int8.onnx": "2" * 64}


def problems(text: str) -> object:
    """What CycloneDX's own schema finds wrong: None when nothing is."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def named(components: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in components}


def test_the_schema_accepts_it_and_would_not_accept_another(exported: Path, figures: Figures) -> None:
    text = (exported / "sbom.cdx.json").read_text(encoding="utf-8")
    assert problems(text) is None
    assert problems(text.replace('"machine-learning-model"', '"oracle"')) is not None
    assert problems(text.replace('"CycloneDX"', '"Cyclone"')) is not None
    figures.add("bundle", "bill of materials, by CycloneDX's own schema", "valid")


def test_it_lists_the_model_its_source_what_made_it_and_what_serves_it(exported: Path) -> None:
    found, manifest = json.loads((exported / "sbom.cdx.json").read_bytes()), open_bundle(exported).manifest
    parts = named(found["components"])
    graph = parts["model.onnx"]
    assert graph["hashes"] == [
        {"alg": "SHA-256", "content": hashlib.sha256((exported / "model.onnx").read_bytes()).hexdigest()}
    ]
    (source,) = graph["pedigree"]["ancestors"]
    assert source["name"] == manifest.model.source
    assert source["hashes"] == [{"alg": "SHA-256", "content": manifest.model.source_sha256}]
    tools = named(found["metadata"]["tools"]["components"])
    assert {name: tool["version"] for name, tool in tools.items()} == {
        **manifest.tools,
        "cbpt-guard": manifest.cbpt_guard,
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    runtime = {name: part for name, part in parts.items() if part["type"] == "library"}
    assert sorted(f"{name}{part['properties'][0]['value']}" for name, part in runtime.items()) == sorted(wanted)
    assert all(part["version"] == version(name) for name, part in runtime.items())
    assert all(part["purl"] == f"pkg:pypi/{name}@{part['version']}" for name, part in runtime.items())


def test_variants_are_listed_each_with_its_file() -> None:
    manifest = tiny_manifest()
    int8 = manifest.variants["fp32"].model_copy(update={"file": "model.int8.onnx"})
    both = manifest.model_copy(update={"variants": manifest.variants | {"int8": int8}})
    text = sbom(both, HASHES)
    assert problems(text) is None
    parts = named(json.loads(text)["components"])
    assert {name: parts[name]["hashes"][0]["content"] for name in HASHES} == HASHES
    assert all(parts[name]["pedigree"]["ancestors"][0]["name"] == "tiny.pt" for name in HASHES)


def test_its_serial_number_is_its_contents() -> None:
    manifest = tiny_manifest()
    text = sbom(manifest, HASHES)
    assert text == sbom(manifest, HASHES)
    other = sbom(manifest, HASHES | {"model.onnx": "3" * 64})
    assert json.loads(text)["serialNumber"] != json.loads(other)["serialNumber"]
    assert json.loads(text)["metadata"]["timestamp"].startswith("2026-01-01T00:00:00")


@pytest.mark.parametrize("source", ['"], {\n\\', "naïve \u202e\x1b[31m.pt", "x" * 5000])
def test_a_strangers_file_name_stays_a_name(source: str) -> None:
    manifest = tiny_manifest()
    hostile = manifest.model_copy(update={"model": manifest.model.model_copy(update={"source": source})})
    text = sbom(hostile, HASHES)
    assert problems(text) is None
    (ancestor,) = named(json.loads(text)["components"])["model.onnx"]["pedigree"]["ancestors"]
    assert ancestor["name"] == source
    assert "\x1b" not in text


def test_a_run_without_a_date() -> None:
    with pytest.raises(InputError, match="no ISO date"):
        sbom(tiny_manifest().model_copy(update={"created": "yesterday"}), HASHES)


def test_both_are_listed_in_the_manifest(exported: Path) -> None:
    assert {"README.md", "sbom.cdx.json"} <= set(open_bundle(exported).manifest.files)


def test_the_card_says_what_a_reader_looks_for(exported: Path) -> None:
    manifest, card = open_bundle(exported).manifest, (exported / "README.md").read_text(encoding="utf-8")
    gate = manifest.variants["fp32"].gate
    for said in (
        manifest.model.source_sha256,
        "**Verdict: guarded.**",
        f"| clean accuracy, guarded | {100 * gate.clean_accuracy:.1f} % |",
        f"on {gate.images} held-out images",
        "## Intended use",
        "## What is not protected",
        'GuardedClassifier.load("path/to/this/folder"',
        "pip install '.[cpu]'",
        "cbpt-guard verify",
        "sbom.cdx.json",
        "licence",
    ):
        assert said in card, said
