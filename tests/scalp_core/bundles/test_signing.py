"""Signed promotions: what `models://NAME` accepts and refuses."""

import base64
import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from jobs import doctor
from jobs.models.driver import promote, rollback
from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.registry import open_registry, resolve
from scalp_core.errors import UserError


def write_key(path, key=None):
    """Write a private key, and its public key to `path`.pub, as `ssh-keygen` does."""
    key = key or Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    path.with_suffix(".pub").write_text(f"{public} kim@clinic\n")
    return str(path)


def set_passphrase(path):
    """Change the header of a private key to that of one with a passphrase; writing one needs bcrypt."""
    first, *lines, last = path.read_text().splitlines()
    magic, plain = b"openssh-key-v1\0", _text(b"none") * 2 + _text(b"")
    content = base64.b64decode("".join(lines)).removeprefix(magic + plain)
    locked = _text(b"aes256-ctr") + _text(b"bcrypt") + _text(_text(bytes(16)) + struct.pack(">I", 16))
    public = 8 + struct.unpack(">I", content[4:8])[0]
    content = content[:public] + _text(bytes(160))
    path.write_text("\n".join([first, base64.b64encode(magic + locked + content).decode(), last, ""]))


def _text(data):
    return struct.pack(">I", len(data)) + data


@pytest.fixture
def store(bundle, make_bundle, tmp_path, monkeypatch):
    """A registry with two versions, of which the first is promoted without a signature."""
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))
    store = open_registry()
    store.add(str(bundle), "scalp")
    store.add(str(make_bundle(tmp_path / "other", seed=1)), "scalp")
    store.promote("scalp", 1)
    return store


@pytest.fixture
def key(tmp_path, monkeypatch):
    """A private key, whose public key is the only signer."""
    path = write_key(tmp_path / "release")
    signers = tmp_path / "signers"
    signers.write_text("# who may promote\n\n" + (tmp_path / "release.pub").read_text())
    monkeypatch.setenv(signing.ENVIRONMENT, str(signers))
    return path


def test_an_unsigned_promotion_is_refused_and_signing_it_keeps_its_evidence(store, key):
    with pytest.raises(
        UserError, match=r"version 1 by \S+, is not signed, and SCALP_SIGNERS is set; if it is yours, promote"
    ):
        resolve("models://scalp")
    assert resolve("models://scalp@1") == store.uri("scalp", 1)  # names a version, not a promotion
    before = store.current("scalp")
    promote("scalp@1", key=key)
    assert resolve("models://scalp") == store.uri("scalp", 1)
    after = store.current("scalp")
    assert (after.version, after.evidence, after.policy) == (before.version, before.evidence, before.policy)
    assert promote("scalp@1", key=key) == after  # the second time it adds nothing


def test_promotion_and_rollback_are_signed(store, key):
    promote("scalp@1", key=key)
    promote("scalp@2", untested=True, why="trial", key=key)
    assert resolve("models://scalp") == store.uri("scalp", 2)
    rollback("scalp", key=key)
    assert resolve("models://scalp") == store.uri("scalp", 1)
    assert len({entry.signature.signer for entry in store.history("scalp")[1:]}) == 1


def test_a_rollback_signs_no_promotion_of_somebody_else(store, key, monkeypatch):
    promote("scalp@1", key=key)
    with monkeypatch.context() as patch:
        patch.delenv(signing.ENVIRONMENT)
        store.promote("scalp", 2, untested=True)  # somebody else
    promote("scalp@1", untested=True, why="restore", key=key)
    with pytest.raises(UserError, match=r"000003.json, a promotion of version \d by \S+, is not signed"):
        rollback("scalp", key=key)
    assert resolve("models://scalp") == store.uri("scalp", 1)


def test_a_changed_bundle_is_not_signed_with_the_evidence_of_the_old_one(store, key):
    save_bundle(store.uri("scalp", 1), store.spec("scalp", 1).model_copy(update={"temperature": 9.0}), {})
    with pytest.raises(UserError, match="versions/1 was changed after its promotion, so the evidence"):
        promote("scalp@1", key=key)


def test_a_missing_or_unknown_key_is_refused_and_adds_nothing(store, key, tmp_path):
    with pytest.raises(UserError, match=r"promotions are signed; add --key FILE"):
        promote("scalp@2", untested=True, why="trial")
    with pytest.raises(UserError, match=r"add --key FILE"):
        rollback("scalp")
    stranger = write_key(tmp_path / "stranger")
    with pytest.raises(UserError, match=r"the key SHA256:\S+ is not in .*signers, so its signature"):
        promote("scalp@2", untested=True, why="trial", key=stranger)
    assert len(store.history("scalp")) == 1


def test_a_signature_by_a_key_that_is_no_signer_does_not_count(store, key, tmp_path, monkeypatch):
    monkeypatch.delenv(signing.ENVIRONMENT)
    promote("scalp@2", untested=True, why="trial", key=write_key(tmp_path / "stranger"))
    monkeypatch.setenv(signing.ENVIRONMENT, str(tmp_path / "signers"))
    with pytest.raises(UserError, match=r"is signed by SHA256:\S+, which is not in"):
        resolve("models://scalp")


