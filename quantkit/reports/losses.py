"""Where an artifact loses quality, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from rich.table import Table

from quantkit.reports.terminal import listing
from quantkit.results.localization import Localisation

HEADERS = ("place", "relative error", "KL divergence, it alone in BF16")
_MOST = 5


def losses_table(name: str, found: Localisation) -> Table:
    """The worst places of one artifact."""
    table = listing(HEADERS, list(rows(found)))
    table.title = f"{name}: KL divergence {found.kl_divergence:.5f} on {found.rows} rows"
    table.title_justify = "left"
    return table


def losses_markdown(name: str, found: Localisation) -> list[str]:
    """The same as lines of Markdown."""
    lines = [f"## Where {name} loses", ""]
    lines += [f"KL divergence on {found.rows} rows: {found.kl_divergence:.5f}", ""]
    lines += ["| " + " | ".join(HEADERS) + " |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
    text, *code = summary(found).split("\n", 1)
    lines += ["", text] if text else []
    return lines + (["", "```yaml", code[0], "```"] if code else [])


def summary(found: Localisation) -> str:
    """What the patch is, costs and is predicted to reach, and its text; or why there is none."""
    patch = found.patch
    if patch is None:
        return f"No patch: {found.no_patch}." if found.no_patch else ""
    kl = patch.predicted["kl_divergence.mean"]
    verdict = ", by which every gate on likelihood would hold"
    if patch.fixes is None:
        verdict = "; the gates that failed are on answers, which aren't predicted"
    weights = "1 weight" if len(patch.changes) == 1 else f"{len(patch.changes)} weights"
    head = (
        f"Patch ({patch.recipe['name']} {patch.recipe['version']}): {weights}, "
        f"{patch.added_bytes / 1e6:+,.2f} MB (to {patch.nbytes / 1e6:,.1f} MB), "
        f"KL divergence predicted {kl:.5f}{verdict}:"
    )
    overrides = [change for change in patch.changes if "ignore" not in change]
    ignored = [change["ignore"] for change in patch.changes if "ignore" in change]
    said = {"overrides": overrides} if overrides else {"ignore": ignored}
    return f"{head}\n{yaml.safe_dump(said, sort_keys=False, width=100).rstrip()}"


def rows(found: Localisation) -> Iterator[tuple[str, str, str]]:
    """The worst places as cells under HEADERS."""
    for place in found.places[:_MOST]:
        kl = "–" if place.kl_divergence is None else f"{place.kl_divergence:.5f}"
        yield _name(place.modules), f"{place.error:.2e}", kl


def _name(modules: tuple[str, ...]) -> str:
    """``model.layers.0.self_attn.k_proj, q_proj``."""
    first, *others = modules
    return ", ".join([first, *(module.rpartition(".")[2] for module in others)])
