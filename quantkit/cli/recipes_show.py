"""quantkit recipes show"""

from __future__ import annotations

from typing import Any

import quantkit
from quantkit.cli.app import handles_errors, recipes_app
from quantkit.cli.options import JsonOpt, RecipeArg, SetOpt


@recipes_app.command("show")
@handles_errors
def recipes_show_command(
    recipe: RecipeArg, settings: SetOpt = None, as_json: JsonOpt = False
) -> None:
    """Show a recipe with every default written out, and its digest."""
    import yaml

    from quantkit.cli.console import Console

    shown = quantkit.load_recipe(recipe, settings or ()).recipe
    content: dict[str, Any] = shown.model_dump(mode="json", by_alias=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    Console(as_json=as_json).show(
        {**content, "digest": shown.digest}, f"{text}# digest: {shown.digest}"
    )
