"""What lies ready: shipped recipes, and the cache of statistics."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantkit.cli.app import (
    JsonOpt,
    SetOpt,
    cache_app,
    recipes_app,
    reported,
)


@cache_app.command("list")
@reported
def cache_list(as_json: JsonOpt = False) -> None:
    """Name what is kept, where, and how much room it takes."""
    from quantkit.calibration import cache
    from quantkit.console import Console
    from quantkit.reports.terminal import listing

    entries = cache.entries()
    values = [
        {"path": str(entry.path), "bytes": entry.nbytes, "about": entry.about} for entry in entries
    ]
    rows = [
        (
            entry.path.name[:12],
            f"{entry.nbytes / 1e6:,.1f}",
            entry.about.get("checkpoint", "")[:12],
            entry.about.get("calibration rows", "")[:12],
        )
        for entry in entries
    ]
    table = listing(("entry", "MB", "checkpoint", "calibration rows"), rows)
    table.title = f"{cache.directory()}, at most {cache.limit() / 1e9:g} GB"
    Console(as_json=as_json).show(values, table)


@cache_app.command("clear")
@reported
def cache_clear(as_json: JsonOpt = False) -> None:
    """Remove everything that is kept."""
    from quantkit.calibration import cache
    from quantkit.console import Console

    freed = cache.clear()
    Console(as_json=as_json).show({"freed_bytes": freed}, f"{freed / 1e6:,.1f} MB freed")


@recipes_app.command("list")
@reported
def recipes_list(as_json: JsonOpt = False) -> None:
    """Name the shipped recipes."""
    from quantkit.console import Console
    from quantkit.recipe import shipped_recipes
    from quantkit.reports.terminal import listing

    recipes = [loaded.recipe for loaded in shipped_recipes()]
    rows = [(r.name, r.version, r.digest[:12], r.description) for r in recipes]
    keys = ("name", "version", "digest", "description")
    values = [{key: getattr(recipe, key) for key in keys} for recipe in recipes]
    Console(as_json=as_json).show(values, listing(keys, rows))


@recipes_app.command("show")
@reported
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    settings: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show a recipe with every default written out, and its digest."""
    import yaml

    from quantkit.console import Console
    from quantkit.recipe import load_recipe

    loaded = load_recipe(recipe, settings).recipe
    content: dict[str, Any] = loaded.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    Console(as_json=as_json).show(
        {**content, "digest": loaded.digest}, f"{text}# digest: {loaded.digest}"
    )
