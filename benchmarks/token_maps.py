"""Takes the picture of the README out of the demo's report: patch tokens of both models as colours.

Run `python benchmarks/token_maps.py` after `make demo`.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

STRIP = re.compile(r'<span[^>]*>(?P<label>[^<]+)</span>\s*<img src="data:image/png;base64,(?P<data>[^"]+)"')
LABEL_PX, GAP_PX, MARGIN_PX, NUM_TILES, TILE_PX = 150, 10, 16, 6, 154  # a tile of the report and the gap behind it


def main() -> None:
    """Read the report, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("vitrim-demo/report.html"))
    parser.add_argument("--out", type=Path, default=Path("docs/assets/tokens.png"))
    arguments = parser.parse_args()
    page = arguments.report.read_text(encoding="utf-8")
    strips = [
        (match["label"], Image.open(io.BytesIO(base64.b64decode(match["data"]))).convert("RGBA"))
        for match in STRIP.finditer(page)
    ]
    picture = joined(strips)
    picture.save(arguments.out, optimize=True)
    print(f"{arguments.out}: {picture.size[0]} x {picture.size[1]}, {arguments.out.stat().st_size / 1e3:.0f} kB")


def joined(strips: list[tuple[str, Image.Image]]) -> Image.Image:
    """Set the strips below each other on white, each behind its label."""
    width = min(strips[0][1].width, NUM_TILES * TILE_PX - GAP_PX)
    row = strips[0][1].height + GAP_PX
    size = (LABEL_PX + width + 2 * MARGIN_PX, len(strips) * row - GAP_PX + 2 * MARGIN_PX)
    canvas = Image.new("RGBA", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=24)
    for number, (label, strip) in enumerate(strips):
        top, tiles = MARGIN_PX + number * row, strip.crop((0, 0, width, strip.height))
        canvas.paste(tiles, (MARGIN_PX + LABEL_PX, top), tiles)
        draw.text((MARGIN_PX, top + strip.height / 2), label, fill="#444444", font=font, anchor="lm")
    return canvas.convert("RGB")


if __name__ == "__main__":
    main()
