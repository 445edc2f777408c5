"""Reads emoji drawings from Iconify's npm packages of icons, and finds which emoji each drawing shows."""

import json
import pathlib
import re
import unicodedata


def slug(name: str) -> str:
    """Returns a name as Iconify writes it: ``Côte d’Ivoire`` becomes ``cote-divoire``."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", re.sub("['.]", "", ascii_name.replace("&", "and"))).strip("-")


def without_variation_selector(code_points: str) -> str:
    """Returns the code points in upper case without U+FE0F, which the packages use differently."""
    return "-".join(point for point in code_points.upper().split("-") if point != "FE0F")


class Names:
    """Finds a concept by its name.

    Args:
      labels: the name of each concept by its key.
      unicode_names: Unicode's own names by code points, which older icon sets use.
    """

    def __init__(self, labels: dict[str, str], unicode_names: dict[str, str]):
        self.keys = set(labels)
        known = {without_variation_selector(points): name for points, name in unicode_names.items()}
        self._tables = [_unique(labels), _unique({key: known[key] for key in labels if key in known})]
        # fxemoji writes names without hyphens.
        self._joined = [{name.replace("-", ""): key for name, key in table.items()} for table in self._tables]

    def find(self, name: str, joined: bool) -> str | None:
        """Returns the key of the concept that has this name, or None if no concept or several concepts have it."""
        tables = self._joined if joined else self._tables
        return next((table[name] for table in tables if name in table), None)


def _unique(names: dict[str, str]) -> dict[str, str]:
    keys = {}
    for key, name in names.items():
        keys.setdefault(slug(name), []).append(key)
    return {name: found[0] for name, found in keys.items() if len(found) == 1}


def icon_names(style: str) -> dict[str, str | None]:
    """Returns the concepts of the icons of a style whose names do not state it; None for an icon to leave out."""
    return json.loads((pathlib.Path(__file__).parent / "icon_names.json").read_text(encoding="utf-8")).get(style, {})


def drawings(package: pathlib.Path, style: str, names: Names) -> dict[str, str]:
    """Returns the SVG text of each concept that the package draws, by the concept's key.

    The package's ``chars.json`` has the icon of each code point. If it is empty, an icon belongs to the concept of the
    same name, or to that in ``icon_names.json``.

    Raises:
      ValueError: two icons show one concept, or ``icon_names.json`` has an icon or concept that does not exist.
    """

    def read(path: pathlib.Path):
        return json.loads(path.read_text(encoding="utf-8"))

    icons = read(package / "icons.json")
    by_hand = icon_names(style)
    if chars := read(package / "chars.json"):
        pairs = [(without_variation_selector(points), name) for points, name in chars.items()]
    else:
        everything = [*icons["icons"], *icons.get("aliases", {})]
        unknown = [name for name, key in by_hand.items() if name not in everything or key not in {*names.keys, None}]
        if unknown:
            raise ValueError(f"icon_names.json, {style}: no such icon or concept: {', '.join(unknown)}")
        pairs = [
            (by_hand[name] if name in by_hand else names.find(concept_name(name), style == "fxemoji"), name)
            for name in everything
        ]
    chosen = {}
    for key, name in pairs:
        if key in names.keys and svg_of(icons, chosen.setdefault(key, name)) != svg_of(icons, name):
            raise ValueError(f"{style}: {chosen[key]} and {name} are both {key}: choose one in icon_names.json")
    return {key: svg_of(icons, name) for key, name in chosen.items()}


def concept_name(icon: str) -> str:
    """Returns emojibase's form of an icon's name: ``flag-france`` for EmojiOne's and Noto's ``flag-for-france``."""
    return re.sub("^flag-for-(flag-)?", "flag-", icon)


def svg_of(icons: dict, name: str) -> str:
    """Returns the SVG text of an icon or an alias, centered in a square."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"][alias.get("parent", name)]
    if unknown := {*alias, *icon} - {"parent", "body", "width", "height", "hFlip", "hidden"}:
        raise ValueError(f"{name}: cannot draw {', '.join(sorted(unknown))}")
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    space = "http://www.w3.org"
    return f'<svg xmlns="{space}/2000/svg" xmlns:xlink="{space}/1999/xlink" viewBox="{box}">{body}</svg>'
