"""HTML pages on runs: self-contained files that need no network and no file beside them."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dgm.common.formatting import duration, number, percent
from dgm.common.redact import without_password
from dgm.report.charts import NUM_STYLES, Chart, metric_chart, plotly_library
from dgm.report.curve_summary import summarize_curves
from dgm.report.pictures import embed, generated_grids, newest_samples, sample_grids
from dgm.report.read_run import ENERGY, Failure, Run
from dgm.report.studies import denoising_study, exploration_study
from dgm.report.tables import (
    NOTHING,
    Table,
    as_text,
    differing_keys,
    evaluation_tables,
    facts,
    listing,
    table_of_runs,
)

_TEMPLATES = Path(__file__).parent / "templates"
_SMALL = ("lr", "grad_norm", "images_per_s")
_NUM_GRIDS = 5  # sample grids through training, on the page of one run
_PAUSES = {"save": "saving", "sample": "drawing samples", "eval": "measuring"}
_NEIGHBORS = "generated images nearest to training images (below them: by features, by pixels)"


def make_page(title: str, runs: list[Run], failures: Sequence[Failure]) -> str:
    """Return the page on a run, or on several side by side."""
    if len(runs) == 1 and not failures:
        charts = curves(runs)
        return render(
            "run.html.j2", title, charts, run=run_sections(runs[0], _NUM_GRIDS),
            observations=observations(runs), curves=charts,
        )  # fmt: skip
    compared = compare_runs(runs, failures)
    return render("runs.html.j2", title, compared["curves"], compared=compared)


def render(template: str, title: str, charts: dict[str, Any], **content: Any) -> str:
    """Return a page; `charts` is what `curves` returned."""
    script = _read("page.js")
    library = plotly_library() if charts["groups"] else None
    scripts = f"'sha256-{_sha256(script)}'" + (f" 'sha256-{library.sha256}'" if library else "")
    # A second line of defense: injected markup could neither load nor run anything. Plotly needs
    # inline styles to draw, and blob: to export charts as images.
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}"
    )
    page = _environment().get_template(template).render(
        title=title, policy=policy, css=Markup(_read("page.css")), script=Markup(script),
        library=library, **content,
    )  # fmt: skip
    # An ASCII page does not depend on the encoding in which it is written or read.
    return page.encode("ascii", "xmlcharrefreplace").decode() + "\n"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Pages are shared, so passwords in addresses are removed.
        finalize=lambda v: v if isinstance(v, Markup) else without_password(str(v)),
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


@lru_cache
def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="ascii")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def compare_runs(
    runs: list[Run], failures: Sequence[Failure] = (), pictures: bool = True
) -> dict[str, Any]:
    """Return the parts of a page on several runs side by side."""
    chosen = choose_drawn(runs)
    note = ""
    if len(chosen) < len(runs):
        families = len({run.family for run in runs})
        note = (
            f"Of {len(runs)} runs the {len(chosen)} with the lowest final loss are drawn"
            f"{' (of each family)' * (families > 1)}."
        )
    return {
        "count": _count(runs, failures),
        "observations": observations(runs),
        "results": table_of_runs(runs) if runs else None,
        "failures": _failure_table(failures),
        "drawn": note,
        "curves": curves(chosen),
        "samples": newest_samples(chosen) if pictures else [],
        "runs": [run_sections(run, 0) for run in runs],
    }


def choose_drawn(runs: list[Run]) -> list[Run]:
    """Return the runs whose curves are drawn: of each family those with the lowest final loss."""

    def final(run: Run) -> tuple[bool, float]:
        values = run.curve(run.losses[0]).values if run.losses else []
        return not values, values[-1] if values else 0.0

    rank: dict[str, int] = {}
    for family in dict.fromkeys(run.family for run in runs):
        own = sorted((run for run in runs if run.family == family), key=final)
        rank.update({run.name: k for k, run in enumerate(own)})
    chosen = {run.name for run in sorted(runs, key=lambda run: rank[run.name])[:NUM_STYLES]}
    return [run for run in runs if run.name in chosen]


def observations(runs: list[Run]) -> list[str]:
    """Return sentences on the runs' curves, and on the limits of comparing them."""
    sentences = summarize_curves(runs)
    families = {run.family for run in runs}
    keys = [k for k in differing_keys(runs) if len(families) == 1 and k.split(".")[0] in families]
    if sentences and keys:
        sentences.append(
            f"The runs differ in {', '.join(keys)}: their losses may not measure the same."
        )
    return sentences


