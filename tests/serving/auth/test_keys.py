"""Keys: parsing, identification, reload; and checks of the address to listen on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from scalp_core.errors import UserError
from serving.admission.rate_limit import TokenBuckets
from serving.auth import keys as keys_module
from serving.auth.keys import Keys, KeySettings, new_key, parse_keys
from serving.auth.network import check_address
from serving.auth.scopes import Rights

ANN = "a-key-of-ann-that-is-long-enough"
BEN = "a-key-of-ben-that-is-long-enough"


def write(path: Path, text: str, mode: int = 0o600) -> KeySettings:
    path.write_text(text)
    path.chmod(mode)
    return KeySettings(file=str(path))


def who(keys: Keys, authorization: str | None) -> str | None:
    key = keys.identify(authorization)
    return key and key.id


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_file_holds_keys_plain_and_hashed(tmp_path):
    hashed = hashlib.sha256(BEN.encode()).hexdigest()
    keys = Keys(write(tmp_path / "keys", f"# of the clinic\n\nann: {ANN}\nben sha256:{hashed}\n"))
    assert who(keys, bearer(ANN)) == "ann"
    assert who(keys, f"bearer  {BEN} ") == "ben"
    for wrong in (None, "", ANN, bearer(""), bearer(ANN[:-1]), bearer(hashed), f"Basic {ANN}", bearer("ö")):
        assert who(keys, wrong) is None


def test_keys_of_the_environment_count_too(tmp_path, monkeypatch):
    assert not Keys(KeySettings())
    monkeypatch.setenv("SCALP_KEYS", f"ben: {BEN}")
    assert who(Keys(KeySettings()), bearer(BEN)) == "ben"
    both = Keys(write(tmp_path / "keys", f"ann {ANN}"))
    assert (who(both, bearer(ANN)), who(both, bearer(BEN))) == ("ann", "ben")


def test_a_key_that_is_made_is_let_in_by_its_line(tmp_path):
    key, line = new_key("clinic-7")
    assert key not in line and len(key) > 40
    assert new_key("clinic-7")[0] != key
    assert who(Keys(write(tmp_path / "keys", line)), bearer(key)) == "clinic-7"
    with pytest.raises(UserError, match="is not a valid id"):
        new_key("two words")


def test_an_id_may_have_two_keys_and_a_key_one_id():
    assert [key.id for key in parse_keys([f"ann: {ANN}", f"ann: {BEN}"], "x")] == ["ann", "ann"]
    with pytest.raises(UserError, match="line 2 of x has the key of ann"):
        parse_keys([f"ann: {ANN}", f"ben: {ANN}"], "x")


def test_two_keys_of_an_id_do_not_read_and_decide():
    with pytest.raises(
        UserError, match="line 2 of x is a second key of ann, which would both read and decide"
    ):
        parse_keys([f"ann: {ANN} scope=review", f"ann: {BEN} scope=adjudicate scope=grade"], "x")
    assert (
        len(
            parse_keys(
                [
                    f"ann: {ANN} scope=review",
                    f"ann: {BEN} scope=review",
                    "cleo: a-key-of-cleo-that-is-long-enough",
                ],
                "x",
            )
        )
        == 3
    )


@pytest.mark.parametrize(
    "line", ["just-one-word", "ann: guess-me", "ann: sha256:abc", f"a b {ANN}", f"é: {ANN}"]
)
def test_a_bad_line_is_named_and_not_shown(line):
    with pytest.raises(UserError, match=r"line 3 of keys\.txt") as refusal:
        parse_keys(["# keys", f"ben: {BEN}", line], "keys.txt")
    assert line.split()[-1] not in str(refusal.value) and BEN not in str(refusal.value)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o602])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    settings = write(tmp_path / "keys", f"ann: {ANN}", mode)
    with pytest.raises(UserError, match=f"chmod 600 {tmp_path}/keys"):
        Keys(settings)


def test_a_file_that_kubernetes_mounts_is_read(tmp_path, monkeypatch):
    settings = write(tmp_path / "keys", f"ann: {ANN}", 0o440)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert who(Keys(settings), bearer(ANN)) == "ann"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read keys from .*: it does not exist; check"):
        Keys(KeySettings(file=str(tmp_path / "none")))


def test_a_key_that_is_taken_back_stops_without_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(keys_module, "_RELOAD_S", 0)
    path = tmp_path / "keys"
    keys = Keys(write(path, f"ann: {ANN}\nben: {BEN}"))
    assert who(keys, bearer(ANN)) == "ann"
    write(path, f"ben: {BEN}")
    assert who(keys, bearer(ANN)) is None
    write(path, f"ann: {ANN}", 0o644)  # a mistake changes nothing
    assert who(keys, bearer(BEN)) == "ben"
    write(path, "")
    assert keys and who(keys, bearer(BEN)) is None  # no key at all lets nobody in


def test_a_deleted_file_lets_nobody_in(tmp_path, monkeypatch):
    monkeypatch.setattr(keys_module, "_RELOAD_S", 0)
    path = tmp_path / "keys"
    keys = Keys(write(path, f"ann: {ANN}"))
    path.unlink()
    assert keys and who(keys, bearer(ANN)) is None
    write(path, f"ann: {ANN}")
    assert who(keys, bearer(ANN)) == "ann"


def test_of_a_key_in_both_places_the_files_id_holds(tmp_path, monkeypatch):
    """All keys are compared, so that the duration reveals nothing; those of the file come last."""
    monkeypatch.setenv("SCALP_KEYS", f"ann: {ANN}")
    assert who(Keys(write(tmp_path / "keys", f"ben: {ANN}\ncleo: {BEN}")), bearer(ANN)) == "ben"


def test_tokens_come_back_evenly():
    buckets = TokenBuckets(per_minute=30, burst=2)
    assert [buckets.take("ann", 0.0) for _ in range(3)] == [0, 0, 2]
    assert buckets.take("ben", 0.0) == 0  # has its own
    assert buckets.take("ann", 0.5) == pytest.approx(1.5)
    assert buckets.take("ann", 2.0) == 0
    assert buckets.take("ann", 2.0) > 0
    assert [buckets.take("ann", 1000.0) for _ in range(3)] == [0, 0, 2]  # a bucket holds no more than a burst


def test_addresses_without_end_take_no_memory_without_end():
    buckets = TokenBuckets(per_minute=1, burst=1)
    for number in range(20_000):
        buckets.take(str(number), 0.0)
    assert len(buckets._buckets) == 10_000


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com", "::ffff:8.8.8.8"])  # noqa: S104
def test_the_network_needs_keys_or_a_word(tmp_path, host):
    nobody = Keys(KeySettings())
    with pytest.raises(UserError, match="open to the network") as refusal:
        check_address(host, nobody, open_to_network=False)
    assert "\n" not in str(refusal.value)
    check_address(host, nobody, open_to_network=True)
    check_address(host, Keys(write(tmp_path / "keys", f"ann: {ANN}")), open_to_network=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_none(host):
    check_address(host, Keys(KeySettings()), open_to_network=False)


def test_a_key_cannot_read_and_decide():
    with pytest.raises(ValueError, match="so it cannot review; use two keys"):
        Rights.parse(["review", "adjudicate"])
    assert Rights.parse(["adjudicate", "grade"]).scopes == ["grade", "adjudicate"]
