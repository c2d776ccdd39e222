"""A server that lies: what it gets in the semi-honest mode, and that it gets nothing in the active one."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Any

import numpy as np
import pytest
import torch

from privfm.checks import BrokenEnvelope, Corrupt, InvalidArgument, ParameterMismatch, TooFewClients
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses.channels.identities import sign
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.masks.client import sign_of
from privfm.defenses.channels.masks.expansion import subtract_mask
from privfm.defenses.channels.masks.secrets import (
    Announced,
    box_keys,
    confirmation,
    loaded,
    mask_key,
    numbers_to_bytes,
    open_box,
    public_of,
    tagged,
    untagged,
)
from privfm.defenses.channels.masks.shamir import join

ACTIVE = PairwiseMasks(clients=7, corrupt=0.3, dropouts=0.25, active=True)  # 2 of 7 corrupt
TRUSTING = replace(ACTIVE, active=False)
VICTIM = 9


def whole_rows(n, d):
    drawn = np.random.default_rng(n).integers(-(2**20), 2**20, (n, d))
    return {3 * (n - i): torch.from_numpy(row.astype(np.float64)) for i, row in enumerate(drawn)}


def plain(rows, ids):
    return sum(rows[party] for party in ids).tolist()


@dataclass
class Lying:
    """A server that changes what it sends on the way: `lie(stage, party, parts) -> parts`, sealed in its own name."""

    line: Any
    roster: Any
    lie: Callable[[str, int, list[bytes]], list[bytes]]

    @property
    def server(self):
        return self.line.server

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        changed = {}
        for party, request in requests.items():
            header, parts = self.roster.opened(request, SERVER, party)
            told = self.lie(stage, party, parts)
            count = len(told[0]) // 8 if stage in ("confirm", "unmask") else header.clients  # a consistent story
            changed[party] = self.roster.sealed(replace(header, clients=count), told, SERVER, party)
        yield from self.line(stage, changed)


# An honest server


@pytest.mark.parametrize("n", [3, 4, 7])
def test_the_sum_is_exact(n, wire, intake):
    channel, rows = PairwiseMasks(clients=n, corrupt=0.25, dropouts=0.25, active=True), whole_rows(n, 5)
    view = channel.collect(list(rows), intake(5), wire(channel, rows))
    assert view.total().tolist() == plain(rows, rows)
    assert view.bad == 0


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "confirm", "unmask"])
@pytest.mark.parametrize("gone", [{3}, {VICTIM}, {3, 21}], ids=str)
def test_drop_outs_down_to_the_threshold(gone, stage, wire, intake):
    """7 clients, threshold 5."""
    rows = whole_rows(7, 3)
    if stage == "keys" and len(gone) == 2:  # 5 answer, of whom 2 may be corrupt
        with pytest.raises(TooFewClients, match="more than 6"):
            ACTIVE.collect(list(rows), intake(3), wire(ACTIVE, rows, {stage: gone}))
        return
    if stage == "keys":
        with pytest.raises(TooFewClients, match="more than 6"):
            ACTIVE.collect(list(rows), intake(3), wire(ACTIVE, rows, {stage: gone}))
        return
    view = ACTIVE.collect(list(rows), intake(3), wire(ACTIVE, rows, {stage: gone}))
    left = rows.keys() - (gone if stage in ("shares", "masked") else set())
    assert view.total().tolist() == plain(rows, left)


@pytest.mark.parametrize("stage", ["shares", "masked", "confirm", "unmask"])
def test_below_the_threshold_nothing_is_opened(stage, wire, intake):
    rows = whole_rows(7, 3)
    with pytest.raises(TooFewClients, match="threshold=5"):
        ACTIVE.collect(list(rows), intake(3), wire(ACTIVE, rows, {stage: {3, 6, 12}})).total()


@pytest.mark.parametrize("broken", [lambda reply: reply[:-1], lambda reply: b"", lambda reply: reply[::-1]])
def test_a_broken_confirmation_is_a_drop_out(broken, wire, intake):
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    line.change = lambda party, reply: (
        broken(reply) if party == 3 and line.memories[3]["done"].endswith(b"confirm") else reply
    )
    view = ACTIVE.collect(list(rows), intake(3), line)
    assert view.total().tolist() == plain(rows, rows)
    assert view.bad == 0


@pytest.mark.parametrize("stage", ["keys", "confirm"])
def test_a_signature_of_somebody_else_is_left_out(stage, wire, roster, intake):
    """A malicious client cannot make the honest ones end the round."""
    rows = whole_rows(8, 3)
    channel = PairwiseMasks(clients=8, corrupt=0.25, dropouts=0.2, active=True)
    line = wire(channel, rows)

    def change(party, reply):
        header, parts = roster.opened(reply, party)
        return (
            roster.sealed(header, [parts[0][:-64] + bytes(64)], party) if (party, header.stage) == (3, stage) else reply
        )

    line.change = change
    view = channel.collect(list(rows), intake(3), line)
    left = rows.keys() - ({3} if stage == "keys" else set())
    assert view.total().tolist() == plain(rows, left)
    assert view.bad == (stage == "keys")


def test_stages_and_arguments():
    assert ACTIVE.client_stages == ("keys", "shares", "masked", "confirm", "unmask")
    assert "whatever it likes" in ACTIVE.learns["trust"]
    assert (ACTIVE.graph(7).threshold, ACTIVE.graph(7).complete) == (5, True)
    for arguments in (
        {"corrupt": 1 / 3},
        {"dropouts": 0.4},
        {"neighbours": 10},
        {"clients": 300},
    ):
        with pytest.raises(InvalidArgument):
            PairwiseMasks(**{"clients": 20, "active": True, **arguments})


def test_the_assumed_corrupt_are_a_number_not_a_share_of_who_the_server_lets_in():
    """2 of 7 may be corrupt: in a sum of 6 they would be a third."""
    with pytest.raises(TooFewClients, match="6 clients answered, of whom 2 may be corrupt"):
        ACTIVE.graph(6)


# Keys of the server's own


class Impostor:
    """Passes on keys of its own making to the victim, instead of the neighbours'."""

    def __init__(self, line, roster):
        self.line, self.roster, self.server = line, roster, line.server
        self.secrets: dict[int, tuple[bytes, bytes]] = {}
        self.told: dict[int, Announced] = {}
        self.dealt: dict[int, bytes] = {}
        self.row = np.zeros(0, np.uint32)

    def __call__(self, stage, requests):
        requests = dict(requests)
        if stage in ("shares", "masked"):
            header, parts = self.roster.opened(requests[VICTIM], SERVER, VICTIM)
            changed = self._keys(parts) if stage == "shares" else [tagged((n, bytes(80)) for n in self.secrets)]
            requests[VICTIM] = self.roster.sealed(header, changed, SERVER, VICTIM)
        for party, reply in self.line(stage, requests):
            if party == VICTIM and stage in ("shares", "masked"):
                parts = self.roster.opened(reply, VICTIM)[1]
                if stage == "shares":
                    self.dealt = untagged(parts[2], 80)
                else:
                    self.row = np.frombuffer(parts[0], "<u4").copy()
            yield party, reply

    def _keys(self, parts):
        for each in Announced.all_from(parts[0]):
            self.told[each.number] = each
            if each.number != VICTIM:
                self.secrets[each.number] = sharing, masking = token_bytes(32), token_bytes(32)
                mine = replace(each, sharing=public_of(sharing), masking=public_of(masking))
                self.told[each.number] = mine
        return [b"".join(self.told[number].to_bytes() for number in sorted(self.told))]

    def recovered(self, threshold):
        """The victim's row, from its boxes and its masked row alone."""
        victim, order, shares = self.told[VICTIM], sorted(self.told), []
        for number, box in self.dealt.items():
            secret = loaded(self.secrets[number][0])
            _, back = box_keys(secret, self.told[number], victim, self.server.round)
            shares.append((order.index(number) + 1, open_box(back, box)))
        seed, masking = (join([(x, s[part]) for x, s in shares], threshold) for part in (slice(32), slice(32, 64)))
        subtract_mask(self.row, seed)
        for number in self.secrets:
            key = mask_key(loaded(masking), victim, self.told[number], self.server.round)
            sign_of(number, VICTIM)(self.row, key)
        return self.row.view(np.int32).tolist()


