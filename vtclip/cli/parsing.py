# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, checked values, one-line errors, output. No torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from vtclip import __version__
from vtclip.cli.colours import is_dumb, paint
from vtclip.environment import is_first
from vtclip.extensions.registry import METHODS as METHODS_GROUP
from vtclip.extensions.registry import names_beside
from vtclip.files import printable
from vtclip.names import MAX_SEED, METHODS, nearest


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and the nearest option to a wrong one.

    An option that stores a value is refused where it is given twice.
    options: the option strings of the parser, those of its groups too.
    flags: those of them that take no value.
    actions: every argument by the name of its value.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.options = ["-h", "--help"]
        self.flags = {"-h", "--help"}
        self.actions: dict[str, argparse.Action] = {}
        self.words: list[str] = []  # that are parsed
        self.hidden: Callable[[argparse.Action], bool] | None = None  # left out of the help
        self.more_help: Callable[[], str] | None = None  # what the end of the help says
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, Once)
        self._note_options(self)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        return self._note_options(super().add_argument_group(*args, **kwargs))

    def add_mutually_exclusive_group(self, **kwargs: Any) -> Any:
        return self._note_options(super().add_mutually_exclusive_group(**kwargs))

    def _note_options(self, group: Any) -> Any:
        """`group`, whose `add_argument` also writes the new option into `options`."""
        add = group.add_argument

        def add_argument(*names: str, **settings: Any) -> argparse.Action:
            action: argparse.Action = add(*names, **settings)
            self.options += action.option_strings
            self.actions.setdefault(action.dest, action)
            if action.nargs == 0:
                self.flags.update(action.option_strings)
            return action

        group.add_argument = add_argument
        return group

    def add_shared(self, *options: str, group: Any = None) -> None:
        """Options that several commands have, with one meaning and one help."""
        for option in options:
            (group or self).add_argument(option, **SHARED[option])

    def add_batch_size(self, option: str, other: str) -> None:
        """The encoder's batch under two names; its value is called as the first."""
        settings = SHARED["--encoder-batch-size"]
        dest = option[2:].replace("-", "_")
        self.add_argument(option, **settings)
        same = {"dest": dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        self.add_argument(other, **{**settings, **same})

    def add_model_of_run(self) -> None:
        self.add_argument("--model", help="path to the weights, if they have moved")

    def format_help(self) -> str:
        shown = {}
        for action in self._actions if self.hidden is not None else ():
            if self.hidden is not None and self.hidden(action):
                shown[action], action.help = action.help, argparse.SUPPRESS
        text = super().format_help()
        for action, words in shown.items():
            action.help = words
        more = "" if self.more_help is None else self.more_help()
        if not more:
            return text
        return "\n".join([text, *map(printable, more.split("\n")), ""])

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, Any]:
        """As argparse does, but a command's positional arguments may stand between its options."""
        self.words = list(args or ())
        if args is not None and self.get_default("parser") is self:
            args = self._positionals_together(list(args))
        return super().parse_known_args(args, namespace)

    def _positionals_together(self, words: list[str]) -> list[str]:
        """`words` with the positional arguments next to each other.

        argparse fills an optional positional with nothing as soon as an option follows the one
        before it. Words are left as they are where an option is unknown: whether the next word is
        its value cannot be told.
        """
        apart, positionals, options = False, list[str](), list[str]()
        queue = words[::-1]
        while queue:
            word = queue.pop()
            if word == "--":
                apart, positionals = True, positionals + queue[::-1]
                break
            if not _like_option(word):
                positionals.append(word)
                continue
            name, has_value, _ = word.partition("=")
            if name not in self.options:
                return words
            options.append(word)
            if name not in self.flags and not has_value and queue and not _like_option(queue[-1]):
                options.append(queue.pop())
        return [*options, "--", *positionals] if apart else positionals + options

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        args: argparse.Namespace
        args, extra = self.parse_known_args(words)
        if extra:
            parser: Parser = getattr(args, "parser", self)  # the command's, where there is one
            hint = nearest(extra[0], parser.options) if extra[0].startswith("-") else ""
            parser.error(f"unknown argument {extra[0]!r}{hint}")
        return args


