"""
Draws a part of a picture anew: the source with the part cut out, and a few results, side by side.

    python examples/inpainting.py photo.png --class volcano --model var-d16
"""

import argparse

from PIL import Image
from transformers import pipeline

import hf_argen  # noqa: F401 - registers the pipelines

GREY = (128, 128, 128)


def middle(size: tuple[int, int]) -> Image.Image:
    """A mask that has the middle of the picture drawn anew."""
    width, height = size
    mask = Image.new("L", size, 0)
    mask.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("image", help="the picture")
    parser.add_argument("--mask", help="white where the picture is drawn anew; default: the middle")
    parser.add_argument("--class", dest="label", help="what to draw there, for a class-conditional model")
    parser.add_argument("--prompt", help="what to draw there, for a text-conditional model")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder of a model; default: the one that comes with the package")
    parser.add_argument("--out", default="filled.png")
    options = parser.parse_args()

    draw = pipeline("image-inpainting", options.model)
    picture = Image.open(options.image).convert("RGB")
    mask = Image.open(options.mask).convert("L") if options.mask else middle(picture.size)
    results = draw(
        [picture],  # a list in, a list out, also for one result
        mask,
        prompt=options.prompt,
        class_labels=options.label,
        num_images_per_prompt=options.count,
        seed=options.seed,
        do_sample=True,
    )[0]
    results = [results] if isinstance(results, dict) else results

    size = results[0]["image"].size
    cut = Image.composite(Image.new("RGB", picture.size, GREY), picture, mask).resize(size)
    strip = Image.new("RGB", (size[0] * (len(results) + 1), size[1]))
    for i, shown in enumerate([cut, *(result["image"] for result in results)]):
        strip.paste(shown, (i * size[0], 0))
    strip.save(options.out)
    print(f"{options.out}: the source and {len(results)} results")


if __name__ == "__main__":
    main()
