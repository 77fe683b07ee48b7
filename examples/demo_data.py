"""Three small chat data sets, written for this project, that a small model can learn one after another.

They stand for three kinds of skill, NLU, Math and Code:

- ``home``: what a person wants from a home assistant, as one of twelve short labels;
- ``math``: addition and subtraction in one sentence or two, the answer is the bare number;
- ``code``: a request in English becomes one or two commands of a tiny robot language.

Train and test never share a template, a name or an object, so that a good test score means the skill was learned and
not the wording. Everything follows from a seed: the same arguments give the same rows on every machine.
``python examples/demo_data.py DIR`` writes DIR/train, DIR/test and DIR/order.json.

Does not cover: hard language. These sets show learning and forgetting in minutes; they are no benchmark of ability.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

TASKS: tuple[str, ...] = ("home", "math", "code")
SPLITS: tuple[str, ...] = ("train", "test")
PREFIXES: dict[str, str] = {"home": "What does the user want: ", "math": "", "code": "Write the command: "}

Pair = tuple[str, str]  # prompt, answer
Pools = dict[str, list[Pair]]  # label -> its distinct pairs, varied from the first on

# What the templates are filled with; no word list is shared between the splits.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "room": ("kitchen", "bedroom", "hallway", "bathroom", "office", "garage"),
        "music": ("jazz", "rock", "the beatles", "piano music", "my favourite album", "dance music"),
        "span": ("5 minutes", "ten minutes", "half an hour", "20 minutes", "one hour", "90 seconds"),
        "item": ("milk", "eggs", "bread", "apples", "coffee", "soap"),
        "person": ("mum", "anna", "the doctor", "my brother", "peter", "the office"),
        "day": ("today", "tomorrow", "on monday", "this weekend", "tonight", "this afternoon"),
        "door": ("front door", "back door", "garage door", "side door", "kitchen door", "main door"),
        "carrier": ("{}", "{}", "{} please", "hello, {}", "{} now"),
        "name": ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma"),
        "thing": ("apple", "pencil", "coin", "shell", "marble", "button", "card", "egg"),
        "obj": ("box", "ball", "cup", "brick", "toy", "can"),
        "joiner": ("{} then {}", "{} and then {}", "first {}, then {}"),
    },
    "test": {
        "room": ("cellar", "attic", "nursery", "dining room", "study"),
        "music": ("mozart", "hip hop", "folk tunes", "something by queen", "a lively melody"),
        "span": ("a quarter of an hour", "45 minutes", "three hours", "8 minutes", "forty seconds"),
        "item": ("cheese", "onions", "toothpaste", "rice", "orange juice"),
        "person": ("grandma", "the plumber", "uncle joe", "lisa", "my boss"),
        "day": ("on friday", "next week", "this morning", "over the holidays", "later on"),
        "door": ("entrance", "patio door", "gate", "cellar door", "porch door"),
        "carrier": ("{}", "{}", "okay, {}", "{}, thanks", "hey there, {}"),
        "name": ("Oscar", "Nora", "Felix", "Ruth", "Hugo", "Iris"),
        "thing": ("stamp", "balloon", "ticket", "pebble", "candle", "ribbon"),
        "obj": ("bottle", "parcel", "stone", "crate"),
        "joiner": ("{}, after that {}", "{}; finally {}"),
    },
}

# home: label -> templates
HOME_TRAIN: dict[str, tuple[str, ...]] = {
    "light on": ("turn on the light in the {room}", "switch the {room} lamp on", "lights on in the {room}",
        "put the {room} light on", "i need more light in the {room}", "the {room} is dark", "make the {room} bright"),
    "light off": ("turn off the light in the {room}", "switch the {room} lamp off", "lights off in the {room}",
        "put the {room} light out", "i do not need light in the {room}", "the {room} is too bright",
        "make the {room} dark"),
    "set timer": ("set a timer for {span}", "start a timer of {span}", "remind me in {span}",
        "tell me when {span} are over", "timer for {span}", "wake me in {span}", "i need an alarm in {span}"),
    "play music": ("play {music}", "put on {music}", "i want to hear {music}", "start playing {music}",
        "let me listen to {music}", "turn on some {music}", "play a song, maybe {music}"),
    "stop music": ("stop the music in the {room}", "stop playing {music}", "turn off the song in the {room}",
        "no more {music}", "the music in the {room} is too loud", "i do not want to hear {music}",
        "be silent in the {room}, no songs"),
    "heating up": ("turn up the heating in the {room}", "make the {room} warmer", "i am cold in the {room}",
        "it is freezing in the {room}", "raise the temperature in the {room}", "set the {room} two degrees higher",
        "more heat in the {room}"),
    "heating down": ("turn down the heating in the {room}", "make the {room} cooler", "i am hot in the {room}",
        "it is too warm in the {room}", "lower the temperature in the {room}", "set the {room} two degrees lower",
        "less heat in the {room}"),
    "lock door": ("lock the {door}", "close and lock the {door}", "make sure the {door} is locked",
        "is the {door} locked", "the {door} is open, lock it", "i forgot to lock the {door}",
        "nobody should come in by the {door}"),
    "weather": ("what is the weather like {day}", "will it rain {day}", "how is the weather {day}",
        "is it going to be sunny {day}", "tell me the weather {day}", "do i need a coat {day}",
        "how cold will it be outside {day}"),
    "shopping list": ("add {item} to the shopping list", "put {item} on my list", "we need to buy {item}",
        "remember to get {item} at the shop", "write {item} on the shopping list", "there is no {item} left",
        "i have to buy {item}"),
    "phone call": ("call {person}", "phone {person}", "make a call to {person}",
        "i want to speak to {person} on the phone", "start a phone call with {person}", "dial the number of {person}",
        "get me {person} on the phone"),
    "clean floor": ("clean the floor in the {room}", "vacuum the {room}", "start the vacuum in the {room}",
        "the {room} floor is dirty", "sweep the {room}", "there is dust on the floor of the {room}",
        "send the robot to clean the {room}"),
}  # fmt: skip

HOME_TEST: dict[str, tuple[str, ...]] = {
    "light on": ("brighten up that {room}", "i can't see a thing down in our {room}",
        "illuminate our {room}, it's pitch black", "our {room} is so gloomy, lamp please"),
    "light off": ("darken our {room}", "kill those lamps in our {room}",
        "nobody needs the lights burning in our {room}", "our {room} lamps should be out for sleeping"),
    "set timer": ("count down {span}", "give me a beep once {span} have passed",
        "let me know after {span}, my pasta is boiling", "alert me {span} from this moment"),
    "play music": ("how about {music} through the speakers", "i'm in the mood for {music}",
        "we would love to dance to {music}", "fill our house with {music}"),
    "stop music": ("silence {music}, my ears hurt", "pause {music}", "enough of {music}, quiet",
        "cut {music}, it's noisy"),
    "heating up": ("i'm shivering in our {room}", "our {room} feels chilly, warm it up",
        "bump up the thermostat of our {room}", "give our {room} some extra warmth"),
    "heating down": ("i'm sweating in our {room}", "cool our {room} down a bit", "our {room} feels like an oven",
        "our {room} is boiling"),
    "lock door": ("bolt our {door}", "secure our {door} against burglars", "did anyone leave our {door} unlocked",
        "put a key in our {door} and turn it"),
    "weather": ("should i carry an umbrella {day}", "any chance of snow {day}",
        "give me a forecast for the sky {day}", "are storms coming {day}"),
    "shopping list": ("we ran out of {item}", "note down {item} for the supermarket",
        "i'll pick up {item} at the grocery store", "our fridge has run out of {item}"),
    "phone call": ("ring {person}", "connect me with {person}", "could you reach {person} by telephone",
        "have {person} on the line"),
    "clean floor": ("hoover our {room}", "mop up crumbs lying around our {room}", "our {room} carpet looks filthy",
        "get rid of dirt under our {room} table"),
}  # fmt: skip

# math: split -> operation -> templates. {A} is a number with its noun ("1 coin"), {b} a number, {os} the plural.
MATH: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "add": (
            "{name} has {A} and gets {b} more. How many {os} does {name} have now?",
            "{name} finds {A}. Then {name} finds {b} more. How many {os} is that in all?",
            "There are {A} in a box. {name} puts in {b} more. How many {os} are in the box?",
            "{name} buys {A} on Monday and {b} on Tuesday. How many {os} is that together?",
            "{name} has {A}. A friend brings {b} more. How many {os} do they have?",
        ),
        "subtract": (
            "{name} has {A} and gives away {b}. How many {os} are left?",
            "There are {A} on a table. {name} takes {b} away. How many {os} are left on the table?",
            "{name} had {A} but lost {b}. How many {os} does {name} still have?",
            "There are {A} in a bag. {name} pulls out {b}. How many {os} are still in the bag?",
            "{name} carried {A} home but dropped {b}. How many {os} did {name} bring home?",
        ),
    },
    "test": {
        "add": (
            "Starting with {A}, {name} collected another {b}. What is the total?",
            "Grandfather handed {name} {A}, plus {b} extra for a birthday. What number of {os} was received?",
            "A jar with {A} was filled by {name} with an additional {b}. What does it contain?",
        ),
        "subtract": (
            "Out of {A}, {name} used up {b}. What number remains?",
            "{name} owned {A} before {b} went missing. What is the remaining count?",
            "From {A}, {b} got thrown out by {name}. What number of {os} was kept?",
        ),
    },
}

# code: split -> command -> phrases. {steps}, {times}, {seconds} carry a unit; {n} is bare; answers leave {obj} out.
CODE: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "fwd": ("move the robot forward {steps}", "go forward {n}", "drive ahead {steps}"),
        "back": ("move the robot back {steps}", "go back {n}", "drive in reverse {steps}"),
        "left": ("turn left {times}", "turn to the left {times}", "make a left turn {times}"),
        "right": ("turn right {times}", "turn to the right {times}", "make a right turn {times}"),
        "wait": ("wait {n}", "wait for {seconds}", "do nothing for {seconds}"),
        "beep": ("beep {times}", "make a sound {times}", "play the beep {times}"),
        "grab": ("grab the {obj}", "pick up the {obj}", "take the {obj}"),
        "drop": ("drop the {obj}", "put down the {obj}", "put the {obj} on the floor"),
    },
    "test": {
        "fwd": ("advance {steps}", "walk straight on, {steps}"),
        "back": ("move backwards by {steps}", "back off {steps}"),
        "left": ("rotate leftwards {times}", "spin left {times}"),
        "right": ("rotate rightwards {times}", "spin right {times}"),
        "wait": ("pause {seconds}", "rest, waiting {seconds}"),
        "beep": ("let it beep, {times}", "honk {times}"),
        "grab": ("seize that {obj}", "get hold of that {obj}"),
        "drop": ("release that {obj}", "let that {obj} fall"),
    },
}


def make_rows(task: str, split: str, n: int, seed: int = 0) -> list[dict[str, object]]:
    """Return n chat rows of one task, no prompt twice, labels balanced to within one row.

    Args:
        task: one of TASKS.
        split: ``train`` or ``test``; the two share no template and no prompt.
        n: number of rows, at least 1.
        seed: the same seed gives the same rows.

    Returns:
        Rows ``{"messages": [user, assistant], "task": task}``; ``math`` rows add ``"final"``, the number as a string.

    Raises:
        ValueError: unknown task or split, n below 1, or n above the number of distinct rows.
    """
    most = distinct_rows(task, split, seed)
    if not 1 <= n <= most:
        raise ValueError(f"n must be between 1 and {most} (the distinct {split} rows of {task!r}), got {n}")
    rng = random.Random(f"{task}/{split}/{seed}")
    pools = _pools(task, split, rng)
    labels = sorted(pools)
    rng.shuffle(labels)  # else a small n would always favour the same labels
    pairs = [pools[labels[i % len(labels)]][i // len(labels)] for i in range(n)]
    rng.shuffle(pairs)
    return [_row(task, prompt, answer) for prompt, answer in pairs]


def distinct_rows(task: str, split: str, seed: int = 0) -> int:
    """Return the largest n that make_rows accepts: labels times the rows of the smallest label."""
    pools = _pools(task, split, random.Random(f"{task}/{split}/{seed}"))
    return len(pools) * min(len(pool) for pool in pools.values())


def write_stream(folder: Path, n_train: int = 160, n_test: int = 60, seed: int = 0) -> None:
    """Write train/T.jsonl and test/T.jsonl for every task T, and order.json, under folder.

    Args:
        folder: made if missing; files of the same names are overwritten.
        n_train, n_test, seed: rows a task and the seed, passed to make_rows.

    Raises:
        ValueError: as make_rows; nothing is written then.
    """
    sizes = {"train": n_train, "test": n_test}
    files = {(split, task): make_rows(task, split, sizes[split], seed) for split in SPLITS for task in TASKS}
    for (split, task), rows in files.items():
        path = folder / split / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(list(TASKS)) + "\n", encoding="utf-8")


def _row(task: str, prompt: str, answer: str) -> dict[str, object]:
    messages = [{"role": "user", "content": PREFIXES[task] + prompt}, {"role": "assistant", "content": answer}]
    row: dict[str, object] = {"messages": messages, "task": task}
    return row | {"final": answer} if task == "math" else row


def _pools(task: str, split: str, rng: random.Random) -> Pools:
    makers = {"home": _home, "math": _math, "code": _code}
    if task not in makers:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be train or test, got {split!r}")
    return makers[task](split, rng)


def _home(split: str, rng: random.Random) -> Pools:
    templates, carriers = HOME_TRAIN if split == "train" else HOME_TEST, WORDS[split]["carrier"]
    pools: Pools = {}
    for label, texts in templates.items():
        groups = [[(rng.choice(carriers).format(said), label) for said in _fill(text, split)] for text in texts]
        pools[label] = _interleave(groups, rng)
    return pools


def _math(split: str, rng: random.Random) -> Pools:
    # One row for each template and pair of numbers, a in 1..10 and b in 1..5, so results lie in 0..15.
    pools: Pools = {}
    for operation, texts in MATH[split].items():
        sign = 1 if operation == "add" else -1
        numbers = [(a, b) for a, b in itertools.product(range(1, 11), range(1, 6)) if a + sign * b >= 0]
        groups = [[(_problem(text, split, a, b, rng), str(a + sign * b)) for a, b in numbers] for text in texts]
        pools[operation] = _interleave(groups, rng)
    return pools


def _problem(text: str, split: str, a: int, b: int, rng: random.Random) -> str:
    name, thing = rng.choice(WORDS[split]["name"]), rng.choice(WORDS[split]["thing"])
    return text.format(name=name, A=_count(a, thing), b=b, os=thing + "s")


def _code(split: str, rng: random.Random) -> Pools:
    # Half of a label's rows are one command, half are two that begin with it.
    single = {verb: _commands(verb, split) for verb in CODE[split]}
    pools: Pools = {}
    for verb, own in single.items():
        double: list[Pair] = []
        for other, joiner, _ in itertools.product(single, WORDS[split]["joiner"], range(3)):
            (text, command), (text2, command2) = rng.choice(own), rng.choice(single[other])
            if other != verb:
                double.append((joiner.format(text, text2), f"{command}; {command2}"))
        pools[verb] = _interleave([own, double], rng)
    return pools


def _commands(verb: str, split: str) -> list[Pair]:
    pairs: dict[str, str] = {}
    for phrase, n, obj in itertools.product(CODE[split][verb], range(1, 10), WORDS[split]["obj"]):
        times = {1: "once", 2: "twice"}.get(n, f"{n} times")
        text = phrase.format(n=n, steps=_count(n, "step"), seconds=_count(n, "second"), times=times, obj=obj)
        pairs[text] = verb if "{obj}" in phrase else f"{verb} {n}"
    return list(pairs.items())


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _fill(template: str, split: str) -> list[str]:
    slot = template[template.index("{") + 1 : template.index("}")]  # a home template has exactly one
    return [template.format(**{slot: word}) for word in WORDS[split][slot]]


def _interleave(groups: Iterable[Sequence[Pair]], rng: random.Random) -> list[Pair]:
    # Shuffle each group, then take one from each in turn: every beginning of the result shows all templates evenly.
    shuffled = [rng.sample(group, len(group)) for group in groups]
    rounds = itertools.zip_longest(*rng.sample(shuffled, len(shuffled)))
    return list(dict.fromkeys(pair for turn in rounds for pair in turn if pair is not None))


def main() -> None:
    """Write the three data sets into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Write three small chat data sets: home, math, code.")
    parser.add_argument("dir", type=Path, help="folder to write into")
    parser.add_argument("--train", type=int, default=160, metavar="N", help="train rows a task (default 160)")
    parser.add_argument("--test", type=int, default=60, metavar="N", help="test rows a task (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_stream(args.dir, args.train, args.test, args.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
