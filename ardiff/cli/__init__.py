"""The `ardiff` command: one verb per job, `--help` on each; the modules beside this one hold a family of verbs each.

torch and everything built on it are imported by the verb that runs, so that `ardiff --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence

from ardiff.cli import data, evaluation, generation, hosting, training


VERBS = generation.VERBS | training.VERBS | data.VERBS | evaluation.VERBS | hosting.VERBS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or 2 after one line on stderr when the input was wrong.

    A verb that checks something returns 1 when it found something wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv).parse_args(argv)
    try:
        return VERBS[args.verb].run(args) or 0
    except (ValueError, OSError) as error:
        print(f"ardiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`; only the verb in its first place gets its options, some of which import torch to be listed."""
    parser = argparse.ArgumentParser(prog="ardiff", description="Asynchronous auto-regressive video diffusion.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb_parser = verbs.add_parser(name, help=verb.help, description=verb.help)
        if list(argv[:1]) == [name]:
            verb.add_options(verb_parser)
    return parser
