"""Files of who is who: secrets are their owner's alone and never overwritten, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from privfm.checks import InvalidArgument
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses.channels.identities import public_identity
from privfm.defenses.channels.identity_files import Pinned, make_secrets, read_public, read_secrets, write_public

PARTIES = (SERVER, KEY_HOLDER, 0, 7)


def test_who_has_the_secrets_is_whom_others_pin(tmp_path: Path) -> None:
    public = make_secrets(tmp_path / "own.json", PARTIES)
    write_public(tmp_path / "public.json", public)
    own, pinned = read_secrets(tmp_path / "own.json"), Pinned(tmp_path / "public.json")
    assert own.keys() == set(PARTIES)
    assert {party: public_identity(identity) for party, identity in own.items()} == public
    assert {party: pinned(party) for party in PARTIES} == public
    assert len({identity.secret for identity in own.values()}) == len(PARTIES)


def test_the_public_file_holds_no_secret(tmp_path: Path) -> None:
    public = make_secrets(tmp_path / "own.json", PARTIES)
    write_public(tmp_path / "public.json", public)
    secrets = [identity.secret.hex() for identity in read_secrets(tmp_path / "own.json").values()]
    text = (tmp_path / "public.json").read_text()
    assert all(secret in (tmp_path / "own.json").read_text() for secret in secrets)
    assert not any(secret in text for secret in secrets)


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    make_secrets(path, PARTIES)
    assert path.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(InvalidArgument, match="chmod 600"):
            read_secrets(path)
    path.chmod(0o400)
    assert read_secrets(path).keys() == set(PARTIES)


def test_an_identity_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    make_secrets(path, PARTIES)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="is there already"):
        make_secrets(path, PARTIES)
    assert path.read_bytes() == before
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere.json")  # nor written through somebody's link
    with pytest.raises(InvalidArgument, match="is there already"):
        make_secrets(tmp_path / "link.json", PARTIES)
    assert not (tmp_path / "elsewhere.json").exists()


WRONG = {
    "empty": "",
    "a list": "[]",
    "not text": '{"0": 5}',
    "not hexadecimal": '{"0": "xyz"}',
    "no number": '{"a": "00"}',
    "too short": json.dumps({"0": "00" * 16}),
    "too long": json.dumps({"0": "00" * 65}),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_other_content_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match=r"wrong\.json"):
        read_secrets(path)
    with pytest.raises(InvalidArgument, match=r"wrong\.json"):
        Pinned(path)


def test_a_public_file_holds_no_identities_of_ones_own(tmp_path: Path) -> None:
    """Nor the other way round: the two are of different lengths."""
    write_public(tmp_path / "public.json", make_secrets(tmp_path / "own.json", PARTIES))
    (tmp_path / "public.json").chmod(0o600)
    with pytest.raises(InvalidArgument, match=r"public\.json"):
        read_secrets(tmp_path / "public.json")
    with pytest.raises(InvalidArgument, match=r"own\.json"):
        Pinned(tmp_path / "own.json")


def test_a_file_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"none\.json"):
        read_secrets(tmp_path / "none.json")
    with pytest.raises(InvalidArgument, match=r"none\.json"):
        Pinned(tmp_path / "none.json")


def test_a_party_that_nobody_pins_is_nobody(tmp_path: Path) -> None:
    write_public(tmp_path / "public.json", make_secrets(tmp_path / "own.json", [0]))
    with pytest.raises(InvalidArgument, match="pins no party 1"):
        Pinned(tmp_path / "public.json")(1)


def test_the_files_of_a_folder_are_one_list_and_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "public"
    folder.mkdir()
    with pytest.raises(InvalidArgument, match="no public identities"):
        read_public(folder)
    public = make_secrets(tmp_path / "own.json", PARTIES)
    write_public(folder / "some.json", {party: public[party] for party in (SERVER, 0)})
    write_public(str(folder / "others.json"), {party: public[party] for party in (KEY_HOLDER, 0, 7)})
    assert read_public(folder) == public
    write_public(folder / "third.json", make_secrets(str(tmp_path / "false.json"), [7]))
    with pytest.raises(InvalidArgument, match="two identities of party 7"):
        read_public(folder)
