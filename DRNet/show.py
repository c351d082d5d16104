"""Draw what a DRNet does: sample images under the resolution chosen for them, and accuracy against cost."""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
from PIL import Image

from utils.cli import Parser, UserError, run, whole_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import SubFigure

COLUMNS = 8


def read(folder: Path, name: str) -> Path:
    """The file `name` that eval.py wrote into `folder`.

    Raises:
        UserError: it is not there.
    """
    if not (folder / name).is_file():
        raise UserError(f"no {folder / name}; run eval.py with --output_dir {folder} first")
    return folder / name


def main() -> None:
    parser = Parser(prog="show.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        help="output_dir of eval.py, with predictions.csv in it (--predictions <output_dir>/predictions.csv)",
    )
    parser.add_argument(
        "--fixed",
        type=Path,
        nargs="*",
        default=[],
        help="output_dir of each eval.py --force_resolution (default: none)",
    )
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    dynamic = json.loads(read(args.results, "results.json").read_text())
    fixed = [json.loads(read(folder, "results.json").read_text()) for folder in args.fixed]
    with read(args.results, "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))

    rows = dynamic["resolutions"]
    figure = plt.figure(figsize=(13, 1.3 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(8, 5))
    draw_images(left, dynamic, predictions)
    draw_costs(right, dynamic, fixed)
    with whole_file(args.output) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"{compare(dynamic, fixed)}\nwrote {args.output}")


def compare(dynamic: dict, fixed: list[dict]) -> str:
    """A table of accuracy and cost, the fixed resolutions first, and how far the dynamic network is above their line.

    The line joins neighbouring resolutions: what a mix of the two, drawn by lot, would have at that cost.
    """
    points = sorted((result["mean_gmacs"], result["acc"], f"{result['force_resolution']} px") for result in fixed)
    rows = [*points, (dynamic["mean_gmacs"], dynamic["acc"], "dynamic")]
    largest = max(row["gmacs"] for row in dynamic["resolutions"])
    lines = ["resolution  top-1 %   mean GMACs   of the largest"]
    lines += [f"{name:>10} {acc:8.3f} {cost:12.4f} {cost / largest:16.1%}" for cost, acc, name in rows]
    if points:
        above = dynamic["acc"] - np.interp(dynamic["mean_gmacs"], *zip(*[point[:2] for point in points]))
        lines.append(f"dynamic against the fixed resolutions at its cost: {above:+.2f} points")
    return "\n".join(lines)


def draw_images(figure: SubFigure, dynamic: dict, predictions: list[dict]) -> None:
    """Some images of each resolution, in a row."""
    rows = dynamic["resolutions"]
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    figure.suptitle("Images under the resolution chosen for them (red: classified wrongly)")
    for line, row in zip(axes, rows):
        chosen = [item for item in predictions if int(item["resolution"]) == row["resolution"]]
        # Evenly over the folder, so that all classes have a chance.
        picked = [chosen[k * len(chosen) // COLUMNS] for k in range(COLUMNS)] if len(chosen) >= COLUMNS else chosen
        for axis in line:
            axis.set_axis_off()
        for axis, item in zip(line, picked):
            with Image.open(item["path"]) as image:
                pixels = image.convert("RGB").resize((row["resolution"],) * 2, Image.Resampling.BILINEAR)
            axis.imshow(pixels, interpolation="nearest")
            right_one = item["prediction"] == item["label"]
            axis.set_title(item["prediction"], fontsize=9, pad=2, color="black" if right_one else "red")
        share = row["images"] / dynamic["images"]
        line[0].text(
            -0.15,
            0.5,
            f"{row['resolution']} px\n{share:.0%}",
            transform=line[0].transAxes,
            ha="right",
            va="center",
        )


def draw_costs(figure: SubFigure, dynamic: dict, fixed: list[dict]) -> None:
    """Accuracy against cost, of the dynamic network and of each fixed resolution."""
    axis = figure.subplots()
    sizes = {result["force_resolution"]: result for result in fixed}
    points = sorted((result["mean_gmacs"], result["acc"], f"{size} px") for size, result in sizes.items())
    if points:
        axis.plot(*zip(*[point[:2] for point in points]), "o--", color="tab:grey", label="one fixed resolution")
    axis.plot(dynamic["mean_gmacs"], dynamic["acc"], "*", markersize=16, color="tab:red", label="dynamic")
    for x, y, name in points:
        axis.annotate(name, (x, y), xytext=(0, 8), textcoords="offset points", ha="center")
    axis.set(
        xlabel="mean GMACs per image (dynamic: predictor included)",
        ylabel="top-1 accuracy, %",
        title="Accuracy against cost",
    )
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)


if __name__ == "__main__":
    run(main)
