"""Draw throughput against published accuracy from the measurements in benchmarks/results.

    python benchmarks/throughput_accuracy.py

Accuracies are ImageNet-1K top-1 as published: RepLKNet arXiv:2203.06717, ConvNeXt arXiv:2201.03545, Swin
arXiv:2103.14030. They were not measured here; images per second were.
"""

import csv
from pathlib import Path

from replknet.plotting._figures import COLOURS, new_figure, save, style

RESULTS = Path(__file__).parent / "results"
MEASURED = RESULTS / "2026-11-24_h100_models.csv"
FIGURE = RESULTS / "2026-11-24_h100_throughput_accuracy.png"

# Network in the measurements and its input size: label, family, published top-1 by training data.
PUBLISHED = {
    ("replknet_31b", 224): ("RepLKNet-31B", 0, {"ImageNet-1K": 83.5, "ImageNet-22K": 85.2}),
    ("convnext_base", 224): ("ConvNeXt-B", 1, {"ImageNet-1K": 83.8, "ImageNet-22K": 85.8}),
    ("swin_base_patch4_window7_224", 224): ("Swin-B", 2, {"ImageNet-1K": 83.5, "ImageNet-22K": 85.2}),
    ("replknet_31l", 384): ("RepLKNet-31L, 384", 0, {"ImageNet-22K": 86.6}),
    ("convnext_large", 384): ("ConvNeXt-L, 384", 1, {"ImageNet-22K": 87.5}),
    ("replknet_xl", 320): ("RepLKNet-XL, 320", 0, {"MegData-73M": 87.8}),
}
MARKERS = {"ImageNet-1K": "o", "ImageNet-22K": "s", "MegData-73M": "^"}


def throughputs() -> dict[tuple[str, int], float]:
    """Images per second of inference in batches, by network and input size."""
    lines = [line for line in MEASURED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found: dict[tuple[str, int], float] = {}
    for row in csv.DictReader(lines):
        if row["mode"] == "inference" and int(row["batch"]) > 1:
            found.setdefault((row["model"], int(row["height"])), float(row["images_per_second"]))
    return found


def main() -> None:
    """Write the figure beside the measurements."""
    measured = throughputs()
    with style():
        figure = new_figure(5.4, 3.4)
        axes = figure.subplots()
        for key, (label, colour, scores) in PUBLISHED.items():
            for data, score in scores.items():
                axes.plot(measured[key], score, MARKERS[data], color=COLOURS[colour], markersize=6)
                axes.annotate(label, (measured[key], score), xytext=(6, 4), textcoords="offset points", fontsize=7.5)
        for data, marker in MARKERS.items():
            label = f"{data} only" if data == "ImageNet-1K" else f"pretrained on {data}"
            axes.plot([], [], marker, color="0.4", label=label)
        axes.set_xscale("log")
        axes.set_xlim(1200, 16000)
        ticks = (1500, 2000, 3000, 5000, 7000, 10000)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("images/s, measured: one H100, bfloat16, batch 64 (224) or 32")
        axes.set_ylabel("ImageNet-1K top-1, %, published")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, loc="upper right")
        save(figure, FIGURE)


if __name__ == "__main__":
    main()
