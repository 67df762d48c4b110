"""``unialign``: one table of command → function.

Errors a user can act on are printed on one line and end with exit code 2, Ctrl-C ends with 130. Nothing heavy is
imported before a command runs. Knows nothing of what commands do.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from unialignment import __version__
from unialignment.errors import UniAlignmentError


@dataclass(frozen=True)
class Command:
    """One entry of the table.

    Attributes:
        summary: One line for ``unialign --help``.
        run: ``module:function`` below ``unialignment.commands``.
        example: Shown by ``--help``.
        configure: Function of the same module that declares the arguments; ``None`` hands everything after the
            command's name to ``run``, which parses it itself.
    """

    summary: str
    run: str
    example: str
    configure: str | None = None


COMMANDS: dict[str, Command] = {
    "generate": Command(
        "draw pictures from text",
        "images:generate",
        'unialign generate "a dog to the left of a red apple" --seed 1 -o dog.png',
        "configure_generate",
    ),
    "edit": Command(
        "change a picture by instruction",
        "images:edit",
        'unialign edit "replace the dog with a cat" dog.png -o cat.png',
        "configure_edit",
    ),
    "perceive": Command(
        "draw a picture's depth map, an object's mask, or edges",
        "images:perceive",
        'unialign perceive dog.png --kind segment --of "the dog" -o mask.png',
        "configure_perceive",
    ),
    "control": Command(
        "draw a picture that follows a map",
        "images:control",
        'unialign control "a dog on a blue background" depth.png --kind depth -o dog.png',
        "configure_control",
    ),
    "compose": Command(
        "draw a new picture from several given ones",
        "images:compose",
        'unialign compose "put the subject of image 1 next to the subject of image 2" dog.png cat.png -o both.png',
        "configure_compose",
    ),
    "caption": Command("describe pictures", "texts:caption", "unialign caption dog.png cat.png", "configure_caption"),
    "answer": Command(
        "answer questions about a picture",
        "texts:answer",
        'unialign answer dog.png "what is to the left of the apple?"',
        "configure_answer",
    ),
    "infill": Command(
        "fill the gaps of a text about a picture",
        "texts:infill",
        'unialign infill dog.png "a [MASK] to the left of a red [MASK]"',
        "configure_infill",
    ),
    "rewrite": Command(
        "say a prompt as the model's own captions do, what it leaves open decided",
        "texts:rewrite",
        'unialign rewrite "a dog left of an apple, on a blue background"',
        "configure_rewrite",
    ),
    "embed": Command(
        "map pictures and texts to vectors of one space",
        "texts:embed",
        'unialign embed --image dog.png --text "a dog" "a cat"',
        "configure_embed",
    ),
    "train": Command(
        "train a model", "system:train", "unialign train configs/nano.yaml optimizer.lr=5e-4", "configure_train"
    ),
    "data": Command(
        "check a data set of your own: counts, sizes, examples, what is wrong",
        "data:run",
        "unialign data check examples/data/editing/manifest.jsonl",
        "configure",
    ),
    "cache": Command(
        "run autoencoder, text encoder and teachers once over the training data",
        "cache:run",
        "unialign cache examples/data/train.yaml --out runs/own-data/features",
        "configure",
    ),
    "runs": Command(
        "list, compare and plot training runs",
        "runs:runs",
        "unialign runs runs --compare --plot out/runs.html",
        "configure_runs",
    ),
    "merge": Command(
        "write a model with a LoRA, or what several runs changed, added to its weights",
        "weights:merge",
        "unialign merge models/base runs/mine/lora --out models/mine",
        "configure_merge",
    ),
    "grow": Command(
        "write a larger model with the same outputs, to train on from there",
        "weights:grow",
        "unialign grow nano --layers 12 --out models/nano-12",
        "configure_grow",
    ),
    "convert": Command(
        "write a model in another folder layout",
        "weights:convert",
        "unialign convert models/published --out models/ours",
        "configure_convert",
    ),
    "plan": Command(
        "predict the memory of a configuration, and what makes it fit",
        "weights:plan",
        "unialign plan configs/sd3-medium.yaml --gpu-memory 24GiB",
        "configure_plan",
    ),
    "eval": Command(
        "measure a model on held-out scenes",
        "system:evaluate",
        "unialign eval semgen-world --model nano --limit 100 --json",
        "configure_evaluate",
    ),
    "ablate": Command(
        "compare arms of a training recipe over seeds",
        "ablate:ablate",
        "unialign ablate configs/ablation.yaml --jobs 2",
        "configure_ablate",
    ),
    "card": Command(
        "write a model's card from its evaluation", "system:card", "unialign card --model nano", "configure_card"
    ),
    "world": Command("build the scene world's sprite pack", "system:world", "unialign world build", "configure_world"),
    "info": Command(
        "say what is installed, what a model consists of, or how a picture was made",
        "system:info",
        "unialign info nano",
        "configure_info",
    ),
    "distill": Command(
        "teach a few-step student what a trained model draws in many",
        "distill:distill",
        "unialign distill configs/distill-nano.yaml budget_seconds=600",
        "configure",
    ),
    "bench": Command(
        "measure time, memory and operations of the tasks",
        "bench:bench",
        "unialign bench --size 100M --pixels 256",
        "configure",
    ),
    "serve": Command(
        "serve the OpenAI-compatible API and the web page on one port",
        "serve:serve",
        "unialign serve --port 8000 --model nano",
        "configure",
    ),
    "demo": Command("run every task once and write a page with the results", "system:demo", "unialign demo"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake on one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def _function(name: str, run: str) -> Callable[..., int | None]:
    module = importlib.import_module(f"unialignment.commands.{run.partition(':')[0]}")
    function: Callable[..., int | None] = getattr(module, name)
    return function


def _overview() -> _Parser:
    table = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="unialign",
        description="One model that generates, edits, perceives, composes, captions and answers.",
        epilog=f"commands:\n{table}\n\n`unialign COMMAND --help` explains one, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="unialign COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"unialign {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="see below")
    return parser


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        parser = _overview()
        if not argv:
            parser.print_help()
            return 2
        parser.parse_args(argv)
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UniAlignmentError(f"unknown command {name!r}; {hint}")
    command = COMMANDS[name]
    run = _function(command.run.partition(":")[2], command.run)
    if command.configure is None:
        return run(rest) or 0
    parser = _Parser(
        prog=f"unialign {name}",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=f"example: {command.example}",
    )
    _function(command.configure, command.run)(parser)
    args = parser.parse_args(rest)
    args.command = name
    return run(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` unless given.

    Returns:
        0, or the exit code of the failure: 2 for a mistake of the user's, 130 for Ctrl-C. ``--help`` and argparse's own
        errors leave through :class:`SystemExit`, as usual.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UniAlignmentError as error:
        message = " ".join(str(error).split())
        print(f"unialign: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nunialign: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, e.g. `head`, has gone. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        print("unialign: error: out of memory; use a smaller --batch-size or fewer pictures", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
