"""A signed bundle: ours and the package's own command line accept each other's signatures, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import assert_refused, blocking, cli, python
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from figures import Figures

from cbpt_guard import GuardedClassifier
from cbpt_guard.bundle import open_bundle
from cbpt_guard.export import sign as signing

pytestmark = pytest.mark.trust

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()


class Pair(NamedTuple):
    private: Path
    public: Path


def write_pair(folder: Path, name: str, key: Any, how: Any = PLAIN) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    pair.private.write_bytes(key.private_bytes(PEM, PKCS8, how))
    pair.public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("keys")
    curves = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
    return {name: write_pair(folder, name, ec.generate_private_key(curve)) for name, curve in curves.items()}


def theirs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *(str(argument) for argument in arguments)]
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=120)


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "model.sig"}


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_ours_signs_and_theirs_accepts(tiny_bundle: Path, pairs: dict[str, Pair], curve: str) -> None:
    before, digest = contents(tiny_bundle), open_bundle(tiny_bundle).digest
    done = cli("sign", tiny_bundle, "--key", pairs[curve].private)
    assert (done.exit_code, done.stdout) == (0, f"{digest}\n"), done.stderr
    assert contents(tiny_bundle) == before
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["bundle"]
    assert GuardedClassifier.load(tiny_bundle, digest=digest).digest == digest
    for public, code in ((pairs[curve].public, 0), (pairs["P-384" if curve != "P-384" else "P-256"].public, 1)):
        found = theirs("verify", "key", tiny_bundle, "--signature", tiny_bundle / "model.sig", "--public_key", public)
        assert found.returncode == code, found.stderr
    ours = cli("verify", tiny_bundle, "--key", pairs[curve].public, "--json")
    assert {"name": "signature", "outcome": f"5 files signed for {pairs[curve].public}"} in json.loads(ours.stdout)[
        "checks"
    ]


@pytest.mark.parametrize("beside", [False, True])
def test_theirs_signs_and_ours_accepts(
    tiny_bundle: Path, pairs: dict[str, Pair], beside: bool, tmp_path: Path, figures: Figures
) -> None:
    """Also when their signature was written elsewhere and put into the bundle later."""
    place = tmp_path / "elsewhere.sig" if beside else tiny_bundle / "model.sig"
    done = theirs("sign", "key", tiny_bundle, "--signature", place, "--private_key", pairs["P-256"].private)
    assert done.returncode == 0, done.stderr
    if beside:
        shutil.move(place, tiny_bundle / "model.sig")
    assert cli("verify", tiny_bundle, "--key", pairs["P-256"].public).exit_code == 0
    assert_refused(cli("verify", tiny_bundle, "--key", pairs["P-384"].public), "model.sig", "Key mismatch", code=1)
    figures.add("bundle", "signatures exchanged with model_signing's own command line, each way", "accepted")


def test_a_signature_covers_every_file(tiny_bundle: Path, pairs: dict[str, Pair]) -> None:
    """One that the key's owner made over a part only, by their own tool, does not vouch for the rest."""
    public = pairs["P-256"].public
    for left_out in ("manifest.json", "README.md"):
        (tiny_bundle / "model.sig").unlink(missing_ok=True)
        arguments = ("--signature", tiny_bundle / "model.sig", "--private_key", pairs["P-256"].private)
        theirs("sign", "key", tiny_bundle, *arguments, "--ignore-paths", tiny_bundle / left_out)
        accepted = theirs("verify", "key", tiny_bundle, *arguments[:2], "--public_key", public)
        assert accepted.returncode == 0, accepted.stderr
        assert_refused(cli("verify", tiny_bundle, "--key", public), "model.sig", left_out, code=1)


