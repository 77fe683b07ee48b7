r"""An assistant that learns: edgecl inside a program of your own, to be read in one sitting.

    python examples/assistant.py [--home DIR] [--model smollm2] [--idle MINUTES]

It answers what you type. `/fix TEXT` says what the last answer should have been, `/good` that it was right; nothing else is
kept. `/learn` begins a night now, and so does a while without a word, once there is something to learn. A night runs beside
you: you go on asking, and what it has published answers from your next question on. `/wait` waits for it, `/learned` asks
again what you have corrected, `/quit` ends, and stops a night that runs. Lines from a pipe are a script:

    printf '%s\n' 'Who waters the plants?' '/fix Mira, on Fridays.' /learn /wait /learned | python examples/assistant.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edgecl import EdgeclError, Example, Learner


class Assistant:
    """What it has to say goes to `say`: from the thread that calls `hear`, and from that of a night."""

    def __init__(self, learner: Learner, say: Callable[[str], None] = print, idle_minutes: float = 15) -> None:
        self.learner, self.say, self.idle_s = learner, say, 60 * idle_minutes
        self.question = self.answer = ""
        self.corrected: dict[str, str] = {}
        self.is_anything_new = False
        self.night: threading.Thread | None = None
        self.idle = threading.Timer(0, self.begin_night)

    def hear(self, line: str) -> None:
        """Answer a question, or do what a /command asks for; what goes wrong is said, too."""
        self.idle.cancel()
        command, _, text = line.strip().partition(" ")
        try:
            if command in ("/fix", "/good"):
                self.observe(text.strip() if command == "/fix" else self.answer)
            elif command == "/learn":
                self.begin_night()
            elif command == "/wait" and self.night:
                self.night.join()
            elif command == "/learned":
                self.show_learned()
            elif command and not command.startswith("/"):
                self.question, self.answer = line.strip(), self.learner.ask(line.strip())
                self.say(self.answer)
        except EdgeclError as error:
            self.say(f"({error})")
        self.wait_for_silence()

    def wait_for_silence(self) -> None:
        """Have a night begin after a while, where there is something to learn."""
        self.idle.cancel()
        if self.is_anything_new:
            self.idle = threading.Timer(self.idle_s, self.begin_night)
            self.idle.daemon = True
            self.idle.start()

    def observe(self, answer: str) -> None:
        """Have the last question learned with an answer; a later one to the same question takes its place."""
        if not self.question or not answer:
            self.say("(ask something first; then /fix TEXT says what is right)")
            return
        report = self.learner.observe([Example((("user", self.question), ("assistant", answer)), source="assistant")])
        if report.bad:
            self.say(f"({report.bad[0][1]})")
            return
        self.corrected[self.question] = self.answer = answer
        self.is_anything_new = True
        self.say("(to be learned)")

    def begin_night(self) -> None:
        """Learn in a thread, unless a night runs already; what came during one is learned a while after it."""
        if not (self.night and self.night.is_alive()):
            self.is_anything_new = False
            self.night = threading.Thread(target=self.learn)
            self.night.start()

    def learn(self) -> None:
        """Run a night and say how it ended; `ask` takes up what it published, so there is nothing to swap here."""
        try:
            report = self.learner.adapt()
        except EdgeclError as error:  # nothing to learn, another night, no memory, the learner was closed ...
            self.say(f"(no night: {error})")
        else:
            outcome = f"generation {report.generation} answers now" if report.accepted else f"refused: {report.reason}"
            answers = "1 answer" if report.n_new == 1 else f"{report.n_new} answers"
            self.say(f"(learned {answers} in {report.train_s:.0f} s; {outcome})")
        self.wait_for_silence()

    def show_learned(self) -> None:
        """Ask again what was corrected since this program began."""
        for question, wanted in self.corrected.items():
            self.say(f"{question}\n  wanted: {wanted}\n  now:    {self.learner.ask(question)}")
        self.say(f"(generation {self.learner.status()['generation']} answers)")


def main(arguments: Sequence[str] | None = None, lines: Iterable[str] = sys.stdin, say: Callable[[str], None] = print) -> None:
    """Talk until the lines end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="default: one that is thrown away at the end")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--idle", type=float, default=15, help="minutes without a word before a night begins")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="edgecl-assistant-") as folder:
        home = args.home or Path(folder) / "home"
        is_made = (home / "edgecl.toml").exists()
        with Learner.open(home) if is_made else Learner.init(args.model, home) as learner:
            assistant = Assistant(learner, say, args.idle)
            for line in lines:
                if line.strip() == "/quit":
                    break
                assistant.hear(line)
            assistant.idle.cancel()
        if assistant.night:
            assistant.night.join()  # `close` has stopped it; it says so


if __name__ == "__main__":
    main()
