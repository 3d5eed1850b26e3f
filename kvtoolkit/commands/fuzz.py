"""Test an allocator, ours or your own, with random programs; on a GPU `lockfree` from inside kernels too."""

import argparse
import sys

from allocators._command_line import Parser, quietly
from allocators._fuzz_arguments import add_arguments

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Run ``kvtoolkit fuzz`` with parsed arguments; returns the exit status."""
    # imported here, so that the help can be read without Hypothesis
    from allocators.testing import fuzz
    from kvtoolkit.cuda.pool import can_be_made

    if args.allocator == "lockfree" and can_be_made() and not any(one.startswith("device=") for one in args.option):
        args.option.append("device=0")
    if not any(one.startswith("device=") for one in args.option):
        return fuzz.main(args)
    from kvtoolkit.commands.fuzz_kernels import run_kernels

    return fuzz.main(args, more={"kernels": run_kernels})


if __name__ == "__main__":
    _parser = Parser("python -m kvtoolkit.commands.fuzz", description=__doc__)
    add_arguments(_parser)
    sys.exit(quietly(lambda: main(_parser.parse_args())))
