"""What lies ready: shipped recipes, and the cache of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.base.errors import ExitCode, InputError
from quantkit.cli.app import EXIT_CODES, JsonOpt, SetOpt, cache_app, recipes_app, reported


@cache_app.command("list")
@reported
def cache_list(as_json: JsonOpt = False) -> None:
    """Name what is kept, where, and how much room it takes."""
    from quantkit.calibration import cache
    from quantkit.cli.console import Console
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
    from quantkit.cli.console import Console

    freed = cache.clear()
    Console(as_json=as_json).show({"freed_bytes": freed}, f"{freed / 1e6:,.1f} MB freed")


@recipes_app.command("list")
@reported
def recipes_list(as_json: JsonOpt = False) -> None:
    """Name the shipped recipes."""
    from quantkit.cli.console import Console
    from quantkit.recipes.recipe import shipped_recipes
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

    from quantkit.cli.console import Console
    from quantkit.recipes.recipe import load_recipe

    loaded = load_recipe(recipe, settings).recipe
    content: dict[str, Any] = loaded.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    Console(as_json=as_json).show(
        {**content, "digest": loaded.digest}, f"{text}# digest: {loaded.digest}"
    )


@recipes_app.command("check", epilog=EXIT_CODES)
@reported
def recipes_check(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of recipes; the shipped ones if unset.")
    ] = None,
    lock: Annotated[Path | None, typer.Option(help="FOLDER/recipes.lock if unset.")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Lock what is new; what is locked never changes.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Compare recipes and suites with their lock: a published version never changes."""
    from quantkit.base import resources
    from quantkit.cli.console import Console
    from quantkit.recipes import lock as locks
    from quantkit.reports.terminal import listing

    folder = folder or resources.recipes()
    if not folder.is_dir():
        raise InputError("isn't a folder", subject=str(folder))
    place = lock or folder / locks.LOCK
    found = locks.check(folder, place)
    problems = [(p.where, p.what, p.fix) for p in found.problems]
    if found.new and write and not problems:
        locks.write(place, found)
    elif not write:
        unlocked = ("isn't locked", "Run quantkit recipes check --write.")
        problems += [(" ".join(entry), *unlocked) for entry in found.new]
    names = ("document", "problem", "fix")
    value = {
        "folder": str(folder),
        "lock": str(place),
        "problems": [dict(zip(names, problem, strict=True)) for problem in problems],
        "new": [" ".join(entry) for entry in found.new],
    }
    if problems:
        Console(as_json=as_json).show(value, listing(names, problems))
        raise typer.Exit(int(ExitCode.GATE_FAILED))
    kept = f", {len(found.new)} of them new" if found.new else ""
    count = len(found.locked) + len(found.new)
    Console(as_json=as_json).show(value, f"{place}: {count} lines hold{kept}")
