"""What the page says of one run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from dgm.report.denoising import show_denoised
from dgm.report.exploring import show_explored
from dgm.report.markup import Html, element, join
from dgm.report.numbers import duration, number, percent
from dgm.report.pictures import embed, show_generated, show_samples
from dgm.report.read import ENERGY, Run
from dgm.report.tables import as_text, evaluation_tables, facts, listing

_SHEET = "generated images nearest to training images, above these, by features and by pixels"
_PAUSES = {"save": "saving", "sample": "drawing samples", "eval": "measuring"}


def what_was_run(run: Run) -> Html:
    """Say what was run, on what, and how far it is."""
    total = run.total_images
    seen = f"{run.images_seen:,}" + (f" of {total:,}" if total else "")
    saved = "none" if run.saved is None else f"{run.saved:,} images seen"
    rows: list[tuple[str, object]] = [
        ("family", run.family),
        ("data", _data(run)),
        ("images seen", seen),
        ("state", run.state),
        ("newest checkpoint", saved),
    ]
    if "engine" in run.environment:
        devices = _listed(run.environment.get("devices", []))
        rows.append(("ran on", f"{run.environment['engine']}: {devices}"))
    notes = [element("p", note, class_="note") for note in run.notes]
    return join(facts("What was run", rows), *notes)


def _data(run: Run) -> str:
    """Return the source of a run's images, or the shards where they were not built of it."""
    source, shards = run.config.get("data.source"), run.config.get("data.shards")
    return f"shards {shards}" if source is None and shards is not None else as_text(source)


def parts_of(run: Run, grids: int, heading: str = "h2") -> Html:
    """Show all but the curves: `grids` sheets of samples, figures, cost, and how it was made."""

    def section(title: str, content: Html | None) -> Html | None:
        return None if content is None else join(element(heading, title), content)

    return join(
        section("Samples through training", show_samples(run.folder, run.name, grids)),
        section("Made with the trained run", show_generated(run.folder, run.name)),
        section("Evaluation", _evaluation(run)),
        section("Explored", show_explored(run.folder, run.name)),
        section("Denoised test images", show_denoised(run.folder, run.name)),
        section("Cost", cost(run)),
        section("Run it again", again(run)),
        section("Starts", _starts(run)),
        section("Environment", _environment(run)),
        section("Configuration", _configuration(run)),
    )


def cost(run: Run) -> Html | None:
    """Say what the run took; None before its first log."""
    if not run.lines:
        return None
    rows: list[tuple[str, object]] = [("images", f"{run.images_seen:,}")]
    wall, spent = run.wall_s(), run.spent_s()
    if wall is not None:
        rows.append(("wall time until the last log", duration(wall)))
    for name, word in _PAUSES.items():
        if name in spent and wall:
            rows.append(
                (f"of it {word}", f"{duration(spent[name])} ({percent(spent[name] / wall)})")
            )
    speed = run.median("time/images_per_s")
    if speed is not None:
        rows.append(("images/s, median of the logs", number(speed)))
    training = None if wall is None else wall - sum(spent.get(name, 0.0) for name in _PAUSES)
    if "data_wait" in spent and training and training > 0:
        rows.append(
            ("share of training spent waiting for data", percent(spent["data_wait"] / training))
        )
    memory = run.curve("memory/peak_gib").values
    if memory:
        rows.append(("peak memory of the first process", f"{max(memory):.2f} GiB"))
    for key, covered in ENERGY.items():
        if (energy := run.energy_kwh(key)) is not None:
            read = sum(key in line for line in run.lines)
            share = "" if read == len(run.lines) else f", read in {read} of {len(run.lines)} logs"
            rows.append((f"energy of the {covered}", f"{number(energy)} kWh{share}"))
    return facts("What it took", rows)


