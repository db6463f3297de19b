"""Every tool of every job can be run: its script, its environment and its recipe are there."""

from __future__ import annotations

import pytest

from benchmarks.environments import ENVIRONMENTS
from benchmarks.peers.jobs import JOBS, SCRIPTS, TITLES, Tool, ours, peer_names
from quantkit.recipes.recipe import load_recipe, shipped_recipes
from tests.helpers.cli import assert_parses

TOOLS = [pytest.param(job, tool, id=f"{job} {tool.name}") for job in JOBS for tool in JOBS[job]]
PLACE = {"feed": "/feed", "out": "/out", "device": "cpu"}


@pytest.mark.parametrize(("job", "tool"), TOOLS)
def test_a_tool_can_be_run(job: str, tool: Tool) -> None:
    command = [part.format(**PLACE) for part in tool.arguments]
    assert tool.environment is None or tool.environment in ENVIRONMENTS
    if job == "idle":
        return
    assert "/out" in command
    if tool.is_ours:
        assert_parses(command)
    if not tool.is_ours:
        assert command[0].startswith(str(SCRIPTS)) and (SCRIPTS / command[0]).is_file()
        assert command[1] == job
    elif job != "merge":
        recipe = command[command.index("quantize") + 1]
        assert recipe in {loaded.recipe.name for loaded in shipped_recipes()}
        load_recipe(recipe, [part for part in command if "=" in part])


def test_jobs_have_titles_and_tools_have_names_of_their_own() -> None:
    assert TITLES.keys() == JOBS.keys()
    for tools in JOBS.values():
        assert len({tool.name for tool in tools}) == len(tools)


def test_every_job_but_idling_compares_us_with_a_peer() -> None:
    for job, tools in JOBS.items():
        if job != "idle":
            assert {tool.is_ours for tool in tools} == {True, False}, job


def test_peers_are_named_once_and_we_are_none() -> None:
    names = peer_names()
    assert len(set(names)) == len(names)
    assert "GPTQModel" in names and not any(name.startswith("quantkit") for name in names)


def test_settings_become_flags() -> None:
    tool = ours("rtn-w4-g128", "quantize.bits=3", name="quantkit, 3 bits")
    assert tool.arguments[-2:] == ("--set", "quantize.bits=3")
    assert tool.is_ours and "--no-cache" in tool.arguments
