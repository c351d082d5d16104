"""Draw what a DRNet does: sample images under the resolution chosen for them, and accuracy against cost."""

import csv
import io
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
from PIL import Image

from utils.cli import Parser, UserError, check_file, read_file, read_json, run, whole_file
from utils.images import Unreadable, open_image, rgb

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import SubFigure

COLUMNS = 8
MOST_ROWS, LARGEST = 32, 2**13  # resolutions in a picture, pixels of one


def read_results(folder: Path) -> dict:
    """What eval.py wrote into `folder` as results.json.

    Raises:
        UserError: it is not there, or is something else.
    """
    path, remedy = folder / "results.json", f"run eval.py with --output_dir {folder} first"
    results = read_json(path, remedy)
    try:
        rows = results["resolutions"]
        integers = [results["images"], *(row[key] for row in rows for key in ("resolution", "images"))]
        fits = {type(number) for number in integers} == {int} and min(integers) >= 0 and 0 < results["images"] < 2**31
        fits = fits and 0 < len(rows) <= MOST_ROWS and all(0 < row["resolution"] <= LARGEST for row in rows)
        costs = [results["mean_gmacs"], *(row["gmacs"] for row in rows)]
        fits = fits and 0 <= results["acc"] <= 100 and all(0 < cost < 1e6 for cost in costs)
        fits = fits and results["force_resolution"] in (None, *(row["resolution"] for row in rows))
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path} is not as DRNet's eval.py writes it; {remedy}")
    return results


def read_predictions(folder: Path) -> list[tuple[str, int, int, int]]:
    """Path, label, prediction and resolution of every image, of the file predictions.csv beside results.json.

    Raises:
        UserError: it is not there, or is something else.
    """
    path = folder / "predictions.csv"
    remedy = f"run eval.py with --output_dir {folder} --predictions {path} first"
    text = read_file(path, remedy).decode(errors="surrogateescape")
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [(row["path"], *(int(row[key]) for key in ("label", "prediction", "resolution"))) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not as DRNet's eval.py writes it; {remedy}") from error


def read_image(path: str, size: int) -> Image.Image:
    """The image file, as RGB of size x size pixels.

    Raises:
        UserError: it cannot be read.
    """
    remedy = "run show.py where eval.py was run, on the same images"
    try:
        with open_image(check_file(path, remedy)) as image:
            return rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    except Unreadable as error:
        raise UserError(f"{path} cannot be read as an image; {remedy}") from error


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
    dynamic, fixed = read_results(args.results), [read_results(folder) for folder in args.fixed]
    for folder, result in zip(args.fixed, fixed):
        if result["force_resolution"] is None:
            raise UserError(f"{folder} is not of one resolution; give folders of eval.py --force_resolution")
    predictions = read_predictions(args.results)

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


def draw_images(figure: SubFigure, dynamic: dict, predictions: list[tuple[str, int, int, int]]) -> None:
    """Some images of each resolution, in a row."""
    rows = dynamic["resolutions"]
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    figure.suptitle("Images under the resolution chosen for them (red: classified wrongly)")
    for line, row in zip(axes, rows):
        chosen = [item for item in predictions if item[3] == row["resolution"]]
        # Evenly over the folder, so that all classes have a chance.
        picked = [chosen[k * len(chosen) // COLUMNS] for k in range(COLUMNS)] if len(chosen) >= COLUMNS else chosen
        for axis in line:
            axis.set_axis_off()
        for axis, (path, label, prediction, resolution) in zip(line, picked):
            axis.imshow(read_image(path, resolution), interpolation="nearest")
            axis.set_title(str(prediction), fontsize=9, pad=2, color="black" if prediction == label else "red")
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
