"""The honest table: every scorer on supernets before, early in and after training, against true accuracies.

python -m experiments.ranking_table TABLE.csv initial=RUN early=RUN trained=RUN      # Markdown on standard output

Each RUN is a folder that `kdnas train nas_bench_macro:...` made, and one column of the table; scores of networks with
weights of their own, which no supernet changes, are computed for the first of them alone. A cell is Kendall's tau-b
on canonical networks with its 95 % bootstrap interval over rows; a star says that the score ranks better than every
size control does, by the interval of the difference. Finished columns are kept in `ranking_table.jsonl` beside the
first run, and are not computed again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kdnas import Run
from kdnas.jobs.rank_check import rank_check
from kdnas.ranking.quality import CONTROLS
from kdnas.specs import parse_spec

FROM_WEIGHTS = (
    "rdm",
    "rdm,compare=spearman",
    "rdm,premature=1",
    "cka",
    "loss",
    "loss,loss=alpha_divergence",
    "loss,loss=dist",
    "loss,loss=similarity_preserving",
    "fitted_blocks",
    "accuracy",
    "in_place",
    "in_place,scorer=cka",
    "in_place,scorer=loss",
    "rank_ensemble",
)
FRESH = ("depth", "diswot,semantic=0", "nwot", "synflow", "zen")
PARTS = ("top tenth", "layers", "non_minimal", "macs")


def measure(run: Path, table: Path, names: tuple[str, ...], num_images: int) -> dict[str, Any]:
    """What rank-check finds for these scorers, cut down to what the table shows."""
    began = time.perf_counter()
    scorers = {name: parse_spec("kdnas.scorers", name) for name in names}
    result = rank_check(Run(run), table, scorers=scorers, num_images=num_images)
    groups = result["groups"]
    cells: dict[str, Any] = {}
    for name in (*names, *CONTROLS):
        own = groups["canonical"]["scores"][name]
        cells[name] = {"canonical": own["tau"], "top 10%": own["top 10%"], "regret q50": own["regret q50"]}
        cells[name]["all"] = groups["all"]["scores"][name]["tau"]
        cells[name]["top tenth"] = groups["top tenth"]["scores"][name]["tau"]
        cells[name] |= {
            group: groups[group]["scores"][name]["tau"] for group in groups if group.startswith("non_minimal ")
        }
        cells[name] |= {f"within {kind}": result["within"][kind][name] for kind in result["within"]}
        if name in names:
            cells[name]["beats"] = all(own[f"tau - {control}"][1] > 0 for control in CONTROLS)
    return {"cells": cells, "saved": result["saved"], "seconds": round(time.perf_counter() - began, 1)}


def markdown(columns: dict[str, dict[str, Any]]) -> str:
    """The tables."""
    titles = list(columns)
    last = columns[titles[-1]]["cells"]
    lines = ["| scorer | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 1) + "|"]
    for name in (*FROM_WEIGHTS, *FRESH, *CONTROLS):
        cells = [column["cells"].get(name) for column in columns.values()]
        texts = ["" if c is None else _cell(c["canonical"]) + ("*" if c.get("beats") else "") for c in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    groups = [group for group in last["macs"] if group not in ("beats",)]
    lines += ["", f"The column `{titles[-1]}` by parts of the rows:", ""]
    lines += ["| scorer | " + " | ".join(groups) + " |", "| --- " * (len(groups) + 1) + "|"]
    for name in (*FROM_WEIGHTS, *CONTROLS):
        lines.append(f"| {name} | " + " | ".join(_cell(last[name][g], interval=False) for g in groups) + " |")
    lines += ["", "Of `" + "`, `".join(titles) + "`: " + "; ".join(c["saved"] for c in columns.values()) + "."]
    return "\n".join(lines)


def _cell(value: list[float | None], *, interval: bool = True) -> str:
    middle, low, high = value
    if middle is None:
        return "-"
    if not interval or low is None or high is None:
        return f"{middle:.2f}"
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Measure what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("runs", nargs="+", metavar="COLUMN=RUN")
    parser.add_argument("--num-images", type=int, default=256)
    options = parser.parse_args()
    runs = {title: Path(run) for title, _, run in (text.partition("=") for text in options.runs)}
    finished = next(iter(runs.values())) / "ranking_table.jsonl"
    lines = finished.read_text().splitlines() if finished.exists() else []
    done = {(record["title"], record["part"]): record for record in map(json.loads, lines)}
    for place, (title, run) in enumerate(runs.items()):
        for part, names in (("weights", FROM_WEIGHTS), ("fresh", FRESH if place == 0 else ())):
            if names and (title, part) not in done:
                done[title, part] = {
                    "title": title,
                    "part": part,
                    **measure(run, options.table, names, options.num_images),
                }
                with finished.open("a") as handle:
                    handle.write(json.dumps(done[title, part]) + "\n")
    columns = {}
    for title in runs:
        parts = [record for (of, _), record in done.items() if of == title]
        cells = {name: cell for record in parts for name, cell in record["cells"].items()}
        columns[title] = {"cells": cells, "saved": done[title, "weights"]["saved"]}
    print(markdown(columns))


if __name__ == "__main__":
    main()
