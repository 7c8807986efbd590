"""Where the preparation scripts left other libraries' files; the command's ``--peers``."""

from __future__ import annotations

import sys
from pathlib import Path


class NotHere(Exception):
    """Why a baseline does not run."""


_folders: list[Path] = []


def use_folder(folder: Path) -> None:
    """Look for prepared packages in a folder."""
    _folders.append(folder)


def add_package(name: str) -> Path:
    """Put a prepared package on the path; `NotHere` if there is none."""
    for folder in _folders:
        place = folder / name
        if place.is_dir():
            if str(place) not in sys.path:
                sys.path.insert(0, str(place))
            return place
    raise NotHere(f"no {name} was prepared (--peers)")
