"""A public name that no page shows, or that has no docstring, fails the build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import griffe
from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig

ROOTS = ("reference", "fast", "conformance")
Item: TypeAlias = griffe.Object | griffe.Alias
PACKAGES = ("trysquare_reference", "trysquare")


def on_env(env: object, config: MkDocsConfig, **_: object) -> object:
    """MkDocs calls this once every page is rendered, when mkdocstrings knows each name that it has shown."""
    mkdocstrings: Any = config.plugins["mkdocstrings"]
    shown = set(mkdocstrings.handlers.inventory)
    public = [found for package in PACKAGES for found in public_objects(package)]
    problems = [f"{item.path} stands on no page" for exported, item in public if not {exported, item.path} & shown]
    problems += [f"{item.path} has no docstring" for _, item in public if not item.has_docstring]
    if problems:
        raise PluginError("public names without documentation:\n  " + "\n  ".join(sorted(problems)))
    return env


def public_objects(package: str) -> Iterator[tuple[str, Item]]:
    """What users may import, by exported name: a package's exports and their public members."""
    loaded = griffe.load(package, search_paths=ROOTS)
    for name in map(str, loaded.exports or ()):
        defined = loaded.imports[name]  # a function may have the name of the module that it stands in
        yield from members(f"{package}.{name}", loaded[defined.removeprefix(f"{package}.")])


def members(exported: str, item: Item) -> Iterator[tuple[str, Item]]:
    """An object and what is public inside it. What a class inherits from torch is torch's to document."""
    yield exported, item
    for member in item.members.values() if item.is_module or item.is_class else ():
        if not member.name.startswith("_") and not member.is_alias and (member.is_function or member.is_class):
            yield from members(f"{exported}.{member.name}", member)
