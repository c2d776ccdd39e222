"""What parties keep for themselves is nowhere in what a run leaves behind: files, prints, logs, names, pickles."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privfm.contracts import Channel, Identity
from privfm.defenses import FixedPoint, Mean
from privfm.defenses.channels import BFV, CKKS, PairwiseMasks, Plaintext, Selective
from privfm.engines import local
from privfm.experiment import ArmSpec, RunConfig, play_run
from privfm.federation import Average, FixedSize
from privfm.learning import IID, SGD, Digits, ImageClassification, SmallCNN

WINDOW = 16  # bytes of a secret that must not be found

CHANNELS: dict[str, Channel] = {
    "BFV": BFV(clients=6, bits=20),
    "BFV of clients": BFV(clients=6, bits=20, holder="clients"),
    "CKKS": CKKS(bound=4.0, clients=6),
    "CKKS of clients": CKKS(bound=4.0, clients=6, release="clients", exact_grid=False),
    "masks": PairwiseMasks(clients=6),
    "active masks": PairwiseMasks(clients=6, corrupt=0.1, active=True),
    "plaintext": Plaintext(),
    "selective": Selective(PairwiseMasks(clients=6), ((0, 500),)),
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The roster's secret, every identity derived from it, and everything any party keeps in its memory of a round."""
    found: list[bytes] = []
    answer, make, identity_of = Channel.answer, local.new_identity, local.Roster.identity

    def watched(self: Channel, *arguments: Any) -> Any:
        memory, reply = answer(self, *arguments)
        found.extend(value for value in memory.values() if len(value) >= WINDOW)
        return memory, reply

    def seen(identity: Identity) -> Identity:
        if identity.secret not in found:
            found.append(identity.secret)
        return identity

    monkeypatch.setattr(Channel, "answer", watched)
    monkeypatch.setattr(local, "new_identity", lambda: seen(make()))
    monkeypatch.setattr(local.Roster, "identity", lambda self, party: seen(identity_of(self, party)))
    return found


def windows(secret: bytes) -> set[bytes]:
    """Some of its bytes, from begin, middle and end; those of a long one that are not zero."""
    places = (0, (len(secret) - WINDOW) // 2, len(secret) - WINDOW)
    return {secret[at : at + WINDOW] for at in places if any(secret[at : at + WINDOW])}


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
def test_no_secret_is_left_behind(channel, secrets, tmp_path: Path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    config = RunConfig(
        data=Digits(),
        model=SmallCNN(width=4),
        task=ImageClassification(),
        partition=IID(20),
        training=SGD(0.1),
        rule=Mean(),
        channel=channel,
        optimizer=Average(),
        rounds=2,
        cohort=FixedSize(6),
        transforms=(FixedPoint(bound=8.0, bits=20),) if channel.integers else (),
    )
    play_run(tmp_path / "run", ArmSpec("one", "one", "", config), 0)
    printed = "".join(capfd.readouterr()) + caplog.text
    left = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    left += [printed.encode(), repr(config).encode(), repr(channel).encode(), pickle.dumps(config)]
    assert len(left) > 8
    searched = {window for secret in secrets for window in windows(secret)}
    assert len(searched) >= 7  # six clients and the server, at the least
    for content in left:
        text = content.decode("latin-1")
        assert not any(window in content or window.hex() in text for window in searched)


def test_the_search_finds_a_secret_that_is_there(secrets):
    """Negative control."""
    engine = local.Local()
    secret = engine.party(3, 0).identity.secret
    searched = {window for each in secrets for window in windows(each)}
    assert windows(secret) <= searched
    root = engine.roster._root.secret
    assert windows(root) <= searched and root != secret
    shown = repr(engine) + repr(engine.roster) + repr(engine.party(3, 0)) + repr(vars(engine.roster))
    assert secret.hex() not in shown and root.hex() not in shown
    assert repr(secret) not in shown and repr(root) not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(engine)
    assert replace(engine) == engine