def _like_option(word: str) -> bool:
    """Whether argparse takes `word` for an option: negative numbers and sentences are values."""
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    return re.fullmatch(r"-\d+|-\d*\.\d+", word) is None


class Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: Any = None,
    ) -> None:
        seen = vars(namespace).setdefault("seen", set())
        if self.dest in seen:
            parser.error(f"{option} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


def one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"unknown name {value!r}{nearest(value, choices)}")
        return value

    return check


def a_method(*more: str) -> Callable[[str], str]:
    """The name of a method, built in or of another package, or one of `more`."""

    def check(value: str) -> str:
        if value in METHODS or value in more:
            return value
        return one_of(*METHODS, *names_beside(METHODS_GROUP), *more)(value)

    return check


def others_line() -> str:
    """A line on the methods that other packages add, for the end of a help; empty without any."""
    others = names_beside(METHODS_GROUP)
    return f"methods of other packages: {', '.join(others)}" if others else ""


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list with commas between, of values that all differ."""

    def check(text: str) -> list[Any]:
        values = [kind(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"values must differ, got {text!r}")
        return values

    return check


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], Any]:
    """A number in low..high; `above`: strictly above low."""

    def check(value: str) -> Any:
        try:
            parsed = kind(value)
        except ValueError:
            word = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{value!r} is not {word}") from None
        if not low <= parsed <= high or (above and parsed == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"in {low:g}..{high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return parsed

    return check


def number_or_all(low: int) -> Callable[[str], int | str]:
    """A number of images from `low` on, or "all"."""

    def check(value: str) -> int | str:
        if value == "all":
            return value
        if not any(letter.isdigit() for letter in value):
            raise argparse.ArgumentTypeError(f"must be a number or all, got {value!r}")
        checked: int = number(int, low, 1_000_000)(value)
        return checked

    return check


count = number(int, 1, 1_000_000)
seed = number(int, 0, MAX_SEED)
SHARED: dict[str, dict[str, Any]] = {
    "--spatial": {
        "metavar": "OPT",
        "help": "spatial features to keep: default, or a kind of the encoder: raw, pooled, "
        "projected, ... (default: what the method needs)",
    },
    "--prompt": {
        "metavar": "NAME", "help": "one prompt of an .npz with several (default: their mean)"
    },
    "--templates": {
        "metavar": "NAME|FILE",
        "help": "imagenet7, imagenet80, text with {}, a .txt or .json of such lines, or a .json of "
        "sentences per class",
    },
    "--test-fraction": {
        "type": number(float, 0, 1), "default": 0.5, "metavar": "F",
        "help": "share of each class that is set apart for the test (default: 0.5)",
    },
    "--augment-passes": {
        "type": number(int, 0, 1000), "default": 0, "metavar": "N",
        "help": "random crops of every training image to train on in addition (default: 0)",
    },
    "--class-names": {
        "metavar": "FILE", "help": "the classes' names where folders are called by ids "
        "(JSON or text: id, name)",
    },
    "--model": {
        "default": "demo", "help": "demo, ViT-B-32:openai, ViT-B-32:/file, local-dir:/dir"
    },
    "--follow-links": {
        "action": "store_true", "help": "also enter folders that are symbolic links"
    },
    "--encoder-batch-size": {
        "type": count, "default": 64, "metavar": "N",
        "help": "images encoded at a time (default: 64)",
    },
    "--cache-dir": {
        "metavar": "DIR", "help": "cache of extracted features (default: ~/.cache/vtclip)"
    },
    "--device": {"help": "cpu, cuda, cuda:N; default: a GPU where there is one"},
    "--threads": {
        "type": number(int, 1, 4096), "metavar": "N", "help": "CPU threads (default: torch's)"
    },
    "--json": {"action": "store_true", "help": "print JSON"},
}  # fmt: skip
# which features of a source are taken, and which of its rows are tested
FEATURES = ("--spatial", "--prompt", "--templates", "--test-fraction", "--augment-passes")


DEMO_NOTE = (
    "note: --model demo is a small model for 64-pixel synthetic pictures; for photos pass "
    "--model ViT-B-32:openai, or a local file as --model ViT-B-32:/path/to/weights.safetensors"
)


def existing(name: str, path: str) -> Path:
    """A path that is there, or an error that names the argument."""
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"{name} {path!a} does not exist")
    return place


def source_path(source: str, data: str | None) -> str | Path:
    """A path that is there, or, with `data` (which is there), the name of a data set."""
    place = Path(source).expanduser()
    if data is None and place.exists():
        return place
    from vtclip.data.sets import find_set

    if data is not None:
        existing("--data", data)
        return find_set(source).name
    try:
        name = find_set(source).name
    except ValueError:
        return existing("SOURCE", source)
    raise ValueError(f"SOURCE {source!a} does not exist; data set {name} needs --data ROOT")


def options_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options to pass on under the names that they have on the command line."""
    return {name: getattr(args, name) for name in names}


