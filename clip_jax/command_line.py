"""What commands share in reading their flags."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """One that ends the program with a line, where argparse prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class RaisingParser(argparse.ArgumentParser):
    """One that raises ValueError, where argparse prints the usage and ends the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
