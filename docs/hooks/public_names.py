"""A public name that no page shows, or that has no docstring, fails the build."""

from __future__ import annotations

from typing import TYPE_CHECKING

import griffe
from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig

ROOTS = ("reference", "fast", "conformance")
PACKAGES = ("trysquare_reference", "trysquare")


def on_env(env: object, config: MkDocsConfig, **_: object) -> object:
    """MkDocs calls this once every page is rendered, when mkdocstrings knows each name that it has shown."""
    shown = set(config.plugins["mkdocstrings"].handlers.inventory)
    public = {name: documented for package in PACKAGES for name, documented in public_names(package)}
    problems = [f"{name} stands on no page" for name in sorted(public) if name not in shown]
    problems += [f"{name} has no docstring" for name, documented in sorted(public.items()) if not documented]
    if problems:
        raise PluginError("public names without documentation:\n  " + "\n  ".join(problems))
    return env


def public_names(package: str) -> Iterator[tuple[str, bool]]:
    """Dotted names that users may import, with whether each is documented: exports and their public members."""
    loaded = griffe.load(package, search_paths=ROOTS, resolve_aliases=True)
    for export in loaded.exports or ():
        name = str(export)
        yield from members(loaded[name], f"{package}.{name}")


def members(item: griffe.Object | griffe.Alias, name: str) -> Iterator[tuple[str, bool]]:
    """An object and what is public inside it. What a class inherits from torch is torch's to document."""
    yield name, item.has_docstring
    inside = item.members.values() if item.is_module or item.is_class else ()
    for member in inside:
        if not member.name.startswith("_") and not member.is_alias and (member.is_function or member.is_class):
            yield from members(member, f"{name}.{member.name}")