def again(run: Run) -> Html | None:
    """Give the commands that run it anew; None where its command is not known."""
    command, commit = run.environment.get("command"), run.environment.get("git_commit")
    if not isinstance(command, list) or not command:
        return None
    lines = [shlex.join(["git", "checkout", str(commit)])] if commit else []
    lines.append(shlex.join(_started(run.environment, [str(word) for word in command])))
    dirty = "The code had changes that are in no commit: the result may differ."
    unknown = "It is not known of which commit the code was."
    note = dirty if run.environment.get("git_dirty") else None if commit else unknown
    nodes = _nodes(run.environment)
    where = (
        f"On each of the {nodes} nodes, with the first one's address for HOST_OF_NODE_0 and its "
        f"own number, 0 to {nodes - 1}, for N."
    )
    notes = [where] * (nodes > 1) + ([] if note is None else [note])
    return join(
        element("pre", element("code", "\n".join(lines))),
        *(element("p", text, class_="note") for text in notes),
    )


def _started(environment: dict[str, Any], command: list[str]) -> list[str]:
    """Write how the script was started, by the engine's name in `environment.json`."""
    script, *options = command
    engine, processes = str(environment.get("engine", "")), environment.get("world_size", 1)
    zero = re.search(r"ZeRO-(\d)", engine)
    if zero is None and processes == 1:
        return ["python", f"launch/{script}", *options]
    nodes = _nodes(environment)
    ddp = "ddp_nodes" if nodes > 1 else "ddp"
    file = f"zero{zero[1]}" + "_offload" * ("on the CPU" in engine) if zero else ddp
    config = ["--config_file", f"launch/configs/accelerate/{file}.yaml"]
    count = ["--num_processes", str(processes)]
    if nodes > 1:
        count += ["--num_machines", str(nodes), "--main_process_ip", "HOST_OF_NODE_0"]
        count += ["--main_process_port", "29500", "--machine_rank", "N"]
    return ["accelerate", "launch", *config, *count, f"launch/{script}", *options]


def _nodes(environment: dict[str, Any]) -> int:
    nodes = environment.get("num_nodes")
    return nodes if isinstance(nodes, int) and not isinstance(nodes, bool) else 1


def _evaluation(run: Run) -> Html | None:
    parts = evaluation_tables(run.evaluation, "Measured by launch/evaluate.py")
    sheets = sorted(run.folder.glob("neighbours-*.png"))
    parts += [embed(path, f"{path.name}: {_SHEET}", run.name) for path in sheets]
    return element("div", *parts, class_="grids") if parts else None


def _starts(run: Run) -> Html | None:
    if not run.starts:
        return None
    rows = [[*_start(start)] for start in run.starts]
    heads = ["time", "at images seen", "engine", "devices", "commit", "changed settings"]
    return listing("Each start of the run", heads, rows)


def _start(start: dict[str, Any]) -> Iterator[object]:
    yield start.get("time", "–")
    seen = start.get("images_seen")
    yield number(seen) if isinstance(seen, int) else "–"
    yield start.get("engine", "–")
    yield _listed(start.get("devices", "–"))
    yield str(start.get("git_commit") or "–")[:10] + " and changes" * bool(start.get("git_dirty"))
    changed = start.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else ()
    yield "; ".join(f"{key}: {_change(values)}" for key, values in pairs) or "–"


def _change(values: object) -> str:
    return " to ".join(map(as_text, values)) if isinstance(values, list) else as_text(values)


def _environment(run: Run) -> Html | None:
    rows = [(name, _listed(value)) for name, value in run.environment.items() if name != "command"]
    return facts("On what the last start ran", rows) if rows else None


def _configuration(run: Run) -> Html:
    differs: list[list[object]] = [
        [key, as_text(value), as_text(run.defaults[key])]
        for key, value in run.config.items()
        if key in run.defaults and as_text(value) != as_text(run.defaults[key])
    ]
    nested = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    whole = element(
        "details", element("summary", "All of it"), element("pre", element("code", nested))
    )
    heads = ["key", "value", "default"]
    own = listing(f"Differs from the defaults of {run.family}", heads, differs) if differs else None
    return join(own, whole)


def _listed(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(inner)}" for name, inner in value.items())
    return ", ".join(map(as_text, value)) if isinstance(value, list) else as_text(value)