def test_a_signature_of_another_bundle_or_over_other_bytes(
    tiny_bundle: Path, exported: Path, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    private, public = pairs["P-256"]
    assert cli("sign", tiny_bundle, "--key", private).exit_code == 0
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    shutil.copy(tiny_bundle / "model.sig", other)
    assert_refused(cli("verify", other, "--key", public), "model.sig", "manifest.json", code=1)
    assert cli("verify", other).exit_code == 0

    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["verdict"] = "unverified"
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert cli("verify", tiny_bundle).exit_code == 0  # nothing but a key or a digest can tell
    assert_refused(cli("verify", tiny_bundle, "--key", public), "model.sig", "manifest.json", code=1)


def broken_signatures(good: bytes) -> dict[str, bytes]:
    bundle = json.loads(good)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["subject"][0]["name"] = "another"
    forged = json.loads(good)
    forged["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    unhinted = json.loads(good)
    unhinted["verificationMaterial"]["publicKey"] = {}
    unhinted["dsseEnvelope"]["payload"] = forged["dsseEnvelope"]["payload"]
    unsigned = json.loads(good)
    unsigned["dsseEnvelope"]["signatures"] = []
    return {
        "empty": b"",
        "no JSON": b"\xff\xfe",
        "deep": b"[" * 100_000,
        "a list": b"[]",
        "cut": good[: len(good) // 2],
        "forged": json.dumps(forged).encode(),
        "forged, without its key's hash": json.dumps(unhinted).encode(),
        "unsigned": json.dumps(unsigned).encode(),
        "large": b" " * (1024**2 + 1),
    }


def test_a_missing_forged_or_malformed_signature(tiny_bundle: Path, pairs: dict[str, Pair], figures: Figures) -> None:
    private, public = pairs["P-256"]
    assert_refused(cli("verify", tiny_bundle, "--key", public), "is not signed", code=1)
    signing.sign(tiny_bundle, private)
    bad = broken_signatures((tiny_bundle / "model.sig").read_bytes())
    for name, content in bad.items():
        (tiny_bundle / "model.sig").write_bytes(content)
        result = cli("verify", tiny_bundle, "--key", public)
        assert result.exit_code == 1, name
        assert "model.sig" in result.stderr, name
        assert "Traceback" not in result.stderr, name
    figures.add("bundle", "forged or malformed signatures, each refused", len(bad))


def test_a_second_signature_replaces_the_first_by_force_only(
    tiny_bundle: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pairs["P-256"], pairs["P-384"]
    assert cli("sign", tiny_bundle, "--key", first.private).exit_code == 0
    kept = (tiny_bundle / "model.sig").read_bytes()
    assert_refused(cli("sign", tiny_bundle, "--key", second.private), "--force")
    assert (tiny_bundle / "model.sig").read_bytes() == kept

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_refused(cli("sign", tiny_bundle, "--key", second.private, "--force"), "No space left")
    assert (tiny_bundle / "model.sig").read_bytes() == kept
    assert [path.name for path in tiny_bundle.parent.iterdir()] == ["bundle"]
    assert cli("sign", tiny_bundle, "--key", second.private, "--force").exit_code == 0
    assert cli("verify", tiny_bundle, "--key", second.public).exit_code == 0


def test_only_a_whole_bundle_is_signed(tiny_bundle: Path, pairs: dict[str, Pair]) -> None:
    private = pairs["P-256"].private
    assert_refused(cli("sign", tiny_bundle, "--key", private, "--digest", "sha256:" + "0" * 64), "another", code=1)
    (tiny_bundle / "README.md").write_text("other words")
    assert_refused(cli("sign", tiny_bundle, "--key", private), "README.md", code=1)
    assert not (tiny_bundle / "model.sig").exists()


def test_keys_that_cannot_be_used(tiny_bundle: Path, pairs: dict[str, Pair], tmp_path: Path) -> None:
    locked = write_pair(
        tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"secret")
    )
    big = write_pair(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    edwards = write_pair(tmp_path, "ed25519", ed25519.Ed25519PrivateKey.generate())
    koblitz = write_pair(tmp_path, "koblitz", ec.generate_private_key(ec.SECP256K1()))
    (tmp_path / "words.pem").write_text("no key\n")
    (tmp_path / "folder.pem").mkdir()
    private = {
        "nowhere.pem": "cannot be read",
        "folder.pem": "cannot be read",
        "words.pem": "holds no key",
        locked.private.name: "has a password",
        big.private.name: "holds no key",
        edwards.private.name: "holds no key",
        koblitz.private.name: "secp256k1",
        pairs["P-256"].public: "holds no key",
    }
    for name, words in private.items():
        assert_refused(cli("sign", tiny_bundle, "--key", tmp_path / name), words)
        assert not (tiny_bundle / "model.sig").exists()
    signing.sign(tiny_bundle, pairs["P-256"].private)
    for name in ("nowhere.pem", "words.pem", big.public.name, edwards.public.name, pairs["P-256"].private):
        assert_refused(cli("verify", tiny_bundle, "--key", tmp_path / name), "key")


def test_without_the_extra_the_line_that_installs_it_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    for module in ("model_signing", "OpenSSL"):
        code = blocking(module) + "import sys\nfrom cbpt_guard.cli import main\nsys.argv[0] = 'cbpt-guard'\nmain()"
        for command in (("sign", tiny_bundle, "--key", "k.pem"), ("verify", tiny_bundle, "--key", "k.pem")):
            done = python(code, *command, cwd=tmp_path)
            assert_refused(done, module, "pip install 'cbpt-guard[sign]'")
        assert python(code, "verify", tiny_bundle, cwd=tmp_path).returncode == 0


def test_no_network_and_no_temporary_folder(
    tiny_bundle: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    signing.sign(tiny_bundle, pairs["P-256"].private)
    assert cli("verify", tiny_bundle, "--key", pairs["P-256"].public).exit_code == 0
    monkeypatch.setattr("tempfile.TemporaryDirectory", no_folder)
    assert_refused(cli("verify", tiny_bundle, "--key", pairs["P-256"].public), "TMPDIR")


def no_folder(**_: object) -> None:
    raise FileNotFoundError(2, "No usable temporary directory found")


def test_what_is_checked_is_what_was_opened(
    tiny_bundle: Path, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is given the hashes of the bytes that were read, and never reads the folder itself."""
    from model_signing._serialization import file

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the folder was read once more")

    monkeypatch.setattr(file.Serializer, "serialize", read)
    signing.sign(tiny_bundle, pairs["P-256"].private)
    opened = open_bundle(tiny_bundle)
    assert signing.check_signature(tiny_bundle, opened, pairs["P-256"].public) == 5