@pytest.mark.parametrize("field", ["version", "why", "fingerprint", "previous_sha256", "when"])
def test_a_changed_entry_is_detected(store, key, field, tmp_path):
    promote("scalp@1", key=key)
    file = max((tmp_path / "models/scalp/history").iterdir())
    entry = json.loads(file.read_text())
    changed = {"version": 2, "when": "2026-01-01T00:00:00Z"}.get(field, "0" * 64)
    if field == "previous_sha256":  # the chain is checked before the signature
        changed = None
    file.write_text(json.dumps(entry | {field: changed}))
    with pytest.raises(UserError, match=r"was changed or moved after SHA256:\S+ signed it; restore"):
        resolve("models://scalp")


@pytest.mark.parametrize("value", ["é", "not base64", "", "AAAA"])
def test_a_damaged_signature_is_refused(store, key, value, tmp_path):
    promote("scalp@1", key=key)
    file = max((tmp_path / "models/scalp/history").iterdir())
    entry = json.loads(file.read_text())
    entry["signature"]["value"] = value
    file.write_text(json.dumps(entry))
    with pytest.raises(UserError, match=r"was changed or moved after SHA256:\S+ signed it; restore"):
        resolve("models://scalp")


def test_a_signed_entry_counts_only_in_its_place(bundle, make_bundle, key, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))
    store, history = open_registry(), tmp_path / "models/scalp/history"
    for name in ("scalp", "trial"):
        store.add(str(bundle), name)
    store.add(str(make_bundle(tmp_path / "other", seed=1)), "scalp")
    promote("scalp@1", key=key)
    promote("scalp@2", untested=True, why="better", key=key)
    (tmp_path / "models/trial/history").mkdir()
    copies = {"trial": tmp_path / "models/trial/history/000001.json", "scalp": history / "000003.json"}
    for name, copy in copies.items():  # of another model, and of an older promotion
        copy.write_bytes((history / "000001.json").read_bytes())
        with pytest.raises(UserError, match=r"was changed or moved after SHA256:\S+ signed it"):
            resolve(f"models://{name}")


def test_the_entry_that_is_checked_is_the_one_that_is_used(store, key, tmp_path, monkeypatch):
    """Somebody adds an unsigned promotion, and removes it between two reads of the history."""
    promote("scalp@1", key=key)
    history = tmp_path / "models/scalp/history"
    forged = json.loads((history / "000002.json").read_text())
    forged |= {"version": 2, "signature": None, "previous_sha256": None}
    forged["fingerprint"] = store.spec("scalp", 2).fingerprint
    (history / "000003.json").write_text(json.dumps(forged))
    reads = []

    def read(uri):
        data = storage_read(uri)
        if uri.endswith("000003.json"):
            reads.append(uri)
            (history / "000003.json").unlink()
        return data

    storage_read = storage.read
    monkeypatch.setattr(storage, "read", read)
    with pytest.raises(UserError, match=r"000003.json, a promotion of version \d by \S+, is not signed"):
        resolve("models://scalp")
    assert len(reads) == 1


def test_an_empty_variable_is_refused(store, monkeypatch):
    monkeypatch.setenv(signing.ENVIRONMENT, "")
    with pytest.raises(UserError, match="SCALP_SIGNERS is empty; name a file"):
        resolve("models://scalp")
    with pytest.raises(UserError, match="SCALP_SIGNERS is empty; name a file"):
        promote("scalp@2", untested=True, why="trial")


def test_a_changed_bundle_is_detected(store, key):
    promote("scalp@1", key=key)
    save_bundle(store.uri("scalp", 1), store.spec("scalp", 1).model_copy(update={"temperature": 9.0}), {})
    with pytest.raises(UserError, match=r"versions/1 was changed after its promotion was signed; restore"):
        resolve("models://scalp")


def test_a_signature_counts_in_a_later_version_whose_contract_has_more_fields(store, key, monkeypatch):
    promote("scalp@1", key=key)
    monkeypatch.setattr(BundleSpec, "fingerprint", property(lambda _: "of more fields"))
    assert resolve("models://scalp") == store.uri("scalp", 1)


def test_the_doctor_names_a_promotion_that_is_not_signed(store, key):
    with pytest.raises(UserError, match="000001.json, a promotion of version 1 by"):
        doctor._check_models()
    promote("scalp@1", key=key)
    assert doctor._check_models() == f"{store.root} has scalp; each promoted version is signed"


def test_keys_that_cannot_sign_are_refused(store, tmp_path):
    secret = write_key(tmp_path / "secret")
    set_passphrase(tmp_path / "secret")
    rsa = write_key(tmp_path / "rsa", generate_private_key(65537, 2048))
    (tmp_path / "text").write_text("not a key")
    for path, message in {
        secret: "has a passphrase; use a key for signing without one",
        rsa: "is not a private Ed25519 key of OpenSSH; make one with ssh-keygen",
        str(tmp_path / "text"): "is not a private Ed25519 key of OpenSSH; make one with ssh-keygen",
        str(tmp_path / "missing"): r"cannot be read \(No such file or directory\); make one with ssh-keygen",
    }.items():
        with pytest.raises(UserError, match=message):
            promote("scalp@2", untested=True, why="trial", key=path)
    assert len(store.history("scalp")) == 1


def test_a_line_that_is_no_public_key_is_named(store, key, tmp_path):
    with (tmp_path / "signers").open("a") as file:
        file.write("ssh-ed25519 AAAA kim\n")
    with pytest.raises(UserError, match=r"line 4 of .*signers \(SCALP_SIGNERS\) is not a public Ed25519 key"):
        resolve("models://scalp")
