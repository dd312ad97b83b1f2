"""
What guidance does: the same seeds with growing guidance scales, one row of pictures for each scale.

    python examples/guidance_sheet.py "golden retriever" --model var-d16 --scales 0 1.5 4
"""

import argparse

from PIL import Image, ImageDraw, ImageFont
from transformers import AutoConfig, pipeline

from hf_argen.assets import default_model

LABEL = 60  # width of the column that names the scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("what", help="a prompt, or the name of a class")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.5, 4.0])
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder of a model; default: the one that comes with the package")
    parser.add_argument("--out", default="guidance.png")
    options = parser.parse_args()

    model = options.model or default_model()
    kind = AutoConfig.from_pretrained(model).condition_type
    draw = pipeline("text-to-image" if kind == "text" else "class-to-image", str(model))
    rows = []
    for scale in options.scales:
        drawn = draw(
            [options.what],
            num_images_per_prompt=options.count,
            seed=options.seed,
            guidance_scale=scale,
            do_sample=True,
        )[0]
        rows.append([one["image"] for one in (drawn if isinstance(drawn, list) else [drawn])])

    width, height = rows[0][0].size
    sheet = Image.new("RGB", (LABEL + options.count * width, len(rows) * height), "white")
    draw_on = ImageDraw.Draw(sheet)
    for i, (scale, pictures) in enumerate(zip(options.scales, rows, strict=True)):
        place = (LABEL // 2, i * height + height // 2)
        draw_on.text(place, f"{scale:g}", fill="black", font=ImageFont.load_default(16), anchor="mm")
        for j, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL + j * width, i * height))
    sheet.save(options.out)
    print(f"{options.out}: {len(rows)} scales of guidance, {options.count} seeds")


if __name__ == "__main__":
    main()
