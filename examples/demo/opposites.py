"""Requests that differ in one word and mean the opposite: data in our own words, made from templates.

``How do I turn on the porch light?`` is nearer, for a plain sentence encoder, to ``How do I turn off the
porch light?`` than to ``Please activate the porch light.`` The task is to tell what is asked for. What
training sees and what the score is taken on share no pair of opposites, no thing and no frame; see
:func:`overlap`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Opposite:
    """Two actions that undo each other, four wordings of each, and things they are done to (``…``)."""

    one: tuple[str, str, str, str]
    other: tuple[str, str, str, str]
    things: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A sentence, and what it asks for: two requests with equal ``wish`` mean the same."""

    text: str
    wish: tuple[str, int]


TRAIN_FRAMES = ("How do I …?", "I want to ….", "Please ….", "What is the way to …?", "Help me ….")
HELD_OUT_FRAMES = (
    "Could someone explain how to …?",
    "I am trying to …, what now?",
    "Is it possible to … today?",
)

TRAIN = (
    Opposite(
        ("turn on …", "switch … on", "enable …", "activate …"),
        ("turn off …", "switch … off", "disable …", "deactivate …"),
        ("the porch light", "night mode", "the spam filter", "the garden sprinkler", "the oven timer"),
    ),
    Opposite(
        ("open …", "unseal …", "leave … ajar", "throw … wide open"),
        ("close …", "shut …", "seal …", "keep … shut"),
        ("the garage door", "the skylight", "the greenhouse vent", "the mail slot"),
    ),
    Opposite(
        ("turn up …", "raise …", "increase …", "make … higher"),
        ("turn down …", "lower …", "decrease …", "make … less"),
        ("the screen brightness", "the speaker volume", "the mixing speed", "the seat height"),
    ),
    Opposite(
        ("add … to the list", "put … on the list", "include … in the list", "insert … into the list"),
        ("take … off the list", "remove … from the list", "drop … from the list", "cross … off the list"),
        ("oat milk", "a new guest", "the blue paint", "my second address"),
    ),
    Opposite(
        ("upload …", "send … to the server", "copy … from my laptop to the cloud", "push … online"),
        ("download …", "fetch … from the server", "copy … from the cloud to my laptop", "pull … down"),
        ("the holiday photos", "the tax form", "my song lyrics", "the site backup"),
    ),
    Opposite(
        ("buy …", "purchase …", "acquire …", "get … from a seller"),
        ("sell …", "put … up for sale", "find a buyer for …", "hand … over to a buyer"),
        ("a used bicycle", "ten shares", "the antique piano", "a concert ticket"),
    ),
    Opposite(
        ("subscribe to …", "sign up for …", "start getting …", "opt in to …"),
        ("unsubscribe from …", "cancel …", "stop getting …", "opt out of …"),
        ("the weekly newsletter", "the price alerts", "the sports channel", "the parents' bulletin"),
    ),
    Opposite(
        ("connect …", "plug in …", "attach …", "hook up …"),
        ("disconnect …", "unplug …", "detach …", "unhook …"),
        ("the printer", "the second monitor", "the trailer", "the game controller"),
    ),
    Opposite(
        (
            "lend my … to my neighbour",
            "let my neighbour use my …",
            "loan my … out",
            "hand my … on for a week",
        ),
        ("borrow my neighbour's …", "use my neighbour's …", "have a … on loan", "get hold of a … for a week"),
        ("ladder", "lawn mower", "camping stove"),
    ),
    Opposite(
        ("show …", "display …", "make … visible", "reveal …"),
        ("hide …", "conceal …", "make … invisible", "keep … out of sight"),
        ("the side panel", "my phone number", "the line numbers", "the wifi password"),
    ),
    Opposite(
        ("pack …", "wrap up …", "put … into its box", "box up …"),
        ("unpack …", "unwrap …", "take … out of its box", "unbox …"),
        ("the glasses", "the birthday present", "the tent", "the chess set"),
    ),
    Opposite(
        ("warm up …", "heat …", "make … hotter", "get … warm"),
        ("cool down …", "chill …", "make … colder", "get … cold"),
        ("the bath water", "the baby bottle", "the guest room", "the soup"),
    ),
    Opposite(
        ("enlarge …", "make … bigger", "expand …", "scale … up"),
        ("shrink …", "make … smaller", "reduce …", "scale … down"),
        ("the logo", "the map view", "the vegetable bed", "the font"),
    ),
    Opposite(
        ("fill …", "top up …", "pour water into …", "get … full"),
        ("empty …", "drain …", "pour the water out of …", "get … empty"),
        ("the fish tank", "the coffee machine", "the paddling pool", "the boiler"),
    ),
    Opposite(
        ("allow …", "permit …", "make … legal", "let … happen"),
        ("forbid …", "ban …", "make … illegal", "keep … from happening"),
        ("dogs in the office", "parking on the lawn", "late submissions", "barbecues on balconies"),
    ),
    Opposite(
        ("arrive in …", "get to …", "come into …", "reach …"),
        ("depart from …", "get away from …", "go out of …", "leave …"),
        ("Lisbon", "the ferry port", "the summer camp"),
    ),
    Opposite(
        ("tie …", "fasten …", "do up …", "buckle …"),
        ("untie …", "unfasten …", "undo …", "unbuckle …"),
        ("the seat belt", "my skates", "the horse's saddle"),
    ),
    Opposite(
        ("hire …", "recruit …", "take … on", "bring … into the firm"),
        ("fire …", "dismiss …", "let … go", "send … away from the firm"),
        ("a driver", "the young chef", "two accountants"),
    ),
    Opposite(
        ("do it before …", "get it done ahead of …", "finish it prior to …", "have it ready earlier than …"),
        ("do it after …", "get it done later than …", "finish it following …", "have it ready past …"),
        ("the school break", "lunch", "the inspection"),
    ),
    Opposite(
        ("praise …", "speak well of …", "give … a good review", "recommend …"),
        ("criticise …", "speak badly of …", "give … a bad review", "advise against …"),
        ("the new restaurant", "the plumber", "this hotel"),
    ),
)

