"""quantkit recipes list"""

from __future__ import annotations

from quantkit.cli.app import handles_errors, recipes_app
from quantkit.cli.options import JsonOpt


@recipes_app.command("list")
@handles_errors
def recipes_list_command(as_json: JsonOpt = False) -> None:
    """Name the shipped recipes."""
    from quantkit.cli.console import Console
    from quantkit.recipes.recipe import shipped_recipes
    from quantkit.reports.terminal import listing

    recipes = [loaded.recipe for loaded in shipped_recipes()]
    rows = [(r.name, r.version, r.digest[:12], r.description) for r in recipes]
    keys = ("name", "version", "digest", "description")
    values = [{key: getattr(recipe, key) for key in keys} for recipe in recipes]
    Console(as_json=as_json).show(values, listing(keys, rows))
