"""
A page on which a picture is seen by a pretrained model: mask, reconstruction, attention, features, neighbours.

    python examples/space/app.py --model runs/demo

serves it on this machine alone. As a Space of Hugging Face: the files of this folder, and the variable HF_MIM_MODEL.
"""

import argparse
import functools
import html
import os
import re
import sys
from pathlib import Path

try:
    import gradio as gr
except ImportError:
    sys.exit('Error: the page is made with gradio, which is not installed: pip install "gradio>=6.31,<7"')

from hf_mim.data.images import read_image
from hf_mim.data.scenes import render_scene
from hf_mim.evaluation.viewer import Viewer

# Of an upload: bytes, and pixels once it is unpacked.
MAX_FILE_SIZE, MAX_PIXELS = "10mb", 50_000_000
ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICTURES = ("picture", "masked", "reconstructed", "attention", "colours")
LABELS = {
    "picture": "What the model gets",
    "masked": "What its encoder would see",
    "reconstructed": "What it puts in its place",
    "attention": "Where [CLS] looks",
    "colours": "Patch features as colours",
}


def read_examples(folder: str | None) -> list:
    """The pictures of a folder; without one, scenes that are drawn."""
    if folder is None:
        return [render_scene(index, split="test", image_size=64)[0] for index in range(48)]
    endings = (".jpg", ".jpeg", ".png", ".webp")
    return [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in endings][:500]


def build_page(models: list[str], examples: list) -> gr.Blocks:
    """The page. Besides `models` any name on the Hub may be chosen, and no folder."""

    @functools.lru_cache(maxsize=2)
    def viewer(model: str) -> Viewer:
        if model not in models and not ON_THE_HUB.fullmatch(model):
            raise ValueError(f"{model!r} is no name on the Hub (OWNER/NAME), and none of {', '.join(models)}.")
        loaded = Viewer(model)
        if loaded.num_channels == 3:
            # For other channels there are no examples.
            loaded.add_examples(examples)
        return loaded

    def show(model: str, file: str | None, ratio: float, seed: float):
        if not file:
            return [gr.skip()] * (len(PICTURES) + 2)
        try:
            seen_by = viewer(model.strip())
            picture = read_image(file, seen_by.num_channels, name=Path(file).name, max_image_pixels=MAX_PIXELS)
            view = seen_by.view(picture, mask_ratio=ratio, seed=int(seed))
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        neighbours = [(seen_by.example(row), f"{similarity:.2f}") for row, similarity in view.neighbours]
        return [*(getattr(view, name) for name in PICTURES), neighbours, seen_by.title]

    with gr.Blocks(title="hf_mim", analytics_enabled=False) as page:
        gr.Markdown("# What a masked image model sees")
        with gr.Row():
            with gr.Column(scale=1):
                model = gr.Dropdown(models, value=models[0], allow_custom_value=True, label="Run, or name on the Hub")
                file = gr.File(file_types=["image"], label="Picture", elem_id="picture", height=140)
                # Where training began hides as much as there.
                start = viewer(models[0]).mask_ratio or 0.75
                ratio = gr.Slider(0.05, 0.95, start, step=0.05, label="Share of patches hidden", elem_id="ratio")
                seed = gr.Slider(0, 20, 0, step=1, label="Another mask", elem_id="seed")
                title = gr.Markdown(viewer(models[0]).title)
            with gr.Column(scale=3):
                shown = []
                for names in (PICTURES[:3], PICTURES[3:]):
                    with gr.Row():
                        shown += [
                            gr.Image(label=LABELS[name], elem_id=name, interactive=False, format="png")
                            for name in names
                        ]
                gallery = gr.Gallery(label="Nearest examples", elem_id="neighbours", columns=6, height=180)
        inputs, outputs = [model, file, ratio, seed], [*shown, gallery, title]
        for event in (model.change, file.upload, ratio.change, seed.change):
            event(show, inputs, outputs, show_progress="hidden", trigger_mode="always_last")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description="A page on which a picture is seen by a pretrained model.")
    parser.add_argument("--model", nargs="+", default=[os.environ.get("HF_MIM_MODEL", "runs/demo")])
    parser.add_argument("--examples", help="A folder of pictures to find neighbours among; default: drawn scenes.")
    parser.add_argument("--port", type=int, help="Default: the first that is free from 7860.")
    args = parser.parse_args()
    try:
        page = build_page(args.model, read_examples(args.examples))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    # One picture at a time; without a server name on this machine alone, in a Space where it says.
    page.queue(default_concurrency_limit=1, max_size=32)
    page.launch(server_port=args.port, max_file_size=MAX_FILE_SIZE, show_error=True, footer_links=[])
    return 0


if __name__ == "__main__":
    sys.exit(main())
