"""The same jobs by quantkit and by its peers: time, memory, size of what comes out.

    python -m benchmarks.peers [--jobs JOB...] [--peers PEER...] [--models MODEL...] [--runs N]

Every run is a process of its own, from loading to the saved artifact; one runs at a time, our
tools and the peers' in turn. The operating system measures them: wall time, CPU time of all
processes of a run, resident memory of the largest of them. All tools calibrate on the same token
ids. A tool that fails has a row with its last message.

--work keeps checkpoints and logs, --environments the peers' environments; artifacts are deleted
once they are measured. The table goes to --out and every single run to the .json beside it, after
each run; --resume keeps the runs that this file has and adds the missing ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks import environments, machine
from benchmarks.peers.jobs import JOBS, TITLES, peer_names
from benchmarks.peers.runs import Options, Run, bench, read_runs
from benchmarks.peers.setting import describe_setting
from benchmarks.peers.table import render

MODELS = ("82m", "1.1b")
RESULTS = Path(__file__).resolve().parent.parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.splitlines()[0]
    )
    names = peer_names()
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB")
    parser.add_argument("--peers", nargs="*", default=names, choices=names, metavar="PEER")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--runs", type=int, default=1, help="of every tool; medians are shown")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--work", type=Path, default=Path("reports/bench"))
    parser.add_argument("--environments", type=Path, default=environments.DIRECTORY)
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out.json has")
    parser.add_argument("--list", action="store_true", help="name jobs and tools, run nothing")
    given = vars(parser.parse_args())
    if given.pop("list"):
        for job, tools in JOBS.items():
            print(f"{job}: {TITLES[job]}\n    {'; '.join(tool.name for tool in tools)}")
        return
    resume = given.pop("resume")
    if given["device"] == "auto":
        given["device"] = "cuda" if machine.gpu() else "cpu"
    given["work"] = given["work"].resolve()
    options = Options(**given)
    record = options.out.with_suffix(".json")
    kept = read_runs(record) if resume and record.is_file() else []
    report(options, bench(options, kept))


def report(options: Options, runs: Iterable[Run]) -> None:
    """Write table and JSON anew after every run."""
    setting = describe_setting(options)
    done: list[Run] = []
    for run in runs:
        done.append(run)
        document = {**setting, "runs": [asdict(run) for run in done]}
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.write_text(render(setting, done), encoding="utf-8")


if __name__ == "__main__":
    main()