def _count(runs: list[Run], failures: Sequence[Failure]) -> str:
    states = ", ".join(f"{n} {state}" for state, n in Counter(run.state for run in runs).items())
    failed = f"; {len(failures)} listed as failed or without a checkpoint" if failures else ""
    word = "run" if len(runs) == 1 else "runs"
    return f"{len(runs)} {word}" + (f": {states}" if runs else " to read") + failed + "."


def _failure_table(failures: Sequence[Failure]) -> Table | None:
    if not failures:
        return None
    rows: list[list[Any]] = [[f.name, f.reason, f.error or None] for f in failures]
    return listing("Runs that failed or have no checkpoint", ["run", "how", "last error"], rows)


def curves(runs: list[Run]) -> dict[str, Any]:
    """Return the charts of all metrics in groups: losses by family, evaluation, and small ones."""
    silent = [run.name for run in runs if not run.lines]
    note = "Nothing was logged yet" + (f" by {', '.join(silent)}" if len(runs) > 1 else "") + "."
    styled = list(enumerate(runs))
    families = list(dict.fromkeys(run.family for run in runs))
    groups = []
    for family in families:
        own = [(style, run) for style, run in styled if run.family == family]
        title = f"{family}: losses" if len(families) > 1 else ""
        groups.append((title, _charts(own, ("train/",), False, len(runs) > 1)))
    groups.append(("", _charts(styled, ("eval/",), False, len(runs) > 1)))
    groups.append(("", _charts(styled, ("train/", "time/"), True, len(runs) > 1)))
    return {"note": note if silent else "", "groups": [group for group in groups if group[1]]}


def _charts(
    styled: list[tuple[int, Run]], prefixes: tuple[str, ...], small: bool, named: bool
) -> list[Chart]:
    """Return a chart for each metric with one of the prefixes, losses first."""
    keys = dict.fromkeys(
        key
        for _, run in styled
        for key in run.keys
        if key.startswith(prefixes) and (key.split("/")[-1] in _SMALL) == small
    )
    return [
        metric_chart(
            key, {run.name: (style, run.curve(key)) for style, run in styled}, small, named
        )
        for key in sorted(keys, key=lambda key: not key.split("/")[-1].startswith("loss"))
    ]