HELD_OUT = (
    Opposite(
        ("lock …", "block access to …", "secure … with a code", "bolt …"),
        ("unlock …", "restore access to …", "free … with a code", "unbolt …"),
        ("the bike shed", "the tablet", "the cellar", "the front gate"),
    ),
    Opposite(
        ("pay the shop for …", "give the shop money for …", "settle the shop's bill for …", "pay for …"),
        ("get my money back for …", "have the shop refund …", "be reimbursed for …", "get … refunded"),
        ("the leather boots", "the broken kettle", "the rail pass", "the wedding cake"),
    ),
    Opposite(
        ("accept …", "say yes to …", "agree to …", "confirm that I want …"),
        ("decline …", "say no to …", "refuse …", "confirm that I do not want …"),
        ("the dinner invitation", "the internship", "the friend request", "the offer"),
    ),
    Opposite(
        ("mute …", "silence …", "cut the sound of …", "make … quiet"),
        ("unmute …", "play … aloud", "bring back the sound of …", "make … loud"),
        ("the microphone", "the kitchen radio", "the conference call", "the doorbell"),
    ),
    Opposite(
        ("start …", "begin …", "launch …", "kick off …"),
        ("stop …", "end …", "halt …", "bring … to an end"),
        ("the screencast", "the wash cycle", "the evening class", "the data sync"),
    ),
    Opposite(
        ("import …", "bring … in from another program", "load … from an outside file", "read … in"),
        ("export …", "pass … out to another program", "save … to an outside file", "write … out"),
        ("my contacts", "the budget sheet", "the recipe collection", "the exam marks"),
    ),
    Opposite(
        ("build …", "assemble …", "put … together", "set … up"),
        ("demolish …", "dismantle …", "take … apart", "tear … down"),
        ("the bookshelf", "the tree house", "the market stall", "the model railway"),
    ),
    Opposite(
        ("remember …", "memorise …", "keep … in mind", "learn … by heart"),
        ("forget …", "unlearn …", "get … out of my mind", "no longer think of …"),
        ("that melody", "her anniversary", "the accident", "the poem"),
    ),
)


def held_out(seed: int) -> list[Request]:
    """Every held-out wording of every held-out wish, each in one frame drawn at random."""
    rng = random.Random(seed)
    return [
        Request(_say(wording, thing, rng.choice(HELD_OUT_FRAMES)), (thing, side))
        for opposite in HELD_OUT
        for thing in opposite.things
        for side, wordings in enumerate((opposite.one, opposite.other))
        for wording in wordings
    ]


def batch(rng: random.Random, things: int) -> tuple[list[str], list[str]]:
    """Training sentences in two lists: the n-th of both ask for the same, in other words.

    Neighbours 2k and 2k+1 ask for opposite things to be done to the same thing.
    """
    said: list[str] = []
    again: list[str] = []
    for opposite, thing in rng.sample([(o, t) for o in TRAIN for t in o.things], things):
        for wordings in (opposite.one, opposite.other):
            first, second = rng.sample(wordings, 2)
            said.append(_say(first, thing, rng.choice(TRAIN_FRAMES)))
            again.append(_say(second, thing, rng.choice(TRAIN_FRAMES)))
    return said, again


def overlap(requests: Sequence[Request]) -> dict[str, float]:
    """What held-out requests share with everything that training can draw.

    ``sentences``, ``wordings``, ``things`` and ``frames`` count what occurs in both; ``words`` is the
    share of the held-out actions' and things' words that occur in training at all.
    """
    seen = {_say(w, t, f) for o in TRAIN for w in (*o.one, *o.other) for t in o.things for f in TRAIN_FRAMES}
    words = _words(HELD_OUT)
    return {
        "sentences": len(seen & {r.text for r in requests}),
        "wordings": len(_wordings(TRAIN) & _wordings(HELD_OUT)),
        "things": len({t for o in TRAIN for t in o.things} & {t for o in HELD_OUT for t in o.things}),
        "frames": len({*TRAIN_FRAMES} & {*HELD_OUT_FRAMES}),
        "words": len(words & _words(TRAIN)) / len(words),
    }


def _say(wording: str, thing: str, frame: str) -> str:
    return frame.replace("…", wording.replace("…", thing))


def _wordings(opposites: Sequence[Opposite]) -> set[str]:
    return {w for o in opposites for w in (*o.one, *o.other)}


def _words(opposites: Sequence[Opposite]) -> set[str]:
    text = " ".join(w for o in opposites for w in (*o.one, *o.other, *o.things))
    return set(re.findall(r"[a-z']+", text.lower()))