def test_semi_honest_a_server_with_keys_of_its_own_gets_the_row(wire, roster, intake):
    """What the documentation warns of: this mode trusts the server to pass keys on."""
    rows = whole_rows(7, 30)
    impostor = Impostor(wire(TRUSTING, rows), roster)
    TRUSTING.collect(list(rows), intake(30), impostor)
    assert impostor.recovered(TRUSTING.graph(7).threshold) == rows[VICTIM].tolist()


def test_active_keys_of_the_servers_own_are_refused(wire, roster, intake):
    rows = whole_rows(7, 30)
    impostor = Impostor(wire(ACTIVE, rows), roster)
    with pytest.raises(Corrupt, match="not by the pinned identity"):
        ACTIVE.collect(list(rows), intake(30), impostor)
    assert impostor.dealt == {} and len(impostor.row) == 0


def test_active_keys_of_another_session_are_refused(wire, roster, intake):
    """Signed by the right client, but not for this round."""
    rows = whole_rows(7, 3)
    old = wire(ACTIVE, rows)
    ACTIVE.collect(list(rows), intake(3), old)
    announced = {party: roster.opened(reply, party)[1][0] for party, reply in old.replies("keys").items()}

    def lie(stage, party, parts):
        if stage != "shares" or party != VICTIM:
            return parts
        kept = Announced.all_from(parts[0])
        return [b"".join(each.to_bytes() if each.number == VICTIM else announced[each.number] for each in kept)]

    with pytest.raises(Corrupt, match="not by the pinned identity"):
        ACTIVE.collect(list(rows), intake(3), Lying(wire(ACTIVE, rows), roster, lie))


