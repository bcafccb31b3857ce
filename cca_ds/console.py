"""Command lines, and lines and progress bars on the console; tqdm is imported when the first is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import cca_ds
from cca_ds.files import expand

Item = TypeVar("Item")


def command_parser(name: str, description: str, **options: str) -> argparse.ArgumentParser:
    """A command's parser, with its module's docstring as it is written, and --version."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=description, formatter_class=formatter, **options)
    parser.add_argument("--version", action="version", version=f"cca_ds {cca_ds.__version__}")
    return parser


def path(text: str) -> Path:
    """A flag's path, with ~ replaced."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """A flag's whole number above zero, of at most nine digits."""
    if not (text.isascii() and text.isdigit()) or not int(text[:10]) or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:80]} is not a whole number above 0")
    return int(text)


def number(text: str, least: float, most: float, whole: bool = False) -> float:
    """A flag's number between two others."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise argparse.ArgumentTypeError(f"{text[:80]} is no {kind} from {least:g} to {most:g}")
    return value


def say(message: str) -> None:
    """One line on the console, without tearing a progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def progress(items: Iterable[Item], description: str, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Pass items through under a bar with rate and time left."""
    from tqdm import tqdm

    yield from tqdm(items, desc=description, total=total, disable=not show, dynamic_ncols=True, file=sys.stderr)
