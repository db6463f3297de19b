"""Where an artifact loses quality, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from rich.table import Table

from quantkit.reports.terminal import listing
from quantkit.results.localization import Localization
from quantkit.results.metrics import KL_MEAN

HEADERS = ("place", "relative error", "KL divergence with it in BF16")
_MOST = 5


def losses_table(name: str, result: Localization) -> Table:
    """The places of one artifact with the largest errors."""
    table = listing(HEADERS, list(rows(result)))
    table.title = f"{name}: KL divergence {result.kl_divergence:.5f} on {result.rows} rows"
    table.title_justify = "left"
    return table


def losses_markdown(name: str, result: Localization) -> list[str]:
    """The table and the summary as lines of Markdown."""
    lines = [f"## Where {name} loses quality", ""]
    lines += [f"KL divergence on {result.rows} rows: {result.kl_divergence:.5f}", ""]
    lines += ["| " + " | ".join(HEADERS) + " |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result)]
    text, *code = summary(result).split("\n", 1)
    lines += ["", text] if text else []
    return lines + (["", "```yaml", code[0], "```"] if code else [])


def summary(result: Localization) -> str:
    """What the patch costs and is predicted to reach, with its YAML; or why there is none.

    Empty where no gate failed.
    """
    patch = result.patch
    if patch is None:
        return f"No patch: {result.no_patch}." if result.no_patch else ""
    kl = patch.predicted[KL_MEAN]
    verdict = ", with which every gate on likelihood would pass"
    if patch.fixes is None:
        mixture = any(".experts." in name for place in result.places for name in place.modules)
        what = "answers or experts" if mixture else "answers"
        verdict = f"; the gates that failed are on {what}, which can't be predicted"
    weights = "1 weight" if len(patch.changes) == 1 else f"{len(patch.changes)} weights"
    head = (
        f"Patch ({patch.recipe['name']} {patch.recipe['version']}): {weights}, "
        f"{patch.added_bytes / 1e6:+,.2f} MB (to {patch.nbytes / 1e6:,.1f} MB), "
        f"predicted KL divergence {kl:.5f}{verdict}:"
    )
    overrides = [change for change in patch.changes if "ignore" not in change]
    ignored = [change["ignore"] for change in patch.changes if "ignore" in change]
    added = {"overrides": overrides} if overrides else {"ignore": ignored}
    return f"{head}\n{yaml.safe_dump(added, sort_keys=False, width=100).rstrip()}"


def rows(result: Localization) -> Iterator[tuple[str, str, str]]:
    """The five places with the largest errors, as cells under HEADERS."""
    for place in result.places[:_MOST]:
        kl = "–" if place.kl_divergence is None else f"{place.kl_divergence:.5f}"
        yield _name(place.modules), f"{place.error:.2e}", kl


def _name(modules: tuple[str, ...]) -> str:
    """``model.layers.0.self_attn.k_proj, q_proj``."""
    first, *others = modules
    return ", ".join([first, *(module.rpartition(".")[2] for module in others)])