def test_active_the_server_cannot_choose_the_neighbours(wire, roster, intake):
    """Fewer than all of them; and with fewer announced, the number of corrupt ones stays what it is."""
    rows = whole_rows(7, 3)

    def lie(stage, party, parts):
        if stage != "shares":
            return parts
        return [b"".join(each.to_bytes() for each in Announced.all_from(parts[0])[:4])]

    with pytest.raises(ParameterMismatch, match="3 neighbours of 7 clients"):
        ACTIVE.collect(list(rows), intake(3), Lying(wire(ACTIVE, rows), roster, lie))


# Lies about who dropped out


def split_story(line, dropped_for):
    """Some clients hear that the victim dropped out, the others that it survived."""

    def lie(stage, party, parts):
        if stage not in ("confirm", "unmask") or party not in dropped_for:
            return parts
        kept = [n for n in np.frombuffer(parts[0], ">i8").tolist() if n != VICTIM]
        if stage == "confirm":
            return [numbers_to_bytes(kept)]
        return [numbers_to_bytes(kept), numbers_to_bytes([VICTIM]), *parts[2:]]

    return lie


def shares_given(line, roster, victim_dropped_for):
    """What clients answered for the victim: shares of its mask key, and of its seed, by place."""
    order = sorted(line.rows)
    key, seed = [], []
    for party, reply in line.replies("unmask").items():
        content = roster.opened(reply, party)[1][0]
        at = 33 * order.index(VICTIM)
        (key if party in victim_dropped_for else seed).append((order.index(party) + 1, content[at + 1 : at + 33]))
    return key, seed


