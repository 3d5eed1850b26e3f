"""The options of the fuzzer's command line. They are apart from `allocators.testing`, which needs Hypothesis."""

import argparse

from allocators._command_line import integer, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `allocators.testing.fuzz.main` reads."""
    parser.add_argument("--allocator", required=True, help="a name, or package.module:Class")
    parser.add_argument(
        "--seconds",
        type=number(0, infinite=True),
        default=60.0,
        help="begin no new round after that (default %(default)s); a short round of each kind always comes first",
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of everything drawn (default %(default)s)")
    parser.add_argument("--num-granules", type=integer(1), help="size of the pool (default: several in turn)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the allocator; repeatable"
    )
    parser.add_argument("--first-round", type=integer(0), default=0, help="begin at this round (default %(default)s)")
