"""The command line. Heavy imports wait until a command needs them, so `--help` is instant."""

import importlib
import sys

from vpt.cli.app import app
from vpt.errors import InputError

for room in (
    "training",
    "streams",
    "benchmarks",
    "transfer",
    "artefacts",
    "sharing",
    "serving",
    "listing",
):  # as --help lists them
    importlib.import_module(f"vpt.cli.{room}")


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 1."""
    try:
        app(prog_name="vpt")
    except InputError as error:
        print(f"vpt: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a folder that can't be written, a full disk
        print(f"vpt: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