def test_semi_honest_a_split_story_needs_colluders(wire, roster, intake):
    """Both secrets of the victim would take 2t shares. With t = 5 of 7, honest clients give 7, colluders both."""
    rows = whole_rows(7, 30)
    threshold = TRUSTING.graph(7).threshold
    assert threshold == 5
    dropped_for = {3, 6, 12}
    line = wire(TRUSTING, rows)
    view = TRUSTING.collect(list(rows), intake(30), Lying(line, roster, split_story(line, dropped_for)))
    memories = {party: dict(memory) for party, memory in line.memories.items()}
    masked = np.frombuffer(roster.opened(line.replies("masked")[VICTIM], VICTIM)[1][0], "<u4").copy()
    with pytest.raises((TooFewClients, BrokenEnvelope)):
        view.total()
    key, seed = shares_given(line, roster, dropped_for)
    assert (len(key), len(seed)) == (3, 4)
    for colluders, works in (([15], False), ([3, 15, 18], True)):  # 3 gave its share of the key, the others of the seed
        both = {p: opened_shares(memories[p]) for p in colluders}
        order = sorted(rows)
        keys = {**dict(key), **{order.index(p) + 1: share[32:] for p, share in both.items()}}
        seeds = {**dict(seed), **{order.index(p) + 1: share[:32] for p, share in both.items()}}
        if not works:
            assert min(len(keys), len(seeds)) < threshold
            continue
        assert min(len(keys), len(seeds)) >= threshold
        opened_seed, masking = join(list(seeds.items()), threshold), join(list(keys.items()), threshold)
        announced = {p: Announced.all_from(roster.opened(r, p)[1][0])[0] for p, r in line.replies("keys").items()}
        subtract_mask(masked, opened_seed)
        for number in rows.keys() - {VICTIM}:
            sign_of(number, VICTIM)(masked, mask_key(loaded(masking), announced[VICTIM], announced[number], 0))
        assert masked.view(np.int32).tolist() == rows[VICTIM].tolist()


def opened_shares(memory):
    """The two shares of the victim's that a colluder holds."""
    return open_box(untagged(memory["receiving"], 32)[VICTIM], untagged(memory["boxes"], 80)[VICTIM])


@pytest.mark.parametrize("dropped_for", [{3, 6, 12}, {3, 6, 12, 15}, {3, 6, 12, 15, 18}], ids=str)
def test_active_a_split_story_is_refused(dropped_for, wire, roster, intake):
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    view = ACTIVE.collect(list(rows), intake(3), Lying(line, roster, split_story(line, dropped_for)))
    with pytest.raises(TooFewClients, match="confirmed"):
        view.total()
    assert len(line.replies("unmask")) == 0


def test_active_one_who_hears_another_story_is_left_alone(wire, roster, intake):
    """The six others agree, and open the sum with its row and the victim's in it."""
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    view = ACTIVE.collect(list(rows), intake(3), Lying(line, roster, split_story(line, {3})))
    assert view.total().tolist() == plain(rows, rows)
    assert line.replies("unmask").keys() == rows.keys() - {3}


