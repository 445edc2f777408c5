"""Checks whether the program that a benchmark compares with (its peer) is installed. Otherwise it is not measured."""

import importlib.util
import sys


def has_peer(peer: str, modules: str, install: str = "pip install -e '.[peers]'") -> bool:
    """Returns whether all ``modules``, separated by spaces, are installed; prints one line to stderr if one is not."""
    missing = [module for module in modules.split() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{peer} is not measured: {', '.join(missing)} not installed; {install}", file=sys.stderr, flush=True)
    return not missing