def open_classifier(args: argparse.Namespace, folder: Path) -> Any:
    """The classifier of the run in `folder`, with the options --model, --device and --threads."""
    from vtclip.machine import doing, set_threads
    from vtclip.runs.classifier import Classifier

    set_threads(args.threads)
    with doing("loading the model", on_terminal()):
        return Classifier.load(folder, model=args.model, device=args.device)


def on_terminal() -> bool:
    """Whether somebody watches on a terminal that can move its cursor: progress is shown then."""
    return sys.stderr is not None and sys.stderr.isatty() and not is_dumb()


def emit(line: str, how: str = "") -> None:
    """One line on stdout, whatever the names in it hold; `how` is of `colours.CODES`."""
    print(paint(printable(line), how, sys.stdout))


def emit_headline(line: str) -> None:
    """The line that matters most."""
    emit(line, "bold")


def emit_table(text: str) -> None:
    """Lines whose names were made `printable` one by one, so that none of them ends a line."""
    for line in text.split("\n"):
        emit(line)


def emit_json(command: str, value: Mapping[str, Any]) -> None:
    """One object on stdout, in ASCII: what docs/json_output.md says of `command`."""
    from vtclip.files import to_json

    whole = {"command": command, "vtclip_version": __version__, **value}
    print(to_json(whole).decode("ascii").rstrip())


def above_bars() -> AbstractContextManager[Any]:
    """A block that writes to stderr: progress bars, where any are shown, make room and return."""
    if "tqdm" not in sys.modules:
        return nullcontext()
    from tqdm import tqdm

    shown: AbstractContextManager[Any] = tqdm.external_write_mode(file=sys.stderr)
    return shown


def note(line: str, how: str = "") -> None:
    """One line on stderr, where there is one; notes are yellow on a terminal."""
    if sys.stderr is None:
        return
    how = how or ("yellow" if line.startswith("note: ") else "")
    with above_bars():
        sys.stderr.write(f"{paint(printable(line), how, sys.stderr)}\n")


@contextmanager
def demo_model_noted(needed: bool) -> Iterator[None]:
    """Says what the default model is not for when its work begins: after the cheap refusals.

    needed: whether the command encodes images by the default model. Of several processes the first
    says it.
    """
    if not needed or not is_first():
        yield
        return
    from vtclip.clip.loading import saying_of_demo

    with saying_of_demo(lambda: note(DEMO_NOTE)):
        yield


def fail(message: str, status: int = 2) -> NoReturn:
    note(message, "red")
    raise SystemExit(status)