@pytest.mark.parametrize("count", range(5))
def test_active_no_two_stories_are_opened(count, wire, roster, intake):
    """5 of 7 must sign. The corrupt, 18 and 21, sign both lists; of the five honest clients some hear either."""
    rows, corrupt = whole_rows(7, 3), {18, 21}
    dropped_for = {3, 6, 12, 15} if count == 4 else set([3, 6, 12, 15][:count])
    line = wire(ACTIVE, rows)
    view = ACTIVE.collect(list(rows), intake(3), Lying(line, roster, split_story(line, dropped_for)))
    with contextlib.suppress(TooFewClients):
        line.lost = {"unmask": set(rows)}  # the stage is played below
        view.total()
    session = line.memories[3]["session"]
    holders = line.memories[3]["holders"]
    opened = set()
    for story, hearing in (("survived", rows.keys() - dropped_for), ("dropped", dropped_for)):
        kept = numbers_to_bytes(n for n in rows if story == "survived" or n != VICTIM)
        content = confirmation(roster.party(18), session, holders, rows, kept)
        signed = {n: sign(roster.party(n), content) for n in corrupt}
        signed |= {n: roster.opened(line.replies("confirm")[n], n)[1][0] for n in hearing - corrupt}
        gone = b"" if story == "survived" else numbers_to_bytes([VICTIM])
        header = replace(ACTIVE.header("unmask", session), clients=len(kept) // 8)
        for party in hearing - corrupt:
            request = roster.sealed(header, [kept, gone, tagged(signed.items())], SERVER, party)
            if len(signed) < 5:
                with pytest.raises(TooFewClients, match=f"only {len(signed)}"):
                    ACTIVE.answer(roster.party(party), "unmask", line.memories[party], request, lambda: None)
            else:
                ACTIVE.answer(roster.party(party), "unmask", line.memories[party], request, lambda: None)
                opened.add(story)
    assert len(opened) == 1


def test_active_another_list_than_was_confirmed_is_refused(wire, roster, intake):
    """Everybody confirmed the true list; then one client hears another."""
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    lie = split_story(line, {3})
    told = lambda stage, party, parts: lie(stage, party, parts) if stage == "unmask" else parts  # noqa: E731
    view = ACTIVE.collect(list(rows), intake(3), Lying(line, roster, told))
    with pytest.raises(Corrupt, match="not the list of survivors that this client confirmed"):
        view.total()


def test_active_confirmations_of_another_list_do_not_count(wire, roster, intake):
    """One client confirmed a list without the victim, and is shown the others' signatures under the true list."""
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    lie = split_story(line, {3})

    class Server(Lying):
        def __call__(self, stage, requests):
            if stage != "unmask":
                yield from super().__call__(stage, requests)
                return
            others = roster.opened(requests[6], SERVER, 6)[1]
            signed = {n: one for n, one in untagged(others[2], 64).items() if n != VICTIM}
            kept = [*lie("unmask", 3, others)[:2], tagged(signed.items())]
            header = replace(ACTIVE.header("unmask", line.memories[3]["session"]), clients=6)
            yield from line("unmask", {3: roster.sealed(header, kept, SERVER, 3)})

    view = ACTIVE.collect(list(rows), intake(3), Server(line, roster, lie))
    with pytest.raises(Corrupt, match="told it another story"):
        view.total()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param(lambda signed: signed[: 72 * 4], TooFewClients, "threshold=5: only 4", id="one short"),
        pytest.param(lambda signed: b"", TooFewClients, "threshold=5: only 0", id="none"),
        pytest.param(lambda signed: signed + signed[-72:], Corrupt, "twice", id="one twice"),
        pytest.param(lambda signed: signed[:-1], Corrupt, "expected 72", id="cut off"),
        pytest.param(lambda signed: signed[:-64] + signed[8:72], Corrupt, "another story", id="another's"),
        pytest.param(
            lambda signed: signed + numbers_to_bytes([99]) + signed[8:72], Corrupt, "did not survive", id="a stranger's"
        ),
    ],
)
def test_active_confirmations_that_are_not_enough(change, error, match, wire, roster, intake):
    rows = whole_rows(7, 3)
    lie = lambda stage, party, parts: [*parts[:2], change(parts[2])] if stage == "unmask" else parts  # noqa: E731
    view = ACTIVE.collect(list(rows), intake(3), Lying(wire(ACTIVE, rows), roster, lie))
    with pytest.raises(error, match=match):
        view.total()


def test_active_different_sharers_do_not_agree(wire, roster, intake):
    """A client that was told of fewer sharers signs no list with the others, and the others sign none without them."""
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)
    lie = lambda stage, party, parts: [parts[0][:-88]] if (stage, party) == ("masked", 3) else parts  # noqa: E731
    view = ACTIVE.collect(list(rows), intake(3), Lying(line, roster, lie))
    with pytest.raises(Corrupt, match="client 3, or with others than dealt shares"):
        view.total()


@pytest.mark.parametrize("missing", [VICTIM, 3])
def test_active_a_client_signs_no_list_without_itself(missing, wire, roster, intake):
    rows = whole_rows(7, 3)

    def lie(stage, party, parts):
        if (stage, party) != ("confirm", missing):
            return parts
        return [numbers_to_bytes(n for n in rows if n != missing)]

    with pytest.raises(Corrupt, match=f"without client {missing}"):
        ACTIVE.collect(list(rows), intake(3), Lying(wire(ACTIVE, rows), roster, lie)).total()


def test_active_a_short_list_is_not_signed(wire, roster, intake):
    channel, rows = ACTIVE.with_floor(6), whole_rows(7, 3)
    few = [numbers_to_bytes([3, 6, 9, 12, 15])]
    lie = lambda stage, party, parts: few if (stage, party) == ("confirm", 3) else parts  # noqa: E731
    with pytest.raises(TooFewClients, match="smallest_release=6: a sum of 5"):
        channel.collect(list(rows), intake(3), Lying(wire(channel, rows), roster, lie)).total()


