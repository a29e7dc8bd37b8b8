"""Draws a row of a trace: a page with a slider over its steps, an animated image, and charts; or a run's metrics.

    python launch/generate.py --checkpoint=DIR --prompt="The list object" --trace=trace.jsonl
    python launch/visualize.py --trace=trace.jsonl --output=pictures
    python launch/visualize.py --workdir=DIR --fields=loss,validation_loss --output=pictures

The folder gets page.html, which needs no other file and no network; animation.gif, text that resolves block by block;
heatmap.svg, which step decided each position; steps.svg, how many steps each block took; and experts.svg, which experts
the denoiser used, if it has any. Of a workdir it is curves.svg, the fields of its metrics.jsonl over the steps.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import sys

from absl import flags

from twotower_jax import command_line

_TRACE = command_line.DEFINE_path("trace", None, "Trace file, as launch/generate.py --trace writes it.")
_OUTPUT = command_line.DEFINE_path(
    "output", None, "Folder for the pictures; made if it does not exist.", required=True, local=True
)
_ROW = flags.DEFINE_integer("row", 0, "Which row of the trace, counted from 0.")
_WORKDIR = command_line.DEFINE_path("workdir", None, "Workdir of a run, in place of a trace.")
_FIELDS = flags.DEFINE_list("fields", [], "Of --workdir: numbers of metrics.jsonl, several with commas.")

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.outputs import output_folder, write_file
from twotower_jax.visualize.charts import expert_map, heat_map, steps_chart
from twotower_jax.visualize.curves import draw_curves, read_curves
from twotower_jax.visualize.page import page
from twotower_jax.visualize.story import TraceError, read_story


def main() -> None:
    if (_TRACE.value is None) == (_WORKDIR.value is None):
        raise ValueError("give either --trace=FILE or --workdir=DIR")
    files = _of_trace() if _WORKDIR.value is None else _of_workdir()
    with output_folder(_OUTPUT.value) as folder:
        for name, content in files.items():
            write_file(folder / name, content)
            print(f"{folder / name}: {len(content):,} bytes", file=sys.stderr)


def _of_workdir() -> dict[str, bytes]:
    command_line.refuse_given([_ROW], "with --workdir")
    if not _FIELDS.value:
        raise ValueError("--workdir needs --fields=NAME, several with commas")
    curves = read_curves(_WORKDIR.value, _FIELDS.value)
    return {"curves.svg": draw_curves(", ".join(curves), curves).encode()}


def _of_trace() -> dict[str, bytes]:
    command_line.refuse_given([_FIELDS], "with --trace")
    try:
        from twotower_jax.visualize.animation import animation
    except ImportError:
        raise ValueError("animations need Pillow: pip install 'twotower_jax[visual]', or pip install pillow") from None
    try:
        story = read_story(_TRACE.value, _ROW.value)
    except TraceError as error:
        command_line.fail(str(error), command_line.BROKEN_CHECKPOINT)
    files = {
        "page.html": page(story).encode(),
        "animation.gif": animation(story),
        "heatmap.svg": heat_map(story).encode(),
        "steps.svg": steps_chart(story).encode(),
    }
    if story.load:
        files["experts.svg"] = expert_map(story).encode()
    return files


if __name__ == "__main__":
    command_line.run(main)