def run_sections(run: Run, num_grids: int) -> dict[str, Any]:
    """Return the content of a page on a run, without curves; `num_grids` sample grids."""
    commands, command_notes = _commands(run)
    sheets = sorted(run.folder.glob("neighbours-*.png"))
    environment = [(k, _joined(value)) for k, value in run.environment.items() if k != "command"]
    return {
        "name": run.name,
        "state": run.state,
        "summary": _summary(run),
        "notes": run.notes,
        "samples": sample_grids(run, num_grids),
        "generated": generated_grids(run),
        "evaluation": evaluation_tables(run.evaluation, "Measured by launch/evaluate.py"),
        "neighbors": [embed(path, f"{path.name}: {_NEIGHBORS}", run.name) for path in sheets],
        "exploration": exploration_study(run),
        "denoising": denoising_study(run),
        "cost": _cost(run),
        "commands": commands,
        "command_notes": command_notes,
        "starts": _starts(run),
        "environment": facts("At the last start", environment) if environment else None,
        "differences": _differences(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
    }


def _summary(run: Run) -> Table:
    total = run.total_images
    source, shards = run.config.get("data.source"), run.config.get("data.shards")
    rows: list[tuple[str, object]] = [
        ("family", run.family),
        # For shards that were not built from the source, their own name is shown.
        ("data", f"shards {shards}" if source is None and shards is not None else as_text(source)),
        ("images seen", f"{run.images_seen:,}" + (f" of {total:,}" if total else "")),
        ("state", run.state),
        ("newest checkpoint", "none" if run.saved is None else f"{run.saved:,} images seen"),
    ]
    if "engine" in run.environment:
        devices = _joined(run.environment.get("devices", []))
        rows.append(("ran on", f"{run.environment['engine']}: {devices}"))
    return facts("Summary", rows)


def _cost(run: Run) -> Table | None:
    if not run.lines:
        return None
    rows: list[tuple[str, object]] = [("images", f"{run.images_seen:,}")]
    wall, spent = run.wall_s(), run.spent_s()
    if wall is not None:
        rows.append(("wall time until the last log", duration(wall)))
    for name, word in _PAUSES.items():
        if name in spent and wall:
            text = f"{duration(spent[name])} ({percent(spent[name] / wall)})"
            rows.append((f"of which {word}", text))
    speed = run.median("time/images_per_s")
    if speed is not None:
        rows.append(("images/s, median of the logs", number(speed)))
    training = None if wall is None else wall - sum(spent.get(name, 0.0) for name in _PAUSES)
    if "data_wait" in spent and training and training > 0:
        waiting = percent(spent["data_wait"] / training)
        rows.append(("fraction of training spent waiting for data", waiting))
    memory = run.curve("memory/peak_gib").values
    if memory:
        rows.append(("peak memory of the first process", f"{max(memory):.2f} GiB"))
    for key, covered in ENERGY.items():
        if (energy := run.energy_kwh(key)) is not None:
            count = sum(key in line for line in run.lines)
            partly = f", read in {count} of {len(run.lines)} logs" * (count < len(run.lines))
            rows.append((f"energy of the {covered}", f"{number(energy)} kWh{partly}"))
    return facts("Resources used", rows)


def _commands(run: Run) -> tuple[str, list[str]]:
    """Return the commands that reproduce the run, with notes; empty if they are unknown."""
    command, commit = run.environment.get("command"), run.environment.get("git_commit")
    if not isinstance(command, list) or not command:
        return "", []
    lines = [shlex.join(["git", "checkout", str(commit)])] if commit else []
    lines.append(shlex.join(_launch_command(run.environment, [str(word) for word in command])))
    notes, nodes = [], _num_nodes(run.environment)
    if nodes > 1:
        notes.append(
            f"On each of the {nodes} nodes, with the address of the first node for HOST_OF_NODE_0 "
            f"and the rank of the node, 0 to {nodes - 1}, for N."
        )
    if run.environment.get("git_dirty"):
        notes.append("The code had uncommitted changes: the result may differ.")
    elif not commit:
        notes.append("The commit of the code is unknown.")
    return "\n".join(lines), notes


def _launch_command(environment: dict[str, Any], command: list[str]) -> list[str]:
    """Return the command that started a script, from the engine's name in `environment.json`."""
    script, *options = command
    engine, processes = str(environment.get("engine", "")), environment.get("world_size", 1)
    zero = re.search(r"ZeRO-(\d)", engine)
    if zero is None and processes == 1:
        return ["python", f"launch/{script}", *options]
    nodes = _num_nodes(environment)
    ddp = "ddp_nodes" if nodes > 1 else "ddp"
    file = f"zero{zero[1]}" + "_offload" * ("on the CPU" in engine) if zero else ddp
    config = ["--config_file", f"launch/configs/accelerate/{file}.yaml"]
    count = ["--num_processes", str(processes)]
    if nodes > 1:
        count += ["--num_machines", str(nodes), "--main_process_ip", "HOST_OF_NODE_0"]
        count += ["--main_process_port", "29500", "--machine_rank", "N"]
    return ["accelerate", "launch", *config, *count, f"launch/{script}", *options]


def _num_nodes(environment: dict[str, Any]) -> int:
    nodes = environment.get("num_nodes")
    return nodes if isinstance(nodes, int) and not isinstance(nodes, bool) else 1


def _starts(run: Run) -> Table | None:
    if not run.starts:
        return None
    heads = ["time", "at images seen", "engine", "devices", "commit", "changed settings"]
    return listing("Each start of the run", heads, [_start(start) for start in run.starts])


def _start(start: dict[str, Any]) -> list[Any]:
    seen, changed = start.get("images_seen"), start.get("changed")
    commit = str(start.get("git_commit") or NOTHING)[:10]
    pairs = changed.items() if isinstance(changed, dict) else ()
    return [
        start.get("time"),
        number(seen) if isinstance(seen, int) else None,
        start.get("engine"),
        _joined(start.get("devices", NOTHING)),
        commit + " and changes" * bool(start.get("git_dirty")),
        "; ".join(f"{key}: {_joined(values, ' to ')}" for key, values in pairs) or None,
    ]


def _differences(run: Run) -> Table | None:
    rows: list[list[Any]] = [
        [key, as_text(value), as_text(run.defaults[key])]
        for key, value in run.config.items()
        if key in run.defaults and as_text(value) != as_text(run.defaults[key])
    ]
    caption = f"Differs from the defaults of {run.family}"
    return listing(caption, ["key", "value", "default"], rows) if rows else None


def _joined(value: object, separator: str = ", ") -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(inner)}" for name, inner in value.items())
    return separator.join(map(as_text, value)) if isinstance(value, list) else as_text(value)