def test_what_is_confirmed_names_everything_that_a_client_was_told(roster):
    base = {"session": b"s" * 16, "holders": b"h", "sharing": [1, 2, 3], "survivors": numbers_to_bytes([1, 2])}
    others = {"session": b"t" * 16, "holders": b"i", "sharing": [1, 2], "survivors": numbers_to_bytes([1, 3])}
    party = roster.party(3)
    contents = {confirmation(party, **{**base, name: other}) for name, other in others.items()}
    contents |= {confirmation(party, **base), confirmation(roster.party(3, now=1), **base)}
    assert len(contents) == 6


@pytest.mark.parametrize("impostor", [SERVER, KEY_HOLDER])
def test_active_the_server_is_no_client(impostor, wire, roster, intake):
    """Its identity is pinned too: as one more client it would count among those a sum is hidden in, and sign twice."""
    rows = whole_rows(7, 3)
    line = wire(ACTIVE, rows)

    def lie(stage, party, parts):
        if stage != "shares":
            return parts
        kept = Announced.all_from(parts[0])[1:]  # seven with its own
        mine = Announced(impostor, public_of(token_bytes(32)), public_of(token_bytes(32)))
        mine = mine.signed_by(roster.party(impostor), line.memories[VICTIM]["session"])
        return [b"".join(each.to_bytes() for each in [mine, *kept])]

    lying = Lying(line, roster, lambda stage, party, parts: lie(stage, party, parts) if party == VICTIM else parts)
    with pytest.raises(Corrupt, match="no client"):
        ACTIVE.collect(list(rows), intake(3), lying)


def test_active_what_is_assumed_is_said_as_a_number():
    """With 20 of 100 assumed, 61 may answer; a third of 100 among them would back two stories: 2 * 41 <= 61 + 33."""
    channel = PairwiseMasks(clients=100, active=True)
    threshold = channel.graph(61).threshold
    assert 2 * threshold <= 61 + 33
    assert 2 * threshold > 61 + 20
    assert "at most 20 of the clients" in channel.learns["trust"]


def test_semi_honest_lies_about_drop_outs_open_a_sum_below_the_floor(wire, roster, intake):
    """Each client keeps to its floor of 6; of ten stories, told to ten clients, a sum of 4 rows comes together.

    Every client hears of four drop-outs. Of each of six clients six others hear that it dropped out, which opens its
    mask key; of the four others everybody hears that they survived.
    """
    channel = PairwiseMasks(clients=10, corrupt=0.0, dropouts=0.4, smallest_release=6)
    rows = whole_rows(10, 30)
    order = sorted(rows)
    gone, kept = order[:6], order[6:]
    assert channel.graph(10).threshold == 6
    told = {party: [gone[(place + 1 + step) % 6] for step in range(4)] for place, party in enumerate(gone)}
    told |= {party: [gone[(3 * place + step) % 6] for step in range(3)] for place, party in enumerate(kept)}

    def lie(stage, party, parts):
        if stage != "unmask":
            return parts
        return [numbers_to_bytes(set(order) - set(told[party])), numbers_to_bytes(told[party])]

    line = wire(channel, rows)
    view = channel.collect(list(rows), intake(30), Lying(line, roster, lie))
    with contextlib.suppress(TooFewClients):
        view.total()
    announced = {p: Announced.all_from(roster.opened(r, p)[1][0])[0] for p, r in line.replies("keys").items()}
    shares = {owner: [] for owner in order}
    for place, (party, reply) in enumerate(sorted(line.replies("unmask").items())):
        content = roster.opened(reply, party)[1][0]
        for at, owner in enumerate(order):
            if (owner in told[party]) == (owner in gone):
                shares[owner].append((place + 1, content[33 * at + 1 : 33 * (at + 1)]))
    total = np.zeros(30, np.uint32)
    for party in kept:
        total += np.frombuffer(roster.opened(line.replies("masked")[party], party)[1][0], "<u4")
        subtract_mask(total, join(shares[party], 6))
    for dropped in gone:
        secret = loaded(join(shares[dropped], 6))
        for party in kept:
            sign_of(dropped, party)(total, mask_key(secret, announced[dropped], announced[party], 0))
    assert total.view(np.int32).tolist() == plain(rows, kept)
