"""A bundle is signed with a key, and the signature checked: OpenSSF model signing, offline, as its own CLI does."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbpt_guard.bundle import MANIFEST, SIGNATURE, OpenedBundle, open_bundle, read_signature
from cbpt_guard.errors import BundleError, InputError, SetupError

if TYPE_CHECKING:
    from model_signing.manifest import Manifest as Signed

_EXTRA = "pip install 'cbpt-guard[sign]'"
_WITHOUT = "openssl pkey -in KEY -out PLAIN_KEY"


def sign(
    path: str | os.PathLike[str], key: str | os.PathLike[str], *, digest: str | None = None, force: bool = False
) -> str:
    """Check a bundle, sign what was checked, put the signature into it as `model.sig`, and return its digest.

    Nothing else of the bundle changes, and a reader sees the old signature or the new one, never half of one.

    Args:
        path: the bundle's folder.
        key: a private key of an elliptic curve (P-256, P-384 or P-521), PEM, without a password.
        digest: "sha256:..." of the manifest.json that it must be.
        force: replace an earlier signature.

    Raises:
        BundleError: the bundle differs from its manifest.
        InputError: there is no such bundle or key, the key is of another kind, or a signature is there already.
        SetupError: the extra is missing, or the disk refuses.
    """
    api = _import("signing")
    bundle = open_bundle(path, digest)
    if read_signature(path) is not None and not force:
        raise InputError(f"{path} is signed already; pass `--force` to replace the signature")
    with _reading(key):
        signer = api.Config().use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(_opened(bundle))
    with _scratch() as file:
        signer.sign(path, file)
        _place(file.read_bytes(), Path(path))
    return bundle.digest


def check_signature(path: str | os.PathLike[str], bundle: OpenedBundle, key: str | os.PathLike[str]) -> int:
    """Hold the signature of a bundle against the very bytes that were opened; answer how many files it covers.

    Args:
        path: the bundle's folder, for its `model.sig`.
        bundle: what `open_bundle` read there.
        key: the signer's public key, PEM.

    Raises:
        BundleError: it is not signed, not by this key, or the signature covers other bytes.
        InputError: the key cannot be read or is of another kind.
        SetupError: the extra is missing, or the disk refuses.
    """
    api = _import("verifying")
    with _reading(key):
        verifier = api.Config().use_elliptic_key_verifier(public_key=key)
    verifier.set_hashing_config(_opened(bundle))
    signature = read_signature(path)
    if signature is None:
        raise BundleError(f"{path} is not signed: it has no {SIGNATURE}")
    with _scratch() as copy:
        copy.write_bytes(signature)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints warnings
                verifier.verify(path, copy)
        except Exception as error:  # malformed signatures raise anything; a wrong one raises two kinds
            reason = _reason(str(error).strip(), bundle)
            raise BundleError(f"{SIGNATURE} does not sign this bundle under {key}: {reason}") from error
    return len(bundle.manifest.files) + 1


def _reason(text: str, bundle: OpenedBundle) -> str:
    """The package's own words, or the files that it compares by their raw digests."""
    if text.startswith("Signature mismatch"):
        named = [name for name in (MANIFEST, *bundle.manifest.files) if re.search(rf"['\s]{re.escape(name)}\b", text)]
        return f"it was made over other files or bytes ({', '.join(named)})"
    return text[:300] or "it was made by another key, or changed"


def _import(name: str) -> Any:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise SetupError(f"signing needs {error.name or 'model_signing'}: {_EXTRA}") from error
    return getattr(model_signing, name)


@contextmanager
def _reading(key: str | os.PathLike[str]) -> Iterator[None]:
    """What the package and `cryptography` raise about a key, in words."""
    try:
        yield
    except OSError as error:
        raise InputError(f"the key {key} cannot be read: {error.strerror}") from error
    except TypeError as error:
        raise InputError(f"the key {key} has a password; write it without one first: {_WITHOUT}") from error
    except Exception as error:  # no PEM, no key in it, RSA (which has no curve), an unknown curve
        raise InputError(
            f"{key} holds no key that can be used here ({str(error).strip()[:200]}); it must be a PEM key of P-256, "
            "P-384 or P-521: private to sign, public to verify"
        ) from error


@contextmanager
def _scratch() -> Iterator[Path]:
    """A file that nobody else can change: the package takes no bytes."""
    try:
        with tempfile.TemporaryDirectory(prefix="cbpt-guard-") as folder:
            yield Path(folder) / SIGNATURE
    except OSError as error:
        raise SetupError(f"no temporary file can be written: {error.strerror}; set TMPDIR to another folder") from error


def _opened(bundle: OpenedBundle) -> Any:
    """For the package: what `open_bundle` hashed, in place of reading the folder once more."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    sums = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    sums[MANIFEST] = bundle.digest.removeprefix("sha256:")
    how = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    )

    class Opened(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Signed:
            """The same whatever the signature says is to be ignored, or how files are to be cut."""
            items = [how.new_item(name, Digest("sha256", bytes.fromhex(value))) for name, value in sums.items()]
            return manifest.Manifest(Path(model_path).resolve().name, items, how)

    make: Any = Opened  # the package's constructor carries no annotations
    return make()


def _place(signature: bytes, bundle: Path) -> None:
    """Written beside the bundle, for a stray file inside it would make it one that is refused."""
    folder = bundle.resolve()
    temporary = folder.parent / f".{folder.name}.{SIGNATURE}.new"
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(signature)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / SIGNATURE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SetupError(f"the signature cannot be written beside {folder}: {error.strerror}") from error
